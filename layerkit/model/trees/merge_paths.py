"""The rows of all layers in canonical order, and the paths they name with every directory above them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress, islice, pairwise, repeat
from operator import ne

import numpy as np
from numpy.typing import NDArray

from layerkit.model.entry import Kind
from layerkit.model.errors import LimitExceeded
from layerkit.model.index import Index
from layerkit.model.limits import Limits
from layerkit.model.strings import Strings

_NAMES_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of all layers: row 0 is a made root, then the layers' rows, bottom layer first.

    ``order``, ``path``, ``sorted_layer`` and ``sorted_kind`` have one value per *place*: rows sorted by
    path, then layer, markers before the entry. ``layer`` and ``kind`` have one per row.

    Attributes:
        order: int32, the row at each place.
        path: int32, row of ``Paths``; never falls.
        sorted_layer: int16. sorted_kind: uint8.
        layer: int16. kind: uint8.
        starts: first row of each layer.
    """

    order: NDArray[np.int32]
    path: NDArray[np.int32]
    sorted_layer: NDArray[np.int16]
    sorted_kind: NDArray[np.uint8]
    layer: NDArray[np.int16]
    kind: NDArray[np.uint8]
    starts: list[int]

    @property
    def total(self) -> int:
        """Return the number of rows."""
        return len(self.order)


@dataclass(frozen=True, slots=True, eq=False)
class Paths:
    r"""Distinct paths in canonical order, each after the directory that holds it.

    Attributes:
        keys: ``path_key`` of each path that some row names, as Latin-1 text: it compares like the bytes,
            and faster.
        start: int32, where the last part of each key begins.
        length: int64, of that part.
        place: int32, the path of each key; between them lie the directories that no row names.
        added: their names, by path.
        parent: int32 per path, -1 for the root.
        depth: int16 per path.
        levels: the paths of each depth, rising.
    """

    keys: list[str]
    start: NDArray[np.int32]
    length: NDArray[np.int64]
    place: NDArray[np.int32]
    added: dict[int, str]
    parent: NDArray[np.int32]
    depth: NDArray[np.int16]
    levels: list[NDArray[np.int32]]

    def names(self, rows: NDArray[np.int64]) -> Strings:
        """Return the last part of each path of ``rows`` (which rise)."""
        wanted = np.zeros(len(self.parent), np.bool_)
        wanted[rows] = True
        chosen = wanted[self.place]
        keys, starts = list(compress(self.keys, chosen.tolist())), self.start[chosen]
        listed = np.ones(len(self.parent), np.bool_)
        listed[list(self.added)] = False
        listed = listed[rows]
        lengths = np.empty(len(rows), np.int64)
        lengths[listed] = self.length[chosen]
        lengths[~listed] = [len(self.added[row]) for row in rows[~listed].tolist()]
        blobs, done = [], 0
        # In pieces, so that the names are never all there as Python objects.
        for first in range(0, len(rows), _NAMES_AT_ONCE):
            part = slice(first, first + _NAMES_AT_ONCE)
            count = int(np.count_nonzero(listed[part]))
            pairs = zip(keys[done : done + count], starts[done : done + count].tolist(), strict=True)
            names = [key[start:] for key, start in pairs]
            done += count
            if count < len(listed[part]):
                known = iter(names)
                places = zip(rows[part].tolist(), listed[part].tolist(), strict=True)
                names = [next(known) if is_listed else self.added[row] for row, is_listed in places]
            blobs.append("".join(names).encode("latin-1"))
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return Strings(b"".join(blobs), offsets)


def sort_rows(indexes: Sequence[Index], limits: Limits) -> tuple[Paths, Rows]:
    """Return the paths and the rows of ``indexes``, bottom layer first.

    Raises:
        LimitExceeded: missing directories make more entries than ``limits`` allows, or a path too deep.
    """
    keys, starts, sizes = [""], list[int](), [np.zeros(1, np.int64)]
    for index in indexes:
        starts.append(len(keys))
        sizes.append(index.path.lengths)
        # One byte for one byte, so the offsets stay right for the whole blob.
        text = bytes(index.path.blob).replace(b"/", b"\0").decode("latin-1")
        keys += [text[a:b] for a, b in pairwise(index.path.offsets.tolist())]
    layer = np.zeros(len(keys), np.int16)
    for i, (a, b) in enumerate(pairwise([*starts, len(keys)])):
        layer[a:b] = i
    kind = np.concatenate([np.array([Kind.DIR], np.uint8), *(index.kind for index in indexes)])
    # Every layer is a sorted run already, and merging runs is what this sort is best at. It is stable:
    # within a path, rows stay in the order of the layers.
    ordered = sorted(range(len(keys)), key=keys.__getitem__)
    order = np.array(ordered, np.int32)
    texts = list(map(keys.__getitem__, ordered))
    del keys, ordered
    fresh = np.ones(len(texts), np.bool_)
    fresh[1:] = np.fromiter(map(ne, islice(texts, 1, None), texts), np.bool_, len(texts) - 1)
    texts = list(compress(texts, fresh.tolist()))
    paths = _paths(texts, np.concatenate(sizes)[order[fresh]], limits)
    path = paths.place[np.cumsum(fresh, dtype=np.int32) - np.int32(1)]
    return paths, Rows(order, path, layer[order], kind[order], layer, kind, starts)


def _paths(keys: list[str], sizes: NDArray[np.int64], limits: Limits) -> Paths:
    """Return the paths of sorted, distinct ``keys``, whose lengths are ``sizes``."""
    count = len(keys)
    parts = np.fromiter(map(str.count, keys, repeat("\0")), np.int64, count) + 1
    parts[0] = 0
    if int(parts.max()) > min(limits.path_depth, 32767):
        raise LimitExceeded("path_depth", int(parts.max()), limits.path_depth, "image")
    depth = parts.astype(np.int16)
    parent, levels = _parents(depth)
    start = np.fromiter(map(str.rfind, keys, repeat("\0")), np.int32, count) + np.int32(1)
    # The last path one level up is the directory, unless that is missing: then it is some other path.
    right = sizes[parent] == np.maximum(start - 1, 0)
    above = map(keys.__getitem__, parent.tolist())
    right &= np.fromiter(map(str.startswith, keys, above), np.bool_, count)
    right[0] = True
    place = np.arange(count, dtype=np.int32)
    if right.all():
        return Paths(keys, start, sizes - start, place, {}, parent, depth, levels)
    return _with_missing(keys, start, sizes - start, depth, np.flatnonzero(~right), limits)


def _with_missing(
    keys: list[str],
    start: NDArray[np.int32],
    length: NDArray[np.int64],
    depth: NDArray[np.int16],
    orphans: NDArray[np.int64],
    limits: Limits,
) -> Paths:
    """Return the paths with the directories that no row names, each right before the first path in it."""
    extra = np.zeros(len(keys), np.int64)
    allowed = limits.entries_per_image - len(keys)
    missing: list[list[str]] = []
    for row in orphans.tolist():
        directories = keys[row].split("\0")[:-1]
        shared = 0
        for ours, theirs in zip(directories, keys[row - 1].split("\0"), strict=False):
            if ours != theirs:
                break
            shared += 1
        missing.append(directories[shared:])
        extra[row] = len(directories) - shared
        # Deep paths without their directories multiply: some bytes of input for thousands of entries.
        allowed -= len(directories) - shared
        if allowed < 0:
            found = limits.entries_per_image - allowed
            raise LimitExceeded("entries_per_image", found, limits.entries_per_image, "image")
    place = (np.arange(len(keys)) + np.cumsum(extra)).astype(np.int32)
    full = np.zeros(len(keys) + int(extra.sum()), np.int16)
    full[place] = depth
    added: dict[int, str] = {}
    for row, names in zip(orphans.tolist(), missing, strict=True):
        first, level = int(place[row]) - len(names), int(depth[row]) - len(names)
        for i, name in enumerate(names):
            added[first + i] = name
            full[first + i] = level + i
    parent, levels = _parents(full)
    return Paths(keys, start, length, place, added, parent, full, levels)


def _parents(depth: NDArray[np.int16]) -> tuple[NDArray[np.int32], list[NDArray[np.int32]]]:
    """Return for each path the last one before it that is one level up, and the paths of each level."""
    by_depth = np.argsort(depth, kind="stable").astype(np.int32)
    bounds = np.searchsorted(depth[by_depth], np.arange(int(depth.max()) + 2)).tolist()
    levels = [by_depth[a:b] for a, b in pairwise(bounds)]
    parent = np.zeros(len(depth), np.int32)
    for upper, level in pairwise(levels):
        if len(upper):
            parent[level] = upper[np.maximum(np.searchsorted(upper, level) - 1, 0)]
    parent[0] = -1
    return parent, levels
