"""The tar reader for layers: ustar, PAX and GNU tar, read once, in order, into an index.

It is strict where tools disagree: a layer that GNU tar, Go's archive/tar and Python's tarfile would each
read differently is refused, for nobody could say which of the trees was meant.

The walk over the members looks at no more of a header than type and size; the rest is decoded for
thousands of members at once (``table``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from mmap import mmap

import numpy as np

from layerkit.formats.tar import header as tar_header
from layerkit.formats.tar import pax as tar_pax
from layerkit.formats.tar.header import BLOCK, ZERO_BLOCK
from layerkit.formats.tar.pax import Records
from layerkit.formats.tar.sparse import PREFIX, SparseFile
from layerkit.formats.tar.table import Table
from layerkit.model.digest import Digest
from layerkit.model.entry import Extent
from layerkit.model.errors import InvalidImage, LimitExceeded, UnsafeEntry, show_path
from layerkit.model.index import Index
from layerkit.model.limits import DEFAULT, Limits

Chunk = tuple[bytearray | bytes | mmap, int]
"""A buffer and how many of its bytes count."""

_ZEROS = memoryview(bytes(1 << 20))
_EMPTY_SHA256 = hashlib.sha256().digest()
_NUL, _REG, _LINK, _DIR, _CONTIGUOUS, _OLD_SPARSE = 0, 0x30, 0x31, 0x35, 0x37, 0x53
_PAX, _GLOBAL, _LONG_NAME, _LONG_LINK = 0x78, 0x67, 0x4C, 0x4B
_ENDS_NUMBER = (0, 0x20)
_EXTENSIONS = (_PAX, _GLOBAL, _LONG_NAME, _LONG_LINK)
_COMMON = frozenset((_REG, _LINK, 0x32, _DIR))
_NO_SIZE = b"00000000000\0"
_SMALL_SIZES = {b"%011o\0" % size: size for size in range(1024)}
# Records that would give every member the same name or shape have no meaning in a global header.
_LOCAL_ONLY = (b"path", b"linkpath", b"size", b"SCHILY.realsize")


class TarReader:
    """Reads one layer; use :meth:`read` once, then :meth:`index`."""

    def __init__(self, layer: str, limits: Limits = DEFAULT) -> None:
        """``layer`` names the layer in errors (its digest or file)."""
        self._layer, self._limits = layer, limits
        self._table = Table(layer, limits)
        self._chunks: Iterator[Chunk] = iter(())
        self._chunk: bytearray | bytes | mmap = b""
        self._view = memoryview(b"")
        self._length = self._pos = self._base = 0
        self._members: list[int] = []  # header positions in the current chunk
        self._extensions: list[int] = []
        self._bodies: list[bytes] = []  # of PAX headers, and which of the members they are of
        self._body_rows: list[int] = []
        self._hole_bytes = 0
        self._globals: Records = {}
        self._local: bytes | None = None  # the body of its own PAX header, of the member to come
        self._long: Records = {}  # GNU long names of the member to come
        self._extended = False  # whether any of these three says something
        self._plain = True  # whether they leave the member's data alone

    def read(self, chunks: Iterable[Chunk]) -> None:
        """Read the tar from ``chunks``: each but the last a multiple of 512 bytes long.

        A chunk is not touched any more once the next one was asked for. Data after the end-of-archive
        marker is consumed and ignored, as by all readers.

        Raises:
            InvalidImage: malformed or truncated; :class:`UnsafeEntry` with the path where there is one.
            LossyResult: an ACL that cannot be expressed.
        """
        self._chunks = iter(chunks)
        try:
            if self._next_chunk():
                self._walk()
        except InvalidImage as e:
            if not isinstance(e, LimitExceeded):
                # A damaged header sends the walk astray. If that is what happened, say that instead.
                self._gather()
                self._table.verify()
            raise
        finally:
            self._chunk, self._view = b"", memoryview(b"")
        if self.size == 0:
            # umoci and docker accept both this and a missing marker: their reader takes the end of the
            # stream at a block boundary for the end of the archive.
            self._table.warn("the layer is empty, without even an end-of-archive marker")

    @property
    def size(self) -> int:
        """Return the bytes read so far."""
        return self._base + self._length

    def index(self, diff_id: Digest) -> Index:
        """Return the index of what was read.

        Raises:
            UnsafeEntry: entries that contradict each other.
        """
        return self._table.index(diff_id, self.size)

    # --- the walk ----------------------------------------------------------------------------------------

    def _walk(self) -> None:
        members, extensions, digests, sha256 = self._members, self._extensions, self._table.digests, hashlib.sha256
        bodies, body_rows = self._bodies, self._body_rows
        small = _SMALL_SIZES if self._limits.pax_header_bytes >= len(_SMALL_SIZES) else {}
        while True:
            # Everything in this loop runs once per header; the rare cases are in methods.
            chunk, view, length, pos = self._chunk, self._view, self._length, self._pos
            while pos + BLOCK <= length:
                flag = chunk[pos + 156]
                if flag == _PAX and not self._extended:
                    # A small header and, right behind it, the plain entry that it is of.
                    size = small.get(bytes(chunk[pos + 124 : pos + 136]), length)
                    end = pos + BLOCK + size
                    entry = (end + 511) & -BLOCK
                    if entry + BLOCK <= length:
                        body = bytes(view[pos + BLOCK : end])
                        extensions.append(pos)
                        pos = entry
                        flag = chunk[pos + 156]
                        if b"size=" in body or b"GNU.sparse." in body or flag not in _COMMON:
                            self._begin(body)
                        else:
                            body_rows.append(len(members))
                            bodies.append(body)
                if flag == _REG and self._plain:
                    digits = chunk[pos + 124 : pos + 135]
                    if digits.isdigit() and chunk[pos + 135] in _ENDS_NUMBER:
                        try:
                            size = int(digits, 8)
                        except ValueError:  # an 8 or 9 among the digits
                            size = self._size(pos)
                    else:
                        size = self._size(pos)
                    if self._extended:
                        self._hold(self._take_records())
                    members.append(pos)
                    data = pos + BLOCK
                    end = data + size
                    if end <= length:
                        digests.append(sha256(view[data:end]).digest() if size else _EMPTY_SHA256)
                        pos = (end + 511) & -BLOCK
                        continue
                    self._limits.check("file_bytes", size, f"{self._layer}: bytes of a file")
                    self._pos = data
                    digests.append(self._hash(size))
                elif flag in _COMMON and not self._extended and chunk[pos + 124 : pos + 136] == _NO_SIZE:
                    members.append(pos)
                    pos += BLOCK
                    continue
                else:
                    self._pos = pos
                    if not flag and chunk[pos : pos + BLOCK] == ZERO_BLOCK:
                        self._end()
                        return
                    self._other(flag)
                chunk, view, length, pos = self._chunk, self._view, self._length, self._pos
            self._pos = pos
            if pos != length:
                raise self._truncated()
            if not self._next_chunk():
                self._check_nothing_pending()
                self._table.warn("no end-of-archive marker")
                return

    def _other(self, flag: int) -> None:
        """Handle the header at the current position, of a member or extension that is not of the common kind."""
        if flag in _EXTENSIONS:
            self._extension(flag)
            return
        pos = self._pos
        if not tar_header.KIND_OF_FLAG[flag]:
            raise self._refused(f"type {bytes((flag,))!r} is not one that layers may hold")
        size = self._size(pos)
        if flag == _OLD_SPARSE or (not self._plain and flag in (_NUL, _REG, _CONTIGUOUS)):
            self._special(flag, size)
            return
        regular = flag in (_NUL, _REG, _CONTIGUOUS)
        if self._extended:
            records = self._take_records()
            if any(key.startswith(PREFIX) for key in records):
                raise self._refused("sparse, but not a regular file")
            if records.get(b"size"):
                size = tar_pax.number(records[b"size"], "size", self._layer)
            self._hold(records)
        if size and not regular and flag not in (_LINK, _DIR):
            # GNU tar passes over that many bytes; Go and Python read a header there. For links and
            # folders all of them take the size for a mere remark.
            raise self._refused(f"{size} bytes of data on an entry that cannot have any")
        self._members.append(pos)
        self._pos = pos + BLOCK
        if regular:
            self._table.digests.append(self._hash(size))

    def _special(self, flag: int, size: int) -> None:
        """Handle a file whose data is not simply the header's ``size`` bytes: sparse, or sized by PAX."""
        layer, limits = self._layer, self._limits
        block = bytes(self._view[self._pos : self._pos + BLOCK])
        header_at = self._base + self._pos
        records = self._take_records()
        if records.get(b"GNU.sparse.name"):
            records = {**records, b"path": records[b"GNU.sparse.name"]}
        path = records.get(b"path") or _name(block)
        if records.get(b"size"):
            size = tar_pax.number(records[b"size"], "size", layer)
        limits.check("file_bytes", size, f"{layer}: {show_path(path)}: bytes of a file")
        file = SparseFile(layer, path, limits)
        form = file.version(records)
        self._pos += BLOCK
        pairs: list[Extent] = []
        logical = size
        if flag == _OLD_SPARSE:
            if form is not None or block[slice(*tar_header.MAGIC)] != b"ustar ":
                raise self._refused("of GNU tar's sparse type in a header of another kind", block, path)
            pairs, more, logical = file.old_first(block)
            while more:
                found, more = file.old_more(self._take(BLOCK))
                pairs += found
                file.check_runs(len(pairs))
        elif form is not None:
            logical = file.real_size(records)
            if form == (1, 0):
                pairs, used = self._map_in_data(size, file)
                size -= used
            else:
                pairs = file.pairs_of_map(records)
        else:
            pairs = [(0, size)]
        limits.check("file_bytes", logical, f"{layer}: {show_path(path)}: bytes of a file")
        runs = file.checked(pairs, size, logical)
        # The map may lie across chunks, so this row cannot wait for the end of a chunk as the others do.
        self._gather()
        self._hold(records)
        self._table.placed[self._table.rows] = (self._base + self._pos, logical, runs)
        self._table.add(np.frombuffer(block, np.uint8).reshape(1, BLOCK), np.array([header_at], np.int64))
        digest = self._hash(size) if runs is None else self._hash_sparse(runs, logical, size)
        self._table.digests.append(digest)

    def _map_in_data(self, size: int, file: SparseFile) -> tuple[list[Extent], int]:
        """Read the map of GNU.sparse 1.0 off the beginning of the data; return it and its padded length."""
        data = bytearray()
        lines, want = 0, -1
        while want < 0 or lines <= want:
            # One number has at most 20 digits: what goes on without newlines is no map.
            if len(data) >= min(size, (want + 2) * 21 + BLOCK):
                raise file.refused("its sparse map does not end where it should")
            block = self._take(BLOCK)
            data += block
            lines += block.count(b"\n")
            if want < 0 and lines:
                want = file.line_count(bytes(data.partition(b"\n")[0]))
        return file.pairs(bytes(data).split(b"\n", want + 1)[1 : want + 1]), len(data)

    # --- the bytes of the tar as they come, chunk by chunk ------------------------------------------------

    def _hash(self, size: int) -> bytes:
        """Return the sha256 of the next ``size`` bytes, and pass over their padding."""
        h = hashlib.sha256()
        for part in self._parts(size):
            h.update(part)
        self._pos += -size % BLOCK
        return h.digest()

    def _hash_sparse(self, runs: tuple[Extent, ...], logical: int, size: int) -> bytes:
        """Return the sha256 of a file of ``logical`` bytes, holes as zeros, of which ``runs`` follow here."""
        self._hole_bytes += logical - size
        where = f"{self._layer}: bytes of holes"
        self._limits.check("sparse_hole_bytes_per_layer", self._hole_bytes, where)
        h = hashlib.sha256()
        end = 0
        for offset, length in (*runs, (logical, 0)):
            hole = offset - end
            while hole:
                step = min(hole, len(_ZEROS))
                h.update(_ZEROS[:step])
                hole -= step
            for part in self._parts(length):
                h.update(part)
            end = offset + length
        self._pos += -size % BLOCK
        return h.digest()

    def _take(self, size: int) -> bytes:
        """Return the next ``size`` bytes, which the caller has bounded, and pass over their padding."""
        data = b"".join(bytes(part) for part in self._parts(size))
        self._pos += -size % BLOCK
        return data

    def _parts(self, size: int) -> Iterator[memoryview]:
        """Yield the next ``size`` bytes as they lie in the chunks; each view holds until the next is asked for."""
        while size:
            if self._pos >= self._length and not self._next_chunk():
                raise self._truncated()
            step = min(size, self._length - self._pos)
            part = self._view[self._pos : self._pos + step]
            self._pos += step
            size -= step
            yield part

    def _next_chunk(self) -> bool:
        """Go on to the next chunk; return whether there was one."""
        self._gather()
        self._table.decode_if_full()
        self._base += self._length
        self._pos = self._length = 0
        for chunk, length in self._chunks:
            if length:
                self._chunk, self._view, self._length = chunk, memoryview(chunk), length
                return True
        return False

    def _gather(self) -> None:
        """Copy the headers met in the current chunk into the table, before the chunk is gone."""
        if not self._members and not self._extensions:
            return
        if self._bodies:
            self._table.hold_bodies(self._body_rows, self._bodies)
            self._bodies.clear()
            self._body_rows.clear()
        blocks = np.frombuffer(self._chunk, np.uint8, self._length // BLOCK * BLOCK).reshape(-1, BLOCK)
        for positions, add in ((self._extensions, self._table.add_extensions), (self._members, self._table.add)):
            if positions:
                at = np.array(positions, np.int64)
                add(blocks[at // BLOCK], at + self._base)
                positions.clear()

    def _truncated(self) -> InvalidImage:
        return InvalidImage(f"{self._layer}: the tar ends at byte {self.size}, inside an entry; it is truncated")

    # --- extension headers -------------------------------------------------------------------------------

    def _extension(self, flag: int) -> None:
        pos = self._pos
        size = self._size(pos)
        where = f"{self._layer}: bytes of the extended header at byte {self._base + pos}"
        self._limits.check("pax_header_bytes", size, where)
        self._extensions.append(pos)
        self._pos = pos + BLOCK
        body = self._take(size)
        if flag == _PAX:
            if self._local is not None:
                raise InvalidImage(f"{self._layer}: two PAX headers in a row before byte {self._base + self._pos}")
            self._begin(body)
        elif flag == _GLOBAL:
            self._merge_globals(body)
        else:
            key = b"path" if flag == _LONG_NAME else b"linkpath"
            text, _, rest = body.partition(b"\0")
            if key in self._long or rest.strip(b"\0"):
                raise InvalidImage(f"{self._layer}: a GNU long name that is doubled or has a NUL, {text[:40]!r}")
            self._long[key] = text
            self._extended = True

    def _begin(self, body: bytes) -> None:
        """Take a local PAX header's ``body`` for the member to come."""
        self._local = body
        self._extended = True
        if b"size=" in body or b"GNU.sparse." in body:
            self._plain = False

    def _merge_globals(self, body: bytes) -> None:
        if self._local is not None or self._long:
            raise InvalidImage(f"{self._layer}: a global PAX header between an entry and its own extended header")
        records = tar_pax.parse(body, self._layer, self._limits)
        records.pop(b"comment", None)
        for key in records:
            if key in _LOCAL_ONLY or key.startswith(PREFIX):
                raise InvalidImage(f"{self._layer}: a global PAX header sets {show_path(key)} for all entries")
        if records:
            names = ", ".join(show_path(key[:40]) for key in list(records)[:5])
            self._table.warn(f"a global PAX header sets {names} for all entries after it; some tools ignore that")
        merged = {**self._globals, **records}
        self._globals = {k: v for k, v in merged.items() if v or k.startswith(tar_pax.XATTR)}
        self._extended = bool(self._globals)
        total = sum(len(k) + len(v) for k, v in self._globals.items())
        self._limits.check("pax_header_bytes", total, f"{self._layer}: bytes of global PAX records")

    def _take_records(self) -> Records:
        """Return what the extended headers say of the member at the current position, and forget it."""
        records: Records = tar_pax.parse(self._local, self._layer, self._limits) if self._local else {}
        if self._long:
            for key, text in self._long.items():
                if records.get(key) and records[key] != text:
                    raise self._refused(f"a GNU long name and a PAX name that differ, {text[:80]!r}")
            records = {**records, **self._long}
            self._long = {}
        if self._globals:
            records = {**self._globals, **records}
        self._local = None
        self._plain = True
        self._extended = bool(self._globals)
        return records

    def _hold(self, records: Records) -> None:
        """Keep ``records`` for the member that is added next."""
        size = sum(len(key) + len(value) for key, value in records.items())
        if self._table.is_crowded(size):
            self._gather()
            self._table.decode()
        self._table.hold(self._table.rows + len(self._members), records, size)

    # --- ends and errors ---------------------------------------------------------------------------------

    def _end(self) -> None:
        """Handle the end-of-archive marker, two zero blocks of which the first is here."""
        self._check_nothing_pending()
        self._pos += BLOCK
        if self._pos == self._length and not self._next_chunk():
            return  # one block alone at the end of the stream is enough for all readers
        if self._length - self._pos < BLOCK:
            raise self._truncated()
        if self._chunk[self._pos : self._pos + BLOCK] != ZERO_BLOCK:
            raise InvalidImage(
                f"{self._layer}: a single zero block before byte {self._base + self._pos}, and data after it; "
                "tools differ on whether the archive ends there"
            )
        while self._next_chunk():
            pass

    def _check_nothing_pending(self) -> None:
        if self._local is not None or self._long:
            raise InvalidImage(f"{self._layer}: the tar ends after an extended header, without its entry")

    def _size(self, pos: int) -> int:
        field = bytes(self._view[pos + 124 : pos + 136])
        try:
            size = tar_header.number(field)
        except ValueError as e:
            self._pos = pos
            raise self._refused(f"its size is damaged: {e}") from e
        if size < 0:
            self._pos = pos
            raise self._refused(f"its size is {size}")
        self._limits.check("file_bytes", size, f"{self._layer}: bytes of an entry")
        return size

    def _refused(self, why: str, block: bytes = b"", path: bytes = b"") -> InvalidImage:
        """Return the error for the member at the current position, whose header may be damaged too."""
        block = block or bytes(self._view[self._pos : self._pos + BLOCK])
        at = np.array([self._base + self._pos], np.int64)
        tar_header.verify_checksums(np.frombuffer(block, np.uint8).reshape(1, BLOCK), at, self._layer)
        return UnsafeEntry(self._layer, path or _name(block), why)


def _name(block: bytes) -> bytes:
    """Return a header's name field, which is enough for an error."""
    return block[slice(*tar_header.NAME)].partition(b"\0")[0]


def read_tar(data: bytes, layer: str = "layer", limits: Limits = DEFAULT) -> Index:
    """Return the index of a small uncompressed tar that is in memory.

    Raises:
        InvalidImage: see :meth:`TarReader.read`.
    """
    reader = TarReader(layer, limits)
    reader.read([(data, len(data))])
    return reader.index(Digest.of(data))
