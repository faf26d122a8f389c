"""Sparse files in tar: old GNU (type S), and GNU.sparse 0.0, 0.1 and 1.0 in PAX records (GNU tar manual, D.)."""

from __future__ import annotations

from collections.abc import Sequence

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


def version(records: Records, layer: str, path: bytes) -> tuple[int, int] | None:
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
        raise UnsafeEntry(
            layer, path, f"a sparse file of an unknown format {b'.'.join(stated).decode('ascii', 'replace')}"
        )
    return None


def real_size(records: Records, layer: str, path: bytes) -> int:
    """Return the logical size that ``records`` give a sparse file, in bytes.

    Raises:
        UnsafeEntry: none, or two that differ.
    """
    stated = {records[key] for key in (b"GNU.sparse.realsize", b"GNU.sparse.size") if records.get(key)}
    if len(stated) != 1:
        raise UnsafeEntry(layer, path, "a sparse file without one clear real size")
    return _number(stated.pop(), layer, path)


def pairs_of_map(text: bytes, layer: str, path: bytes, limits: Limits) -> list[Extent]:
    """Return the (offset, length) pairs of version 0.1's ``offset,length,...``."""
    limits.check("sparse_extents_per_file", (text.count(b",") + 1) // 2, f"{layer}: sparse extents of a file")
    return _pairs(text.split(b",") if text else [], layer, path)


def check_count(records: Records, count: int, layer: str, path: bytes) -> None:
    """Check that a version 0.0 or 0.1 map of ``count`` pairs has as many as it says.

    Raises:
        UnsafeEntry: it does not.
    """
    if records.get(b"GNU.sparse.numblocks") != b"%d" % count:
        raise UnsafeEntry(layer, path, f"a sparse map of {count} runs that claims another number")


def pairs_of_lines(lines: Sequence[bytes], layer: str, path: bytes) -> list[Extent]:
    """Return the pairs of version 1.0's numbers, one a line."""
    return _pairs(lines, layer, path)


def line_count(first: bytes, layer: str, path: bytes, limits: Limits) -> int:
    """Return how many lines follow the ``first`` one of a version 1.0 map."""
    count = _number(first, layer, path)
    limits.check("sparse_extents_per_file", count, f"{layer}: sparse extents of a file")
    return 2 * count


def old_first(block: bytes, layer: str, path: bytes) -> tuple[list[Extent], bool, int]:
    """Return an old GNU header's pairs, whether more blocks of them follow, and the file's real size."""
    pairs, ended = _old_pairs(block, _OLD_FIRST, _OLD_FIRST_COUNT, layer, path)
    more = block[_OLD_EXTENDED] != 0
    if more and ended:
        raise UnsafeEntry(layer, path, "a sparse map that ends and goes on")
    return pairs, more, _old_number(block[slice(*_OLD_REAL_SIZE)], layer, path)


def old_more(block: bytes, layer: str, path: bytes) -> tuple[list[Extent], bool]:
    """Return the pairs of an old GNU extension block, and whether another one follows."""
    pairs, ended = _old_pairs(block, 0, _OLD_MORE_COUNT, layer, path)
    more = block[_OLD_MORE_EXTENDED] != 0
    if more and ended:
        raise UnsafeEntry(layer, path, "a sparse map that ends and goes on")
    return pairs, more


def checked(pairs: list[Extent], stored: int, size: int, layer: str, path: bytes) -> tuple[Extent, ...] | None:
    """Return ``pairs`` without empty ones, neighbours joined; None if they leave no hole.

    Args:
        pairs: (offset, length) as written.
        stored: bytes of data in the archive.
        size: the file's logical size.
        layer: for errors.
        path: for errors.

    Raises:
        UnsafeEntry: runs that overlap, fall, reach beyond ``size`` or do not add up to ``stored``.
    """
    runs: list[Extent] = []
    end = total = 0
    for offset, length in pairs:
        if offset < end or offset + length > size:
            raise UnsafeEntry(
                layer,
                path,
                f"a sparse run of {length} bytes at {offset} overlaps the one before or ends beyond {size}",
            )
        total += length
        if length and runs and offset == end:
            runs[-1] = (runs[-1][0], runs[-1][1] + length)
        elif length:
            runs.append((offset, length))
        end = offset + length
    if total != stored:
        raise UnsafeEntry(layer, path, f"a sparse map of {total} bytes for {stored} bytes of data")
    return None if runs == [(0, size)] or size == 0 else tuple(runs)


def _pairs(numbers: Sequence[bytes], layer: str, path: bytes) -> list[Extent]:
    if len(numbers) % 2:
        raise UnsafeEntry(layer, path, "a sparse map with an odd number of values")
    values = [_number(text, layer, path) for text in numbers]
    return list(zip(values[::2], values[1::2], strict=True))


def _old_pairs(block: bytes, start: int, count: int, layer: str, path: bytes) -> tuple[list[Extent], bool]:
    pairs: list[Extent] = []
    for at in range(start, start + count * _PAIR, _PAIR):
        if block[at] == 0:  # an unused pair ends the map
            return pairs, True
        half = at + _PAIR // 2
        pairs.append((_old_number(block[at:half], layer, path), _old_number(block[half : at + _PAIR], layer, path)))
    return pairs, False


def _old_number(field: bytes, layer: str, path: bytes) -> int:
    try:
        value = tar_header.number(field)
    except ValueError as e:
        raise UnsafeEntry(layer, path, f"a damaged sparse map: {e}") from e
    if not 0 <= value < 1 << 63:
        raise UnsafeEntry(layer, path, f"a sparse map with the value {value}")
    return value


def _number(text: bytes, layer: str, path: bytes) -> int:
    if not text.isdigit() or len(text) > _MAX_DIGITS:
        raise UnsafeEntry(layer, path, f"a sparse map with the value {text[:40]!r}")
    value = int(text)
    if value >= 1 << 63:
        raise UnsafeEntry(layer, path, f"a sparse map with the value {value}")
    return value
