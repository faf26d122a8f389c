"""Directories as EROFS wants them: sorted dirents with ``.`` and ``..`` among them, cut into blocks.

A block holds its dirents (12 bytes each) and then their names, one after the other; no entry spans two
blocks. Both the entries in a block and the blocks of a directory rise by name, as unsigned bytes, because
the kernel searches them by bisection (``fs/erofs/namei.c``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layerkit.formats.erofs import format as f
from layerkit.model.strings import Strings, offsets_of

_DOT, _DOTDOT = -1, -2
_ROWS_AT_ONCE = 1 << 15


@dataclass(frozen=True, slots=True, eq=False)
class DirPlan:
    """The dirents of all directories, in the order of their directories' rows, ``e`` in all.

    Attributes:
        names: the names that ``row`` points to.
        row: int32 (e,): the row of the name; -1 for ``.``, -2 for ``..``.
        owner: int32 (d,): the row of each directory's own name.
        parent: int32 (n,): of the names; -1 for the root.
        block_first: int64 (b + 1,): first dirent of each block.
        dir_first: int64 (d + 1,): first block of each directory.
        tail: int64 (d,): bytes used in each directory's last block.
        dir_of_block: int32 (b,): the directory of each block.
        block_bits: log2 of the block size.
    """

    names: Strings
    row: NDArray[np.int32]
    owner: NDArray[np.int32]
    parent: NDArray[np.int32]
    block_first: NDArray[np.int64]
    dir_first: NDArray[np.int64]
    tail: NDArray[np.int64]
    dir_of_block: NDArray[np.int32]
    block_bits: int

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Return int64 (d,): ``i_size`` of each directory."""
        return ((np.diff(self.dir_first) - 1) << self.block_bits) + self.tail

    def blocks(
        self, chosen: NDArray[np.int64], nid: NDArray[np.uint32], file_type: NDArray[np.uint8]
    ) -> Iterator[bytes]:
        """Yield the bytes of the blocks ``chosen`` (rising), without padding.

        Args:
            chosen: rows of blocks.
            nid: uint32 (n,), of each name's inode.
            file_type: uint8 (n,), the dirent type of each name.
        """
        lengths = self.names.lengths
        all_counts = self.block_first[chosen + 1] - self.block_first[chosen]
        rows_before = np.cumsum(all_counts)
        at = 0
        while at < len(chosen):
            done = int(rows_before[at - 1]) if at else 0
            upto = max(at + 1, int(np.searchsorted(rows_before, done + _ROWS_AT_ONCE, "right")))
            blocks, counts, at = chosen[at:upto], all_counts[at:upto], upto
            starts = np.cumsum(counts) - counts
            places = np.arange(int(counts.sum()), dtype=np.int64)
            row = self.row[places + np.repeat(self.block_first[blocks] - starts, counts)]
            special = np.flatnonzero(row < 0)
            owner = np.repeat(self.owner[self.dir_of_block[blocks]], counts)[special]
            dotdot = row[special] == _DOTDOT
            target = row.copy()
            target[special] = np.where(dotdot, np.maximum(self.parent[owner], 0), owner)
            length = lengths.take(row, mode="clip")
            length[special] = 1 + dotdot
            text_at = offsets_of(length)
            first_text = text_at[starts]
            dirents = np.zeros(len(row), f.DIRENT)
            dirents["nid"] = nid[target]
            dirents["nameoff"] = text_at[:-1] - np.repeat(first_text - counts * f.DIRENT_BYTES, counts)
            dirents["type"] = file_type[target]
            source = self.names.offsets[:-1].take(row, mode="clip")
            source[special] = 0
            places = np.arange(int(text_at[-1]), dtype=np.int64) + np.repeat(source - text_at[:-1], length)
            # The two names that are in no blob may read past its end here; they are overwritten below.
            text = np.frombuffer(self.names.blob or b".", np.uint8).take(places, mode="clip")
            text[text_at[special]] = ord(".")
            text[text_at[special[dotdot]] + 1] = ord(".")
            heads, texts = dirents.tobytes(), text.tobytes()
            ends = np.append(first_text[1:], text_at[-1]).tolist()
            for start, count, a, b in zip(starts.tolist(), counts.tolist(), first_text.tolist(), ends, strict=True):
                yield heads[start * f.DIRENT_BYTES : (start + count) * f.DIRENT_BYTES] + texts[a:b]


def plan(names: Strings, parent: NDArray[np.int32], is_dir: NDArray[np.bool_], block_bits: int) -> DirPlan:
    """Return the dirents of a tree of names.

    Args:
        names: n strings; row 0 is the root, siblings rise by their bytes from row to row.
        parent: int32 (n,), row of each name's directory, below the name's own; -1 for the root.
        is_dir: bool (n,).
        block_bits: log2 of the block size.
    """
    owner = np.flatnonzero(is_dir).astype(np.int32)
    dirs, n = len(owner), len(names)
    dir_of_row = np.full(n, -1, np.int32)
    dir_of_row[owner] = np.arange(dirs, dtype=np.int32)
    belongs = dir_of_row[parent[1:]]
    order = np.argsort(belongs, kind="stable")
    belongs = belongs[order]
    order += 1
    group = _before_dots(names)[order]
    children = np.bincount(belongs, minlength=dirs)
    first_child = np.cumsum(children) - children
    first = first_child + 2 * np.arange(dirs)
    row = np.empty(n - 1 + 2 * dirs, np.int32)
    # A child moves behind `.` and `..` unless it sorts before them ("+", "-x" and such do).
    place = np.arange(n - 1) + 2 * belongs
    place += group >= 1
    place += group >= 2
    row[place] = order
    before_dot = np.bincount(belongs[group == 0], minlength=dirs)
    between = np.bincount(belongs[group == 1], minlength=dirs)
    row[first + before_dot] = _DOT
    row[first + before_dot + between + 1] = _DOTDOT

    width = names.lengths.take(row, mode="clip")
    width[first + before_dot] = 1
    width[first + before_dot + between + 1] = 2
    ends = offsets_of(width + f.DIRENT_BYTES)
    bounds = np.append(first, len(row))
    block_first, dir_first = _cut(ends, bounds, 1 << block_bits)
    last = dir_first[1:] - 1
    return DirPlan(
        names=names,
        row=row,
        owner=owner,
        parent=parent,
        block_first=block_first,
        dir_first=dir_first,
        tail=ends[block_first[last + 1]] - ends[block_first[last]],
        dir_of_block=np.repeat(np.arange(dirs, dtype=np.int32), np.diff(dir_first)),
        block_bits=block_bits,
    )


def _before_dots(names: Strings) -> NDArray[np.uint8]:
    """Return uint8 (n,): 0 for names before ``.``, 1 for those between ``.`` and ``..``, else 2."""
    blob = np.frombuffer(names.blob + b"\xff\xff", np.uint8)
    start = names.offsets[:-1]
    one = blob[start]
    between = (one == ord(".")) & (names.lengths > 1) & (blob[start + 1] < ord("."))
    group = np.full(len(names), 2, np.uint8)
    group[between] = 1
    group[one < ord(".")] = 0
    return group


def _cut(
    ends: NDArray[np.int64], bounds: NDArray[np.int64], block: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (first dirent of each block and the end, first block of each directory and the end)."""
    totals = ends[bounds[1:]] - ends[bounds[:-1]]
    big = np.flatnonzero(totals > block)
    counts = np.ones(len(bounds) - 1, np.int64)
    cuts = []
    for place in big.tolist():
        at, end = int(bounds[place]), int(bounds[place + 1])
        firsts = []
        while at < end:
            firsts.append(at)
            window = ends[at : at + block // f.DIRENT_BYTES + 2]
            at = min(end, at + int(np.searchsorted(window, window[0] + block, "right")) - 1)
        counts[place] = len(firsts)
        cuts.append(np.array(firsts[1:], np.int64))
    block_first = np.concatenate([bounds, *cuts])
    block_first.sort()
    return block_first, offsets_of(counts)
