"""What the mount program makes of podman's layers, in a process of its own: METAs over them, views of containers.

With a mount program podman unpacks whiteouts as ``.wh.`` files, which mean nothing to the kernel: its overlay of
such layers would show both the ``.wh.`` files and what they delete. A few small folders between the layers, the
*marks*, put that right, so that a mount without a map, a build or a commit needs no server: below each layer one
that deletes in its name (a whiteout acts on lower layers alone), and on top one that hides the ``.wh.`` files, in
folders that look like those they cover.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from layerkit.formats.meta.fuse_tree import TREE_FILE, write_tree
from layerkit.hosts.adopted.mount import adopt_layers, metadata_over_folders
from layerkit.hosts.podman.layers import (
    TOP,
    StorageLayer,
    folder_key,
    parse_shift,
    shift_text,
    shifted_back,
    tree_key,
)
from layerkit.idmap import Mapping
from layerkit.idmap import apply as apply_map
from layerkit.linux import configuration
from layerkit.linux.folders.reader import LayerFolder, Marks, index_layer_folder
from layerkit.linux.folders.writer import write_directory
from layerkit.metaonly import OPAQUE, WHITEOUT_DEVICE, WHITEOUT_MODE, YES, MetadataLayer, Namespace
from layerkit.model.entry import OPAQUE_NAME, WHITEOUT_PREFIX, Entry, Kind
from layerkit.model.index import Index
from layerkit.model.tree import Tree
from layerkit.model.trees.merge import merge
from layerkit.store.local import LocalStore
from layerkit.store.metas import Stacking

Deleted = tuple[list[bytes], list[bytes]]
"""What podman's files in a layer delete: (paths in lower layers, folders whose lower content goes)."""


def build_meta(
    store_root: Path, layers: Sequence[StorageLayer], namespace: Namespace, mapping: Mapping | None = None
) -> None:
    """Make the META of ``layers`` (top first, all fixed) in the store, made too if missing, unless it is there.

    Without a mapping it is a tree to serve under every map, and marks; else a folder of stubs for this map.

    Raises:
        LayerkitError: a folder that cannot be adopted, an owner outside the map, or a disk that refuses.
    """
    limits = configuration.limits()
    tree_name = tree_key(layers, namespace)
    key = tree_name if mapping is None else folder_key(layers, namespace, mapping)
    with LocalStore.open(store_root, limits=limits) as store, store.hold(), store.meta_lock(key):
        if store.meta(key) is not None:
            return
        folders = [LayerFolder(layer.path, Marks.AUFS, layer.path.parent.name) for layer in reversed(layers)]
        # podman itself may touch a layer (to compare it, it mounts it writable): then it is read again.
        diff_ids = [layer.diff_id for layer in adopt_layers(store, folders, reread=True)]
        indexes = [index for index in map(store.load_index, diff_ids) if index is not None]
        tree = merge(indexes, limits=limits)
        shift = "" if mapping is None else shift_text(mapping)
        meta = metadata_over_folders(tree, mapping if shift else None, namespace, Stacking.DATA_ONLY)
        with store.begin_meta(key) as writer:
            if mapping is None:
                marks = list(map(_deleted_by, layers, reversed(indexes)))
                below = _write_marks(writer.root, marks, meta)
                with (writer.path / TREE_FILE).open("xb") as file:
                    write_tree(meta, file, {"marks_below": below})
            else:
                writer.root.mkdir()
                write_directory(meta, writer.root)
            writer.commit(
                {
                    "tree": f"sha256:{tree_name}", "map": shift, "namespace": namespace, "names": len(tree),
                    "rendering": "fuse" if mapping is None else "directory",
                    "folders": [os.fspath(layer.path) for layer in layers],
                    "identities": [layer.identity for layer in layers],
                    "diff_ids": list(map(str, diff_ids)),
                }
            )  # fmt: skip


def write_view(layer: StorageLayer, namespace: Namespace, out: BinaryIO) -> None:
    """Write to ``out`` what a container's writable folder holds at this moment, with the owners of an image.

    The result stands for the folder as a layer: deletions are in it, and its files' bytes are to be read from the
    folder by path. Owners are mapped back; those that the map never gives out become 65534, but for 0, which is
    what podman itself makes.

    Raises:
        LayerkitError: the folder cannot be read as a layer.
    """
    limits = configuration.limits()
    index = index_layer_folder(layer.path, marks=Marks.OVERLAY, limits=limits).index
    removed, cut, entries = set[bytes](), set[bytes](), list[Entry]()
    for entry in apply_map(index, shifted_back(parse_shift(layer.shifted))).entries():
        # A merge would act on deletions. As fifos they come through it, and get their kind back behind it.
        if entry.kind is Kind.WHITEOUT:
            removed.add(entry.path)
        elif entry.kind is Kind.OPAQUE:
            cut.add(entry.path)
            continue
        entries.append(entry._replace(kind=Kind.FIFO) if entry.kind is Kind.WHITEOUT else entry)
    merged = merge([Index.of(entries, index.diff_id, index.tar_size)], limits=limits)
    meta = metadata_over_folders(merged, None, namespace, Stacking.DATA_ONLY)
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
    out.flush()


# Marks


def _deleted_by(layer: StorageLayer, index: Index) -> Deleted:
    base = os.fsencode(layer.path)
    removed, opaque = (
        index.path.take(np.flatnonzero(index.kind == kind)).tolist() for kind in (Kind.WHITEOUT, Kind.OPAQUE)
    )
    return (
        [path for path in removed if os.path.lexists(os.path.join(base, _mark(path)))],
        [path for path in opaque if os.path.lexists(os.path.join(base, path, OPAQUE_NAME))],
    )


def _mark(path: bytes) -> bytes:
    folder, _, name = path.rpartition(b"/")
    return os.path.join(folder, WHITEOUT_PREFIX + name)


def _write_marks(root: Path, marks: Sequence[Deleted], meta: MetadataLayer) -> tuple[int, ...] | None:
    """Return the places of the layers (top first) that got a folder of marks below them, written into ``root``.

    Where nothing is to be written ``root`` is not made, and None returned. ``meta``: what the layers show together.
    """
    tree, namespace = meta.tree, meta.namespace
    if not any(removed or opaque for removed, opaque in marks):
        return None
    root.mkdir()
    below = []
    for place, (removed, opaque) in enumerate(marks[:-1]):
        if removed or opaque:
            below.append(place)
            folder = os.fsencode(root / str(place))
            for path in removed:
                _whiteout(os.path.join(folder, path))
            for path in opaque:
                os.makedirs(os.path.join(folder, path), exist_ok=True)
                os.setxattr(os.path.join(folder, path), namespace.xattr(OPAQUE), YES)
    top = os.fsencode(root / TOP)
    os.mkdir(top)
    rows = {path: row for row, path in enumerate(tree.paths()) if tree.mode[tree.inode[row]] >> 12 == Kind.DIR}
    covered: set[bytes] = {b""}
    for removed, opaque in marks:
        for path in (*map(_mark, removed), *(os.path.join(folder, OPAQUE_NAME) for folder in opaque)):
            folder = os.path.dirname(path)
            # A folder that another layer deletes must not come back.
            if folder in rows:
                _whiteout(os.path.join(top, path))
                while folder not in covered:
                    covered.add(folder)
                    folder = os.path.dirname(folder)
    for path in sorted(covered, reverse=True):
        _look_like(os.path.join(top, path), tree, int(tree.inode[rows[path]]))
    return tuple(below)


def _whiteout(path: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if not os.path.lexists(path):
        os.mknod(path, WHITEOUT_MODE, WHITEOUT_DEVICE)


def _look_like(path: bytes, tree: Tree, inode: int) -> None:
    os.chown(path, int(tree.uid[inode]), int(tree.gid[inode]))
    os.chmod(path, int(tree.mode[inode]) & 0o7777)
    for name, value in tree.xattr_sets[int(tree.xattr[inode])]:
        os.setxattr(path, name, value)
    moment = int(tree.mtime[inode]) * 1_000_000_000 + int(tree.mtime_ns[inode])
    os.utime(path, ns=(moment, moment))
