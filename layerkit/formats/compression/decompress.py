"""Layer compression, told by its magic bytes: gzip (RFC 1952), zstd (RFC 8878) or none.

The media type is not asked: registries serve layers whose media type names another compression, and the
runtimes go by the magic bytes too. Everything here streams; memory does not depend on the data's size. The
writing side is ``compress``.
"""

from __future__ import annotations

import io
import zlib
from enum import StrEnum
from typing import BinaryIO, Protocol, cast

import zstandard
from isal import igzip, igzip_lib

from layerkit.model.errors import InvalidImage, LimitExceeded
from layerkit.model.limits import DEFAULT, Limits

MAGIC_BYTES = 10
"""How many bytes :func:`detect` wants to see."""

_FRAME_MAGIC = b"\x28\xb5\x2f\xfd"
_SKIPPABLE_TAIL = b"\x2a\x4d\x18"
_READ_BYTES = 1 << 21
_ZSTD_WINDOW_BYTES = 1 << 27  # zstd's own bound for decoders that were not told more (`--long=27`)
_DAMAGED: tuple[type[Exception], ...] = (
    igzip.BadGzipFile,
    cast(type[Exception], igzip_lib.IsalError),  # an instance, say its stubs
    zlib.error,
    zstandard.ZstdError,
)


class Compression(StrEnum):
    """How a layer blob is compressed; the value is the suffix of OCI media types, "" for none."""

    NONE = ""
    GZIP = "gzip"
    ZSTD = "zstd"


class Source(Protocol):
    """The compressed bytes in order (a part of ``ports.BlobReader``, which this layer cannot import)."""

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill ``buffer`` from its start; return the bytes written, 0 at the end."""
        ...


def detect(head: bytes, where: str = "layer") -> Compression:
    """Return the compression of a blob that begins with ``head`` (:data:`MAGIC_BYTES` of it, if it has them).

    Raises:
        InvalidImage: compressed in a way that image layers must not be.
    """
    if head[:2] == b"\x1f\x8b":
        return Compression.GZIP
    if head[:4] == _FRAME_MAGIC or (head[1:4] == _SKIPPABLE_TAIL and 0x50 <= head[0] <= 0x5F):
        return Compression.ZSTD
    for magic, name in ((b"\xfd7zXZ\0", "xz"), (b"BZh", "bzip2"), (b"\x04\x22\x4d\x18", "lz4")):
        # "BZh" alone could be a file's name at the start of a tar; with the block magic it cannot.
        if head.startswith(magic) and (name != "bzip2" or head[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")):
            raise InvalidImage(f"{where}: compressed with {name}; image layers are tar, tar+gzip or tar+zstd")
    return Compression.NONE


class Decompressor:
    """The uncompressed bytes of a blob, bounded against bombs.

    Attributes:
        compression: what the magic bytes said.
        compressed_bytes: read from the source so far.
        tar_bytes: given out so far.
    """

    def __init__(self, source: Source, *, limits: Limits = DEFAULT, where: str = "layer") -> None:
        """Read the magic bytes of ``source``; ``where`` names the blob in errors."""
        self._raw = _Counted(source)
        self._limits, self._where = limits, where
        self.compression = detect(self._raw.peek(MAGIC_BYTES), where)
        self.tar_bytes = 0
        self._scanner: _FrameScanner | None = None
        self._stream: Source
        if self.compression is Compression.GZIP:
            file = igzip.GzipFile(fileobj=self._raw, mode="rb")  # type: ignore[no-untyped-call]
            # Its own readinto makes a bytes object and copies it; the buffered reader inside fills the buffer.
            self._gzip, self._stream = file, getattr(file, "_buffer", file)
        elif self.compression is Compression.ZSTD:
            self._scanner = self._raw.scanner = _FrameScanner(where)
            # The reader accepts a stream that ends inside a frame; the scanner does not.
            self._stream = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).stream_reader(
                cast(BinaryIO, self._raw), read_size=_READ_BYTES, read_across_frames=True
            )
        else:
            self._stream = self._raw

    @property
    def compressed_bytes(self) -> int:
        """Return how many bytes of the source were read."""
        return self._raw.count

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill ``buffer`` WHOLLY, unless the data ends; return the bytes written, 0 at the end.

        Raises:
            InvalidImage: damaged, truncated, or with garbage after the end.
            LimitExceeded: more data than ``layer_tar_bytes``, or a bomb (``compression_ratio``).
        """
        done, size = 0, len(buffer)
        try:
            while done < size:
                n = self._stream.readinto(buffer[done:] if done else buffer)
                if not n:
                    if self._scanner is not None:
                        self._scanner.finish()
                    break
                done += n
        except EOFError as e:
            raise InvalidImage(
                f"{self._where}: the gzip data ends early or has garbage after its end; fetch the layer again"
            ) from e
        except _DAMAGED as e:
            at = self.tar_bytes + done
            raise InvalidImage(
                f"{self._where}: damaged {self.compression.value} data after {at} bytes of tar: {e}"
            ) from e
        self.tar_bytes += done
        self._check_bomb()
        return done

    def _check_bomb(self) -> None:
        limits, out = self._limits, self.tar_bytes
        limits.check("layer_tar_bytes", out, f"{self._where}: uncompressed bytes")
        if out > limits.bomb_floor_bytes and out > limits.compression_ratio * self._raw.count:
            where = f"{self._where}: uncompressed bytes for each compressed one"
            ratio = out // max(1, self._raw.count)
            raise LimitExceeded("compression_ratio", ratio, limits.compression_ratio, where)


class _Counted(io.RawIOBase):
    """The source as a file object for the decoders: counts, replays the peeked bytes, shows the scanner."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._head = b""
        self._buffer = bytearray()
        self.count = 0
        self.scanner: _FrameScanner | None = None

    def readable(self) -> bool:
        return True

    def peek(self, n: int) -> bytes:
        buffer = bytearray(n)
        view, got = memoryview(buffer), 0
        while got < n and (k := self._source.readinto(view[got:])):
            got += k
        self._head = bytes(view[:got])
        self.count += got
        return self._head

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        view = memoryview(buffer)
        n = len(self._head)
        if n:
            n = min(n, len(view))
            view[:n] = self._head[:n]
            self._head = self._head[n:]
        else:
            n = self._source.readinto(view)
            self.count += n
        if self.scanner is not None:
            self.scanner.feed(view[:n])
        return n

    def read(self, size: int = -1, /) -> memoryview:
        # zstandard takes any buffer here and is done with it before it reads again.
        if len(self._buffer) < size:
            self._buffer = bytearray(size)
        view = memoryview(self._buffer)[:size]
        return view[: self.readinto(view)]


class _FrameScanner:
    """Fed with zstd data in order, knows whether it ends between two frames (RFC 8878, section 3).

    libzstd's streaming interface knows whether a frame is complete, but the Python binding's reader does not tell:
    a stream cut inside a frame simply ends. Following the headers is cheap, blocks being up to 128 KiB.
    """

    def __init__(self, where: str) -> None:
        """``where`` names the blob in errors."""
        self._where = where
        self._skip = 0  # bytes of the current block, skippable frame or checksum still to pass over
        self._head = b""  # the beginning of a header that lies across two calls
        self._in_frame = False
        self._last = False
        self._checksum = False
        self.frames = 0

    def feed(self, data: memoryview) -> None:
        """Follow the next ``data``; bytes that are no zstd are left for the decoder to refuse."""
        pos, size = 0, len(data)
        while pos < size:
            if self._skip:
                step = min(self._skip, size - pos)
                self._skip -= step
                pos += step
                continue
            head = self._head + bytes(data[pos : pos + 18 - len(self._head)])
            used = self._block(head) if self._in_frame else self._frame(head)
            if used == 0:
                self._head = head
                return
            pos += used - len(self._head)
            self._head = b""

    def finish(self) -> None:
        """State that the stream ended here.

        Raises:
            InvalidImage: it ended inside a frame.
        """
        if self._skip or self._head or self._in_frame:
            raise InvalidImage(f"{self._where}: the zstd data ends inside a frame; fetch the layer again")

    def _frame(self, head: bytes) -> int:
        """Read a frame header from ``head``; return its length, 0 if ``head`` is too short."""
        if len(head) < 5:
            return 0
        if head[1:4] == _SKIPPABLE_TAIL and 0x50 <= head[0] <= 0x5F:
            if len(head) < 8:
                return 0
            self._skip = int.from_bytes(head[4:8], "little")
            self.frames += 1
            return 8
        if head[:4] != _FRAME_MAGIC:
            raise InvalidImage(f"{self._where}: garbage after the end of a zstd frame (bytes {head[:4].hex()})")
        flags = head[4]
        single = bool(flags & 0x20)
        length = 5 + (not single) + (0, 1, 2, 4)[flags & 3] + (int(single), 2, 4, 8)[flags >> 6]
        if len(head) < length:
            return 0
        self._checksum = bool(flags & 4)
        self._in_frame, self._last = True, False
        self.frames += 1
        return length

    def _block(self, head: bytes) -> int:
        """Read a block header (or pass the checksum after the last block); 0 if ``head`` is too short."""
        if self._last:
            # Only reached with the checksum outstanding: see below.
            if len(head) < 4:
                return 0
            self._in_frame = False
            return 4
        if len(head) < 3:
            return 0
        word = int.from_bytes(head[:3], "little")
        self._last = bool(word & 1)
        kind, size = word >> 1 & 3, word >> 3
        self._skip = 1 if kind == 1 else size  # an RLE block stores one byte, whatever it expands to
        if self._last and not self._checksum:
            self._in_frame = False
        return 3
