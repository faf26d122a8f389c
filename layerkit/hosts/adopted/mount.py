"""Mounting what a runtime has unpacked already, under other owners: META over its own layer folders."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from layerkit.formats.overlay_options import OverlayOptions
from layerkit.hosts.adopted.meta import (
    AdoptedImage,
    FolderPreparation,
    adopt_layers,
    metadata_over_folders,
)
from layerkit.hosts.adopted.unpacked import Unpacked
from layerkit.hosts.mounts import mount as mounter
from layerkit.hosts.mounts.choose import MountOptions, Ways, choose
from layerkit.hosts.mounts.records import UNPACKED
from layerkit.hosts.mounts.spec import MountLayer, MountSpec, meta_layer
from layerkit.idmap import Mapping
from layerkit.linux import userns
from layerkit.linux.probe import Features
from layerkit.metaonly import Namespace
from layerkit.model.errors import UnsupportedHost, UsageError
from layerkit.model.limits import DEFAULT, Limits
from layerkit.model.ports import Progress
from layerkit.store.local import LocalStore
from layerkit.store.metas import Stacking
from layerkit.store.preparation import Rendering


@dataclass(frozen=True, slots=True)
class AdoptReport:
    """What was made to show unpacked layers under a map.

    Attributes:
        name: of the image. runtime: who unpacked it. target: mount point, or the folder that was written.
        stacking: how META lies over the layers. how: whose work the map is.
        map_text: canonical id map, "" for none.
        folders: layers in all, bottom first; data_folders: those that hold data of visible files, top first.
        read_folders: how many were read just now; of the others the index was kept.
        names: entries of the root filesystem. meta_bytes: written on disk for this map.
        seconds: from start to end.
        mount_line: for a ready upper, the command that mounts it.
        warnings: what was left out.
    """

    name: str
    runtime: str
    target: str
    stacking: str
    how: str
    map_text: str
    folders: tuple[str, ...]
    data_folders: tuple[str, ...]
    read_folders: int
    names: int
    meta_bytes: int
    seconds: float
    mount_line: str = ""
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)


def choose_stacking(store: Path, wanted: str = "auto") -> Stacking:
    """Return the way of stacking that this kernel and user can have.

    Raises:
        UsageError: no such way.
        UnsupportedHost: what was asked for, or both, do not work here.
    """
    if wanted not in ("auto", *Stacking):
        raise UsageError(f"--stacking {wanted!r}: want auto, {' or '.join(Stacking)}")
    features = Features(store)
    privileged = features.privileged
    if wanted in ("auto", Stacking.DATA_ONLY) and (
        features.overlay_trusted if privileged else features.overlay_userxattr
    ):
        return Stacking.DATA_ONLY
    if wanted in ("auto", Stacking.CLASSIC) and privileged and features.overlay_classic:
        return Stacking.CLASSIC
    if wanted == Stacking.CLASSIC and not privileged:
        raise UnsupportedHost(
            "the classic stacking for this user", "metacopy=on is for root of the host; leave out --stacking"
        )
    what = "overlay over data-only layers, nor metacopy=on" if wanted == "auto" else f"the stacking {wanted}"
    raise UnsupportedHost(what, "`layerkit doctor` says what this kernel can do; Linux 4.19 as root is the least")


def mount_unpacked(
    unpacked: Unpacked,
    target: Path,
    mapping: Mapping | None,
    store: LocalStore,
    options: MountOptions = MountOptions(),  # noqa: B008
    *,
    limits: Limits = DEFAULT,
    progress: Progress | None = None,
) -> AdoptReport:
    """Mount the layers of ``unpacked`` under ``mapping`` at ``target``; nothing in their folders is written.

    Args:
        unpacked: see :func:`~layerkit.hosts.adopted.sources.find_unpacked`.
        target: an existing folder.
        mapping: the id map; None keeps the owners.
        store: keeps indexes and METAs.
        options: how; the rendering ``fuse`` is for the data-only stacking, and ``data`` means nothing.
        limits: bounds on what is read.
        progress: told of entries.

    Raises:
        NotFound: a layer's folder is not there.
        FolderChanged: one changed since it was read.
        UnmappedId: the map does not cover an owner.
        UnsupportedHost: this host or user cannot mount it so.
    """
    start = time.monotonic()
    way = choose_stacking(store.root, options.stacking)
    ways = choose(store.root, mapping, replace(options, data="objects"))
    if ways.rendering is Rendering.FUSE and way is Stacking.CLASSIC:
        raise UsageError(
            "--rendering fuse: for --stacking data-only; the classic one holds only what a map changes"
        )
    with store.hold():
        image = adopt_layers(store, unpacked.folders, limits=limits, reread=options.reread, progress=progress)
        preparation = FolderPreparation(store, image.diff_ids, way, limits=limits)
        if mapping is not None:
            preparation.check(mapping)
        facts = preparation.facts()
        wanted = None if ways.one_meta else mapping
        known = {entry.key for entry in store.metas()}
        entry = preparation.meta(wanted, ways.rendering, ways.namespace, progress=progress)
        data = _data_folders(image, facts.data_layers, way)
        map_text = mapping.canonical() if mapping else ""
        extents = (mapping.uid.extents, mapping.gid.extents) if mapping and ways.idmap else None
        mounter.mount(
            MountSpec(
                meta=meta_layer(entry, mapping),
                data=tuple(map(MountLayer, data)),
                namespace=ways.namespace,
                target=target,
                idmap=extents,
                upper=options.upper,
                work=options.work,
                read_only=options.upper is None,
                classic=way is Stacking.CLASSIC,
                label={
                    "image": unpacked.name, "manifest": unpacked.digest, "map": map_text, "meta": entry.key,
                    "layers": ",".join(map(str, image.diff_ids)), "backend": UNPACKED, "runtime": unpacked.runtime,
                    "folders": "\n".join(str(layer.folder.path) for layer in image.layers),
                    "diff_ids": ",".join(unpacked.diff_ids), "blobs": ",".join(unpacked.blobs),
                },
            ),
            run=mounter.default_run(store.root),
        )  # fmt: skip
    return AdoptReport(
        name=unpacked.name,
        runtime=unpacked.runtime,
        target=os.fspath(target),
        stacking=way.value,
        how=_how(mapping, ways, entry.key in known),
        map_text=map_text,
        folders=tuple(os.fspath(layer.folder.path) for layer in image.layers),
        data_folders=tuple(map(os.fspath, data)),
        read_folders=sum(layer.read for layer in image.layers),
        names=facts.names,
        meta_bytes=0 if entry.key in known else entry.allocated_bytes,
        seconds=time.monotonic() - start,
        warnings=facts.warnings,
    )


def _data_folders(image: AdoptedImage, with_data: Sequence[str], way: Stacking) -> tuple[Path, ...]:
    # In the classic way what META leaves out shows through, whiteouts included: then every layer counts.
    return image.data(with_data if way is Stacking.DATA_ONLY else [str(d) for d in image.diff_ids])


def _how(mapping: Mapping | None, ways: Ways, known: bool) -> str:
    if mapping is None:
        return "owners as they are"
    if ways.idmap:
        return "the kernel maps the owners of one shared META"
    if ways.one_meta:
        return "one shared META, served under the map"
    return f"a META of its own, {ways.rendering.value}" + (", kept from before" if known else "")


def write_upper(
    unpacked: Unpacked,
    folder: Path,
    mapping: Mapping,
    store: LocalStore,
    *,
    stacking: str = "auto",
    reread: bool = False,
    limits: Limits = DEFAULT,
    progress: Progress | None = None,
) -> AdoptReport:
    """Write into the new folder ``folder`` what mounts ``unpacked`` under ``mapping`` without layerkit.

    ``upper`` holds what the map changes, as stubs, ready to be an overlay's ``upperdir`` with ``work`` beside
    it and ``metacopy=on``. Over data-only layers a stub in an upper needs one beneath it: that is ``meta``.

    Raises:
        UnsupportedHost: not root of the host: ``metacopy=on`` is for it alone.
        UsageError: ``folder`` exists.
        NotFound, FolderChanged, UnmappedId: as :func:`mount_unpacked`.
    """
    from layerkit.linux.durable import whole_folder
    from layerkit.linux.folders.stubs import write_directory

    if not userns.is_privileged():
        raise UnsupportedHost(
            "a ready upper for this user", "metacopy=on is for root of the host; `layerkit mount` works without"
        )
    start = time.monotonic()
    way = choose_stacking(store.root, stacking)
    folder = Path(os.path.abspath(folder))
    with store.hold():
        image = adopt_layers(store, unpacked.folders, limits=limits, reread=reread, progress=progress)
        preparation = FolderPreparation(store, image.diff_ids, way, limits=limits)
        preparation.check(mapping)
        tree, facts = preparation.tree(), preparation.facts()
        data = _data_folders(image, facts.data_layers, way)
        with whole_folder(folder) as root:
            upper = metadata_over_folders(tree, mapping, Namespace.TRUSTED, Stacking.CLASSIC)
            allocated = _write(root, "upper", lambda fd: write_directory(upper, fd, progress=progress).allocated)
            if way is Stacking.DATA_ONLY:
                meta = metadata_over_folders(tree, None, Namespace.TRUSTED, way)
                allocated += _write(root, "meta", lambda fd: write_directory(meta, fd, progress=progress).allocated)
            os.mkdir("work", 0o700, dir_fd=root)
            os.fchmod(root, 0o700)
    return AdoptReport(
        name=unpacked.name,
        runtime=unpacked.runtime,
        target=os.fspath(folder),
        stacking=way.value,
        how="an upper of stubs",
        map_text=mapping.canonical(),
        folders=tuple(os.fspath(layer.folder.path) for layer in image.layers),
        data_folders=tuple(map(os.fspath, data)),
        read_folders=sum(layer.read for layer in image.layers),
        names=facts.names,
        meta_bytes=allocated,
        seconds=time.monotonic() - start,
        mount_line=_mount_line(folder, data, way),
        warnings=facts.warnings,
    )


def _write(root: int, name: str, fill: Any) -> int:
    os.mkdir(name, 0o700, dir_fd=root)
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
    try:
        return int(fill(fd))
    finally:
        os.close(fd)


def _mount_line(folder: Path, data: Sequence[Path], way: Stacking) -> str:
    layers = tuple(map(os.fspath, data))
    lower, below = (layers, ()) if way is Stacking.CLASSIC else ((os.fspath(folder / "meta"),), layers)
    options = OverlayOptions(lower, below, f"{folder}/upper", f"{folder}/work", (("metacopy", "on"),))
    if not options.fits:
        return ""
    return f"mount -t overlay overlay -o '{options}' TARGET"


__all__ = ["AdoptReport", "Rendering", "choose_stacking", "mount_unpacked", "write_upper"]
