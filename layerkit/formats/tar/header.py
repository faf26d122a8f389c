"""The 512-byte tar header (POSIX.1-2008 pax, "ustar Interchange Format", and GNU tar's tar.h).

Thousands of headers are decoded at once as columns; what is not in the common octal form goes through
:func:`number` one by one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from layerkit.model.entry import Kind
from layerkit.model.errors import InvalidImage, UnsafeEntry

BLOCK = 512
ZERO_BLOCK = bytes(BLOCK)

# Field positions (offset, end) in a header block.
NAME, MODE, UID, GID = (0, 100), (100, 108), (108, 116), (116, 124)
SIZE, MTIME, CHKSUM, LINK = (124, 136), (136, 148), (148, 156), (157, 257)
TYPE, MAGIC, MAJOR, MINOR = 156, (257, 263), (329, 337), (337, 345)
PREFIX, STAR_PREFIX, STAR_TRAILER = (345, 500), (345, 476), (508, 512)
_NUMBERS = {"mode": MODE, "uid": UID, "gid": GID, "mtime": MTIME, "size": SIZE}

TYPEFLAG = {
    Kind.REG: b"0", Kind.HARDLINK: b"1", Kind.SYMLINK: b"2", Kind.CHAR: b"3", Kind.BLOCK: b"4", Kind.DIR: b"5",
    Kind.FIFO: b"6",
}  # fmt: skip
"""The type flag that each kind is written with."""

KIND_OF_FLAG = np.zeros(256, np.uint8)
"""Kind of each type flag; 0 for those that layers must not hold (or that are not members)."""
KIND_OF_FLAG[[flag[0] for flag in TYPEFLAG.values()]] = list(TYPEFLAG)
KIND_OF_FLAG[list(b"\x007S")] = Kind.REG

_NUL, _SPACE, _ZERO = 0, 0x20, 0x30
_POWERS = 8 ** np.arange(20, -1, -1, dtype=np.int64)
_CHECK_ROWS = 256  # what stays in a processor's cache with its intermediate results
_EVEN_BYTES = np.uint64(0x00FF00FF00FF00FF)


class Headers(NamedTuple):
    """Columns decoded from ``k`` header blocks; PAX records are not applied yet.

    Attributes:
        flag: uint8 (k,), the type flag.
        name: k names as written, prefix included.
        link: k link names as written, b"" for kinds without one.
        numbers: mode, uid, gid, mtime and size, int64 (k,), whatever the header says, not yet checked for range;
            major and minor are 0 for all but devices.
        ustar: bool (k,), whether the magic is one of ustar's or GNU's.
    """

    flag: NDArray[np.uint8]
    name: list[bytes]
    link: list[bytes]
    numbers: dict[str, NDArray[np.int64]]
    ustar: NDArray[np.bool_]


def number(field: bytes) -> int:
    """Return the value of a numeric field: octal, or base-256 if the first byte's high bit is set.

    The form is the intersection of what GNU tar, Go and Python read: spaces before the digits, a space or
    NUL (or the field's end) after them. An unused field (spaces and NULs) is 0.

    Raises:
        ValueError: anything else.
    """
    first = field[0]
    if first & 0x80:
        # Two's complement over the bits after the marker bit: 0x80.. is positive, 0xff.. negative.
        value = int.from_bytes(bytes((first & 0x7F,)) + field[1:], "big")
        return value - (1 << (8 * len(field) - 1)) if first & 0x40 else value
    text = field.lstrip(b" ")
    digits = text[: len(text) - len(text.lstrip(b"01234567"))]
    rest = text[len(digits) :]
    # After a NUL nobody reads on; after a space there must be no second number.
    if rest.partition(b"\0")[0].strip(b" ") or (not digits and rest.strip(b" \0")):
        raise ValueError(f"not an octal number: {field!r}")
    return int(digits, 8) if digits else 0


def _column(blocks: NDArray[np.uint8], field: tuple[int, int], what: str, where: str) -> NDArray[np.int64]:
    """Return int64 (k,): the numeric ``field`` of uint8 (k, 512) ``blocks``."""
    raw = blocks[:, slice(*field)]
    value, plain = _octal(raw, raw.shape[1] - 1)
    # Several writers end the digits with a space AND a NUL.
    for row in np.flatnonzero(~plain).tolist():
        try:
            value[row] = number(raw[row].tobytes())
        except (ValueError, OverflowError) as e:
            name = blocks[row, slice(*NAME)].tobytes().partition(b"\0")[0]
            raise UnsafeEntry(where, name, f"its header's {what} is damaged or out of range: {e}") from e
    return value


def _octal(raw: NDArray[np.uint8], width: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the values of fields whose first ``width`` bytes are digits, and for which that holds."""
    digit = raw[:, :width] - _ZERO  # uint8: everything below "0" wraps to a large value
    tail = raw[:, width:]
    plain = (digit < 8).all(axis=1) & ((tail == _NUL) | (tail == _SPACE)).all(axis=1)
    return digit.astype(np.int64) @ _POWERS[-width:], plain


def verify_checksums(blocks: NDArray[np.uint8], offsets: NDArray[np.int64], where: str) -> None:
    """Check the checksum of each of the (k, 512) ``blocks``, found at ``offsets`` in the tar.

    Old writers summed signed bytes, so either sum is right.

    Raises:
        InvalidImage: a wrong checksum.
    """
    for first in range(0, len(blocks), _CHECK_ROWS):
        part = slice(first, first + _CHECK_ROWS)
        _verify(blocks[part], offsets[part], where)


def _verify(blocks: NDArray[np.uint8], offsets: NDArray[np.int64], where: str) -> None:
    words = np.ascontiguousarray(blocks).view("<u8")
    # Four 16-bit lanes per word; 128 bytes of at most 255 fit a lane.
    lanes = ((words & _EVEN_BYTES) + ((words >> np.uint64(8)) & _EVEN_BYTES)).sum(axis=1, dtype=np.uint64)
    total = lanes.view("<u2").reshape(-1, 4).sum(axis=1, dtype=np.int64)
    own = blocks[:, slice(*CHKSUM)]
    total += 8 * _SPACE - own.sum(axis=1, dtype=np.int64)
    stated = _checksum_fields(own)
    for row in np.flatnonzero(total != stated).tolist():
        other = np.delete(blocks[row], np.arange(*CHKSUM))
        signed = int(total[row]) - 256 * int((other >= 0x80).sum())
        if signed != stated[row]:
            raise InvalidImage(
                f"{where}: the tar header at byte {int(offsets[row])} has checksum {int(total[row])}, "
                f"its field says {int(stated[row])}; the layer is damaged or is no tar"
            )


def _checksum_fields(raw: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return int64 (k,): the stated sums, -1 for one that is no number."""
    value, plain = _octal(raw, 6)
    for row in np.flatnonzero(~plain).tolist():
        try:
            value[row] = number(raw[row].tobytes())
        except (ValueError, OverflowError):
            value[row] = -1
    return value


def decode(blocks: NDArray[np.uint8], where: str) -> Headers:
    """Return the columns of uint8 (k, 512) ``blocks``, whose checksums were verified.

    Raises:
        InvalidImage: a numeric field that is none, or beyond 64 bits.
    """
    flag = blocks[:, TYPE].copy()
    magic = np.ascontiguousarray(blocks[:, slice(*MAGIC)]).view("S6").ravel()
    posix = (magic == b"ustar") & (blocks[:, MAGIC[1] - 1] == 0)
    gnu = magic == b"ustar "
    names = _texts(blocks[:, slice(*NAME)])
    for row in np.flatnonzero(posix & (blocks[:, PREFIX[0]] != 0)).tolist():
        # star puts times where ustar has the end of the prefix, and says so at the block's end.
        star = blocks[row, slice(*STAR_TRAILER)].tobytes() == b"tar\0"
        prefix = blocks[row, slice(*(STAR_PREFIX if star else PREFIX))].tobytes().partition(b"\0")[0]
        names[row] = prefix + b"/" + names[row]
    linked = np.flatnonzero((flag == ord("1")) | (flag == ord("2")))
    links = [b""] * len(blocks)
    for row, text in zip(linked.tolist(), _texts(blocks[linked, slice(*LINK)]), strict=True):
        links[row] = text
    numbers = {name: np.zeros(len(blocks), np.int64) for name in ("major", "minor")}
    devices = np.flatnonzero((flag == ord("3")) | (flag == ord("4")))
    if len(devices):
        for name, field in (("major", MAJOR), ("minor", MINOR)):
            numbers[name][devices] = _column(blocks[devices], field, f"device {name}", where)
    numbers |= {name: _column(blocks, field, name, where) for name, field in _NUMBERS.items()}
    return Headers(flag, names, links, numbers, posix | gnu)


def _texts(raw: NDArray[np.uint8]) -> list[bytes]:
    """Return the rows of uint8 (k, width) as byte strings that end at their first NUL."""
    if not len(raw):
        return []
    block = np.ascontiguousarray(raw)
    texts: list[bytes] = block.view(f"S{raw.shape[1]}").ravel().tolist()  # strips NULs at the end only
    full = block != 0
    for row in np.flatnonzero((full[:, 1:] & ~full[:, :-1]).any(axis=1)).tolist():
        texts[row] = texts[row].partition(b"\0")[0]
    return texts
