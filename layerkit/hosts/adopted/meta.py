"""META over layer folders that a runtime unpacked: the index of each, the tree, and stubs that name their data.

Two ways to stack it:

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

from layerkit.idmap import Mapping
from layerkit.idmap import apply as apply_map
from layerkit.linux.folders.reader import LayerFolder, index_layer_folder, read_state
from layerkit.linux.syscalls import FOLDER, born, closing
from layerkit.metaonly import MetadataLayer, Namespace, metadata_layer
from layerkit.model.digest import Digest
from layerkit.model.errors import InvalidImage, NotFound, StoreError, show_path
from layerkit.model.ports import Progress
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


@dataclass(frozen=True, slots=True)
class AdoptedImage:
    """Layer folders as a store knows them, bottom first."""

    layers: tuple[AdoptedLayer, ...]

    @property
    def diff_ids(self) -> tuple[Digest, ...]:
        """Return the names of the indexes, bottom first."""
        return tuple(layer.diff_id for layer in self.layers)

    def data(self, diff_ids: Sequence[str]) -> tuple[Path, ...]:
        """Return the folders of the layers called ``diff_ids``, top first."""
        wanted = set(diff_ids)
        return tuple(layer.folder.path for layer in reversed(self.layers) if str(layer.diff_id) in wanted)


def adopt_layers(
    store: LocalStore, folders: Sequence[LayerFolder], *, reread: bool = False, progress: Progress | None = None
) -> AdoptedImage:
    """Bring the indexes of ``folders`` (bottom first) into ``store``; those that are kept are checked, not read.

    Args:
        store: keeps the indexes.
        folders: the layers.
        reread: accept a folder that changed, and read it again.
        progress: told of entries.

    Raises:
        NotFound: a folder is not there, or not there any more.
        FolderChanged: names came, went or were renamed in a folder since it was read.
        InvalidImage: a folder that cannot be adopted; the message says why.
    """
    store.limits.check("layers_per_image", len(folders), "layer folders")
    return AdoptedImage(tuple(_adopt(store, folder, reread, progress) for folder in folders))


def _adopt(store: LocalStore, folder: LayerFolder, reread: bool, progress: Progress | None) -> AdoptedLayer:
    try:
        root = os.open(folder.path, FOLDER & ~os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(
            f"{folder.path}: the layer {folder.name or 'folder'} is not there (any more); its runtime removes a "
            "layer with the last image that has it: pull the image again, or name another"
        ) from None
    with closing(root):
        identity = folder_identity(root, folder)
        with store.layer_lock(identity):
            kept = _kept(store, root, identity, folder, reread)
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
                _facts_key(identity),
                {
                    "version": _FACTS_VERSION, "path": os.fspath(folder.path), "state": layer.state.decode(),
                    "diff_id": str(diff_id), "read": time.time(),
                },
            )  # fmt: skip
            return AdoptedLayer(folder, diff_id, True)


def _kept(store: LocalStore, root: int, identity: Digest, folder: LayerFolder, reread: bool) -> Digest | None:
    facts = store.tree_facts(_facts_key(identity))
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
    raise FolderChanged(
        f"{folder.path}: changed since layerkit read it (at {_when(facts)}): a layer never changes, so somebody "
        "wrote into it; have the runtime verify or pull the image anew, or accept it with --reread"
    )


def _when(facts: dict[str, object]) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(str(facts["read"]))))


def _facts_key(identity: Digest) -> str:
    return f"folder-{identity.hex}"


def folder_identity(root: int, folder: LayerFolder) -> Digest:
    """Return a digest that stays for as long as the folder is there, and that no later one at its place has."""
    st = os.fstat(root)
    path = os.path.realpath(f"/proc/self/fd/{root}")
    parts = (path, str(st.st_ino), str(born(root)), folder.marks.value)
    return Digest.of("\0".join(("layerkit.folder-identity", *parts)).encode("utf-8", "surrogateescape"))


class FolderPreparation(Preparation):
    """Adopted layers on their way to a mount: the tree, its facts, and META over the folders."""

    def __init__(self, store: LocalStore, diff_ids: Sequence[Digest], stacking: Stacking) -> None:
        """Layers must be in the store, see :func:`adopt_layers`."""
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

    Args:
        tree: with container ids.
        mapping: the id map; None keeps the owners, and everything is in the result.
        namespace: of the stubs' xattrs.
        stacking: how the result will lie over the folders.

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
