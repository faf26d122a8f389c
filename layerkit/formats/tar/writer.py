"""Tar headers from values, always the same bytes for the same values (POSIX.1-2017, pax Interchange Format).

A plain ustar header where everything fits, one with a PAX header before it where not. What a reader is told:
names that are not ASCII, or longer than the field, by ``path`` and ``linkpath``; ids above the octal field by
``uid`` and ``gid``; times with a fraction, or before 1970, by ``mtime``; xattrs by ``SCHILY.xattr.NAME`` with
the value's bytes as they are. Names that are no UTF-8 are written raw under ``hdrcharset=BINARY``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from layerkit.model.entry import Kind, XattrSet
from layerkit.model.errors import LossyResult, show_path

BLOCK = 512
END = bytes(2 * BLOCK)
"""What every archive ends with."""

TYPEFLAG = {
    Kind.REG: b"0", Kind.HARDLINK: b"1", Kind.SYMLINK: b"2", Kind.CHAR: b"3", Kind.BLOCK: b"4", Kind.DIR: b"5",
    Kind.FIFO: b"6",
}  # fmt: skip

_NAME_BYTES = 100
_OCTAL_7, _OCTAL_11 = 1 << 21, 1 << 33
_MAGIC = b"ustar\x0000"
_BLANK_SUM = b"        "
_OWNER_NAMES = bytes(64)
_REST = bytes(155 + 12)
_NO_DEVICE = b"0000000\x000000000\0"
_PAX_NAME = b"././@PaxHeader".ljust(_NAME_BYTES, b"\0") + b"0000644\x000000000\x000000000\0"
_PAX_REST = b"00000000000\0" + _BLANK_SUM + b"x" + bytes(_NAME_BYTES) + _MAGIC + _OWNER_NAMES + _NO_DEVICE + _REST


def padding(size: int) -> bytes:
    """Return the zeros that fill ``size`` bytes up to whole blocks."""
    return bytes(-size % BLOCK)


def record(key: bytes, value: bytes) -> bytes:
    """Return one PAX record: its own length in decimal, a blank, ``key=value`` and a newline."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    # The number counts itself: one digit more may make it one longer again.
    length = rest + len(str(length))
    return b"%d %b=%b\n" % (length, key, value)


def decimal_time(seconds: int, nanoseconds: int) -> bytes:
    """Return a time as PAX writes it, exactly: ``-1.5`` for (-2, 500000000)."""
    total = seconds * 1_000_000_000 + nanoseconds
    whole, fraction = divmod(abs(total), 1_000_000_000)
    text = b"%d.%09d" % (whole, fraction)
    return (b"-" if total < 0 else b"") + text.rstrip(b"0").rstrip(b".")


def xattr_records(xattrs: XattrSet, path: bytes = b"") -> bytes:
    """Return the PAX records of ``xattrs``; ``path`` is for the message.

    Raises:
        LossyResult: a name with ``=`` in it, which ends a PAX keyword.
    """
    for name, _ in xattrs:
        if b"=" in name:
            raise LossyResult(path, f"the xattr {show_path(name)} has '=' in its name, which a tar cannot hold")
    return b"".join([record(b"SCHILY.xattr." + name, value) for name, value in xattrs])


def pax_header(records: bytes) -> bytes:
    """Return the header of type ``x`` over ``records``, its checksum still blank, with them and padding."""
    return b"%b%011o\0%b%b%b" % (_PAX_NAME, len(records), _PAX_REST, records, padding(len(records)))


def blank_header(
    name: bytes,
    kind: Kind,
    *,
    perm: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    size: int = 0,
    mtime: int = 0,
    mtime_ns: int = 0,
    link: bytes = b"",
    major: int = 0,
    minor: int = 0,
    records: bytes = b"",
) -> bytes:
    """As :func:`header`, with blanks in place of the checksums, which :func:`seal` writes for many at once.

    Every result is whole blocks: the entry's header is the last of them, a PAX header the first.
    """
    if kind == Kind.DIR:
        name = name + b"/" if name else b"./"
    pax = b""
    if len(name) > _NAME_BYTES or not name.isascii():
        pax = record(b"path", name)
    if link and (len(link) > _NAME_BYTES or not link.isascii()):
        pax += record(b"linkpath", link)
    if pax and not (_is_utf8(name) and _is_utf8(link)):
        pax = record(b"hdrcharset", b"BINARY") + pax
    if uid >= _OCTAL_7:
        pax, uid = pax + record(b"uid", b"%d" % uid), 0
    if gid >= _OCTAL_7:
        pax, gid = pax + record(b"gid", b"%d" % gid), 0
    if size >= _OCTAL_11:
        pax, size = pax + record(b"size", b"%d" % size), 0
    if mtime_ns or not 0 <= mtime < _OCTAL_11:
        pax += record(b"mtime", decimal_time(mtime, mtime_ns))
        mtime = min(max(mtime, 0), _OCTAL_11 - 1)
    pax += records
    device = b"%07o\0%07o\0" % (major, minor) if major or minor else _NO_DEVICE
    return b"%b%b%07o\0%07o\0%07o\0%011o\0%011o\0%b%b%b%b%b%b%b" % (
        pax_header(pax) if pax else b"",
        name[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0"),
        perm, uid, gid, size, mtime,
        _BLANK_SUM, TYPEFLAG[kind],
        link[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0"),
        _MAGIC, _OWNER_NAMES, device, _REST,
    )  # fmt: skip


def seal(headers: Sequence[bytes], data: Sequence[bytes]) -> bytearray:
    """Return each header of :func:`blank_header` with its data (whole blocks) after it, checksums written."""
    lengths = np.fromiter(map(len, headers), np.int64, len(headers)) // BLOCK
    tails = np.fromiter(map(len, data), np.int64, len(data)) // BLOCK
    ends = np.cumsum(lengths + tails)
    sealed = bytearray().join(part for pair in zip(headers, data, strict=True) for part in pair)
    blocks = np.frombuffer(sealed, np.uint8).reshape(-1, BLOCK)
    first = ends - lengths - tails
    rows = np.concatenate([first + lengths - 1, first[lengths > 1]])
    sums = blocks[rows].sum(axis=1, dtype=np.int64)
    field = np.empty((len(rows), 8), np.uint8)
    field[:, :6] = (sums[:, None] >> np.arange(15, -1, -3) & 7) + ord("0")
    field[:, 6:] = (0, ord(" "))
    blocks[rows, 148:156] = field
    return sealed


def header(
    name: bytes,
    kind: Kind,
    *,
    perm: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    size: int = 0,
    mtime: int = 0,
    mtime_ns: int = 0,
    link: bytes = b"",
    major: int = 0,
    minor: int = 0,
    xattrs: XattrSet = (),
    records: bytes = b"",
) -> bytes:
    """Return the header of one entry, with the PAX header before it where its values need one.

    Args:
        name: the path, relative and without a slash at its end; ``b""`` is the root.
        kind: what it is; not WHITEOUT or OPAQUE, which are files with special names.
        perm: permission bits.
        uid: owner.
        gid: group.
        size: bytes of data that the caller writes after the header, with :func:`padding`.
        mtime: seconds since 1970, may be negative.
        mtime_ns: nanoseconds to add.
        link: target of a SYMLINK or HARDLINK.
        major: of a device.
        minor: of a device.
        xattrs: kernel names and values.
        records: more PAX records, made by :func:`record`.

    Raises:
        LossyResult: an xattr name that PAX cannot write.
    """
    blank = blank_header(
        name, kind, perm=perm, uid=uid, gid=gid, size=size, mtime=mtime, mtime_ns=mtime_ns, link=link, major=major,
        minor=minor, records=xattr_records(xattrs, name) + records,
    )  # fmt: skip
    return bytes(seal([blank], [b""]))


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True
