"""Sparse files in tar: old GNU (type S), and GNU.sparse 0.0, 0.1 and 1.0 in PAX records (GNU tar manual, D.)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerkit.formats.tar import header as tar_header
from layerkit.formats.tar.pax import SPARSE_MAP, Records
from layerkit.model.entry import Extent
from layerkit.model.errors import UnsafeEntry
from layerkit.model.limits import Limits

PREFIX = b"GNU.sparse."
_OLD_FIRST, _OLD_FIRST_COUNT, _OLD_EXTENDED, _OLD_REAL_SIZE = 386, 4, 482, (483, 495)
_OLD_MORE_COUNT, _OLD_MORE_EXTENDED = 21, 504
_PAIR = 24
_MAX_DIGITS = 20


@dataclass(frozen=True, slots=True)
class SparseFile:
    """A sparse file whose map is read.

    Attributes:
        layer: of the file, and its ``path``, for errors.
        limits: bounds.
    """

    layer: str
    path: bytes
    limits: Limits

    def refused(self, why: str) -> UnsafeEntry:
        """Return the error that says ``why`` the file is refused."""
        return UnsafeEntry(self.layer, self.path, why)

    def check_runs(self, count: int) -> None:
        """Raise if the file has more than the allowed number of runs."""
        self.limits.check("sparse_extents_per_file", count, f"{self.layer}: sparse extents of a file")

    def version(self, records: Records) -> tuple[int, int] | None:
        """Return the sparse format's version that ``records`` name, None for a plain file.

        Raises:
            UnsafeEntry: a version that is not known.
        """
        stated = records.get(b"GNU.sparse.major", b""), records.get(b"GNU.sparse.minor", b"")
        if stated == (b"1", b"0"):
            return 1, 0
        if stated in ((b"0", b"0"), (b"0", b"1")) or (stated == (b"", b"") and records.get(SPARSE_MAP)):
            return 0, 1
        if stated != (b"", b"") or any(key.startswith(PREFIX) for key in records):
            raise self.refused(f"a sparse file of an unknown format {b'.'.join(stated).decode('ascii', 'replace')}")
        return None

    def real_size(self, records: Records) -> int:
        """Return the logical size that ``records`` give the file, in bytes.

        Raises:
            UnsafeEntry: none, or two that differ.
        """
        stated = {records[key] for key in (b"GNU.sparse.realsize", b"GNU.sparse.size") if records.get(key)}
        if len(stated) != 1:
            raise self.refused("a sparse file without one clear real size")
        return self._number(stated.pop())

    def pairs_of_map(self, records: Records) -> list[Extent]:
        """Return the (offset, length) pairs of version 0.1's ``offset,length,...``.

        Raises:
            UnsafeEntry: they are not numbers, or not as many as ``records`` say.
        """
        text = records.get(SPARSE_MAP, b"")
        self.check_runs((text.count(b",") + 1) // 2)
        found = self.pairs(text.split(b",") if text else [])
        if records.get(b"GNU.sparse.numblocks") != b"%d" % len(found):
            raise self.refused(f"a sparse map of {len(found)} runs that claims another number")
        return found

    def pairs(self, numbers: Sequence[bytes]) -> list[Extent]:
        """Return the pairs that ``numbers`` are, an offset and a length by turns."""
        if len(numbers) % 2:
            raise self.refused("a sparse map with an odd number of values")
        values = [self._number(text) for text in numbers]
        return list(zip(values[::2], values[1::2], strict=True))

    def line_count(self, first: bytes) -> int:
        """Return how many lines follow the ``first`` one of a version 1.0 map."""
        count = self._number(first)
        self.check_runs(count)
        return 2 * count

    def old_first(self, block: bytes) -> tuple[list[Extent], bool, int]:
        """Return an old GNU header's pairs, whether more blocks of them follow, and the file's real size."""
        pairs, more = self._old_pairs(block, _OLD_FIRST, _OLD_FIRST_COUNT, _OLD_EXTENDED)
        return pairs, more, self._old_number(block[slice(*_OLD_REAL_SIZE)])

    def old_more(self, block: bytes) -> tuple[list[Extent], bool]:
        """Return the pairs of an old GNU extension block, and whether another one follows."""
        return self._old_pairs(block, 0, _OLD_MORE_COUNT, _OLD_MORE_EXTENDED)

    def checked(self, pairs: list[Extent], stored: int, size: int) -> tuple[Extent, ...] | None:
        """Return ``pairs`` without empty ones, neighbours joined; None if they leave no hole.

        Args:
            pairs: (offset, length) as written.
            stored: bytes of data in the archive.
            size: the file's logical size.

        Raises:
            UnsafeEntry: runs that overlap, fall, reach beyond ``size`` or do not add up to ``stored``.
        """
        runs: list[Extent] = []
        end = total = 0
        for offset, length in pairs:
            if offset < end or offset + length > size:
                raise self.refused(
                    f"a sparse run of {length} bytes at {offset} overlaps the one before or ends beyond {size}"
                )
            total += length
            if length and runs and offset == end:
                runs[-1] = (runs[-1][0], runs[-1][1] + length)
            elif length:
                runs.append((offset, length))
            end = offset + length
        if total != stored:
            raise self.refused(f"a sparse map of {total} bytes for {stored} bytes of data")
        return None if runs == [(0, size)] or size == 0 else tuple(runs)

    def _old_pairs(self, block: bytes, start: int, count: int, extended: int) -> tuple[list[Extent], bool]:
        pairs: list[Extent] = []
        more = block[extended] != 0
        for at in range(start, start + count * _PAIR, _PAIR):
            if block[at] == 0:  # an unused pair ends the map
                if more:
                    raise self.refused("a sparse map that ends and goes on")
                break
            half = at + _PAIR // 2
            pairs.append((self._old_number(block[at:half]), self._old_number(block[half : at + _PAIR])))
        return pairs, more

    def _old_number(self, field: bytes) -> int:
        try:
            value = tar_header.number(field)
        except ValueError as e:
            raise self.refused(f"a damaged sparse map: {e}") from e
        return self._in_range(value)

    def _number(self, text: bytes) -> int:
        if not text.isdigit() or len(text) > _MAX_DIGITS:
            raise self.refused(f"a sparse map with the value {text[:40]!r}")
        return self._in_range(int(text))

    def _in_range(self, value: int) -> int:
        if not 0 <= value < 1 << 63:
            raise self.refused(f"a sparse map with the value {value}")
        return value
