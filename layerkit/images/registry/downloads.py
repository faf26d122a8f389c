"""A blob as it comes from a registry: taken up again where it broke off, never longer than promised."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import httpx2

from layerkit.images.registry.transport import Transport
from layerkit.model.descriptor import Descriptor
from layerkit.model.errors import DigestMismatch, RegistryError

_PROGRESS_BYTES = 1 << 20
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")

OpenAt = Callable[[int], httpx2.Response]
"""Asks for a blob from an offset on, and returns the answer: 200 or 206."""


class RemoteBlob:
    """A :class:`~layerkit.model.ports.BlobReader` over HTTP; whoever reads it verifies the digest.

    A connection that breaks, goes silent or ends early is followed by another one that asks for the rest
    (``Range``), as often as there is progress and a bounded number of times without.
    """

    def __init__(self, transport: Transport, descriptor: Descriptor, open_at: OpenAt, what: str) -> None:
        """Connect; ``what`` names the blob in errors.

        Raises:
            RegistryError: it cannot be had.
        """
        self._transport, self._descriptor, self._open_at, self._what = transport, descriptor, open_at, what
        self._at = 0
        self._rest = memoryview(b"")
        self._failures, self._good_at = 0, 0
        self._response: httpx2.Response | None = None
        self._pieces: Iterator[bytes] = iter(())
        self._drained = False
        self._connect()
        transport.traffic.add(blobs_read=1)

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill ``buffer`` WHOLLY, unless the blob ends; return the bytes written, 0 at the end.

        Pieces come as small as the connection gives them; one write for each would cost more than the copy.
        """
        done, most = 0, len(buffer)
        while done < most:
            if not self._rest:
                if self._at >= self._descriptor.size:
                    self._finish()
                    break
                piece = self._next()
                if len(piece) > self._descriptor.size - self._at:
                    raise self._too_long()
                self._at += len(piece)
                self._rest = memoryview(piece)
            n = min(len(self._rest), most - done)
            buffer[done : done + n] = self._rest[:n]
            self._rest = self._rest[n:]
            done += n
        return done

    def _next(self) -> bytes:
        """Return the next bytes, from another connection where this one fails."""
        while True:
            fault = ""
            try:
                for piece in self._pieces:
                    if piece:
                        self._transport.traffic.add(bytes_read=len(piece))
                        return piece
                fault = f"ended after {self._at} of {self._descriptor.size} bytes"
            except httpx2.TransportError as error:
                fault = f"broke off after {self._at} of {self._descriptor.size} bytes ({type(error).__name__})"
            self._disconnect()
            if self._at - self._good_at >= _PROGRESS_BYTES:
                self._failures = 0
            self._good_at = self._at
            self._failures += 1
            if self._failures >= self._transport.options.retry.attempts:
                raise RegistryError(self._what, 0, f"{fault}, again and again", temporary=True)
            self._transport.traffic.add(retries=1)
            self._transport.pause(self._failures)
            self._connect()

    def _connect(self) -> None:
        response = self._open_at(self._at)
        skip = 0
        try:
            if response.status_code == 206:
                check_range(response, self._at, None, self._descriptor.size, self._what)
            else:
                length = response.headers.get("content-length", "")
                if length.isdigit() and int(length) > self._descriptor.size:
                    raise self._too_long()
                skip = self._at  # a server without ranges begins again
        except BaseException:
            response.close()
            raise
        self._response = response
        self._pieces = _from(response.iter_raw(), skip)

    def _finish(self) -> None:
        """See that nothing follows the promised bytes, so that the connection can be used again."""
        if self._drained:
            return
        self._drained = True
        try:
            if any(self._pieces):
                raise self._too_long()
        except httpx2.TransportError:
            pass  # all that was promised is here; how the connection ends does not matter
        self._disconnect()

    def _too_long(self) -> DigestMismatch:
        size = self._descriptor.size
        return DigestMismatch(self._what, f"more than {size} bytes", f"{size} bytes")

    def _disconnect(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def close(self) -> None:
        """Give the connection back, or up where bytes are left."""
        self._pieces = iter(())
        self._disconnect()


def _from(pieces: Iterator[bytes], skip: int) -> Iterator[bytes]:
    for piece in pieces:
        if skip >= len(piece):
            skip -= len(piece)
            continue
        yield piece[skip:] if skip else piece
        skip = 0


def check_range(response: httpx2.Response, start: int, end: int | None, size: int, what: str) -> None:
    """Raise unless a 206 holds the bytes from ``start`` (to ``end``, exclusive) of ``size`` (RFC 9110, 14.4).

    Raises:
        RegistryError: another part, or none at all.
    """
    said = response.headers.get("content-range", "")
    match = _CONTENT_RANGE.fullmatch(said)
    good = (
        match is not None
        and int(match[1]) == start
        and (end is None or int(match[2]) == end - 1)
        and match[3] in ("*", str(size))
    )
    if not good:
        wanted = f"{start}-{'' if end is None else end - 1}"
        raise RegistryError(what, 206, f"asked for bytes {wanted} of {size}, got {said[:100]!r}")


__all__ = ["OpenAt", "RemoteBlob", "check_range"]
