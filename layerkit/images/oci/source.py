"""Images in an OCI image layout (image-spec, image-layout.md), whatever its files lie in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from layerkit.formats.oci import documents as oci
from layerkit.formats.oci import images as oci_images
from layerkit.formats.oci import remap_artifact as artifact
from layerkit.images.oci.blobs import read_all
from layerkit.model.descriptor import Descriptor, Platform
from layerkit.model.digest import Digest
from layerkit.model.errors import DigestMismatch, InvalidImage, NotFound
from layerkit.model.image import Image
from layerkit.model.limits import Limits
from layerkit.model.ports import ImageSource

if TYPE_CHECKING:
    from layerkit.model.ports import BlobReader


class LayoutFiles(Protocol):
    """The files of one layout: a folder, or the members of an archive."""

    def read_small(self, name: str) -> bytes:
        """Return ``oci-layout`` or ``index.json``, at most ``limits.manifest_bytes`` long."""
        ...

    def open_blob(self, digest: Digest) -> tuple[BlobReader, int] | None:
        """Return a reader of the blob and the length it has, or None if it is not there."""
        ...

    def close(self) -> None:
        """Release what is held."""
        ...


class LayoutSource(ImageSource):
    """An :class:`~layerkit.model.ports.ImageSource` over the files of a layout.

    Attributes:
        where: the layout's name in messages.
        entries: the descriptors of ``index.json``, in order.
    """

    def __init__(
        self, files: LayoutFiles, where: str, name: str = "", digest: Digest | None = None, *, limits: Limits
    ) -> None:
        """Read ``index.json`` of ``files``, which are closed with this.

        ``name`` or ``digest`` say which image is meant; with neither, the only one.

        Raises:
            InvalidImage: no layout, or a malformed one.
        """
        self.where, self._files, self._name, self._digest, self._limits = where, files, name, digest, limits
        try:
            oci.check_layout(files.read_small("oci-layout"), f"{where}: oci-layout", limits=limits)
            data = files.read_small("index.json")
            self.entries = oci.parse_index(data, f"{where}: index.json", limits=limits).manifests
        except BaseException:
            files.close()
            raise

    def image(self, platform: Platform | None = None) -> Image:
        """Return the image that name or digest select; see :class:`~layerkit.model.ports.ImageSource`."""
        entries = self.chosen()
        name = self._name or next((names[0] for e in entries if (names := _names(e))), "")
        return oci_images.select(self.fetch, entries, name, self.where, platform, limits=self._limits)

    def chosen(self) -> Sequence[Descriptor]:
        """Return the top entries that name or digest select: one, or one per platform.

        Raises:
            NotFound: none, or several without a choice; the message lists what is there.
        """
        if self._digest is not None:
            return [self._by_digest(self._digest)]
        if self._name:
            found = [e for e in self.entries if self._name in _names(e)]
            if not found:
                raise NotFound(f"{self.where}: no image named {self._name!r}; {self._listing()}")
        else:
            found = [e for e in self.entries if oci.is_image(e)]
            if not found:
                raise NotFound(f"{self.where}: holds no image")
        distinct = list({e.digest: e for e in found}.values())
        if len(distinct) > 1 and not self._name:
            # Few tools write artifactType into index.json: what is attached to an image shows in its manifest.
            distinct = [e for e in distinct if not self._is_artifact(e)]
        # One name on several entries, each for another platform, is an index in all but form.
        one_each = len({e.platform for e in distinct} - {None}) == len(distinct)
        if len(distinct) > 1 and not (one_each and len({tuple(_names(e)) for e in distinct}) == 1):
            which = f"{len(distinct)} are named {self._name!r}" if self._name else f"{len(distinct)} images"
            raise NotFound(f"{self.where}: {which}, so one must be chosen; {self._listing()}")
        return distinct

    def _is_artifact(self, entry: Descriptor) -> bool:
        if entry.platform is not None or entry.media_type not in oci.MANIFEST_TYPES:
            return False
        data = oci_images.fetch_manifest(self.fetch, entry, self.where, self._limits)
        manifest = oci.parse_manifest(data, f"{self.where}: manifest {entry.digest}", limits=self._limits)
        return bool(manifest.artifact_type) or manifest.config.media_type not in (oci.CONFIG, oci.DOCKER_CONFIG)

    def _by_digest(self, digest: Digest) -> Descriptor:
        for entry in self.entries:
            if entry.digest == digest:
                return entry
        # Not in index.json: a part of an index, or a manifest without a name. The blob says what it is.
        found = self._files.open_blob(digest)
        if found is None:
            raise NotFound(f"{self.where}: no image {digest}; {self._listing()}")
        reader, size = found
        what = f"{self.where}: manifest {digest}"
        try:
            self._limits.check("manifest_bytes", size, what)
        except BaseException:
            reader.close()
            raise
        data = read_all(reader, self._limits.manifest_bytes, what, "manifest_bytes")
        oci.verify(data, Descriptor("", digest, size), what)
        return Descriptor(oci.guess_media_type(data, what, limits=self._limits), digest, size)

    def _listing(self) -> str:
        images = [e for e in self.entries if oci.is_image(e)]
        shown = [
            (_names(e) or [f"@{e.digest}"])[0] + (f" ({e.platform})" if e.platform else "") for e in images[:20]
        ]
        more = f" and {len(images) - 20} more" if len(images) > 20 else ""
        return f"there are: {', '.join(shown)}{more}" if shown else "there is none at all"

    def fetch(self, entry: Descriptor, most: int) -> bytes:
        """Return a small blob, not verified."""
        what = f"{self.where}: blob {entry.digest}"
        limit = "config_bytes" if most == self._limits.config_bytes else "manifest_bytes"
        return read_all(self.open_blob(entry), most, what, limit)

    def open_blob(self, descriptor: Descriptor) -> BlobReader:
        """Open a blob; see :class:`~layerkit.model.ports.ImageSource`.

        Raises:
            InvalidImage: it is not there.
            DigestMismatch: its length is not the one ``descriptor`` gives.
        """
        found = self._files.open_blob(descriptor.digest)
        if found is None:
            urls = descriptor.extra.get("urls")
            hint = (
                f"; it is to be had from {urls}, which layerkit does not do" if urls else "; copy the image again"
            )
            raise InvalidImage(f"{self.where}: blob {descriptor.digest} is missing{hint}")
        reader, size = found
        if size != descriptor.size:
            reader.close()
            raise DigestMismatch(
                f"{self.where}: blob {descriptor.digest}", f"{size} bytes", f"{descriptor.size} bytes"
            )
        return reader

    def referrers(self, subject: Digest, artifact_type: str = "") -> list[tuple[Descriptor, bytes]]:
        """Return the manifests in ``index.json`` that are attached to ``subject``, verified, in order."""
        found = []
        for entry in self.entries:
            if entry.media_type not in oci.MANIFEST_TYPES:
                continue
            if artifact_type and entry.artifact_type not in ("", artifact_type):
                continue
            if entry.digest == subject or (entry.platform is not None and not entry.artifact_type):
                continue
            data = oci_images.fetch_manifest(self.fetch, entry, self.where, self._limits)
            what = f"{self.where}: manifest {entry.digest}"
            parsed = oci.parse_manifest(data, what, limits=self._limits)
            if artifact.is_attached(parsed, subject, artifact_type):
                found.append((entry, data))
        return found

    def attached_by_name(self, subject: Digest) -> list[tuple[Descriptor, str]]:
        """See the port."""
        prefix, named = f"{subject.algorithm}-{subject.hex}", oci.REF_NAME
        return [(e, e.annotations[named]) for e in self.entries if e.annotations.get(named, "").startswith(prefix)]

    def close(self) -> None:
        """Close the layout's files."""
        self._files.close()


def _names(entry: Descriptor) -> list[str]:
    """Return the names that ``entry`` goes by."""
    return [entry.annotations[key] for key in (oci.REF_NAME, oci.CONTAINERD_NAME) if entry.annotations.get(key)]


def not_a_layout(where: str, name: str) -> InvalidImage:
    """Return the error for a place without one of a layout's files."""
    return InvalidImage(f"{where}: no OCI image layout: it has no file {name!r}")


__all__ = ["LayoutFiles", "LayoutSource", "not_a_layout"]
