"""Inodes from the rows that hold them: one column at a time, so that only one is held twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerkit.model.entry import Kind, XattrSet
from layerkit.model.index import Index
from layerkit.model.sparse import SparseMaps
from layerkit.model.strings import Strings

_MADE: dict[str, Any] = {"kind": int(Kind.DIR), "perm": 0o755, "link": -1, "offset": -1, "sparse": -1}
"""Row 0, a directory that no layer has; 0 in every other column."""

Column = NDArray[Any]


def inode_columns(indexes: Sequence[Index], source: NDArray[np.int32], layer: NDArray[np.int16]) -> dict[str, Any]:
    """Return the columns of a tree's inodes by the names that ``Tree`` gives them, all but ``nlink``.

    Args:
        indexes: the layers.
        source: (m,), the row of each inode: 0 for a made directory, then the layers' rows in order.
        layer: (m,), the layer of each row.
    """

    def gather(name: str, dtype: str) -> Column:
        made = np.array([_MADE.get(name, 0)], dtype)
        return np.concatenate([made, *(np.asarray(getattr(i, name), dtype) for i in indexes)])[source]

    kind = gather("kind", "u1")
    device = (kind == Kind.CHAR) | (kind == Kind.BLOCK)
    regular = kind == Kind.REG
    mode = (gather("perm", "u4") & np.uint32(0o7777)) | (kind.astype(np.uint32) << np.uint32(12))
    sha256 = np.concatenate([np.zeros((1, 32), np.uint8), *(i.sha256 for i in indexes)])[source]
    target, targets = _symlinks(indexes, np.where(kind == Kind.SYMLINK, gather("link", "i4"), -1), layer)
    size = np.where(regular, gather("size", "i8"), 0)
    links = target >= 0
    size[links] = targets.lengths[target[links]]
    offset = np.where(regular, gather("offset", "i8"), -1)
    xattr, xattr_sets = _xattrs(indexes, gather("xattr", "i4"), layer)
    sparse, sparse_maps = _sparse(indexes, gather("sparse", "i4"), layer)
    return {
        "mode": mode,
        "uid": gather("uid", "u4"),
        "gid": gather("gid", "u4"),
        "size": size,
        "mtime": gather("mtime", "i8"),
        "mtime_ns": gather("mtime_ns", "u4"),
        "major": np.where(device, gather("major", "u4"), np.uint32(0)),
        "minor": np.where(device, gather("minor", "u4"), np.uint32(0)),
        "target": target,
        "targets": targets,
        "xattr": xattr,
        "xattr_sets": xattr_sets,
        "layer": np.where(offset >= 0, layer, np.int16(-1)).astype(np.int32),
        "offset": offset,
        "sha256": sha256,
        "sparse": sparse,
        "sparse_maps": sparse_maps,
    }


def _symlinks(indexes: Sequence[Index], link: Column, layer: Column) -> tuple[NDArray[np.int32], Strings]:
    texts: dict[bytes, int] = {}
    column = _interned(
        link, layer, link >= 0, [len(i.links) for i in indexes],
        lambda at, row: texts.setdefault(indexes[at].links[row], len(texts)),
    )  # fmt: skip
    return column, Strings.of(texts)


def _xattrs(
    indexes: Sequence[Index], xattr: Column, layer: Column
) -> tuple[NDArray[np.int32], tuple[XattrSet, ...]]:
    sets: dict[XattrSet, int] = {(): 0}
    column = _interned(
        xattr, layer, xattr > 0, [len(i.xattr_sets) for i in indexes],
        lambda at, row: sets.setdefault(indexes[at].xattr_sets[row], len(sets)),
    )  # fmt: skip
    column[xattr <= 0] = 0
    return column, tuple(sets)


def _interned(
    column: Column,
    layer: Column,
    used: NDArray[np.bool_],
    sizes: Sequence[int],
    number: Callable[[int, int], int],
) -> NDArray[np.int32]:
    """Return ``column`` with rows of one common table in place of rows of each layer's own; -1 if unused.

    ``number`` is asked for each distinct (layer, row) once, in order of first use.
    """
    out = np.full(len(column), -1, np.int32)
    places = np.flatnonzero(used)
    if len(places):
        starts = np.cumsum([0, *sizes])
        codes = starts[layer[places]] + column[places]
        distinct, first, which = np.unique(codes, return_index=True, return_inverse=True)
        numbers = np.empty(len(distinct), np.int32)
        owners = np.searchsorted(starts, distinct, "right") - 1
        rows = (distinct - starts[owners]).tolist()
        for i in np.argsort(first).tolist():
            numbers[i] = number(int(owners[i]), rows[i])
        out[places] = numbers[which]
    return out


def _sparse(indexes: Sequence[Index], sparse: Column, layer: Column) -> tuple[NDArray[np.int32], SparseMaps]:
    out = np.full(len(sparse), -1, np.int32)
    places = np.flatnonzero(sparse >= 0)
    out[places] = np.arange(len(places))
    starts, offsets, lengths = [0], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for at, row in zip(layer[places].tolist(), sparse[places].tolist(), strict=True):
        maps = indexes[at].sparse_maps
        a, b = int(maps.starts[row]), int(maps.starts[row + 1])
        offsets.append(maps.offset[a:b])
        lengths.append(maps.length[a:b])
        starts.append(starts[-1] + b - a)
    return out, SparseMaps(np.array(starts, np.int64), np.concatenate(offsets), np.concatenate(lengths))
