"""The Python API: open an image, look at its tree, remap it, mount it.

::

    with layerkit.open_image("oci:images:app") as image:
        mapping = layerkit.mapping(["0:100000:65536"])
        with image.mount("/mnt", mapping):
            ...

What can be done with an open image is in ``image``; what makes images out of images, in ``rewrite``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from layerkit.api.image import Mounted, OpenImage, umount
from layerkit.usecases.settings import MapOptions, Settings, default_store, open_store

if TYPE_CHECKING:
    from layerkit.hosts.adopted.mount import AdoptReport
    from layerkit.idmap import Mapping
    from layerkit.model.ports import ImageSource, Progress


def mapping(
    uid_map: Sequence[str] | None = None,
    gid_map: Sequence[str] | None = None,
    *,
    subuid_name: str | None = None,
    overflow_id: int | None = None,
    squash: bool = False,
) -> Mapping | None:
    """Return the id map that the texts spell, None if there are none.

    The arguments are those of :class:`~layerkit.usecases.settings.MapOptions`, ``("0:100000:65536",)`` for example.

    Raises:
        UsageError: malformed, overlapping or contradictory.
    """
    return MapOptions(tuple(uid_map or ()), tuple(gid_map or ()), subuid_name, overflow_id, squash).mapping()


def open_image(ref: str, *, platform: str | None = None, settings: Settings | None = None) -> OpenImage:
    """Open the image that ``ref`` names; use the result as a context manager, or close it.

    Args:
        ref: ``oci:DIR[:TAG]``, ``oci-archive:FILE[:TAG]``, ``docker-archive:FILE[:NAME]``,
            ``docker://HOST/NAME[:TAG|@DIGEST]``, ``store:NAME``, a bare file or folder, or ``-`` for an archive
            on standard input.
        platform: ``os/arch[/variant]``; None takes this host's.
        settings: store, limits and the rest.

    Raises:
        NotFound: nothing there, or no image of that name or platform.
        InvalidImage: malformed, or not what its digests promise.
    """
    from layerkit.images import reference
    from layerkit.images.open import open_source
    from layerkit.model.descriptor import Platform

    chosen = settings or Settings()
    parsed = reference.with_choice(reference.parse(ref))
    with contextlib.ExitStack() as stack:
        source: ImageSource
        name = ""
        if parsed.transport == "store":
            from layerkit.store.source import StoreSource

            store = stack.enter_context(chosen.open_store(create=False))
            source = StoreSource(store, parsed.name)
            names = store.stored_image(parsed.name).names
            name = parsed.name if parsed.name in names or not names else names[0]
        else:
            source = open_source(parsed, limits=chosen.bounds, registry=chosen.registry)
        stack.callback(source.close)
        image = source.image(Platform.parse(platform) if platform else None)
        return OpenImage(name or _store_name(parsed.path, image.name), source, image, chosen, stack.pop_all())


def _store_name(path: str, name: str) -> str:
    """Return what an image called ``name`` at ``path`` is to be called in the store."""
    if ":" in name or "/" in name:
        return name
    # A bare tag says too little: every second archive has an image called "latest".
    file = "stdin" if path == "-" else os.path.basename(os.path.abspath(path))
    stem = file
    for suffix in (".gz", ".zst", ".tgz", ".tzst", ".tar"):
        stem = stem.removesuffix(suffix)
    stem = stem or "image"
    return f"{stem}:{name}" if name else stem


def mount_unpacked(
    ref: str,
    target: str | Path,
    mapping: Mapping | None = None,
    *,
    stacking: str = "auto",
    rendering: str | None = None,
    own_meta: bool = False,
    upper: Path | None = None,
    work: Path | None = None,
    reread: bool = False,
    store: Path | None = None,
    progress: Progress | None = None,
) -> AdoptReport:
    """Mount layers as a runtime has unpacked them under ``mapping`` at ``target``; :func:`umount` ends it.

    ``ref`` is ``containers-storage:NAME``, ``containerd:[ROOT@NAMESPACE]NAME``, ``docker-storage:NAME`` or
    ``folders:UPPER:...:LOWEST``. See :class:`~layerkit.hosts.mounts.choose.MountOptions` for the options.

    Raises:
        NotFound: no such image, or a layer of it is gone.
        StoreError: a layer's folder changed since it was read.
        UnsupportedHost: this host or user cannot mount it so.
    """
    from layerkit.hosts.adopted import mount as adopt
    from layerkit.hosts.adopted.sources import find_unpacked
    from layerkit.hosts.mounts.choose import MountOptions

    options = MountOptions(rendering, own_meta=own_meta, upper=upper, work=work, stacking=stacking, reread=reread)
    settings = Settings(store)
    with settings.open_store() as held:
        return adopt.mount_unpacked(
            find_unpacked(ref), Path(target), mapping, held, options, limits=settings.bounds, progress=progress
        )


def collect_garbage(store: Path | None = None, *, dry_run: bool = False) -> dict[str, object]:
    """Free what no image, mount or bundle uses of ``store`` (None: the default one); return what was freed."""
    from layerkit.usecases import collect_garbage as use_case

    with open_store(store) as held:
        report = use_case.collect_garbage(held, dry_run=dry_run)
    return {"removed": list(report.removed), "freed_bytes": report.freed_bytes}


def mounts(*, store: Path | None = None) -> list[dict[str, str]]:
    """Return the mounts made over ``store``: target, image, manifest digest, map, and layers that got lost.

    ``lost`` names the layer folders of another runtime that it removed under the mount, one in a line: files of
    theirs that nobody has open cannot be opened any more. ``server`` is ``killed`` where metadata is served
    (rendering ``fuse``) and nobody does any more.
    """
    from layerkit.hosts.mounts import mount as mounter

    run = mounter.default_run(store or default_store())
    unserved = mounter.unserved(run)
    return [
        {
            "target": record.target,
            **{k: record.label.get(k, "") for k in ("image", "manifest", "map")},
            "lost": "\n".join(folder for folder in record.folders if not os.path.isdir(folder)),
            "server": "killed" if record in unserved else "",
        }
        for record in mounter.active(run)
    ]


__all__ = [
    "Mounted", "OpenImage", "Settings", "collect_garbage", "default_store", "mapping", "mount_unpacked", "mounts",
    "open_image", "open_store", "umount",
]  # fmt: skip
