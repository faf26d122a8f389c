"""Mounting what a runtime has unpacked already, under other owners: META over its own layer folders."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from layerkit.formats.overlay_options import OverlayOptions
from layerkit.hosts.adopted.meta import FolderPreparation, adopt_layers, metadata_over_folders
from layerkit.hosts.adopted.sources import Unpacked
from layerkit.hosts.mounts import mount as mounter
from layerkit.hosts.mounts.choose import MountOptions, Ways, choose
from layerkit.hosts.mounts.records import UNPACKED
from layerkit.hosts.mounts.spec import MountLayer, MountSpec, meta_layer
from layerkit.idmap import Mapping
from layerkit.linux import userns
from layerkit.linux.probe import Features
from layerkit.linux.syscalls import FOLDER, opened
from layerkit.metaonly import Namespace
from layerkit.model.errors import UnsupportedHost, UsageError
from layerkit.model.ports import Progress
from layerkit.model.reports import Report
from layerkit.store.local import LocalStore
from layerkit.store.metas import Stacking
from layerkit.store.preparation import Rendering


@dataclass(frozen=True, slots=True)
class AdoptReport(Report):
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


def choose_stacking(store: Path, wanted: str = "auto") -> Stacking:
    """Return the way of stacking that this kernel and user can have.

    Raises:
        UnsupportedHost: what was asked for, or both, do not work here.
    """
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


class _Adopted:
    """Layers of a runtime whose indexes are in a store that is held, on their way to a mount or an upper."""

    def __init__(
        self,
        unpacked: Unpacked,
        mapping: Mapping | None,
        store: LocalStore,
        options: MountOptions,
        progress: Progress | None,
    ) -> None:
        """Read what is not known; ``options`` say how META is to lie over the layers, and not ``auto``."""
        self._start, self._unpacked = time.monotonic(), unpacked
        self.way, self.map_text = Stacking(options.stacking), mapping.canonical() if mapping else ""
        self.image = adopt_layers(store, unpacked.folders, reread=options.reread, progress=progress)
        self.ready = FolderPreparation(store, self.image.diff_ids, self.way)
        if mapping is not None:
            self.ready.check(mapping)
        self.facts = self.ready.facts()
        # In the classic way what META leaves out shows through, whiteouts included: then every layer counts.
        every = [str(diff_id) for diff_id in self.image.diff_ids]
        self.data = self.image.data(self.facts.data_layers if self.way is Stacking.DATA_ONLY else every)
        self.folders = tuple(os.fspath(layer.folder.path) for layer in self.image.layers)

    def report(self, target: Path, how: str, meta_bytes: int, mount_line: str = "") -> AdoptReport:
        return AdoptReport(
            name=self._unpacked.name, runtime=self._unpacked.runtime, target=os.fspath(target),
            stacking=self.way.value, how=how, map_text=self.map_text, folders=self.folders,
            data_folders=tuple(map(os.fspath, self.data)),
            read_folders=sum(layer.read for layer in self.image.layers), names=self.facts.names,
            meta_bytes=meta_bytes, seconds=time.monotonic() - self._start, mount_line=mount_line,
            warnings=self.facts.warnings,
        )  # fmt: skip


def mount_unpacked(
    unpacked: Unpacked,
    target: Path,
    mapping: Mapping | None,
    store: LocalStore,
    options: MountOptions = MountOptions(),  # noqa: B008
    *,
    progress: Progress | None = None,
) -> AdoptReport:
    """Mount the layers of ``unpacked`` under ``mapping`` at ``target``; nothing in their folders is written.

    Args:
        unpacked: see :func:`~layerkit.hosts.adopted.sources.find_unpacked`.
        target: an existing folder.
        mapping: the id map; None keeps the owners.
        store: keeps indexes and METAs.
        options: how; the rendering ``fuse`` is for the data-only stacking, and ``data`` means nothing.
        progress: told of entries.

    Raises:
        NotFound: a layer's folder is not there.
        FolderChanged: one changed since it was read.
        UnmappedId: the map does not cover an owner.
        UnsupportedHost: this host or user cannot mount it so.
    """
    options = replace(options, data="objects", stacking=choose_stacking(store.root, options.stacking))
    ways = choose(store.root, mapping, options)
    if ways.rendering is Rendering.FUSE and options.stacking == Stacking.CLASSIC:
        raise UsageError(
            "--rendering fuse: for --stacking data-only; the classic one holds only what a map changes"
        )
    with store.hold():
        found = _Adopted(unpacked, mapping, store, options, progress)
        wanted = None if ways.one_meta else mapping
        known = {entry.key for entry in store.metas()}
        entry = found.ready.meta(wanted, ways.rendering, ways.namespace, progress=progress)
        extents = (mapping.uid.extents, mapping.gid.extents) if mapping and ways.idmap else None
        mounter.mount(
            MountSpec(
                meta=meta_layer(entry, mapping),
                data=tuple(map(MountLayer, found.data)),
                namespace=ways.namespace,
                target=target,
                idmap=extents,
                upper=options.upper,
                work=options.work,
                read_only=options.upper is None,
                classic=found.way is Stacking.CLASSIC,
                label={
                    "image": unpacked.name, "manifest": unpacked.digest, "map": found.map_text, "meta": entry.key,
                    "layers": ",".join(map(str, found.image.diff_ids)), "backend": UNPACKED,
                    "runtime": unpacked.runtime, "folders": "\n".join(found.folders),
                    "diff_ids": ",".join(unpacked.diff_ids), "blobs": ",".join(unpacked.blobs),
                },
            ),
            run=mounter.default_run(store.root),
        )  # fmt: skip
    kept = entry.key in known
    return found.report(target, _how(mapping, ways, kept), 0 if kept else entry.allocated_bytes)


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
    options: MountOptions,
    *,
    progress: Progress | None = None,
) -> AdoptReport:
    """Write into the new folder ``folder`` what mounts ``unpacked`` under ``mapping`` without layerkit.

    ``upper`` holds what the map changes, as stubs, ready to be an overlay's ``upperdir`` with ``work`` beside
    it and ``metacopy=on``. Over data-only layers a stub in an upper needs one beneath it: that is ``meta``.
    Of ``options`` the stacking counts, and whether to read anew.

    Raises:
        UnsupportedHost: not root of the host: ``metacopy=on`` is for it alone.
        UsageError: ``folder`` exists.
        NotFound, FolderChanged, UnmappedId: as :func:`mount_unpacked`.
    """
    from layerkit.linux.durable import whole_folder
    from layerkit.linux.folders.writer import write_directory

    if not userns.is_privileged():
        raise UnsupportedHost(
            "a ready upper for this user", "metacopy=on is for root of the host; `layerkit mount` works without"
        )
    options = replace(options, stacking=choose_stacking(store.root, options.stacking))
    folder, allocated = Path(os.path.abspath(folder)), 0
    with store.hold():
        found = _Adopted(unpacked, mapping, store, options, progress)
        parts: list[tuple[str, Mapping | None, Stacking]] = [("upper", mapping, Stacking.CLASSIC)]
        if found.way is Stacking.DATA_ONLY:
            parts.append(("meta", None, found.way))
        with whole_folder(folder) as root:
            for name, wanted, way in parts:
                layer = metadata_over_folders(found.ready.tree(), wanted, Namespace.TRUSTED, way)
                os.mkdir(name, 0o700, dir_fd=root)
                with opened(name, FOLDER, root) as fd:
                    allocated += write_directory(layer, fd, progress=progress).allocated
            os.mkdir("work", 0o700, dir_fd=root)
            os.fchmod(root, 0o700)
    return found.report(folder, "an upper of stubs", allocated, _mount_line(folder, found.data, found.way))


def _mount_line(folder: Path, data: Sequence[Path], way: Stacking) -> str:
    layers = tuple(map(os.fspath, data))
    lower, below = (layers, ()) if way is Stacking.CLASSIC else ((os.fspath(folder / "meta"),), layers)
    options = OverlayOptions(lower, below, f"{folder}/upper", f"{folder}/work", (("metacopy", "on"),))
    if not options.fits:
        return ""
    return f"mount -t overlay overlay -o '{options}' TARGET"
