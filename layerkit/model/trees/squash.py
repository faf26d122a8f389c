"""PURE: the one layer that turns one tree into another.

The rules of the OCI image-spec (layer.md), and those that runtimes add: the folders above everything that a
layer holds are in it too (else docker makes them anew with owners of its own), and all names of a hard-linked
file are in it if one is (docker unpacks each layer alone, where a link into a lower layer leads nowhere).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerkit.model import sparse as sparse_maps
from layerkit.model.digest import Digest
from layerkit.model.entry import Kind, XattrSet
from layerkit.model.index import Index, path_key
from layerkit.model.strings import Strings
from layerkit.model.tree import Tree

_CAPABILITY = b"security.capability"
_NO_DIGEST = Digest("sha256", "0" * 64)
_SAME = ("mode", "uid", "gid", "size", "mtime", "mtime_ns", "major", "minor")


@dataclass(frozen=True, slots=True, eq=False)
class Squashed:
    """A layer to be written.

    Attributes:
        index: its rows; ``offset`` is that of the content in the tar it comes from, ``diff_id`` is of zeros.
        inode: int64, the inode in the upper tree of each row, -1 for a whiteout.
    """

    index: Index
    inode: NDArray[np.int64]


def squash(below: Tree, top: Tree, *, root: bool = True) -> Squashed:
    """Return the layer that makes ``top`` out of ``below``, of which it repeats nothing that need not be.

    Args:
        below: the tree of the layers under it; ``merge([])`` for none.
        top: the tree that is to come out.
        root: whether the layer may have an entry of the root folder, for images where some layer has.
    """
    paths, below_paths = top.paths(), below.paths()
    place = {path: row for row, path in enumerate(paths)}
    to_top = np.fromiter((place.get(path, -1) for path in below_paths), np.int64, len(below_paths))
    kept = _kept(below, top, to_top)
    emit = ~kept[top.inode]
    # A name that is gone needs a whiteout only where the folder it was in is still a folder.
    above = to_top[below.parent]
    gone = (to_top < 0) & (above >= 0) & (top.kind[top.inode[np.maximum(above, 0)]] == Kind.DIR)
    gone[0] = False
    emit[above[gone]] = True
    chosen = emit.tolist()
    for row, parent in zip(range(len(chosen) - 1, 0, -1), reversed(top.parent.tolist()), strict=False):
        if chosen[row]:
            chosen[parent] = True
    if not root:
        chosen[0] = False
    rows = np.flatnonzero(np.array(chosen, np.bool_))
    return _layer(top, rows, paths, [below_paths[row] for row in np.flatnonzero(gone).tolist()])


def layer_of(tree: Tree) -> Squashed:
    """Return the layer that holds every name of ``tree``, the root included."""
    return _layer(tree, np.arange(len(tree)), tree.paths(), [])


def _kept(below: Tree, top: Tree, to_top: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for each inode of ``top`` whether ``below`` shows it already, by the same names and no others."""
    old_rows = np.flatnonzero(to_top >= 0)
    new, old = top.inode[to_top[old_rows]], below.inode[old_rows]
    same = np.ones(len(old_rows), np.bool_)
    for column in _SAME:
        same &= getattr(top, column)[new] == getattr(below, column)[old]
    same &= (top.sha256[new] == below.sha256[old]).all(axis=1)
    sets = {pairs: row for row, pairs in enumerate(top.xattr_sets)}
    same &= _renumbered(below.xattr_sets, sets)[below.xattr[old]] == top.xattr[new]
    targets = {text: row for row, text in enumerate(top.targets.tolist())}
    # The last one stands for "no target", which is row -1 on both sides.
    renumbered = np.append(_renumbered(below.targets.tolist(), targets), -1)
    same &= renumbered[below.target[old]] == top.target[new]
    new, old = new[same], old[same]
    count = np.bincount(new, minlength=top.inodes)
    low = np.full(top.inodes, below.inodes, np.int64)
    high = np.full(top.inodes, -1, np.int64)
    np.minimum.at(low, new, old)
    np.maximum.at(high, new, old)
    whole = (count == np.bincount(top.inode, minlength=top.inodes)) & (low == high)
    candidates = np.flatnonzero(whole)
    # One inode that became two: only one of them can go on being it.
    _, first = np.unique(low[candidates], return_index=True)
    kept = np.zeros(top.inodes, np.bool_)
    kept[candidates[first]] = True
    return kept


def _renumbered(items: Any, numbers: dict[Any, int]) -> NDArray[np.int64]:
    return np.fromiter((numbers.get(item, -2) for item in items), np.int64, len(items))


def _layer(tree: Tree, rows: NDArray[np.int64], paths: list[bytes], gone: list[bytes]) -> Squashed:
    inode = tree.inode[rows].astype(np.int64)
    first = tree.first_name()[inode] == rows
    kind = np.where(first, tree.kind[inode], np.uint8(Kind.HARDLINK))
    links = tree.targets.tolist()
    link = np.where(kind == Kind.SYMLINK, tree.target[inode], -1)
    numbers: dict[int, int] = {}
    starts = tree.first_name()
    for at in np.flatnonzero(~first).tolist():
        number = numbers.setdefault(int(inode[at]), len(links))
        if number == len(links):
            links.append(paths[int(starts[inode[at]])])
        link[at] = number
    xattr, sets = _with_link_sets(tree, inode, first)
    is_file = kind == Kind.REG
    device = (kind == Kind.CHAR) | (kind == Kind.BLOCK)
    names = [paths[row] for row in rows.tolist()]
    keys = [path_key(path) for path in names] + [path_key(path) for path in gone]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    more = len(gone)

    def column(values: NDArray[Any], dtype: type[np.generic], missing: int = 0) -> NDArray[Any]:
        return np.concatenate([values.astype(dtype), np.full(more, missing, dtype)])[order]

    everything = names + gone
    index = Index(
        diff_id=_NO_DIGEST,
        tar_size=0,
        path=Strings.of([everything[at] for at in order.tolist()]),
        kind=column(kind, np.uint8, Kind.WHITEOUT),
        perm=column(tree.mode[inode] & 0o7777, np.uint16),
        uid=column(tree.uid[inode], np.uint32),
        gid=column(tree.gid[inode], np.uint32),
        mtime=column(tree.mtime[inode], np.int64),
        mtime_ns=column(tree.mtime_ns[inode], np.uint32),
        size=column(np.where(is_file, tree.size[inode], 0), np.int64),
        major=column(np.where(device, tree.major[inode], 0), np.uint32),
        minor=column(np.where(device, tree.minor[inode], 0), np.uint32),
        link=column(link, np.int32, -1),
        links=Strings.of(links),
        xattr=column(xattr, np.int32),
        xattr_sets=sets,
        offset=column(np.where(is_file, tree.offset[inode], -1), np.int64, -1),
        sha256=np.concatenate(
            [np.where(is_file[:, None], tree.sha256[inode], np.uint8(0)), np.zeros((more, 32), np.uint8)]
        )[order],
        sparse=column(np.where(is_file, tree.sparse[inode], -1), np.int32, -1),
        sparse_maps=tree.sparse_maps if len(tree.sparse_maps) else sparse_maps.NONE,
    )
    return Squashed(index, column(inode, np.int64, -1))


def _with_link_sets(
    tree: Tree, inode: NDArray[np.int64], first: NDArray[np.bool_]
) -> tuple[NDArray[np.int32], tuple[XattrSet, ...]]:
    """Return the rows of xattr sets, and the sets with those of hard links after them.

    Unpackers that chown a hard link take the inode's capability away and then set what its entry has, so a
    link's entry has the capability again, and nothing else.
    """
    sets: dict[XattrSet, int] = {}
    row_of = []
    for pairs in tree.xattr_sets:
        row_of.append(sets.setdefault(pairs, len(sets)))
    link_row = [
        sets.setdefault(tuple(p for p in pairs if p[0] == _CAPABILITY), len(sets)) for pairs in tree.xattr_sets
    ]
    own = np.array(row_of, np.int32)[tree.xattr[inode]]
    of_links = np.array(link_row, np.int32)[tree.xattr[inode]]
    return np.where(first, own, of_links), tuple(sets)


__all__ = ["Squashed", "layer_of", "squash"]
