"""Blobs from a registry, taken up again where they broke off, and to one: mounted, in one piece, or in parts.

distribution-spec 1.1, "Pulling blobs" and "Pushing blobs".
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote, urlsplit

import httpx2

from layerkit.images.oci.blobs import verified
from layerkit.images.registry.auth import scope
from layerkit.images.registry.hosts import Endpoint
from layerkit.images.registry.transport import Ask, Body, Transport, next_url
from layerkit.model.descriptor import Descriptor
from layerkit.model.errors import DigestMismatch, LayerkitError, RegistryError

SMALL_BYTES = 4 << 20
"""Blobs up to this size are held in memory and sent in one request."""

_OCTETS = {"Content-Type": "application/octet-stream"}
_RANGE = re.compile(r"(?:bytes=)?0-(\d+)")
_MOST_CHUNK_BYTES = 256 << 20
_PROGRESS_BYTES = 1 << 20
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")

Chunks = Iterable[bytes | memoryview]

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


class Upload:
    """One blob on its way to one repository."""

    def __init__(self, transport: Transport, endpoint: Endpoint, descriptor: Descriptor, what: str) -> None:
        """Nothing is sent yet; ``what`` names the blob in errors."""
        self._transport, self._endpoint, self._descriptor, self._what = transport, endpoint, descriptor, what
        scopes = frozenset((scope(endpoint.repository, "pull", "push"),))
        self._base = Ask(endpoint, "", "", what, (), scopes, follow=False)
        self._location = ""
        self._least_chunk = 0

    def run(self, chunks: Chunks, mount_from: Sequence[str] = ()) -> bool:
        """Bring the blob there; return whether it was mounted, and ``chunks`` not touched.

        Chunks that can be iterated again are: then the whole is sent in one request, and again in parts if
        that fails. Others are sent in parts from the start if they are many.

        Raises:
            DigestMismatch: the bytes are not what the descriptor promises.
            RegistryError: the registry does not take them.
        """
        if self._mount(mount_from):
            return True
        try:
            self._send(chunks)
        except BaseException:
            self._cancel()
            raise
        self._transport.traffic.add(blobs_written=1)
        return False

    def _mount(self, mount_from: Sequence[str]) -> bool:
        """Open a session, or take the blob from another repository of this registry."""
        for place in (*dict.fromkeys(mount_from), None):
            params = [] if place is None else [("mount", str(self._descriptor.digest)), ("from", place)]
            scopes = self._base.scopes | ({scope(place, "pull")} if place else set())
            try:
                response = self._ask(
                    "POST", (201, 202), path=f"/{self._endpoint.repository}/blobs/uploads/", params=params,
                    scopes=scopes, headers={"Content-Length": "0"},
                )  # fmt: skip
            except RegistryError as error:
                if place is not None and error.status in (400, 401, 403, 404, 405):
                    continue  # that repository is not to be read; it is only a short cut
                raise
            if response.status_code == 201:
                self._transport.traffic.add(blobs_mounted=1, bytes_mounted=self._descriptor.size)
                return True
            least = response.headers.get("oci-chunk-min-length", "")
            self._least_chunk = int(least) if least.isascii() and least.isdigit() else 0
            self._moved(response)
            return False  # 202: the mount was not possible, and this is a session to go on with
        raise AssertionError("the last place opens a session")

    def _send(self, chunks: Chunks) -> None:
        """Send all bytes; sessions do not outlive a failure, so each attempt has a new one."""
        small = self._descriptor.size <= SMALL_BYTES
        data = b"".join(bytes(piece) for piece in verified(chunks, self._descriptor, self._what)) if small else b""
        again = small or iter(chunks) is not chunks
        attempts = self._transport.options.retry.attempts if again else 1
        # Some registries drop a session that broke off, and know nothing of it afterwards.
        passing = (404,) if small else (400, 404, 416)
        for attempt in range(1, attempts + 1):
            try:
                if small:
                    self._put(len(data), data)
                    self._transport.traffic.add(bytes_written=len(data))
                elif again and attempt == 1:
                    self._stream(chunks)
                else:
                    self._in_parts(verified(chunks, self._descriptor, self._what))
                return
            except RegistryError as error:
                if self._is_there():
                    return  # only the answer was lost
                if not (error.temporary or error.status in passing) or attempt == attempts:
                    raise
            self._again(attempt)
            self._mount(())

    def _stream(self, chunks: Chunks) -> None:
        def body() -> Iterator[bytes | memoryview]:
            for piece in verified(chunks, self._descriptor, self._what):
                self._transport.traffic.add(bytes_written=len(piece))
                yield piece

        self._put(self._descriptor.size, body)

    def _in_parts(self, pieces: Iterator[bytes | memoryview]) -> None:
        wanted = min(max(self._transport.options.chunk_bytes, self._least_chunk), _MOST_CHUNK_BYTES)
        part, at = bytearray(), 0
        for piece in pieces:
            part += piece
            while len(part) >= wanted:
                self._part(bytes(part[:wanted]), at)
                at += wanted
                del part[:wanted]
        if part:
            self._part(bytes(part), at)
        try:
            self._put(0, b"", attempts=None)
        except RegistryError:
            if not self._is_there():
                raise

    def _part(self, data: bytes, start: int) -> None:
        """Send one part; what a failure left unsent goes again, from where the registry says it is."""
        done, attempts = 0, self._transport.options.retry.attempts
        for attempt in range(1, attempts + 1):
            first, last = start + done, start + len(data) - 1
            headers = self._octets(len(data) - done) | {"Content-Range": f"{first}-{last}"}
            try:
                rest = data[done:]
                self._moved(self._ask("PATCH", (202,), url=self._location, headers=headers, body=rest, attempts=1))
                self._transport.traffic.add(bytes_written=len(data) - done)
                return
            except RegistryError as error:
                if not (error.temporary or error.status == 416) or attempt == attempts:
                    raise
            self._again(attempt)
            there = self._received(start)
            if not start <= there <= start + len(data):
                raise RegistryError(self._what, 416, f"has {there} bytes of the upload, want {start} or more")
            done = there - start
            if done == len(data):
                return

    def _received(self, start: int) -> int:
        """Return how many bytes of the session the registry has."""
        response = self._ask("GET", (200, 202, 204), url=self._location)
        match = _RANGE.fullmatch(response.headers.get("range", ""))
        self._moved(response)
        last = int(match[1]) if match else -1
        # Several registries say 0-0 for nothing at all.
        return start if last <= 0 else last + 1

    def _is_there(self) -> bool:
        try:
            path = f"/{self._endpoint.repository}/blobs/{self._descriptor.digest}"
            response = self._ask("HEAD", (200, 404), path=path, follow=True)
        except RegistryError:
            return False
        return response.status_code == 200

    def _cancel(self) -> None:
        if self._location:
            with contextlib.suppress(LayerkitError, httpx2.HTTPError, OSError):
                self._ask("DELETE", (200, 202, 204, 404, 405), url=self._location, attempts=1)

    def _octets(self, length: int) -> dict[str, str]:
        return _OCTETS | {"Content-Length": str(length)}

    def _final_url(self) -> str:
        parts = urlsplit(self._location)
        query = f"{parts.query}&" if parts.query else ""
        return parts._replace(query=f"{query}digest={quote(str(self._descriptor.digest), safe='')}").geturl()

    def _moved(self, response: httpx2.Response) -> None:
        """Take the address of the session for the next request, checked as that of a redirect is."""
        location = response.headers.get("location", "")
        status = response.status_code
        if not location and self._location:
            return
        self._location = next_url(str(response.url), location, self._endpoint.host, self._what, status)

    def _ask(self, method: str, ok: Sequence[int], **more: Any) -> httpx2.Response:
        """Send a request of this upload; ``more`` are fields of :class:`Ask`."""
        response = self._transport.send(replace(self._base, method=method, ok=ok, **more))
        response.close()
        return response

    def _put(self, length: int, body: Body, attempts: int | None = 1) -> None:
        self._ask("PUT", (201,), url=self._final_url(), headers=self._octets(length), body=body, attempts=attempts)

    def _again(self, attempt: int) -> None:
        self._transport.traffic.add(retries=1)
        self._transport.pause(attempt)
