"""The bytes of a tar as they come, chunk by chunk: where the reader is, and what it takes from there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from mmap import mmap

import numpy as np

from layerkit.formats.tar.header import BLOCK
from layerkit.formats.tar.table import Table
from layerkit.model.entry import Extent
from layerkit.model.errors import InvalidImage
from layerkit.model.limits import Limits

Chunk = tuple[bytearray | bytes | mmap, int]
"""A buffer and how many of its bytes count."""

_ZEROS = memoryview(bytes(1 << 20))


class Cursor:
    """A place in a stream of chunks; knows the headers met in the current one, to save them in time."""

    def __init__(self, layer: str, limits: Limits) -> None:
        """``layer`` names the layer in errors."""
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

    @property
    def size(self) -> int:
        """Return the bytes read so far."""
        return self._base + self._length

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
        for positions, add in (
            (self._extensions, self._table.add_extensions),
            (self._members, self._table.add),
        ):
            if positions:
                at = np.array(positions, np.int64)
                add(blocks[at // BLOCK], at + self._base)
                positions.clear()

    def _truncated(self) -> InvalidImage:
        return InvalidImage(f"{self._layer}: the tar ends at byte {self.size}, inside an entry; it is truncated")
