"""The registry client: repositories with their manifests, blobs, tags and referrers.

::

    with RegistryClient() as client:
        repo = client.repository("registry.example.com/team/app")
        descriptor, data = repo.manifest("v1")
        for layer in oci.parse_manifest(data, "v1").layers:
            reader = repo.open_blob(layer)

One client serves any number of registries and threads. Every answer that has a digest is checked against it,
but for the bytes of :meth:`Repository.open_blob`, which the reader verifies as it goes.

What refers to a manifest comes from the referrers API (distribution-spec 1.1, "Listing Referrers"). Registries
before 1.1 (docker-registry 2.8, for one) keep manifests with a subject and do not list them; then the client keeps
the list, an image index under the tag ``sha256-HEX`` ("Referrers Tag Schema"). Two writers of such a list could
lose each other's entries: they take turns by a lock on this host, and look afterwards if theirs is still there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import httpx2

from layerkit.formats.oci import documents as oci
from layerkit.formats.strict_json import JsonObject, load_object
from layerkit.images.oci.blobs import chunks as pieces_of
from layerkit.images.oci.blobs import verified
from layerkit.images.registry import options as settings
from layerkit.images.registry.auth import scope
from layerkit.images.registry.blobs import Chunks, RemoteBlob, Upload, check_range
from layerkit.images.registry.hosts import Endpoint, base_url, endpoints
from layerkit.images.registry.names import RegistryRef, fallback_tag, parse_host
from layerkit.images.registry.transport import Ask, Traffic, Transport, next_url, origin
from layerkit.linux.syscalls import opened
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import DigestMismatch, InvalidImage, NotFound, RegistryError, UsageError
from layerkit.model.limits import DEFAULT, Limits

_ACCEPT = ", ".join((oci.MANIFEST, oci.INDEX, oci.DOCKER_MANIFEST, oci.DOCKER_LIST, *sorted(oci.DOCKER_SCHEMA1)))
_KNOWN = oci.MANIFEST_TYPES | oci.INDEX_TYPES | oci.DOCKER_SCHEMA1
_NO_HEAD = (405, 501)
"""What registries, and proxies before them, answer to a HEAD that they do not know."""
_CATALOG_SCOPE = frozenset(("registry:catalog:*",))
_NEXT = re.compile(
    r'<([^>]*)>\s*(?:;\s*[A-Za-z]+\s*=\s*(?:"[^"]*"|[^;,"]*)\s*)*?;\s*rel\s*=\s*"?next"?', re.IGNORECASE
)
_MAX_PAGES = 10_000
_ATTEMPTS = 8
_Taken = TypeVar("_Taken")


class RegistryClient:
    """Connections, credentials and tokens for any number of registries."""

    def __init__(
        self,
        options: settings.RegistryOptions | None = None,
        *,
        limits: Limits = DEFAULT,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Nothing is connected yet.

        Args:
            options: None takes those of the environment.
            limits: bounds on what is read.
            sleep: waits between attempts; may raise to stop the work.

        Raises:
            UsageError: a file that the options name is not there.
        """
        self.options = options or settings.from_settings()
        if self.options.authfile is not None and not self.options.authfile.is_file():
            raise UsageError(f"{self.options.authfile}: no such file; --authfile names the one of `podman login`")
        self.limits = limits
        self.transport = Transport(self.options, sleep=sleep)

    @property
    def traffic(self) -> Traffic:
        """Return what went over the wire so far."""
        return self.transport.traffic

    def repository(self, ref: RegistryRef | str) -> Repository:
        """Return the repository of ``ref`` (``HOST/NAME``, tag and digest are ignored).

        Raises:
            UsageError: no reference, or a registry that ``registries.conf`` blocks.
        """
        parsed = RegistryRef.parse(ref) if isinstance(ref, str) else ref
        return Repository(self, parsed.host, parsed.repository)

    def catalog(self, host: str) -> Iterator[str]:
        """Yield the repositories of a registry; some offer no such list.

        Raises:
            RegistryError: refused, or the listing goes in a circle.
        """
        endpoint = endpoints(parse_host(host), "", self.options)[-1]
        ask = Ask(endpoint, "GET", "/_catalog", f"catalog of {host}", scopes=_CATALOG_SCOPE)
        for document in pages(self.transport, ask, self.limits):
            yield from _texts(document.get("repositories"))

    def close(self) -> None:
        """Close all connections."""
        self.transport.close()

    def __enter__(self) -> RegistryClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Repository:
    """One repository of a registry; use :meth:`RegistryClient.repository`. Callable from several threads.

    Attributes:
        client: that it belongs to.
        host: of the registry.
        repository: the name in it.
    """

    def __init__(self, client: RegistryClient, host: str, repository: str) -> None:
        """See the class."""
        self.host, self.repository = host, repository
        self.client, self._transport, self._limits = client, client.transport, client.limits
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
                response = self._ask_manifest(endpoint, "HEAD", reference)
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
        return self._first(
            reference, lambda endpoint: self._ask_manifest(endpoint, "GET", reference),
            lambda response: self._received(response, reference), "image",
        )  # fmt: skip

    def _received(self, response: httpx2.Response, reference: str | Digest) -> tuple[Descriptor, bytes]:
        what = self._label(reference)
        data = self._transport.body(response, self._limits.manifest_bytes, what)
        media_type, said = _media_type(response.headers), response.headers.get("docker-content-digest")
        if media_type not in _KNOWN:
            media_type = oci.guess_media_type(data, what, limits=self._limits)
        digest = reference if isinstance(reference, Digest) else Digest.parse(said) if said else Digest.of(data)
        descriptor = Descriptor(media_type, digest, len(data))
        oci.verify(data, descriptor, what)
        return descriptor, data

    def fetch(self, entry: Descriptor, most: int) -> bytes:
        """Return a small manifest or blob, verified; the media type says which of the two it is.

        Raises:
            InvalidImage: more than ``most`` bytes, or other ones.
            NotFound, RegistryError: it is not to be had.
        """
        if entry.media_type in _KNOWN:
            return oci.verify(self.manifest(entry.digest)[1], entry, self._label(entry.digest))
        return self.blob(entry, most)

    def put_manifest(self, data: bytes, media_type: str, tag: str = "") -> Descriptor:
        """Store a manifest or index under its digest, and under ``tag`` where given; return its descriptor.

        What it refers to must be there already. Where it has a subject and the registry has no referrers
        API, it is listed under the fallback tag of its subject.

        Raises:
            RegistryError: the registry does not take it.
        """
        descriptor = Descriptor.of(media_type, data)
        what = self._label(tag or descriptor.digest)
        response = self._send(Ask(
            self._home, "PUT", f"/{self._home.repository}/manifests/{tag or descriptor.digest}", what,
            (200, 201, 202), self._scopes("push"), headers={"Content-Type": media_type}, body=data,
        ))  # fmt: skip
        self._transport.traffic.add(bytes_written=len(data))
        said = response.headers.get("docker-content-digest")
        if said and said != str(descriptor.digest):
            raise DigestMismatch(f"{what}: as the registry stored it", said, str(descriptor.digest))
        if media_type in oci.MANIFEST_TYPES:
            manifest = oci.parse_manifest(data, what, media_type=media_type, limits=self._limits)
            if manifest.subject is not None and "oci-subject" not in response.headers:
                self._list_by_tag(manifest, manifest.subject.digest, descriptor)
        return descriptor

    def delete_manifest(self, digest: Digest) -> None:
        """Remove a manifest; many registries do not allow it.

        Raises:
            NotFound: it is not there.
            RegistryError: refused.
        """
        what, path = self._label(digest), f"/{self._home.repository}/manifests/{digest}"
        ask = Ask(self._home, "DELETE", path, what, (200, 202, 404), self._scopes("delete"))
        if self._send(ask).status_code == 404:
            raise NotFound(f"{what}: the registry has no such manifest")

    def has_manifest(self, reference: str | Digest) -> bool:
        """Return whether the registry itself (no mirror) has a manifest."""
        return (
            self._head(lambda method, ok: self._ask_manifest(self._home, method, reference, ok)).status_code == 200
        )

    # Blobs

    def blob_size(self, digest: Digest) -> int | None:
        """Return the size of a blob that the registry itself (no mirror) has, None if it has not."""
        path, what = f"/{self._home.repository}/blobs/{digest}", self._label(digest)
        response = self._head(lambda method, ok: self._transport.send(Ask(self._home, method, path, what, ok)))
        length = response.headers.get("content-length", "")
        return None if response.status_code == 404 else int(length) if length.isdigit() else 0

    def open_blob(self, descriptor: Descriptor) -> RemoteBlob:
        """Open a blob from its start, NOT verified; it survives broken connections.

        Raises:
            NotFound: it is not there.
            RegistryError: the registry fails or refuses.
        """
        what = self._label(descriptor.digest)
        return RemoteBlob(self._transport, descriptor, lambda at: self._open_at(descriptor, at), what)

    def blob(self, descriptor: Descriptor, most: int) -> bytes:
        """Return a whole small blob, verified.

        Raises:
            InvalidImage: larger than ``most`` bytes, or not what the descriptor promises.
        """
        what = self._label(descriptor.digest)
        if descriptor.size > most:
            raise InvalidImage(f"{what}: {descriptor.size} bytes, at most {most} are read here")
        with contextlib.closing(self.open_blob(descriptor)) as reader:
            return b"".join(bytes(piece) for piece in verified(pieces_of(reader.readinto), descriptor, what))

    def blob_range(self, descriptor: Descriptor, start: int, length: int) -> bytes:
        """Return a part of a blob, NOT verified: a part has no digest of its own.

        Raises:
            RegistryError: the registry cannot give parts (status 200), or gives another one.
        """
        what, end = self._label(descriptor.digest), start + length
        for attempt in range(1, self.client.options.retry.attempts + 1):
            response = self._open_at(descriptor, start, end)
            try:
                if response.status_code != 206:
                    raise RegistryError(what, response.status_code, "the registry does not support range requests")
                check_range(response, start, end, descriptor.size, what)
                data = self._transport.body(response, length, what)
                if len(data) == length:
                    return data
            except httpx2.TransportError:
                pass
            finally:
                response.close()
            self._transport.traffic.add(retries=1)
            self._transport.pause(attempt)
        raise RegistryError(what, 206, f"bytes {start}-{end - 1} break off, again and again", temporary=True)

    def _open_at(self, descriptor: Descriptor, start: int, end: int | None = None) -> httpx2.Response:
        headers = {} if not start and end is None else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
        digest, what = descriptor.digest, self._label(descriptor.digest)

        def ask(endpoint: Endpoint) -> httpx2.Response:
            path = f"/{endpoint.repository}/blobs/{digest}"
            return self._transport.send(Ask(endpoint, "GET", path, what, (200, 206, 404), headers=headers))

        return self._first(digest, ask, lambda response: response, "blob")

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
        neighbours = [name for name in mount_from if name not in ("", self.repository)]
        upload = Upload(self._transport, self._home, descriptor, self._label(descriptor.digest))
        return upload.run(chunks, neighbours)

    # Lists

    def tags(self) -> Iterator[str]:
        """Yield the tags of the repository, in the registry's order.

        Raises:
            NotFound: no such repository.
            RegistryError: refused, or the listing goes in a circle.
        """
        path = f"/{self._home.repository}/tags/list"
        ask = Ask(self._home, "GET", path, f"tags of {self.name}", (200, 404))
        for document in pages(self._transport, ask, self._limits):
            yield from _texts(document.get("tags"))

    def referrers(self, subject: Digest, artifact_type: str = "") -> list[Descriptor]:
        """Return what is attached to the manifest ``subject``, as the registry lists it.

        Nothing of it is verified but its form: a manifest must be read to know that it has this subject.

        Args:
            subject: digest of a manifest, which need not exist.
            artifact_type: only of this type, "" for all.
        """
        found = self._by_api(subject, artifact_type)
        if not found:
            # A registry that learnt the API later still has lists that were kept by tag.
            known = {entry.digest for entry in found or ()}
            found = [*(found or ()), *(e for e in self._by_tag(subject)[1] if e.digest not in known)]
        return [e for e in found if not artifact_type or e.artifact_type in ("", artifact_type)]

    def _by_api(self, subject: Digest, artifact_type: str) -> list[Descriptor] | None:
        """Return what the referrers API answers, None where the registry has none."""
        if self._no_referrers_api:
            return None
        what = f"referrers of {self._label(subject)}"
        ask = Ask(
            self._home, "GET", f"/{self._home.repository}/referrers/{subject}", what, (200, 400, 404, 405, 501),
            params=[("artifactType", artifact_type)] if artifact_type else (), headers={"Accept": oci.INDEX},
        )  # fmt: skip
        entries: list[Descriptor] = []
        try:
            for document in pages(self._transport, ask, self._limits):
                listed = document.get("manifests")
                if not isinstance(listed, list):
                    raise RegistryError(what, 200, "its answer is no image index")
                for at, value in enumerate(listed):
                    entries.append(oci.descriptor(value, what, f"manifests[{at}]"))
                    self._limits.check("manifests_per_index", len(entries), what)
        except NoSuchList:
            self._no_referrers_api = True
            return None
        return entries

    def _by_tag(self, subject: Digest) -> tuple[JsonObject | None, tuple[Descriptor, ...]]:
        try:
            descriptor, data = self.manifest(fallback_tag(subject))
        except NotFound:
            return None, ()
        if descriptor.media_type not in oci.INDEX_TYPES:
            return None, ()
        what = f"{self.name}:{fallback_tag(subject)}"
        try:
            parsed = oci.parse_index(data, what, media_type=descriptor.media_type, limits=self._limits)
        except InvalidImage as error:
            raise RegistryError(what, 200, f"the list of referrers is malformed: {error}") from None
        return parsed.document, parsed.manifests

    def _list_by_tag(self, manifest: oci.Manifest, subject: Digest, descriptor: Descriptor) -> None:
        """Add ``descriptor``, whose manifest is ``manifest``, to the list that is kept by tag, if there is one.

        Raises:
            RegistryError: other writers kept taking the entry out.
        """
        if self._by_api(subject, "") is not None:
            return  # the registry lists it by itself
        entry = replace(
            descriptor,
            artifact_type=manifest.artifact_type or manifest.config.media_type,
            annotations=dict(manifest.annotations),
        )
        what = f"{self.name}:{fallback_tag(subject)}"
        with _turn(what):
            for _ in range(_ATTEMPTS):
                document, entries = self._by_tag(subject)
                if any(each.digest == entry.digest for each in entries):
                    return
                self.put_manifest(oci.index_json([*entries, entry], document), oci.INDEX, fallback_tag(subject))
        raise RegistryError(what, 0, "other writers keep replacing this list; try again", temporary=True)

    # Requests

    def _asked(self, reference: str | Digest) -> list[Endpoint]:
        by_digest = isinstance(reference, Digest)
        return [e for e in self._endpoints if e is self._home or e.serves(digest=by_digest)]

    def _first(
        self, reference: str | Digest, ask: Callable[[Endpoint], httpx2.Response],
        take: Callable[[httpx2.Response], _Taken], kind: str,
    ) -> _Taken:  # fmt: skip
        """Return what ``take`` makes of the first answer that is no 404; it, or whoever has it then, closes it."""
        for endpoint in self._asked(reference):
            try:
                response = ask(endpoint)
                if response.status_code != 404:
                    return take(response)
                response.close()
            except (RegistryError, InvalidImage):
                if endpoint is self._home:  # a mirror that fails costs time and nothing else
                    raise
        raise NotFound(f"{self._label(reference)}: the registry has no such {kind}")

    def _head(self, ask: Callable[[str, Sequence[int]], httpx2.Response]) -> httpx2.Response:
        """Return the answer, closed, to a HEAD, or where that is not known to a GET, whose head says the same."""
        response = ask("HEAD", (200, 404, *_NO_HEAD))
        response.close()
        if response.status_code in _NO_HEAD:
            response = ask("GET", (200, 404))
            response.close()
        return response

    def _label(self, reference: str | Digest) -> str:
        return f"docker://{self.name}{'@' if isinstance(reference, Digest) else ':'}{reference}"

    def _scopes(self, action: str) -> frozenset[str]:
        return frozenset((scope(self._home.repository, "pull", action),))

    def _send(self, ask: Ask) -> httpx2.Response:
        response = self._transport.send(ask)
        response.close()
        return response

    def _ask_manifest(
        self, endpoint: Endpoint, method: str, reference: str | Digest, ok: Sequence[int] = (200, 404)
    ) -> httpx2.Response:
        path = f"/{endpoint.repository}/manifests/{reference}"
        ask = Ask(endpoint, method, path, self._label(reference), ok, headers={"Accept": _ACCEPT})
        return self._transport.send(ask)


class NoSuchList(NotFound):
    """The registry does not offer the list."""


def pages(transport: Transport, ask: Ask, limits: Limits) -> Iterator[JsonObject]:
    """Yield the documents of a list, page by page (distribution-spec, "Listing Tags").

    Args:
        transport: of the client.
        ask: for the first page; statuses in ``ok`` that are not 200 mean that there is no list.
        limits: bounds on a page.

    Raises:
        NoSuchList: the registry does not have it.
        RegistryError: a page that leads away from the registry, or in a circle.
    """
    seen: set[str] = set()
    for _ in range(_MAX_PAGES):
        response = transport.send(ask)
        if response.status_code != 200:
            response.close()
            raise NoSuchList(f"{ask.what}: the registry has no such list")
        here, link = str(response.url), response.headers.get("link", "")
        yield load_object(transport.body(response, limits.manifest_bytes, ask.what), ask.what, limits)
        match = _NEXT.search(link[:8192])
        if match is None:
            return
        url = next_url(here, match[1], ask.endpoint.host, ask.what, 200)
        if origin(url) != origin(base_url(ask.endpoint, transport.scheme(ask.endpoint))):
            raise RegistryError(
                ask.what, 200, f"its next page is on another host ({transport.words.show(url)}); refused"
            )
        if url in seen:
            raise RegistryError(ask.what, 200, "its pages go in a circle")
        seen.add(url)
        ask = replace(ask, url=url, params=())
    raise RegistryError(ask.what, 200, f"more than {_MAX_PAGES} pages")


def _texts(value: object) -> Iterator[str]:
    """Yield the texts in a list that a registry has sent, whatever else is in it."""
    return (text for text in value if isinstance(text, str)) if isinstance(value, list) else iter(())


def _media_type(headers: httpx2.Headers) -> str:
    return headers.get("content-type", "").partition(";")[0].strip()


@contextlib.contextmanager
def _turn(key: str) -> Iterator[None]:
    """Have the list called ``key`` to oneself among the processes and threads of this user."""
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    folder = Path(base) / f"layerkit-registry-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RegistryError(key, 0, f"{folder} belongs to somebody else; set XDG_RUNTIME_DIR to a folder of yours")
    name = hashlib.sha256(key.encode()).hexdigest()[:2]  # few files that stay, each for many lists
    with opened(folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, mode=0o600) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
