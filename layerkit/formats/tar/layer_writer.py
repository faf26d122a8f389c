"""An index to the layer tar that has it: what ``tar_reader`` reads back as the same rows.

Entries come in canonical order with two exceptions that unpackers need: an opaque marker follows its
folder, and a hard link follows its target. Sparse files are written in the PAX 1.0 form, which both GNU tar
and Go's archive/tar read. The same index and content are always the same bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from layerkit.formats.tar import writer as tar_writer
from layerkit.formats.tar.writer import blank_header, padding, record, seal, xattr_records
from layerkit.model.entry import OPAQUE_NAME, WHITEOUT_PREFIX, Kind
from layerkit.model.errors import InvalidImage, LossyResult, show_path
from layerkit.model.index import Index

Content = Callable[[int], Iterable[memoryview]]
"""Gives the stored bytes of a row (a sparse file's runs one after the other); a piece is good until the next."""

_ROWS_AT_ONCE = 1024
_PIECE_BYTES = 1 << 20
_DIRECT_BYTES = 1 << 16  # pieces from here on are passed on as they are, smaller ones are gathered
_NAME_BYTES = 255
_SPARSE_1_0 = record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.minor", b"0")


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
    yield Part(-1, False, tar_writer.END)


def _header(index: Index, row: int, size: int, sparse: bool, cache: dict[int, bytes]) -> bytes:
    kind, path = Kind(int(index.kind[row])), index.path[row]
    if kind >= Kind.WHITEOUT:
        return blank_header(marker(path, kind), Kind.REG, perm=0)
    xattr = int(index.xattr[row])
    records = cache.get(xattr)
    if records is None:
        records = cache[xattr] = xattr_records(index.xattr_sets[xattr], path)
    if sparse:
        records += _SPARSE_1_0 + record(b"GNU.sparse.realsize", b"%d" % index.size[row])
    link = int(index.link[row])
    return blank_header(
        path, kind, perm=int(index.perm[row]), uid=int(index.uid[row]), gid=int(index.gid[row]), size=size,
        mtime=int(index.mtime[row]), mtime_ns=int(index.mtime_ns[row]),
        link=b"" if link < 0 else index.links[link],
        major=int(index.major[row]), minor=int(index.minor[row]), records=records,
    )  # fmt: skip


def marker(path: bytes, kind: Kind) -> bytes:
    """Return the name of the file that is a whiteout of ``path``, or the marker of an opaque folder.

    Raises:
        LossyResult: a name too long for it.
    """
    if kind is Kind.OPAQUE:
        return path + b"/" + OPAQUE_NAME if path else OPAQUE_NAME
    parent, slash, name = path.rpartition(b"/")
    if len(WHITEOUT_PREFIX) + len(name) > _NAME_BYTES:
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
