"""An image in a registry as a source for the use cases."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from layerkit.formats.oci import documents as oci
from layerkit.formats.oci import images as oci_images
from layerkit.formats.oci import remap_artifact as artifact
from layerkit.images.registry.client import Repository
from layerkit.images.registry.names import RegistryRef
from layerkit.model.descriptor import Descriptor, Platform
from layerkit.model.digest import Digest
from layerkit.model.errors import InvalidImage, NotFound
from layerkit.model.image import Image
from layerkit.model.ports import ImageSource, ReadRange

if TYPE_CHECKING:
    from layerkit.model.ports import BlobReader

_COSIGN_SUFFIXES = (".sig", ".att", ".sbom")


class RegistrySource(ImageSource):
    """A source over a repository. What a tag means is asked once: all that is read afterwards belongs together.

    Attributes:
        repository: where it lies.
        ref: the reference.
    """

    def __init__(self, repository: Repository, ref: RegistryRef, *, owned: bool = False) -> None:
        """Read what ``ref`` names from ``repository``, whose client is closed with this if it is ``owned``."""
        self.repository, self.ref, self._owned = repository, ref, owned
        self._limits = repository.client.limits
        self.where = f"docker://{ref}"
        self._top: tuple[Descriptor, bytes] | None = None
        self._manifests: dict[Digest, bytes] = {}

    def image(self, platform: Platform | None = None) -> Image:
        """See the port."""
        return oci_images.Reading(self.fetch, self.where, self._limits).select(
            self.chosen(), str(self.ref), platform
        )

    def chosen(self) -> Sequence[Descriptor]:
        """See the port; it is one manifest or index."""
        if self._top is None:
            self._top = self.repository.manifest(self.ref.digest or self.ref.tag or "latest")
            self._manifests[self._top[0].digest] = self._top[1]
        return [self._top[0]]

    def fetch(self, entry: Descriptor, most: int) -> bytes:
        """Return a small blob or a manifest, verified; manifests are asked for once."""
        data = self._manifests.get(entry.digest)
        if data is None:
            data = self.repository.fetch(entry, most)
            if entry.media_type in oci.MANIFEST_TYPES | oci.INDEX_TYPES:
                self._manifests[entry.digest] = data
        return data

    def open_blob(self, descriptor: Descriptor) -> BlobReader:
        """See the port."""
        try:
            return self.repository.open_blob(descriptor)
        except NotFound:
            urls = descriptor.extra.get("urls")
            hint = f"it is to be had from {urls}, which layerkit does not do" if urls else "push the image again"
            raise InvalidImage(f"{self.where}: blob {descriptor.digest} is missing; {hint}") from None

    def ranges(self, descriptor: Descriptor) -> ReadRange:
        """See the port, and :meth:`Repository.blob_range`."""
        return lambda start, length: self.repository.blob_range(descriptor, start, length)

    def repository_at(self, registry: str) -> str:
        """See the port."""
        return self.ref.repository if self.ref.host == registry else ""

    def bytes_read(self) -> int:
        """See the port."""
        return self.repository.traffic.bytes_read

    def referrers(self, subject: Digest, artifact_type: str = "") -> list[tuple[Descriptor, bytes]]:
        """See the port. The registry's list is its word only: what in it has another subject is left out."""
        found = []
        for entry in self.repository.referrers(subject, artifact_type):
            if entry.media_type not in oci.MANIFEST_TYPES:
                continue
            try:
                data = oci_images.Reading(self.fetch, self.where, self._limits).manifest(entry)
            except NotFound:
                continue  # lists that are kept by tag outlive what was deleted
            what = f"{self.where}: manifest {entry.digest}"
            parsed = oci.parse_manifest(data, what, media_type=entry.media_type, limits=self._limits)
            if artifact.is_attached(parsed, subject, artifact_type):
                found.append((entry, data))
        return found

    def attached_by_name(self, subject: Digest) -> list[tuple[Descriptor, str]]:
        """See the port: tags are too many to look through, so cosign's are tried."""
        found = []
        for suffix in _COSIGN_SUFFIXES:
            tag = f"{subject.algorithm}-{subject.hex}{suffix}"
            with contextlib.suppress(NotFound):
                found.append((self.repository.resolve(tag), tag))
        return found

    def close(self) -> None:
        """Close the connections that were made for this source."""
        if self._owned:
            self.repository.client.close()
