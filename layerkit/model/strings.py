"""A column of byte strings: one blob and its offsets."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray


def offsets_of(lengths: NDArray[np.integer] | NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return int64 (n + 1,): where each of n runs of these ``lengths`` begins, and where the last one ends."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


@dataclass(frozen=True, slots=True, eq=False)
class Strings(Sequence[bytes]):
    """``n`` byte strings held as ``blob[offsets[i]:offsets[i + 1]]``.

    Attributes:
        blob: every string's bytes, one after the other.
        offsets: int64, shape (n + 1,), in bytes, not falling, first 0, last ``len(blob)``.
    """

    blob: bytes
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, items: Iterable[bytes]) -> Strings:
        """Return the column that holds ``items`` in order."""
        rows = items if isinstance(items, list) else list(items)
        return cls(b"".join(rows), offsets_of(np.fromiter(map(len, rows), np.int64, len(rows))))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return int64, shape (n,): the length of each string in bytes."""
        return np.diff(self.offsets)

    def take(self, rows: NDArray[np.integer]) -> Strings:
        """Return the column of the strings at ``rows`` (any order, repeats allowed)."""
        starts = self.offsets[:-1][rows]
        lengths = self.lengths[rows]
        offsets = offsets_of(lengths)
        # Position of each output byte in the old blob: its string's start plus its place in the string.
        places = np.arange(int(offsets[-1]), dtype=np.int64)
        places += np.repeat(starts - offsets[:-1], lengths)
        return Strings(np.frombuffer(self.blob, np.uint8)[places].tobytes(), offsets)

    def tolist(self) -> list[bytes]:
        """Return the strings as a list."""
        blob, ends = self.blob, self.offsets.tolist()
        return [blob[a:b] for a, b in itertools.pairwise(ends)]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, row: int) -> bytes: ...
    @overload
    def __getitem__(self, row: slice) -> Strings: ...
    def __getitem__(self, row: int | slice) -> bytes | Strings:
        if isinstance(row, slice):
            return self.take(np.arange(*row.indices(len(self))))
        if row < 0:
            row += len(self)
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.blob[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.tolist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Strings):
            return NotImplemented
        return self.blob == other.blob and np.array_equal(self.offsets, other.offsets)

    __hash__ = None  # type: ignore[assignment]


EMPTY = Strings(b"", np.zeros(1, np.int64))
