"""Mounting what a runtime has unpacked already, under other owners: META over its own layer folders.

The index of each folder and the tree become stubs that name their data. Two ways to stack them:

* *data-only*: ``META::TOP::…::BOTTOM``. Each stub's redirect is its own path. The kernel takes the first data
  layer, from the top, that has a regular file there, and that is the file which the layers together show: had
  a higher layer anything at that path, or cut it off, the lower file would not be visible at all.
* *classic*: ``META:TOP:…:BOTTOM`` with ``metacopy=on``, for kernels from 4.19. The stubs need no redirect, and
  META for a map holds only what the map changes, and the folders above that.

Nothing in the layer folders is written. Their indexes are kept in the store by place and state; a folder whose
names changed since is refused, and one that the runtime removed is told apart from it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from layerkit.formats.overlay_options import OverlayOptions
from layerkit.hosts.adopted.sources import Unpacked
from layerkit.hosts.mounts import mount as mounter
from layerkit.hosts.mounts.records import UNPACKED
from layerkit.hosts.mounts.spec import MountLayer, MountOptions, Ways, choose
from layerkit.idmap import Mapping
from layerkit.idmap import apply as apply_map
from layerkit.linux import userns
from layerkit.linux.folders.reader import LayerFolder, index_layer_folder, read_state
from layerkit.linux.folders.walk import TOP_FOLDER
from layerkit.linux.probe import Features
from layerkit.linux.syscalls import FOLDER, born, closing, opened
from layerkit.metaonly import MetadataLayer, Namespace, metadata_layer
from layerkit.model.digest import Digest
from layerkit.model.errors import InvalidImage, NotFound, StoreError, UnsupportedHost, UsageError, show_path
from layerkit.model.ports import Progress
from layerkit.model.reports import Report
from layerkit.model.strings import Strings
from layerkit.model.tree import Tree
from layerkit.store.local import LocalStore
from layerkit.store.metas import FORMAT_VERSION, Stacking, meta_key
from layerkit.store.preparation import Preparation, Rendering

_FACTS_VERSION = 1


class FolderChanged(StoreError):
    """A layer folder is not what it was when it was read."""


@dataclass(frozen=True, slots=True)
class AdoptedLayer:
    """A layer folder whose index is in the store.

    Attributes:
        folder: where it is.
        diff_id: what the store calls the index: a digest of the folder's place and state, not of a tar.
        read: whether it had to be read just now.
    """

    folder: LayerFolder
    diff_id: Digest
    read: bool


def adopt_layers(
    store: LocalStore, folders: Sequence[LayerFolder], *, reread: bool = False, progress: Progress | None = None
) -> tuple[AdoptedLayer, ...]:
    """Bring the indexes of ``folders`` (bottom first) into ``store``; those that are kept are checked, not read.

    With ``reread`` a folder that changed is accepted and read again; ``progress`` is told of entries.

    Raises:
        NotFound: a folder is not there, or not there any more.
        FolderChanged: names came, went or were renamed in a folder since it was read.
        InvalidImage: a folder that cannot be adopted; the message says why.
    """
    store.limits.check("layers_per_image", len(folders), "layer folders")
    return tuple(_adopt(store, folder, reread, progress) for folder in folders)


def _adopt(store: LocalStore, folder: LayerFolder, reread: bool, progress: Progress | None) -> AdoptedLayer:
    try:
        root = os.open(folder.path, TOP_FOLDER)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(
            f"{folder.path}: the layer {folder.name or 'folder'} is not there (any more); its runtime removes a "
            "layer with the last image that has it: pull the image again, or name another"
        ) from None
    with closing(root):
        identity = _identity(root, folder)
        key = f"folder-{identity.hex}"
        with store.layer_lock(identity):
            kept = _kept(store, root, key, folder, reread)
            if kept is not None:
                return AdoptedLayer(folder, kept, False)
            layer = index_layer_folder(root, marks=folder.marks, limits=store.limits, progress=progress)
            if layer.metacopy is not None:
                raise InvalidImage(
                    f"{folder.path}: {show_path(layer.metacopy)} is metadata that the runtime copied itself "
                    "(overlay.metacopy), with its data in another layer; adopt the image's own layers instead of "
                    "the mapped copy of them"
                )
            diff_id = Digest.of(b"layerkit.folder\0" + identity.hex.encode() + layer.state)
            store.save_index(replace(layer.index, diff_id=diff_id))
            store.put_tree_facts(
                key,
                {
                    "version": _FACTS_VERSION, "path": os.fspath(folder.path), "state": layer.state.decode(),
                    "diff_id": str(diff_id), "read": time.time(),
                },
            )  # fmt: skip
            return AdoptedLayer(folder, diff_id, True)


def _kept(store: LocalStore, root: int, key: str, folder: LayerFolder, reread: bool) -> Digest | None:
    facts = store.tree_facts(key)
    if facts is None or facts.get("version") != _FACTS_VERSION:
        return None
    diff_id = Digest.parse(str(facts["diff_id"]))
    index = store.load_index(diff_id)
    if index is None:
        return None
    now = read_state(root, index)
    if now is not None and now.decode() == facts["state"]:
        return diff_id
    if reread:
        return None
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(str(facts["read"]))))
    raise FolderChanged(
        f"{folder.path}: changed since layerkit read it (at {when}): a layer never changes, so somebody "
        "wrote into it; have the runtime verify or pull the image anew, or accept it with --reread"
    )


def _identity(root: int, folder: LayerFolder) -> Digest:
    """Return a digest that stays for as long as the folder is there, and that no later one at its place has."""
    st = os.fstat(root)
    path = os.path.realpath(f"/proc/self/fd/{root}")
    parts = (path, str(st.st_ino), str(born(root)), folder.marks.value)
    return Digest.of("\0".join(("layerkit.folder-identity", *parts)).encode("utf-8", "surrogateescape"))


class _FolderPreparation(Preparation):
    """Adopted layers on their way to a mount: the tree, its facts, and META over the folders."""

    def __init__(self, store: LocalStore, diff_ids: Sequence[Digest], stacking: Stacking) -> None:
        super().__init__(store, diff_ids, limits=store.limits)
        self.stacking, self.patches = stacking, stacking is Stacking.DATA_ONLY

    def _key(self, tree: Digest, mapping: str, rendering: Rendering, namespace: Namespace) -> str:
        return meta_key(tree, mapping, self.stacking.form(rendering), namespace.value, FORMAT_VERSION)

    def metadata_layer(self, mapping: Mapping | None, namespace: Namespace) -> MetadataLayer:
        """Return META of the folders: all of the tree, or for a map in the classic way what differs."""
        return metadata_over_folders(self.tree(), mapping, namespace, self.stacking)


def metadata_over_folders(
    tree: Tree, mapping: Mapping | None, namespace: Namespace, stacking: Stacking
) -> MetadataLayer:
    """Return the metadata layer of ``tree``, merged from indexes of folders, whose data lies in them by path.

    The tree has container ids; without a map the owners stay, and everything is in the result. ``stacking`` says
    how the result will lie over the folders.

    Raises:
        UnmappedId: an owner outside the map.
        LossyResult: something that the way of stacking cannot show.
    """
    mapped = tree if mapping is None else apply_map(tree, mapping)
    if stacking is Stacking.CLASSIC:
        if mapping is not None:
            mapped = mapped.subset(_changed(tree, mapped))
        return metadata_layer(mapped, namespace, places=Strings.of([b""] * mapped.inodes))
    # By inode the first path of each file that is not empty.
    paths, first, stub = mapped.paths(), mapped.first_name().tolist(), mapped.has_content.tolist()
    places = [b"/" + paths[row] if is_stub else b"" for row, is_stub in zip(first, stub, strict=True)]
    return metadata_layer(mapped, namespace, places=Strings.of(places))


def _changed(old: Tree, new: Tree) -> NDArray[np.bool_]:
    """Return bool (n,): the names whose owner (or ids in xattrs) differ, with all that is above them."""
    sets = np.array([a != b for a, b in zip(old.xattr_sets, new.xattr_sets, strict=True)], np.bool_)
    keep: NDArray[np.bool_] = ((old.uid != new.uid) | (old.gid != new.gid) | sets[old.xattr])[old.inode]
    keep[0] = True
    rows = np.flatnonzero(keep)
    while len(rows):
        above = np.unique(old.parent[rows[rows > 0]])
        rows = np.asarray(above[~keep[above]], np.intp)
        keep[rows] = True
    return keep


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


def _stacking(store: Path, wanted: str) -> Stacking:
    """Return the way of stacking that this kernel and user can have; what was asked for, or both, may not work."""
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
        self.layers = adopt_layers(store, unpacked.folders, reread=options.reread, progress=progress)
        self.diff_ids = [layer.diff_id for layer in self.layers]
        self.ready = _FolderPreparation(store, self.diff_ids, self.way)
        if mapping is not None:
            self.ready.check(mapping)
        self.facts = self.ready.facts()
        # In the classic way what META leaves out shows through, whiteouts included: then every layer counts.
        every = self.way is Stacking.CLASSIC
        used = [each for each in self.layers if every or str(each.diff_id) in self.facts.data_layers]
        self.data = tuple(each.folder.path for each in reversed(used))
        self.folders = tuple(os.fspath(layer.folder.path) for layer in self.layers)

    def report(self, target: Path, how: str, meta_bytes: int, mount_line: str = "") -> AdoptReport:
        return AdoptReport(
            name=self._unpacked.name, runtime=self._unpacked.runtime, target=os.fspath(target),
            stacking=self.way.value, how=how, map_text=self.map_text, folders=self.folders,
            data_folders=tuple(map(os.fspath, self.data)),
            read_folders=sum(layer.read for layer in self.layers), names=self.facts.names,
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
    """Mount the layers of ``unpacked`` under ``mapping`` at the existing folder ``target``.

    Nothing in their folders is written; ``store`` keeps indexes and METAs. Of ``options`` the rendering ``fuse`` is
    for the data-only stacking, and ``data`` means nothing.

    Raises:
        NotFound: a layer's folder is not there.
        FolderChanged: one changed since it was read.
        UnmappedId: the map does not cover an owner.
        UnsupportedHost: this host or user cannot mount it so.
    """
    options = replace(options, data="objects", stacking=_stacking(store.root, options.stacking))
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
        spec = options.spec(target, ways, mapping, entry, map(MountLayer, found.data))
        label = {
            "image": unpacked.name, "manifest": unpacked.digest, "map": found.map_text, "meta": entry.key,
            "layers": ",".join(map(str, found.diff_ids)), "backend": UNPACKED,
            "runtime": unpacked.runtime, "folders": "\n".join(found.folders),
            "diff_ids": ",".join(unpacked.diff_ids), "blobs": ",".join(unpacked.blobs),
        }  # fmt: skip
        spec = replace(spec, classic=found.way is Stacking.CLASSIC, label=label)
        mounter.mount(spec, run=mounter.default_run(store.root))
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
    options = replace(options, stacking=_stacking(store.root, options.stacking))
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
