"""Blobs to a registry: mounted from a neighbour, in one piece, or in parts that are sent again one by one.

distribution-spec 1.1, "Pushing blobs".
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from urllib.parse import quote, urlsplit

import httpx2

from layerkit.images.blobs import verified
from layerkit.images.registry.auth import scope
from layerkit.images.registry.hosts import Endpoint
from layerkit.images.registry.redirects import next_url
from layerkit.images.registry.transport import Ask, Body, Transport
from layerkit.model.descriptor import Descriptor
from layerkit.model.errors import LayerkitError, RegistryError

SMALL_BYTES = 4 << 20
"""Blobs up to this size are held in memory and sent in one request."""

_OCTETS = {"Content-Type": "application/octet-stream"}
_RANGE = re.compile(r"(?:bytes=)?0-(\d+)")
_MOST_CHUNK_BYTES = 256 << 20

Chunks = Iterable[bytes | memoryview]


class Upload:
    """One blob on its way to one repository."""

    def __init__(self, transport: Transport, endpoint: Endpoint, descriptor: Descriptor, what: str) -> None:
        """Nothing is sent yet; ``what`` names the blob in errors."""
        self._transport, self._endpoint, self._descriptor, self._what = transport, endpoint, descriptor, what
        self._scopes = frozenset((scope(endpoint.repository, "pull", "push"),))
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
            scopes = self._scopes | ({scope(place, "pull")} if place else set())
            try:
                response = self._ask(
                    "POST", path=f"/{self._endpoint.repository}/blobs/uploads/", params=params,
                    ok=(201, 202), scopes=scopes, headers={"Content-Length": "0"},
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
        descriptor = self._descriptor
        if descriptor.size <= SMALL_BYTES:
            data = b"".join(bytes(piece) for piece in verified(chunks, descriptor, self._what))
            self._whole(data)
            return
        again = iter(chunks) is not chunks
        attempts = self._transport.options.retry.attempts if again else 1
        for attempt in range(1, attempts + 1):
            try:
                if again and attempt == 1:
                    self._stream(chunks)
                else:
                    self._in_parts(verified(chunks, descriptor, self._what))
                return
            except RegistryError as error:
                if self._is_there():
                    return  # only the answer was lost
                # Some registries drop a session that broke off, and know nothing of it afterwards.
                if not (error.temporary or error.status in (400, 404, 416)) or attempt == attempts:
                    raise
            self._transport.traffic.add(retries=1)
            self._transport.pause(attempt)
            self._mount(())

    def _whole(self, data: bytes) -> None:
        """Send all bytes in one request; sessions do not outlive a failure, so each attempt has a new one."""
        attempts = self._transport.options.retry.attempts
        for attempt in range(1, attempts + 1):
            try:
                self._ask(
                    "PUT", url=self._final_url(), ok=(201,), headers=self._octets(len(data)), body=data, attempts=1
                )
                self._transport.traffic.add(bytes_written=len(data))
                return
            except RegistryError as error:
                if self._is_there():
                    return  # only the answer was lost
                if not (error.temporary or error.status == 404) or attempt == attempts:
                    raise
            self._transport.traffic.add(retries=1)
            self._transport.pause(attempt)
            self._mount(())

    def _stream(self, chunks: Chunks) -> None:
        descriptor = self._descriptor

        def body() -> Iterator[bytes | memoryview]:
            for piece in verified(chunks, descriptor, self._what):
                self._transport.traffic.add(bytes_written=len(piece))
                yield piece

        self._ask(
            "PUT", url=self._final_url(), ok=(201,), headers=self._octets(descriptor.size), body=body, attempts=1
        )  # fmt: skip

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
        self._close()

    def _part(self, data: bytes, start: int) -> None:
        """Send one part; what a failure left unsent goes again, from where the registry says it is."""
        done, attempts = 0, self._transport.options.retry.attempts
        for attempt in range(1, attempts + 1):
            first, last = start + done, start + len(data) - 1
            headers = self._octets(len(data) - done) | {"Content-Range": f"{first}-{last}"}
            try:
                self._moved(
                    self._ask("PATCH", url=self._location, ok=(202,), headers=headers, body=data[done:], attempts=1)
                )
                self._transport.traffic.add(bytes_written=len(data) - done)
                return
            except RegistryError as error:
                if not (error.temporary or error.status == 416) or attempt == attempts:
                    raise
            self._transport.traffic.add(retries=1)
            self._transport.pause(attempt)
            there = self._received(start)
            if not start <= there <= start + len(data):
                raise RegistryError(self._what, 416, f"has {there} bytes of the upload, want {start} or more")
            done = there - start
            if done == len(data):
                return

    def _received(self, start: int) -> int:
        """Return how many bytes of the session the registry has."""
        response = self._ask("GET", url=self._location, ok=(200, 202, 204))
        match = _RANGE.fullmatch(response.headers.get("range", ""))
        self._moved(response)
        last = int(match[1]) if match else -1
        # Several registries say 0-0 for nothing at all.
        return start if last <= 0 else last + 1

    def _close(self) -> None:
        try:
            self._ask("PUT", url=self._final_url(), ok=(201,), headers=self._octets(0), body=b"")
        except RegistryError:
            if not self._is_there():
                raise

    def _is_there(self) -> bool:
        try:
            path = f"/{self._endpoint.repository}/blobs/{self._descriptor.digest}"
            response = self._ask("HEAD", path=path, ok=(200, 404), follow=True)
        except RegistryError:
            return False
        return response.status_code == 200

    def _cancel(self) -> None:
        if self._location:
            with contextlib.suppress(LayerkitError, httpx2.HTTPError, OSError):
                self._ask("DELETE", url=self._location, ok=(200, 202, 204, 404, 405), attempts=1)

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

    def _ask(
        self,
        method: str,
        *,
        ok: Sequence[int],
        path: str = "",
        url: str = "",
        params: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
        body: Body = None,
        attempts: int | None = None,
        scopes: frozenset[str] = frozenset(),
        follow: bool = False,
    ) -> httpx2.Response:
        ask = Ask(
            self._endpoint, method, path, self._what, frozenset(ok), scopes or self._scopes,
            params=params, headers=headers or {}, body=body, url=url, follow=follow, attempts=attempts,
        )  # fmt: skip
        response = self._transport.send(ask)
        response.close()
        return response


__all__ = ["SMALL_BYTES", "Chunks", "Upload"]
