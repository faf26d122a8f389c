"""Blobs in files: ranges read by pread, whole small blobs, spools for streams that need random access."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, BinaryIO

from layerkit.linux.durable import naming
from layerkit.linux.syscalls import opened
from layerkit.model.descriptor import Descriptor
from layerkit.model.errors import DigestMismatch, InvalidImage, LimitExceeded
from layerkit.model.limits import Limits

if TYPE_CHECKING:
    from layerkit.model.ports import BlobReader

CHUNK_BYTES = 1 << 20
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = bytes(range(0x50, 0x60))


class FileRange:
    """A blob that is a range of a file. Keeps a descriptor of its own, so readers do not share a position."""

    def __init__(self, fd: int, offset: int, size: int) -> None:
        """Read ``size`` bytes from ``offset`` of the file ``fd``, which is duplicated."""
        self._fd, self._at, self._end = os.dup(fd), offset, offset + size

    @classmethod
    def whole(cls, path: str | os.PathLike[str]) -> FileRange:
        """Read the file at ``path``."""
        with opened(path) as fd:
            return cls(fd, 0, os.fstat(fd).st_size)

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill ``buffer`` from its start; return the bytes written, 0 at the end."""
        got = os.preadv(self._fd, [buffer[: max(0, self._end - self._at)]], self._at)
        self._at += got
        return got

    def close(self) -> None:
        """Close the descriptor; closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class BytesReader(io.BytesIO):
    """Bytes as a :class:`~layerkit.model.ports.BlobReader`."""

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        """See the port."""
        return super().readinto(buffer)


def chunks(readinto: Callable[[memoryview], int], most: int = CHUNK_BYTES) -> Iterator[memoryview]:
    """Yield what ``readinto`` gives, in pieces of up to ``most`` bytes, each valid until the next is asked for."""
    buffer = memoryview(bytearray(max(1, min(most, CHUNK_BYTES))))
    while got := readinto(buffer):
        yield buffer[:got]


def file_chunks(fd: int, size: int) -> Iterator[memoryview]:
    """Yield the first ``size`` bytes of a file; see :func:`chunks`."""
    with contextlib.closing(FileRange(fd, 0, size)) as reader:
        yield from chunks(reader.readinto)


def read_all(reader: BlobReader, most: int, what: str, limit: str) -> bytes:
    """Return all bytes of ``reader`` and close it.

    Raises:
        LimitExceeded: there are more than ``most``.
    """
    out = bytearray()
    try:
        for chunk in chunks(reader.readinto):
            out += chunk
            if len(out) > most:
                raise LimitExceeded(limit, len(out), most, what)
    finally:
        reader.close()
    return bytes(out)


def verified(pieces: Iterable[bytes | memoryview], entry: Descriptor, what: str) -> Iterator[bytes | memoryview]:
    """Pass ``pieces`` on while hashing them.

    Raises:
        DigestMismatch: they end short of the size of ``entry``, go beyond it, or have another digest.
    """
    hasher, seen = entry.digest.hasher(), 0
    for piece in pieces:
        seen += len(piece)
        if seen > entry.size:
            raise DigestMismatch(what, f"more than {entry.size} bytes", f"{entry.size} bytes")
        hasher.update(piece)
        yield piece
    if seen != entry.size:
        raise DigestMismatch(what, f"{seen} bytes", f"{entry.size} bytes")
    if hasher.hexdigest() != entry.digest.hex:
        raise DigestMismatch(what, f"{entry.digest.algorithm}:{hasher.hexdigest()}", str(entry.digest))


def unlinked_file(tmp: str | os.PathLike[str] | None) -> BinaryIO:
    """Return a new file without a name in ``tmp`` (default: the system's folder): nothing to clean up."""
    return tempfile.TemporaryFile(dir=tmp, prefix="layerkit-")


def spool(
    pieces: Iterable[bytes | memoryview], tmp: str | os.PathLike[str] | None, most: int, what: str
) -> BinaryIO:
    """Return a file without a name that holds ``pieces``, positioned at its start.

    Raises:
        LimitExceeded: more than ``most`` bytes (``layer_tar_bytes``).
    """
    file, total = unlinked_file(tmp), 0
    try:
        for piece in pieces:
            total += len(piece)
            if total > most:
                raise LimitExceeded("layer_tar_bytes", total, most, what)
            with naming(tmp or tempfile.gettempdir()):
                file.write(piece)
        with naming(tmp or tempfile.gettempdir()):
            file.flush()
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def compression(head: bytes) -> str:
    """Return ``gzip``, ``zstd``, ``xz``, ``bzip2`` or "" from the first bytes of a file."""
    if head.startswith(GZIP_MAGIC):
        return "gzip"
    if head.startswith(ZSTD_MAGIC) or (head[1:4] == b"\x2a\x4d\x18" and head[:1] in _ZSTD_SKIPPABLE):
        return "zstd"
    if head.startswith(b"\xfd7zXZ\0"):
        return "xz"
    return "bzip2" if head.startswith(b"BZh") else ""


def inflated(reader: BlobReader, kind: str, what: str, limits: Limits) -> Iterator[memoryview]:
    """Yield the decompressed bytes of ``reader`` (``kind`` from :func:`compression`) and close it.

    Each piece is valid until the next is asked for.

    Raises:
        InvalidImage: the compressed data is damaged or cut off, or ``kind`` is not supported.
        LimitExceeded: it expands beyond ``limits.compression_ratio``.
    """
    try:
        if kind in ("xz", "bzip2"):
            raise InvalidImage(f"{what}: compressed with {kind}, which is not read here; decompress it first")
        if kind:
            from layerkit.formats.compression.decompress import Decompressor

            yield from chunks(Decompressor(reader, limits=limits, where=what).readinto)
        else:
            yield from chunks(reader.readinto)
    finally:
        reader.close()
