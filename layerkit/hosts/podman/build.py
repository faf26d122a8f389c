"""TODO."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from layerkit.formats.meta.fuse_tree import TREE_FILE
from layerkit.hosts.podman.layers import StorageLayer, tree_key
from layerkit.hosts.podman.mount_options import parse_shift, shifted_back
from layerkit.metaonly import OPAQUE, YES, Namespace

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from layerkit.model.index import Index
    from layerkit.model.limits import Limits
    from layerkit.store.local import LocalStore


def build_tree(store_root: Path, layers: Sequence[StorageLayer], namespace: Namespace) -> Path:
    """Make the META of ``layers`` (top first, all fixed) in the store unless it is there; return its file.

    Raises:
        LayerkitError: a folder that cannot be adopted, or a disk that refuses.
    """
    from layerkit.formats.meta.fuse import write_tree
    from layerkit.hosts.adopted.meta import Stacking, metadata_over_folders
    from layerkit.hosts.podman.marks import marks_in, write_marks
    from layerkit.model import limits as bounds
    from layerkit.model.trees.merge import merge
    from layerkit.store.local import LocalStore

    limits = bounds.from_environment()
    key = tree_key(layers, namespace)
    with LocalStore.open(store_root, limits=limits) as store, store.hold(), store.meta_lock(key):
        kept = store.meta(key)
        if kept is not None:
            return kept.path / TREE_FILE
        diff_ids, indexes = read_indexes(store, layers, limits)
        tree = merge(indexes, limits=limits)
        meta = metadata_over_folders(tree, None, namespace, Stacking.DATA_ONLY)
        paths = [os.fspath(layer.path) for layer in layers]
        with store.begin_meta(key) as writer:
            marks = list(map(marks_in, layers, reversed(indexes)))
            below: tuple[int, ...] | None = None
            if any(removed or opaque for removed, opaque in marks):
                writer.root.mkdir()
                below = write_marks(writer.root, marks, tree, namespace)
            with (writer.path / TREE_FILE).open("xb") as file:
                write_tree(meta, file, {"marks_below": below})
            info: dict[str, Any] = {
                "tree": f"sha256:{key}", "map": "", "rendering": "fuse", "namespace": namespace,
                "names": len(tree), "folders": paths, "identities": [layer.identity for layer in layers],
                "diff_ids": diff_ids,
            }  # fmt: skip
            return writer.commit(info).path / TREE_FILE


def read_indexes(
    store: LocalStore, layers: Sequence[StorageLayer], limits: Limits
) -> tuple[list[str], list[Index]]:
    """Return the names and the indexes of ``layers`` (top first), bottom first, read and kept where they are not.

    Raises:
        LayerkitError: a folder that cannot be adopted.
    """
    from layerkit.hosts.adopted.meta import adopt_layers
    from layerkit.linux.folders.layer import LayerFolder, Marks

    folders = [LayerFolder(layer.path, Marks.AUFS, layer.path.parent.name) for layer in reversed(layers)]
    # podman itself may touch a layer (to compare it, it mounts it writable): then it is read again.
    image = adopt_layers(store, folders, limits=limits, reread=True)
    indexes = [store.load_index(diff_id) for diff_id in image.diff_ids]
    return [str(diff_id) for diff_id in image.diff_ids], [index for index in indexes if index is not None]


def write_view(layer: StorageLayer, namespace: Namespace, out: BinaryIO) -> None:
    """Write to ``out`` what a container's writable folder holds at this moment, with the owners of an image.

    The result stands for the folder as a layer: deletions are in it, and its files' bytes are to be read from the
    folder by path. Owners are mapped back; those that the map never gives out become 65534, but for 0, which is
    what podman itself makes.

    Raises:
        LayerkitError: the folder cannot be read as a layer.
    """
    from dataclasses import replace

    import numpy as np

    from layerkit.formats.meta.fuse import write_tree
    from layerkit.hosts.adopted.meta import Stacking, metadata_over_folders
    from layerkit.idmap import apply as apply_map
    from layerkit.linux.folders.layer import Marks, index_layer_folder
    from layerkit.model import limits as bounds
    from layerkit.model.entry import Kind
    from layerkit.model.trees.merge import merge

    limits = bounds.from_environment()
    index = index_layer_folder(layer.path, marks=Marks.OVERLAY, limits=limits).index
    index = apply_map(index, shifted_back(parse_shift(layer.shifted)))
    removed, cut = (
        set(index.path.take(np.flatnonzero(index.kind == k)).tolist()) for k in (Kind.WHITEOUT, Kind.OPAQUE)
    )
    # A merge would act on deletions. As fifos they come through it, and get their kind back behind it.
    kind = index.kind.copy()
    kind[kind == Kind.WHITEOUT] = Kind.FIFO
    tree = merge([_rows(replace(index, kind=kind), kind != Kind.OPAQUE)], limits=limits)
    meta = metadata_over_folders(tree, None, namespace, Stacking.DATA_ONLY)
    tree = meta.tree
    mode, xattr, sets = tree.mode.copy(), tree.xattr.copy(), list(tree.xattr_sets)
    opaque = (namespace.xattr(OPAQUE), YES)
    for row, path in enumerate(tree.paths()):
        inode = int(tree.inode[row])
        if path in removed:
            mode[inode] = Kind.CHAR << 12
        elif path in cut:
            sets.append(tuple(sorted((*sets[int(xattr[inode])], opaque))))
            xattr[inode] = len(sets) - 1
    write_tree(replace(meta, tree=replace(tree, mode=mode, xattr=xattr, xattr_sets=tuple(sets))), out)


def _rows(index: Index, keep: NDArray[np.bool_]) -> Index:
    """Return an index with the rows ``keep`` only."""
    from dataclasses import replace

    import numpy as np

    rows = np.flatnonzero(keep)
    columns = (
        "kind", "perm", "uid", "gid", "mtime", "mtime_ns", "size", "major", "minor", "link", "xattr", "offset",
        "sha256", "sparse",
    )  # fmt: skip
    return replace(index, path=index.path.take(rows), **{name: getattr(index, name)[rows] for name in columns})
