"""Hard links to inodes: which row holds the attributes and the content behind a HARDLINK row.

A link's target is an entry of its own layer, wherever that stands in the tar; failing that, what the
layers below show at that path once the link's layer has hidden its part of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from layerkit.model.entry import Kind
from layerkit.model.errors import UnsafeEntry, show_path
from layerkit.model.index import Index
from layerkit.model.trees.merge_paths import Paths, Rows

_NOTHING = "which is not there"
_DIRECTORY = "which is a directory"
_CYCLE = "which leads back to itself through hard links"


def resolve(indexes: Sequence[Index], paths: Paths, rows: Rows) -> NDArray[np.int32] | None:
    """Return for each row the row of its inode (itself for all but links), or None if there are no links.

    Raises:
        UnsafeEntry: a target that is not there, is a directory, or is the link itself. Every link is
            looked at, also one that an upper layer removes: the layer that holds it is broken.
    """
    links = np.flatnonzero(rows.kind == Kind.HARDLINK).astype(np.int32)
    if not len(links):
        return None
    layer = rows.layer[links].astype(np.int64)
    target = np.concatenate([
        _targets(indexes[i], links[layer == i] - rows.starts[i], paths) for i in np.unique(layer).tolist()
    ])  # fmt: skip
    entries = np.flatnonzero(rows.sorted_kind <= Kind.HARDLINK)
    # Each layer has one entry at a path, so (path, layer) rises without repeats.
    code = rows.path[entries] * np.int64(len(indexes)) + rows.sorted_layer[entries]
    wanted = target * len(indexes) + layer
    found = np.minimum(np.searchsorted(code, wanted), len(code) - 1)
    here = code[found] == wanted
    base = np.arange(rows.total, dtype=np.int32)
    base[links[here]] = rows.order[entries[found[here]]]
    below = _Below(paths, rows)
    for i in np.flatnonzero(~here).tolist():
        row = below.entry(int(target[i]), int(layer[i])) if target[i] >= 0 else -1
        if row < 0:
            raise _refused(indexes, rows, int(links[i]), _NOTHING)
        base[links[i]] = row
    for _ in range(len(links).bit_length() + 1):
        # Each round doubles the steps that a link has gone along its chain.
        base[links] = base[base[links]]
    kind = rows.kind[base[links]]
    for bad, why in ((Kind.HARDLINK, _CYCLE), (Kind.DIR, _DIRECTORY)):
        if (kind == bad).any():
            raise _refused(indexes, rows, int(links[np.argmax(kind == bad)]), why)
    return base


def _targets(index: Index, rows: NDArray[np.int32], paths: Paths) -> NDArray[np.int64]:
    """Return the path that each link of ``rows`` names, -1 where there is none."""
    link, which = np.unique(index.link[rows], return_inverse=True)
    found = np.full(len(link), -1, np.int64)
    keys = paths.keys
    for i, row in enumerate(link.tolist()):
        key = "" if row < 0 else index.links[row].replace(b"/", b"\0").decode("latin-1")
        place = bisect_left(keys, key)
        if place < len(keys) and keys[place] == key:
            found[i] = paths.place[place]
    return found[which]


def _refused(indexes: Sequence[Index], rows: Rows, row: int, why: str) -> UnsafeEntry:
    layer = int(rows.layer[row])
    index, row = indexes[layer], row - rows.starts[layer]
    target = index.links[int(index.link[row])] if index.link[row] >= 0 else b""
    return UnsafeEntry(str(index.diff_id), index.path[row], f"hard link to {show_path(target) or '/'}, {why}")


class _Below:
    """What the layers below one layer show, with that layer's markers applied. Links need it rarely."""

    def __init__(self, paths: Paths, rows: Rows) -> None:
        self._paths, self._rows = paths, rows
        self._cuts: dict[tuple[int, int], int] = {}
        self._entries: dict[tuple[int, int], int] = {}

    def entry(self, path: int, layer: int) -> int:
        """Return the row of the entry at ``path``, -1 where there is none or a directory was made."""
        known = self._entries.get((path, layer))
        if known is None:
            known = self._entries[path, layer] = self._find(path, layer)
        return known

    def _find(self, path: int, layer: int) -> int:
        rows = self._rows
        places, layers, kinds = self._at(path, path + 1, layer)
        whiteouts = (kinds == Kind.WHITEOUT) & (layers <= layer)
        cut = max(self._cut(int(self._paths.parent[path]), layer), _last(layers, whiteouts))
        entry = np.flatnonzero((kinds <= Kind.HARDLINK) & (layers < layer) & (layers >= cut))
        if not len(entry):
            return -1
        top = int(entry[-1])
        if kinds[top] != Kind.DIR and self._made_since(path, int(layers[top]), layer):
            return -1
        return int(rows.order[places + top])

    def _made_since(self, path: int, low: int, high: int) -> bool:
        """Return whether a layer between ``low`` and ``high`` has an entry beneath ``path``."""
        depth = self._paths.depth
        end = path + 1
        while end < len(depth) and depth[end] > depth[path]:
            end += 1
        if end == path + 1:
            return False
        _, layers, kinds = self._at(path + 1, end, high)
        return bool(((kinds <= Kind.HARDLINK) & (layers > low) & (layers < high)).any())

    def _at(self, path: int, end: int, layer: int) -> tuple[int, NDArray[np.int16], NDArray[np.uint8]]:
        """Return the first place of the paths from ``path`` to ``end``, their layers and kinds."""
        a, b = np.searchsorted(self._rows.path, [path, end]).tolist()
        return a, self._rows.sorted_layer[a:b], self._rows.sorted_kind[a:b]

    def _cut(self, path: int, layer: int) -> int:
        """Return the lowest layer that ``path`` and the directories above it let through beneath them."""
        todo = []
        while path >= 0 and (path, layer) not in self._cuts:
            todo.append(path)
            path = int(self._paths.parent[path])
        cut = self._cuts[path, layer] if path >= 0 else 0
        for path in reversed(todo):
            _, layers, kinds = self._at(path, path + 1, layer)
            markers = (kinds > Kind.HARDLINK) & (layers <= layer)
            plain = (kinds <= Kind.HARDLINK) & (kinds != Kind.DIR) & (layers < layer)
            cut = self._cuts[path, layer] = max(cut, _last(layers, markers | plain))
        return cut


def _last(layers: NDArray[np.int16], chosen: NDArray[np.bool_]) -> int:
    return int(layers[chosen].max(initial=0))
