"""One repository of a registry: its manifests, blobs, tags and referrers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import httpx2

from layerkit.formats.oci import documents as oci
from layerkit.images.blobs import verified
from layerkit.images.registry import referrers
from layerkit.images.registry.auth import scope
from layerkit.images.registry.downloads import RemoteBlob, check_range
from layerkit.images.registry.hosts import Endpoint, endpoints
from layerkit.images.registry.listing import pages, texts
from layerkit.images.registry.transport import Ask, Traffic
from layerkit.images.registry.uploads import Chunks, Upload
from layerkit.images.registry.words import read_body
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import DigestMismatch, InvalidImage, NotFound, RegistryError

if TYPE_CHECKING:
    from layerkit.images.registry.client import RegistryClient

_ACCEPT = ", ".join((oci.MANIFEST, oci.INDEX, oci.DOCKER_MANIFEST, oci.DOCKER_LIST, *sorted(oci.DOCKER_SCHEMA1)))
_KNOWN = oci.MANIFEST_TYPES | oci.INDEX_TYPES | oci.DOCKER_SCHEMA1
_NO_HEAD = (405, 501)
"""What registries, and proxies before them, answer to a HEAD that they do not know."""


class Repository:
    """One repository of a registry; use :meth:`RegistryClient.repository`. Callable from several threads.

    Attributes:
        host: of the registry.
        repository: the name in it.
    """

    def __init__(self, client: RegistryClient, host: str, repository: str) -> None:
        """See the class."""
        self.host, self.repository = host, repository
        self._client, self._transport, self._limits = client, client.transport, client.limits
        self._endpoints = endpoints(host, repository, client.options)
        self._home = self._endpoints[-1]
        self._no_referrers_api = False

    @property
    def name(self) -> str:
        """Return ``HOST/REPOSITORY``."""
        return f"{self.host}/{self.repository}"

    @property
    def traffic(self) -> Traffic:
        """Return what the client that this belongs to has sent and read."""
        return self._transport.traffic

    def __str__(self) -> str:
        return self.name

    # Manifests

    def resolve(self, reference: str | Digest) -> Descriptor:
        """Return the descriptor of what a tag or digest names, by HEAD where the registry answers it wholly.

        Raises:
            NotFound: no such tag or digest.
            RegistryError: the registry fails or refuses.
        """
        for endpoint in self._asked(reference):
            with contextlib.suppress(RegistryError, InvalidImage):
                response = self._manifest_ask(endpoint, "HEAD", reference)
                response.close()
                if response.status_code == 200:
                    headers = response.headers
                    digest, size = headers.get("docker-content-digest"), headers.get("content-length", "")
                    media_type = _media_type(headers)
                    if digest and size.isdigit() and media_type in _KNOWN:
                        return Descriptor(media_type, Digest.parse(digest), int(size))
        return self.manifest(reference)[0]

    def manifest(self, reference: str | Digest) -> tuple[Descriptor, bytes]:
        """Return a manifest or index with its descriptor; a digest is verified.

        Raises:
            NotFound: no such tag or digest.
            DigestMismatch: other bytes than were asked for, or than the registry announces.
            RegistryError: the registry fails or refuses.
        """
        what = self._label(reference)
        failure: Exception | None = None
        for endpoint in self._asked(reference):
            try:
                response = self._manifest_ask(endpoint, "GET", reference)
                if response.status_code == 404:
                    response.close()
                    continue
                return self._received(response, reference, what)
            except (RegistryError, InvalidImage) as error:
                if endpoint is self._home:
                    raise
                failure = error  # a mirror that fails costs time and nothing else
        del failure
        raise NotFound(f"docker://{what}: the registry has no such image")

    def _received(self, response: httpx2.Response, reference: str | Digest, what: str) -> tuple[Descriptor, bytes]:
        data = read_body(response, self._limits.manifest_bytes, what)
        self._transport.traffic.add(bytes_read=len(data))
        media_type, said = _media_type(response.headers), response.headers.get("docker-content-digest")
        if media_type not in _KNOWN:
            media_type = oci.guess_media_type(data, what, limits=self._limits)
        digest = reference if isinstance(reference, Digest) else Digest.parse(said) if said else Digest.of(data)
        descriptor = Descriptor(media_type, digest, len(data))
        oci.verify(data, descriptor, f"docker://{what}")
        return descriptor, data

    def fetch(self, entry: Descriptor, most: int) -> bytes:
        """Return a small manifest or blob, verified; the media type says which of the two it is.

        Raises:
            InvalidImage: more than ``most`` bytes, or other ones.
            NotFound, RegistryError: it is not to be had.
        """
        if entry.media_type in _KNOWN:
            return oci.verify(self.manifest(entry.digest)[1], entry, f"docker://{self._label(entry.digest)}")
        return self.blob(entry, most)

    def put_manifest(self, data: bytes, media_type: str, tag: str = "") -> Descriptor:
        """Store a manifest or index under its digest, and under ``tag`` where given; return its descriptor.

        What it refers to must be there already. Where it has a subject and the registry has no referrers
        API, it is listed under the fallback tag of its subject.

        Raises:
            RegistryError: the registry does not take it.
        """
        descriptor = Descriptor(media_type, Digest.of(data), len(data))
        what = self._label(tag or descriptor.digest)
        path = f"/{self._home.repository}/manifests/{tag or descriptor.digest}"
        headers = {"Content-Type": media_type}
        response = self._ask(self._home, "PUT", path, what, (200, 201, 202), push=True, headers=headers, body=data)
        response.close()
        self._transport.traffic.add(bytes_written=len(data))
        said = response.headers.get("docker-content-digest")
        if said and said != str(descriptor.digest):
            raise DigestMismatch(f"docker://{what}: as the registry stored it", said, str(descriptor.digest))
        if media_type in oci.MANIFEST_TYPES:
            manifest = oci.parse_manifest(data, what, media_type=media_type, limits=self._limits)
            if manifest.subject is not None and "oci-subject" not in response.headers:
                referrers.list_by_tag(self, manifest, descriptor, self._limits)
        return descriptor

    def delete_manifest(self, digest: Digest) -> None:
        """Remove a manifest; many registries do not allow it.

        Raises:
            NotFound: it is not there.
            RegistryError: refused.
        """
        what = self._label(digest)
        response = self._ask(
            self._home, "DELETE", f"/{self._home.repository}/manifests/{digest}", what, (200, 202, 404), delete=True
        )
        response.close()
        if response.status_code == 404:
            raise NotFound(f"docker://{what}: the registry has no such manifest")

    def has_manifest(self, reference: str | Digest) -> bool:
        """Return whether the registry itself (no mirror) has a manifest."""
        response = self._manifest_ask(self._home, "HEAD", reference, _NO_HEAD)
        response.close()
        if response.status_code in _NO_HEAD:
            response = self._manifest_ask(self._home, "GET", reference)
            response.close()
        return response.status_code == 200

    # Blobs

    def blob_size(self, digest: Digest) -> int | None:
        """Return the size of a blob that the registry itself (no mirror) has, None if it has not."""
        path = f"/{self._home.repository}/blobs/{digest}"
        response = self._ask(self._home, "HEAD", path, self._label(digest), (200, 404, *_NO_HEAD))
        response.close()
        if response.status_code in _NO_HEAD:
            response = self._ask(self._home, "GET", path, self._label(digest), (200, 404))
            response.close()  # its head says all that is wanted
        length = response.headers.get("content-length", "")
        return None if response.status_code == 404 else int(length) if length.isdigit() else 0

    def open_blob(self, descriptor: Descriptor) -> RemoteBlob:
        """Open a blob from its start, NOT verified; it survives broken connections.

        Raises:
            NotFound: it is not there.
            RegistryError: the registry fails or refuses.
        """
        what = f"docker://{self._label(descriptor.digest)}"
        return RemoteBlob(self._transport, descriptor, lambda at: self._open_at(descriptor, at, what), what)

    def blob(self, descriptor: Descriptor, most: int) -> bytes:
        """Return a whole small blob, verified.

        Raises:
            InvalidImage: larger than ``most`` bytes, or not what the descriptor promises.
        """
        what = f"docker://{self._label(descriptor.digest)}"
        if descriptor.size > most:
            raise InvalidImage(f"{what}: {descriptor.size} bytes, at most {most} are read here")
        reader, buffer = self.open_blob(descriptor), memoryview(bytearray(64 << 10))

        def pieces() -> Iterator[bytes]:
            while got := reader.readinto(buffer):
                yield bytes(buffer[:got])

        try:
            return b"".join(bytes(piece) for piece in verified(pieces(), descriptor, what))
        finally:
            reader.close()

    def blob_range(self, descriptor: Descriptor, start: int, length: int) -> bytes:
        """Return a part of a blob, NOT verified: a part has no digest of its own.

        Raises:
            RegistryError: the registry cannot give parts (status 200), or gives another one.
        """
        what = f"docker://{self._label(descriptor.digest)}"
        end = start + length
        for attempt in range(1, self._client.options.retry.attempts + 1):
            response = self._open_at(descriptor, start, what, end)
            try:
                if response.status_code != 206:
                    raise RegistryError(what, response.status_code, "the registry gives no parts of blobs")
                check_range(response, start, end, descriptor.size, what)
                data = read_body(response, length, what)
                self._transport.traffic.add(bytes_read=len(data))
                if len(data) == length:
                    return data
            except httpx2.TransportError:
                pass
            finally:
                response.close()
            self._transport.traffic.add(retries=1)
            self._transport.pause(attempt)
        raise RegistryError(what, 206, f"bytes {start}-{end - 1} break off, again and again", temporary=True)

    def _open_at(self, descriptor: Descriptor, start: int, what: str, end: int | None = None) -> httpx2.Response:
        headers = {} if not start and end is None else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
        for endpoint in self._endpoints:
            if not endpoint.serves(digest=True):
                continue
            path = f"/{endpoint.repository}/blobs/{descriptor.digest}"
            try:
                response = self._ask(endpoint, "GET", path, what, (200, 206, 404), headers=headers)
            except RegistryError:
                if endpoint is self._home:
                    raise
                continue
            if response.status_code != 404:
                return response
            response.close()
        raise NotFound(f"{what}: the registry has no such blob")

    def put_blob(self, descriptor: Descriptor, chunks: Chunks, *, mount_from: Sequence[str] = ()) -> bool:
        """Store a blob, verified while it is sent; return whether it was mounted and ``chunks`` not read.

        Args:
            descriptor: digest and size.
            chunks: the bytes. If they can be iterated again, a broken upload begins again.
            mount_from: names of repositories of this registry that may have it.

        Raises:
            DigestMismatch: the bytes are not what ``descriptor`` promises; the registry keeps nothing.
            RegistryError: the registry does not take it.
        """
        what = f"docker://{self._label(descriptor.digest)}"
        neighbours = [name for name in mount_from if name != self.repository]
        return Upload(self._transport, self._home, descriptor, what).run(chunks, neighbours)

    # Lists

    def tags(self) -> Iterator[str]:
        """Yield the tags of the repository, in the registry's order.

        Raises:
            NotFound: no such repository.
            RegistryError: refused, or the listing goes in a circle.
        """
        ask = Ask(
            self._home, "GET", f"/{self._home.repository}/tags/list", f"tags of {self.name}", frozenset((200, 404)),
            self._scopes(self._home),
        )  # fmt: skip
        for document in pages(self._transport, ask, self._limits):
            yield from texts(document.get("tags"))

    def referrers(self, subject: Digest, artifact_type: str = "") -> list[Descriptor]:
        """Return what is attached to the manifest ``subject``, as the registry lists it.

        Nothing of it is verified but its form: a manifest must be read to know that it has this subject.

        Args:
            subject: digest of a manifest, which need not exist.
            artifact_type: only of this type, "" for all.
        """
        return referrers.find(self, subject, artifact_type, self._limits)

    # Requests

    def referrers_api(self, subject: Digest, artifact_type: str) -> list[Descriptor] | None:
        """Return what the referrers API answers, None where the registry has none."""
        if self._no_referrers_api:
            return None
        path = f"/{self._home.repository}/referrers/{subject}"
        params = [("artifactType", artifact_type)] if artifact_type else []
        what = f"referrers of {self._label(subject)}"
        ask = Ask(
            self._home, "GET", path, what, frozenset((200, 400, 404, 405, 501)), self._scopes(self._home), params,
            headers={"Accept": oci.INDEX},
        )  # fmt: skip
        found = referrers.from_api(pages(self._transport, ask, self._limits), what, self._limits)
        self._no_referrers_api = found is None
        return found

    def _asked(self, reference: str | Digest) -> list[Endpoint]:
        by_digest = isinstance(reference, Digest)
        return [e for e in self._endpoints if e is self._home or e.serves(digest=by_digest)]

    def _label(self, reference: str | Digest) -> str:
        return f"{self.name}{'@' if isinstance(reference, Digest) else ':'}{reference}"

    def _manifest_ask(
        self, endpoint: Endpoint, method: str, reference: str | Digest, also: Sequence[int] = ()
    ) -> httpx2.Response:
        path, ok = f"/{endpoint.repository}/manifests/{reference}", (200, 404, *also)
        return self._ask(endpoint, method, path, self._label(reference), ok, headers={"Accept": _ACCEPT})

    def _scopes(self, endpoint: Endpoint, *, push: bool = False, delete: bool = False) -> frozenset[str]:
        actions = ("pull", *(("push",) if push else ()), *(("delete",) if delete else ()))
        return frozenset((scope(endpoint.repository, *actions),))

    def _ask(
        self, endpoint: Endpoint, method: str, path: str, what: str, ok: Sequence[int], *, push: bool = False,
        delete: bool = False, headers: dict[str, str] | None = None, body: bytes | None = None,
    ) -> httpx2.Response:  # fmt: skip
        scopes = self._scopes(endpoint, push=push, delete=delete)
        return self._transport.send(
            Ask(endpoint, method, path, what, frozenset(ok), scopes, headers=headers or {}, body=body)
        )


def _media_type(headers: httpx2.Headers) -> str:
    return headers.get("content-type", "").partition(";")[0].strip()


__all__ = ["Repository"]
