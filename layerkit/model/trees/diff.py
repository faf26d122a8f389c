"""Two trees to the layer that makes the second out of the first (image-spec layer.md, "Change Types").

The law: for every tree ``old`` made of some layers and every ``new``, merging the layers and ``diff(old, new)``
gives ``new``. An inode that changed is written whole, with all its names (docker unpacks each layer alone, where
a link into a lower layer leads nowhere); what is gone gets a whiteout. The folders above everything that a layer
holds are in it too: runtimes that unpack each layer alone make up owner and mode of a folder it does not list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerkit.model import sparse as sparse_maps
from layerkit.model.acl_caps import CAPABILITY_NAME
from layerkit.model.digest import Digest
from layerkit.model.entry import WHITEOUT_PREFIX, Kind, XattrSet
from layerkit.model.errors import LossyResult
from layerkit.model.index import COLUMNS, Index, path_key
from layerkit.model.strings import Strings
from layerkit.model.tree import Tree

_NO_DIGEST = Digest("sha256", "0" * 64)
_SAME = ("mode", "uid", "gid", "size", "mtime", "mtime_ns", "major", "minor")


@dataclass(frozen=True, slots=True, eq=False)
class LayerDiff:
    """A layer to be written.

    Attributes:
        index: its rows; ``offset`` and ``sparse`` are those of the content in ``new``, ``diff_id`` is of zeros.
        inode: int64, the inode in ``new`` of each row, -1 for a whiteout.
        carried: how many rows are folders listed only for what is in them.
    """

    index: Index
    inode: NDArray[np.int64]
    carried: int = 0


def diff(old: Tree, new: Tree, *, root: bool = False) -> LayerDiff:
    """Return the layer that, on top of ``old``, shows ``new``; it repeats nothing that need not be.

    Both trees have ids of the same space.

    Args:
        old: what the layers below show; ``merge([])`` for none.
        new: what they are to show with the result on top.
        root: whether the root folder is listed with all others, for images where some layer lists it.

    Raises:
        LossyResult: a new name that begins with ``.wh.``, which is a whiteout in a layer.
    """
    paths, old_paths = new.paths(), old.paths()
    place = {path: row for row, path in enumerate(paths)}
    to_new = np.fromiter((place.get(path, -1) for path in old_paths), np.int64, len(old_paths))
    changed = ~_kept(old, new, to_new)[new.inode]
    # A name that is gone needs a whiteout only where the folder it was in is still a folder.
    above = to_new[old.parent]
    gone = (to_new < 0) & (above >= 0) & (new.kind[new.inode[np.maximum(above, 0)]] == Kind.DIR)
    gone[0] = False
    listed = changed.copy()
    listed[above[gone]] = True
    chosen = listed.tolist()
    for row, parent in zip(range(len(chosen) - 1, 0, -1), reversed(new.parent.tolist()), strict=False):
        if chosen[row]:
            chosen[parent] = True
    if not root:
        chosen[0] = bool(changed[0])
    rows = np.flatnonzero(np.array(chosen, np.bool_))
    for row in rows.tolist():
        if new.name[row].startswith(WHITEOUT_PREFIX):
            raise LossyResult(
                paths[row], "a layer cannot hold a name that begins with '.wh.', it would hide a file"
            )
    carried = int(np.count_nonzero(~changed[rows]))
    return _layer(new, rows, paths, [old_paths[row] for row in np.flatnonzero(gone).tolist()], carried)


def layer_of(tree: Tree) -> LayerDiff:
    """Return the layer that holds every name of ``tree``, the root included."""
    return _layer(tree, np.arange(len(tree)), tree.paths(), [])


def _kept(old: Tree, new: Tree, to_new: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for each inode of ``new`` whether ``old`` shows it already, by the same names and no others."""
    old_rows = np.flatnonzero(to_new >= 0)
    ours, theirs = new.inode[to_new[old_rows]], old.inode[old_rows]
    same = (new.sha256[ours] == old.sha256[theirs]).all(axis=1)
    for column in _SAME:
        same &= getattr(new, column)[ours] == getattr(old, column)[theirs]
    sets = {pairs: row for row, pairs in enumerate(new.xattr_sets)}
    same &= _renumbered(old.xattr_sets, sets)[old.xattr[theirs]] == new.xattr[ours]
    targets = {text: row for row, text in enumerate(new.targets.tolist())}
    # The last one stands for "no target", which is row -1 on both sides.
    renumbered = np.append(_renumbered(old.targets.tolist(), targets), -1)
    same &= renumbered[old.target[theirs]] == new.target[ours]
    ours, theirs = ours[same], theirs[same]
    count = np.bincount(ours, minlength=new.inodes)
    low = np.full(new.inodes, old.inodes, np.int64)
    high = np.full(new.inodes, -1, np.int64)
    np.minimum.at(low, ours, theirs)
    np.maximum.at(high, ours, theirs)
    candidates = np.flatnonzero((count == np.bincount(new.inode, minlength=new.inodes)) & (low == high))
    # One inode that became two: only one of them can go on being it.
    _, first = np.unique(low[candidates], return_index=True)
    kept = np.zeros(new.inodes, np.bool_)
    kept[candidates[first]] = True
    return kept


def _renumbered(items: Any, numbers: dict[Any, int]) -> NDArray[np.int64]:
    return np.fromiter((numbers.get(item, -2) for item in items), np.int64, len(items))


def _layer(
    tree: Tree, rows: NDArray[np.int64], paths: list[bytes], gone: list[bytes], carried: int = 0
) -> LayerDiff:
    inode = tree.inode[rows].astype(np.int64)
    starts = tree.first_name()
    first = starts[inode] == rows
    kind = np.where(first, tree.kind[inode], np.uint8(Kind.HARDLINK))
    links = tree.targets.tolist()
    link = np.where(kind == Kind.SYMLINK, tree.target[inode], -1)
    numbers: dict[int, int] = {}
    for at in np.flatnonzero(~first).tolist():
        number = numbers.setdefault(int(inode[at]), len(links))
        if number == len(links):
            links.append(paths[int(starts[inode[at]])])
        link[at] = number
    xattr, sets = _with_link_sets(tree, inode, first)
    is_file = kind == Kind.REG
    device = (kind == Kind.CHAR) | (kind == Kind.BLOCK)
    names = [paths[row] for row in rows.tolist()] + gone
    keys = [path_key(path) for path in names]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)

    def column(values: NDArray[Any], dtype: str, missing: int) -> NDArray[Any]:
        tail = np.full((len(gone), *values.shape[1:]), missing, dtype)
        return np.concatenate([values.astype(dtype), tail])[order]

    values = {
        "kind": kind, "perm": tree.mode[inode] & 0o7777, "link": link, "xattr": xattr,
        "size": np.where(is_file, tree.size[inode], 0), "major": np.where(device, tree.major[inode], 0),
        "minor": np.where(device, tree.minor[inode], 0), "offset": np.where(is_file, tree.offset[inode], -1),
        "sha256": np.where(is_file[:, None], tree.sha256[inode], np.uint8(0)),
        "sparse": np.where(is_file, tree.sparse[inode], -1),
        **{name: getattr(tree, name)[inode] for name in ("uid", "gid", "mtime", "mtime_ns")},
    }  # fmt: skip
    of_whiteouts = {"kind": int(Kind.WHITEOUT), "link": -1, "offset": -1, "sparse": -1}
    index = Index(
        diff_id=_NO_DIGEST,
        tar_size=0,
        path=Strings.of([names[at] for at in order.tolist()]),
        links=Strings.of(links),
        xattr_sets=sets,
        sparse_maps=tree.sparse_maps if len(tree.sparse_maps) else sparse_maps.NONE,
        warnings=(),
        **{name: column(values[name], dtype, of_whiteouts.get(name, 0)) for name, dtype in COLUMNS.items()},
    )
    return LayerDiff(index, column(inode, "i8", -1), carried)


def _with_link_sets(
    tree: Tree, inode: NDArray[np.int64], first: NDArray[np.bool_]
) -> tuple[NDArray[np.int32], tuple[XattrSet, ...]]:
    """Return the rows of xattr sets, and the sets with those of hard links after them.

    Unpackers that chown a hard link take the inode's capability away and then set what its entry has, so a
    link's entry has the capability again, and nothing else.
    """
    sets: dict[XattrSet, int] = {}
    row_of = [sets.setdefault(pairs, len(sets)) for pairs in tree.xattr_sets]
    bare = (tuple(pair for pair in pairs if pair[0] == CAPABILITY_NAME) for pairs in tree.xattr_sets)
    link_row = [sets.setdefault(pairs, len(sets)) for pairs in bare]
    own, of_links = (np.array(each, np.int32)[tree.xattr[inode]] for each in (row_of, link_row))
    return np.where(first, own, of_links), tuple(sets)
