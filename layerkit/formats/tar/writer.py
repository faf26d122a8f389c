"""Tar headers from values, and the tar of an index: what the reader reads back as the same rows.

Equal values are equal bytes (POSIX.1-2017, pax Interchange Format). There is a plain ustar header where
everything fits, and a PAX header before it where not. What a reader is told there: names that are not ASCII, or
longer than the field, by ``path`` and ``linkpath``; ids above the octal field by ``uid`` and ``gid``; times with
a fraction, or before 1970, by ``mtime``; xattrs by ``SCHILY.xattr.NAME`` with the value's bytes as they are.
Names that are no UTF-8 are written raw under ``hdrcharset=BINARY``.

Entries come in canonical order with two exceptions that unpackers need: an opaque marker follows its
folder, and a hard link follows its target. Sparse files are written in the PAX 1.0 form, which both GNU tar
and Go's archive/tar read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from layerkit.formats.tar.header import BLOCK, TYPEFLAG
from layerkit.model.entry import OPAQUE_NAME, WHITEOUT_PREFIX, Entry, Kind, XattrSet
from layerkit.model.errors import InvalidImage, LossyResult, show_path
from layerkit.model.index import Index

END = bytes(2 * BLOCK)
"""What every archive ends with."""

Content = Callable[[int], Iterable[memoryview]]
"""Gives the stored bytes of a row (a sparse file's runs one after the other); a piece is good until the next."""

_ROWS_AT_ONCE = 1024
_PIECE_BYTES = 1 << 20
_DIRECT_BYTES = 1 << 16  # pieces from here on are passed on as they are, smaller ones are gathered
_FILE_NAME_BYTES = 255
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


def blank_header(entry: Entry, size: int, records: bytes = b"") -> bytes:
    """Return the header of one entry, its checksum blank: :func:`seal` writes those of many at once.

    A PAX header goes before it where its values need one. Every result is whole blocks: the entry's header is the
    last of them, a PAX header the first.

    Args:
        entry: not WHITEOUT or OPAQUE, which are files with special names; its xattrs are not looked at.
        size: bytes of data that follow the header.
        records: more PAX records, made by :func:`record`.
    """
    name, kind, perm, uid, gid, mtime, mtime_ns, _, major, minor, link = entry[:11]
    if kind == Kind.DIR:
        name = name + b"/" if name else b"./"
    pax = b""
    if len(name) > _NAME_BYTES or not name.isascii():
        pax = record(b"path", name)
    if link and (len(link) > _NAME_BYTES or not link.isascii()):
        pax += record(b"linkpath", link)
    if pax:
        try:
            (name + b"/" + link).decode()
        except UnicodeDecodeError:
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


SPARSE_1_0 = record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.minor", b"0")
"""What the PAX header of a sparse file in the 1.0 form says besides its real size."""


def layer_tar(index: Index, content: Content) -> Iterator[bytes | bytearray | memoryview]:
    """Yield the tar of ``index`` in pieces; each is good until the next is asked for.

    Args:
        index: rows in canonical order. Its ``offset`` and ``sha256`` are not looked at.
        content: called once for each regular file that stores bytes, in the order of the tar.

    Raises:
        LossyResult: an xattr or a whiteout that a tar cannot hold.
        InvalidImage: hard links in a circle, or ``content`` that is not as long as the index says.
    """
    return _gathered(part.data for part in layer_parts(index, content))


class Part(NamedTuple):
    """A piece of a tar: what ``row`` stores, or else headers and padding; at the end of the tar row is -1."""

    row: int
    is_content: bool
    data: bytes | bytearray | memoryview


def order(index: Index) -> list[int]:
    """Return the rows of ``index`` in the order they are written in.

    Raises:
        InvalidImage: hard links that lead in a circle.
    """
    kind = index.kind
    rows = list(range(len(index)))
    for row in np.flatnonzero(kind == Kind.OPAQUE).tolist():
        path, at = index.path[row], row
        while at + 1 < len(index) and index.path[at + 1] == path:
            rows[at] = rows[at + 1]
            at += 1
        rows[at] = row
    links = np.flatnonzero(kind == Kind.HARDLINK).tolist()
    if not links:
        return rows
    wanted = {index.links[int(index.link[row])] for row in links}
    place_of = {
        path: row for row, path in enumerate(index.path.tolist()) if path in wanted and kind[row] < Kind.WHITEOUT
    }
    written: set[int] = set()
    waiting: dict[int, list[int]] = defaultdict(list)
    out: list[int] = []
    for row in rows:
        if kind[row] == Kind.HARDLINK:
            # A target that is not in this layer is in one below it.
            target = place_of.get(index.links[int(index.link[row])])
            if target is not None and target not in written:
                waiting[target].append(row)
                continue
        ready = [row]
        while ready:
            row = ready.pop(0)
            out.append(row)
            written.add(row)
            ready += waiting.pop(row, ())
    if waiting:
        row = min(min(late) for late in waiting.values())
        raise InvalidImage(f"{show_path(index.path[row])}: hard links that lead back to themselves")
    return out


def stored_bytes(index: Index, row: int) -> int:
    """Return how many bytes of data the file at ``row`` has in a tar."""
    if index.kind[row] != Kind.REG:
        return 0
    hole_map = int(index.sparse[row])
    return int(index.size[row]) if hole_map < 0 else index.sparse_maps.stored_bytes(hole_map)


def layer_parts(index: Index, content: Content) -> Iterator[Part]:
    """Yield the tar of :func:`layer_tar` with what each piece is; the files' pieces are not joined."""
    rows = order(index)
    records: dict[int, bytes] = {}
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        batch = rows[start : start + _ROWS_AT_ONCE]
        headers, maps, stored = list[bytes](), list[bytes](), list[int]()
        for row in batch:
            hole_map = _sparse_map(index, row)
            stored.append(stored_bytes(index, row))
            headers.append(_header(index, row, len(hole_map) + stored[-1], bool(hole_map), records))
            maps.append(hole_map)
        sealed = memoryview(seal(headers, maps))
        done = 0
        for row, header, hole_map, size in zip(batch, headers, maps, stored, strict=True):
            end = done + len(header) + len(hole_map)
            yield Part(row, False, sealed[done:end])
            done = end
            if size:
                for piece in _checked(content(row), size, index, row):
                    yield Part(row, True, piece)
                yield Part(row, False, padding(size))
    yield Part(-1, False, END)


def _header(index: Index, row: int, size: int, sparse: bool, cache: dict[int, bytes]) -> bytes:
    kind, path = Kind(int(index.kind[row])), index.path[row]
    if kind >= Kind.WHITEOUT:
        return blank_header(Entry(marker(path, kind), Kind.REG, perm=0), 0)
    xattr = int(index.xattr[row])
    records = cache.get(xattr)
    if records is None:
        records = cache[xattr] = xattr_records(index.xattr_sets[xattr], path)
    if sparse:
        records += SPARSE_1_0 + record(b"GNU.sparse.realsize", b"%d" % index.size[row])
    link = int(index.link[row])
    entry = Entry(
        path, kind, int(index.perm[row]), int(index.uid[row]), int(index.gid[row]), int(index.mtime[row]),
        int(index.mtime_ns[row]), 0, int(index.major[row]), int(index.minor[row]),
        b"" if link < 0 else index.links[link],
    )  # fmt: skip
    return blank_header(entry, size, records)


def marker(path: bytes, kind: Kind) -> bytes:
    """Return the name of the file that is a whiteout of ``path``, or the marker of an opaque folder.

    Raises:
        LossyResult: a name too long for it.
    """
    if kind is Kind.OPAQUE:
        return path + b"/" + OPAQUE_NAME if path else OPAQUE_NAME
    parent, slash, name = path.rpartition(b"/")
    if len(WHITEOUT_PREFIX) + len(name) > _FILE_NAME_BYTES:
        raise LossyResult(path, "its name is too long for a whiteout, which puts '.wh.' before it (255 bytes)")
    return parent + slash + WHITEOUT_PREFIX + name


def _sparse_map(index: Index, row: int) -> bytes:
    """Return the map that stands before a sparse file's data, in whole blocks; b"" for all others."""
    hole_map = int(index.sparse[row])
    if hole_map < 0 or index.kind[row] != Kind.REG:
        return b""
    runs, size = list(index.sparse_maps.extents(hole_map)), int(index.size[row])
    if not runs or sum(runs[-1]) < size:
        # GNU tar ends the file where the last run ends, so a hole at the end gets a run of no bytes.
        runs.append((size, 0))
    text = b"%d\n" % len(runs) + b"".join(b"%d\n%d\n" % run for run in runs)
    return text + padding(len(text))


def _checked(pieces: Iterable[memoryview], size: int, index: Index, row: int) -> Iterator[memoryview]:
    seen = 0
    for piece in pieces:
        seen += len(piece)
        if seen > size:
            break
        yield piece
    if seen != size:
        more = "more than " if seen > size else ""
        raise InvalidImage(
            f"{show_path(index.path[row])}: {more}{min(seen, size)} bytes of content, want {size}; "
            "the layer it comes from is damaged"
        )


def _gathered(pieces: Iterable[bytes | bytearray | memoryview]) -> Iterator[bytes | bytearray | memoryview]:
    """Join small pieces, so that hashing and compression are called for much at once."""
    held = bytearray()
    for piece in pieces:
        if len(piece) < _DIRECT_BYTES:
            held += piece
            if len(held) >= _PIECE_BYTES:
                yield held
                held = bytearray()
            continue
        if held:
            yield held
            held = bytearray()
        yield piece
    if held:
        yield held
