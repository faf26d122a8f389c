"""A repository as a sink for the use cases.

Blobs go up as they come: nobody sees a blob that no manifest names. Manifests are kept back until the commit,
which sends what others refer to first and the tags last, so whoever pulls by tag finds all of it or none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from layerkit.formats.oci import documents as oci
from layerkit.images.oci.sink import Sink
from layerkit.images.registry.client import Repository
from layerkit.images.registry.names import RegistryRef
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import DigestMismatch, UsageError

_MANIFESTS = oci.MANIFEST_TYPES | oci.INDEX_TYPES
ATTACHED = re.compile(r"sha(?:256|512)-[0-9a-f]{64,128}(\..*)?")


class RegistrySink(Sink):
    """A sink for one reference.

    Attributes:
        repository: where it all goes.
    """

    parallel = 4

    def __init__(
        self,
        repository: Repository,
        ref: RegistryRef,
        *,
        mount_from: Sequence[str] = (),
        attach_only: bool = False,
        owned: bool = False,
    ) -> None:
        """Write to ``repository``, and let the tag of ``ref`` (``latest`` if it has none) mean the image.

        Args:
            repository: of ``ref``.
            ref: with a digest, the image must have it, and with a digest alone it gets no tag.
            mount_from: repositories of the same registry that may have the blobs.
            attach_only: the image is there; all that is put is attached to it and gets no tag.
            owned: whether the repository's client is closed with this.
        """
        super().__init__(f"docker://{ref}", repository.client.limits)
        self.repository, self._ref, self._mount_from, self._owned = repository, ref, tuple(mount_from), owned
        self._tag = "" if ref.digest is not None and not ref.tag else ref.tag or "latest"
        self._there: set[Digest] = set()
        self.mounted: set[Digest] = set()
        self._staged: dict[Digest, tuple[Descriptor, bytes]] = {}
        self._tags: dict[str, Digest] = {}
        self._named = attach_only
        self._open = True

    def has_blob(self, digest: Digest) -> bool:
        """See the port."""
        if digest in self._there or digest in self._staged:
            return True
        if self.repository.blob_size(digest) is None:
            return False
        self._there.add(digest)
        return True

    def has_attached(self, subject: Digest, artifact_type: str) -> bool:
        """See the port."""
        return bool(self.repository.referrers(subject, artifact_type))

    def put_blob(self, descriptor: Descriptor, chunks: Iterable[bytes | memoryview]) -> None:
        """See the port; a manifest is kept for the commit."""
        if descriptor.media_type in _MANIFESTS:
            self._stage(descriptor, b"".join(bytes(piece) for piece in chunks))
            return
        if self.repository.put_blob(descriptor, chunks, mount_from=self._mount_from):
            self.mounted.add(descriptor.digest)
        self._there.add(descriptor.digest)

    def put_manifest(self, descriptor: Descriptor, data: bytes, name: str = "") -> None:
        """Keep a manifest for the commit; see the port.

        The reference says which tag the image gets, whatever its ``name`` was where it comes from; only names
        that attach something by a digest are tags as they are. Without a name, the first is the image, and what
        follows is attached to it. The fallback tag of referrers is not taken over: the registry, or the client,
        keeps that list.
        """
        attached = ATTACHED.fullmatch(name)
        if attached is not None and not attached[1]:
            return
        self._stage(descriptor, data)
        if attached is not None:
            self._tags[name] = descriptor.digest
        elif name or not self._named:
            self._named = True
            if self._ref.digest is not None and descriptor.digest != self._ref.digest:
                raise UsageError(
                    f"{self._where}: the image to write has the digest {descriptor.digest}; name it by a tag"
                )
            if self._tag:
                self._tags[self._tag] = descriptor.digest

    def _stage(self, descriptor: Descriptor, data: bytes) -> None:
        what = f"docker://{self.repository.name}: manifest {descriptor.digest}"
        oci.verify(data, descriptor, what)
        oci.references(data, descriptor.media_type, what, limits=self._limits)
        self._staged.setdefault(descriptor.digest, (descriptor, data))

    def _commit(self) -> None:
        tagged = {digest: tag for tag, digest in self._tags.items()}
        alone = len(self._staged) == 1
        for digest, (descriptor, data) in self._staged.items():
            # The only manifest needs no first step; of several, all must be there before a tag leads to them.
            if not (alone and digest in tagged):
                self._put(descriptor, data, "")
        for tag, digest in self._tags.items():
            self._put(*self._staged[digest], tag)

    def _put(self, descriptor: Descriptor, data: bytes, tag: str) -> None:
        stored = self.repository.put_manifest(data, descriptor.media_type, tag)
        if stored.digest != descriptor.digest:
            raise DigestMismatch(f"{self._where}", str(stored.digest), str(descriptor.digest))

    def _drop(self) -> None:
        self._staged, self._tags = {}, {}  # blobs without a manifest are the registry's to collect
        if self._owned:
            self.repository.client.close()
