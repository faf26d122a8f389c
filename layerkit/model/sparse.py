"""The runs of data of sparse files, as columns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layerkit.model.entry import Extent


@dataclass(frozen=True, slots=True, eq=False)
class SparseMaps:
    """Map ``i`` is the runs ``starts[i]:starts[i + 1]`` of (``offset``, ``length``).

    Runs of a map rise, do not overlap, and none is empty; a file that is all hole has none.

    Attributes:
        starts: int64, shape (maps + 1,): row of each map's first run.
        offset: int64, shape (runs,): where the run lies in the file, in bytes.
        length: int64, shape (runs,): its bytes.
    """

    starts: NDArray[np.int64]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]

    @classmethod
    def of(cls, maps: Iterable[Iterable[Extent]]) -> SparseMaps:
        """Return the columns that hold ``maps`` in order."""
        starts, runs = [0], list[Extent]()
        for extents in maps:
            runs.extend(extents)
            starts.append(len(runs))
        flat = np.array(runs, np.int64).reshape(-1, 2)
        return cls(np.array(starts, np.int64), flat[:, 0].copy(), flat[:, 1].copy())

    def __len__(self) -> int:
        return len(self.starts) - 1

    def extents(self, row: int) -> tuple[Extent, ...]:
        """Return the runs of map ``row`` as pairs of Python ints."""
        a, b = self.starts[row], self.starts[row + 1]
        return tuple(zip(self.offset[a:b].tolist(), self.length[a:b].tolist(), strict=True))

    def stored_bytes(self, row: int) -> int:
        """Return how many bytes map ``row`` stores, holes left out."""
        return int(self.length[self.starts[row] : self.starts[row + 1]].sum())


NONE = SparseMaps(np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))
