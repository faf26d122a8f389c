"""The frame structure of a zstd stream (RFC 8878, section 3), followed without decoding.

libzstd's streaming interface knows whether a frame is complete, but the Python binding's reader does not
tell: a stream cut inside a frame simply ends. Following the headers is cheap, blocks being up to 128 KiB.
"""

from __future__ import annotations

from layerkit.model.errors import InvalidImage

_FRAME_MAGIC = b"\x28\xb5\x2f\xfd"
_SKIPPABLE_TAIL = b"\x2a\x4d\x18"


class FrameScanner:
    """Fed with the compressed bytes in order, knows whether they end between two frames."""

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
