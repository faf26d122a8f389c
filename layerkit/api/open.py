"""The Python API: open an image, look at its tree, remap it, mount it.

::

    with layerkit.open_image("oci:images:app") as image:
        mapping = layerkit.mapping(["0:100000:65536"])
        with image.mount("/mnt", mapping):
            ...

What can be done with an open image is in ``opened``; what makes images out of images, in ``rewrites``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from layerkit.api.image import Mounted, OpenImage, umount
from layerkit.model import limits as bounds
from layerkit.model.errors import UsageError
from layerkit.usecases.collect_garbage import collect_garbage
from layerkit.usecases.settings import Settings, default_store, open_store, store_at

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

    Args:
        uid_map: ``C:H:N`` texts (container id, host id, count), each may hold several with commas.
        gid_map: the same for groups; None takes the uid map.
        subuid_name: take the map from /etc/subuid and /etc/subgid instead.
        overflow_id: host id for owners outside the map; None makes them an error.
        squash: allow several container ids on one host id.

    Raises:
        UsageError: malformed, overlapping or contradictory.
    """
    if not uid_map and not gid_map and subuid_name is None:
        if overflow_id is not None or squash:
            raise UsageError("--overflow-id and --squash mean something only with a map; add --uid-map C:H:N")
        return None
    from layerkit.idmap import IdMap, Mapping

    if subuid_name is not None:
        if uid_map or gid_map:
            raise UsageError(
                "--subuid-name takes the whole map from /etc/subuid; leave --uid-map and --gid-map out"
            )
        from layerkit.linux.subids import subid_map

        return Mapping(subid_map(subuid_name, "uid"), subid_map(subuid_name, "gid"), overflow_id)
    if not uid_map:
        raise UsageError("--gid-map without --uid-map: give the users' map too")
    uid = IdMap.parse(uid_map, what="--uid-map", squash=squash)
    gid = IdMap.parse(gid_map, what="--gid-map", squash=squash) if gid_map else uid
    return Mapping(uid, gid, overflow_id)


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
    from layerkit.model.descriptor import Platform

    chosen = settings or Settings()
    limits = chosen.limits or bounds.from_environment()
    parsed = reference.with_choice(reference.parse(ref))
    with contextlib.ExitStack() as stack:
        source: ImageSource
        name = ""
        if parsed.transport == "store":
            from layerkit.store.source import StoreSource

            store = stack.enter_context(store_at(chosen.store_path, limits, create=False))
            source = StoreSource(store, parsed.name)
            names = store.stored_image(parsed.name).names
            name = parsed.name if parsed.name in names or not names else names[0]
        else:
            source = reference.open_source(parsed, limits=limits, registry=chosen.registry)
        stack.callback(source.close)
        image = source.image(Platform.parse(platform) if platform else None)
        return OpenImage(
            name or _store_name(parsed.path, image.name), source, image, chosen, limits, stack.pop_all()
        )


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
    rendering: str = "auto",
    own_meta: bool = False,
    upper: Path | None = None,
    work: Path | None = None,
    reread: bool = False,
    store: Path | None = None,
    progress: Progress | None = None,
) -> AdoptReport:
    """Mount layers as a runtime has unpacked them under ``mapping`` at ``target``; :func:`umount` ends it.

    Args:
        ref: ``containers-storage:NAME``, ``containerd:[ROOT@NAMESPACE]NAME``, ``docker-storage:NAME`` or
            ``folders:UPPER:...:LOWEST``.
        target: an existing folder.
        mapping: the id map; None keeps the owners.
        stacking: ``auto``, ``data-only`` or ``classic``.
        rendering: ``auto``, ``erofs``, ``directory`` or ``fuse``.
        own_meta: write META for this map even where an idmapped mount of the shared one would do.
        upper: makes the mount writable.
        work: overlayfs's own folder beside ``upper``.
        reread: accept folders that changed since they were read.
        store: the local store; None is :func:`default_store`.
        progress: told of entries.

    Raises:
        NotFound: no such image, or a layer of it is gone.
        StoreError: a layer's folder changed since it was read.
        UnsupportedHost: this host or user cannot mount it so.
    """
    from layerkit.hosts.adopted import mount as adopt
    from layerkit.hosts.adopted.sources import find_unpacked

    limits = bounds.from_environment()
    with store_at(store or default_store(), limits) as held:
        return adopt.mount_unpacked(
            find_unpacked(ref), Path(target), mapping, held, stacking=stacking, rendering=rendering,
            own_meta=own_meta, upper=upper, work=work, reread=reread, limits=limits, progress=progress,
        )  # fmt: skip


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
