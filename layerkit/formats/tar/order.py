"""The members of a layer in canonical order: of duplicates the last, and no two that contradict each other."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerkit.model.entry import Kind
from layerkit.model.errors import UnsafeEntry, show_path
from layerkit.model.index import path_key
from layerkit.model.strings import Strings, offsets_of

_JOIN_ROWS = 1 << 16
_DIR, _HARDLINK, _WHITEOUT, _OPAQUE = map(int, (Kind.DIR, Kind.HARDLINK, Kind.WHITEOUT, Kind.OPAQUE))


@dataclass(frozen=True, slots=True, eq=False)
class Members:
    """The members of a layer in the order of the tar.

    Attributes:
        layer: names the layer in errors.
        columns: as in an ``Index``, n rows each.
        keys: n keys (``model.index.path_key``).
        links: link targets.
    """

    layer: str
    columns: dict[str, NDArray[Any]]
    keys: list[bytes]
    links: list[bytes]


def arrange(
    members: Members, kept: NDArray[np.bool_], warn: Callable[[str], None]
) -> tuple[NDArray[np.int64], Strings]:
    """Return the rows of ``members`` that count, in canonical order, and their paths.

    Args:
        members: what the tar holds. Its keys are used up.
        kept: bool (n,), whether the row counts at all.
        warn: is told of paths that come twice.

    Raises:
        UnsafeEntry: entries that contradict each other.
    """
    keys, kind = members.keys, members.columns["kind"]
    if kept.all() and all(map(operator.lt, keys, islice(keys, 1, None))):
        order, blocked = np.arange(len(keys)), _is_entry_but_folder(kind)
    else:
        rows, blocked = _sorted(members, np.flatnonzero(kept).tolist(), warn)
        order = np.array(rows, np.int64)
        keys = [keys[row] for row in rows]
        del rows
    offsets = offsets_of(np.fromiter(map(len, keys), np.int64, len(keys)))
    # bytes.join needs 80 bytes for each of its items while it runs.
    blob = b"".join([b"".join(keys[i : i + _JOIN_ROWS]) for i in range(0, len(keys), _JOIN_ROWS)])
    # Millions of small objects: they must not be there next to two copies of what they say.
    keys.clear()
    members.keys.clear()
    path = Strings(blob.replace(b"\0", b"/"), offsets)
    del blob
    _check_parents(path, blocked, members.layer)
    return order, path


def _sorted(members: Members, rows: list[int], warn: Callable[[str], None]) -> tuple[list[int], NDArray[np.bool_]]:
    """Return the rows in canonical order, and for each whether its path was ever anything but a folder."""
    keys, kind = members.keys, members.columns["kind"]
    rows.sort(key=keys.__getitem__)
    order = rows
    ordered = [keys[row] for row in order]
    equal = np.fromiter(map(operator.eq, ordered, islice(ordered, 1, None)), np.bool_, max(0, len(order) - 1))
    blocked = _is_entry_but_folder(kind[order])
    if not equal.any():
        return order, blocked
    del ordered
    drop = np.zeros(len(order), np.bool_)
    linked = np.unique(members.columns["link"][kind == _HARDLINK]).tolist()
    targets = {path_key(members.links[i]) for i in linked}
    for start, end in _runs(equal):
        group = order[start:end]
        path = keys[group[0]].replace(b"\0", b"/")
        entries = [row for row in group if kind[row] < _WHITEOUT]
        other = any(kind[row] != _DIR for row in entries)
        marks = [[row for row in group if kind[row] == mark][-1:] for mark in (_OPAQUE, _WHITEOUT)]
        if other and marks[0]:
            raise UnsafeEntry(members.layer, path, "not a folder, but marked opaque as one")
        if len(entries) > 1 and other:
            if keys[group[0]] in targets and _differ(members.columns, entries):
                # Which of them the link means depends on the order, and merging does not know it.
                raise UnsafeEntry(members.layer, path, "replaced within the layer while hard links name it")
            warn(f"{show_path(path)}: {len(entries)} times in the layer, the last one counts")
        chosen = marks[0] + marks[1] + entries[-1:]
        order[start : start + len(chosen)] = chosen
        drop[start + len(chosen) : end] = True
        blocked[start:end] = other
    return [row for row, gone in zip(order, drop.tolist(), strict=True) if not gone], blocked[~drop]


def _differ(columns: dict[str, NDArray[Any]], rows: list[int]) -> bool:
    """Return whether ``rows`` are anything but the same entry written again (elsewhere in the tar)."""
    places = ("offset", "sparse")
    return any(len(np.unique(column[rows], axis=0)) > 1 for name, column in columns.items() if name not in places)


def _check_parents(path: Strings, blocked: NDArray[np.bool_], layer: str) -> None:
    """Refuse names below a path that is not, or was not all the time, a folder.

    The kernel, the runtimes and we would each take such a layer differently; it is the old trick of a
    parent swapped for a symlink between two entries. In canonical order all that lies below a path
    follows it, so looking at the next one is enough.
    """
    lengths = path.lengths
    rows = np.flatnonzero(blocked[:-1] & (lengths[1:] > lengths[:-1]))
    slashes = np.frombuffer(path.blob, np.uint8)[path.offsets[rows + 1] + lengths[rows]] == ord("/")
    for row in rows[slashes].tolist():
        parent, child = path[row], path[row + 1]
        if child.startswith(parent):
            why = f"not a folder (at some time in the layer), but has {show_path(child)} below it"
            raise UnsafeEntry(layer, parent, why)


def _is_entry_but_folder(kind: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return np.less(kind, _WHITEOUT) & np.not_equal(kind, _DIR)


def _runs(equal: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each run of equal keys; ``equal[i]`` says that key i + 1 equals key i."""
    edge = np.diff(np.concatenate(([False], equal, [False])).astype(np.int8))
    starts, ends = np.flatnonzero(edge == 1), np.flatnonzero(edge == -1)
    yield from zip(starts.tolist(), (ends + 1).tolist(), strict=True)
