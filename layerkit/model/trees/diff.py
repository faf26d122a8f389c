"""Two trees to the layer that makes the second out of the first (image-spec layer.md, "Change Types").

The law: for every tree ``old`` made of some layers and every ``new``, merging the layers and ``diff(old, new)``
gives ``new``. An inode that changed is written whole, with all its names; what is gone gets a whiteout.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from layerkit.model.digest import Digest
from layerkit.model.entry import WHITEOUT_PREFIX, Entry, Kind
from layerkit.model.errors import LossyResult
from layerkit.model.index import Index
from layerkit.model.tree import Tree

_UNWRITTEN = Digest("sha256", hashlib.sha256(b"").hexdigest())


def diff(old: Tree, new: Tree, *, root: bool = False) -> Index:
    """Return the rows of the layer that, on top of ``old``, shows ``new``.

    Both trees have ids of the same space. Content references (``offset``, ``sparse``) are those of ``new``;
    the diff_id is a placeholder, since nothing has been written.

    Args:
        old: what the layers below show.
        new: what they are to show with the result on top.
        root: whether the root folder is listed with all others, for images where some layer lists it.

    Raises:
        LossyResult: a new name that begins with ``.wh.``, which is a whiteout in a layer.
    """
    return diff_and_carried(old, new, root=root)[0]


def diff_and_carried(old: Tree, new: Tree, *, root: bool = False) -> tuple[Index, int]:
    """Return as :func:`diff`, and how many rows are folders listed only for what is in them.

    Runtimes that unpack each layer alone make up owner and mode of a folder that the layer does not list, and what
    the topmost layer has is what an overlay shows.
    """
    old_paths, new_paths = old.paths(), new.paths()
    old_row = {path: row for row, path in enumerate(old_paths)}
    below = np.fromiter((old_row.get(path, -1) for path in new_paths), np.int64, len(new_paths))
    changed = _changed(old, new, below)
    is_folder = (new.kind[new.inode] == Kind.DIR).tolist()
    folders = {path: row for row, (path, is_dir) in enumerate(zip(new_paths, is_folder, strict=True)) if is_dir}
    there = set(new_paths)
    # Below a folder that is gone, or is none any more, everything goes with it.
    gone = [path for path in old_paths if path not in there and path.rpartition(b"/")[0] in folders]
    listed = changed[new.inode]
    listed[[folders[path.rpartition(b"/")[0]] for path in gone]] = True
    for row, parent in zip(range(len(new) - 1, 0, -1), reversed(new.parent.tolist()), strict=False):
        if listed[row]:
            listed[parent] = True
    if not root:
        listed[0] = changed[new.inode[0]]
    carried = int(np.count_nonzero(listed & ~changed[new.inode]))
    entries = [*_entries(new, new_paths, listed), *(Entry(path, Kind.WHITEOUT) for path in gone)]
    return Index.of(entries, _UNWRITTEN), carried


def _changed(old: Tree, new: Tree, below: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return bool (m,): the inodes of ``new`` that ``old`` does not have as they are."""
    there = below >= 0
    was = np.where(there, old.inode[below], -1)
    same = np.zeros(len(new), np.bool_)
    same[there] = _equal(old, was[there], new, new.inode[there])
    changed = np.zeros(new.inodes, np.bool_)
    changed[new.inode[~same]] = True
    # All names of an inode have to be names of one inode below ...
    least, most = np.full(new.inodes, np.iinfo(np.int64).max), np.full(new.inodes, -1)
    np.minimum.at(least, new.inode, was)
    np.maximum.at(most, new.inode, was)
    changed |= least != most
    # ... and of several inodes that were one, only one can stay as it is.
    kept = np.flatnonzero(~changed)
    first = np.unique(least[kept], return_index=True)[1]
    others = np.ones(len(kept), np.bool_)
    others[first] = False
    changed[kept[others]] = True
    return changed


def _equal(old: Tree, a: NDArray[np.int64], new: Tree, b: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return whether inodes ``a`` of ``old`` and ``b`` of ``new`` show the same, pair by pair."""
    same: NDArray[np.bool_] = (old.sha256[a] == new.sha256[b]).all(axis=1)
    for name in ("mode", "uid", "gid", "size", "mtime", "mtime_ns", "major", "minor"):
        same &= getattr(old, name)[a] == getattr(new, name)[b]
    sets: dict[object, int] = {}
    for mine, theirs, texts in (
        (old.xattr[a], new.xattr[b], (old.xattr_sets, new.xattr_sets)),
        (old.target[a], new.target[b], (old.targets.tolist(), new.targets.tolist())),
    ):
        sets.clear()
        left, right = (
            # One more at the end: -1, no target, is its place.
            np.array([*(sets.setdefault(text, len(sets)) for text in side), -1], np.int64)
            for side in texts
        )
        same &= left[mine] == right[theirs]
    return same


def _entries(new: Tree, paths: list[bytes], listed: NDArray[np.bool_]) -> list[Entry]:
    first: dict[int, bytes] = {}
    out = []
    for row in np.flatnonzero(listed).tolist():
        path, i = paths[row], int(new.inode[row])
        if new.name[row].startswith(WHITEOUT_PREFIX):
            raise LossyResult(path, "a layer cannot hold a name that begins with '.wh.', it would hide a file")
        if i in first:
            out.append(Entry(path, Kind.HARDLINK, link=first[i]))
            continue
        first[i] = path
        kind, target, hole_map = Kind(int(new.mode[i]) >> 12), int(new.target[i]), int(new.sparse[i])
        out.append(
            Entry(
                path,
                kind,
                perm=int(new.mode[i]) & 0o7777,
                uid=int(new.uid[i]),
                gid=int(new.gid[i]),
                mtime=int(new.mtime[i]),
                mtime_ns=int(new.mtime_ns[i]),
                size=int(new.size[i]) if kind is Kind.REG else 0,
                major=int(new.major[i]),
                minor=int(new.minor[i]),
                link=b"" if target < 0 else new.targets[target],
                xattrs=new.xattr_sets[int(new.xattr[i])],
                offset=int(new.offset[i]),
                sha256=new.sha256[i].tobytes() if kind is Kind.REG else b"",
                sparse=None if hole_map < 0 else new.sparse_maps.extents(hole_map),
            )
        )
    return out


__all__ = ["diff", "diff_and_carried"]
