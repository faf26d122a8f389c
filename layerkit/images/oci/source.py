"""Images in an OCI image layout (image-spec, image-layout.md): a folder, or a tar that is read where it lies."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from layerkit.formats.oci import documents as oci
from layerkit.formats.oci import images as oci_images
from layerkit.formats.oci import remap_artifact as artifact
from layerkit.images.oci.blobs import FileRange, read_all
from layerkit.model.descriptor import Descriptor, Platform
from layerkit.model.digest import Digest
from layerkit.model.errors import DigestMismatch, InvalidImage, NotFound
from layerkit.model.image import Image
from layerkit.model.limits import DEFAULT, Limits
from layerkit.model.ports import ImageSource

if TYPE_CHECKING:  # whoever reads a folder has no need of the package that checks tars
    from layerkit.images.oci.outer_tar import OuterTar
    from layerkit.model.ports import BlobReader

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# Without O_NONBLOCK a planted fifo would hold the open for ever.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class LayoutFiles(Protocol):
    """The files of one layout: a folder, or the members of an archive."""

    def read_small(self, name: str) -> bytes | None:
        """Return ``oci-layout`` or ``index.json``, within ``limits.manifest_bytes``, None if it is not there."""
        ...

    def open_blob(self, digest: Digest) -> tuple[BlobReader, int] | None:
        """Return a reader of the blob and the length it has, or None if it is not there."""
        ...

    def close(self) -> None:
        """Release what is held."""
        ...


class LayoutSource(ImageSource):
    """A source over the files of a layout.

    Attributes:
        entries: the descriptors of ``index.json``, in order.
    """

    def __init__(
        self, files: LayoutFiles, where: str, name: str, digest: Digest | None, limits: Limits = DEFAULT
    ) -> None:
        """Read ``index.json`` of ``files``, which are closed with this; see :meth:`in_folder` and :meth:`in_tar`.

        ``name`` or ``digest`` (of a manifest or index) say which image is meant; with neither, the only one.

        Raises:
            InvalidImage: no layout, or a malformed one.
        """
        self.where, self._files, self._name, self._digest, self._limits = where, files, name, digest, limits
        try:
            oci.check_layout(self._small("oci-layout"), f"{where}: oci-layout", limits=limits)
            self.entries = oci.parse_index(
                self._small("index.json"), f"{where}: index.json", limits=limits
            ).manifests
        except BaseException:
            files.close()
            raise

    @classmethod
    def in_folder(
        cls, path: str, name: str = "", digest: Digest | None = None, limits: Limits = DEFAULT
    ) -> LayoutSource:
        """Return the images in the layout folder ``path``.

        Raises:
            NotFound: no such folder.
            InvalidImage: no layout, or a malformed one.
        """
        return cls(_OwnFolder(path, limits), path, name, digest, limits)

    @classmethod
    def in_tar(cls, archive: OuterTar, name: str, digest: Digest | None, limits: Limits) -> LayoutSource:
        """Return the images in ``archive``, which is closed with the source."""
        return cls(_Members(archive), archive.what, name, digest, limits)

    def _small(self, name: str) -> bytes:
        data = self._files.read_small(name)
        if data is None:
            raise InvalidImage(f"{self.where}: no OCI image layout: it has no file {name!r}")
        return data

    def image(self, platform: Platform | None = None) -> Image:
        """See the port."""
        entries = self.chosen()
        name = self._name or next((names[0] for e in entries if (names := _names(e))), "")
        return oci_images.Reading(self.fetch, self.where, self._limits).select(entries, name, platform)

    def chosen(self) -> Sequence[Descriptor]:
        """See the port; the message of an error lists what is there."""
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
        data = oci_images.Reading(self.fetch, self.where, self._limits).manifest(entry)
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
        """See the port."""
        what = f"{self.where}: blob {entry.digest}"
        limit = "config_bytes" if most == self._limits.config_bytes else "manifest_bytes"
        return read_all(self.open_blob(entry), most, what, limit)

    def open_blob(self, descriptor: Descriptor) -> BlobReader:
        """See the port."""
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
        """See the port: those in ``index.json``."""
        found = []
        for entry in self.entries:
            if entry.media_type not in oci.MANIFEST_TYPES:
                continue
            if artifact_type and entry.artifact_type not in ("", artifact_type):
                continue
            if entry.digest == subject or (entry.platform is not None and not entry.artifact_type):
                continue
            data = oci_images.Reading(self.fetch, self.where, self._limits).manifest(entry)
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


def open_inside(folder_fd: int, parts: tuple[str, ...], where: str) -> tuple[FileRange, int] | None:
    """Return a reader of the regular file at ``parts`` below a folder and its length, or None if it is not there.

    Links are never followed: a layout from a stranger could name any file of this host as its blob.

    Raises:
        InvalidImage: a symbolic link on the way or at the end, something else than a file.
    """
    fd, here = os.dup(folder_fd), where
    try:
        for i, part in enumerate(parts, 1):
            here = f"{here}/{part}"
            below = os.open(part, _FILE if i == len(parts) else _FOLDER | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = below
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            raise InvalidImage(f"{here}: not a regular file")
        return FileRange(fd, 0, facts.st_size), facts.st_size
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            raise InvalidImage(
                f"{here}: a symbolic link or special file; a layout must hold its own files (as cp -rL makes)"
            ) from None
        raise
    finally:
        os.close(fd)


class FolderFiles:
    """The files of a layout in a folder, which belongs to the caller."""

    def __init__(self, fd: int, path: str, limits: Limits) -> None:
        """``fd`` is a descriptor of the folder ``path``."""
        self._fd, self._path, self._limits = fd, path, limits

    def read_small(self, name: str) -> bytes | None:
        """See :class:`LayoutFiles`."""
        found = open_inside(self._fd, (name,), self._path)
        if found is None:
            return None
        what = f"{self._path}: {name}"
        with contextlib.closing(found[0]):
            self._limits.check("manifest_bytes", found[1], what)
            return read_all(found[0], found[1], what, "manifest_bytes")

    def open_blob(self, digest: Digest) -> tuple[BlobReader, int] | None:
        """See :class:`LayoutFiles`."""
        return open_inside(self._fd, ("blobs", digest.algorithm, digest.hex), self._path)

    def size_of(self, digest: Digest) -> int | None:
        """Return the size of a blob, None if it is not there."""
        if (found := self.open_blob(digest)) is None:
            return None
        found[0].close()
        return found[1]

    def close(self) -> None:
        """Do nothing; see :class:`_OwnFolder`."""


class _OwnFolder(FolderFiles):
    def __init__(self, path: str, limits: Limits) -> None:
        try:
            super().__init__(os.open(path, _FOLDER), path, limits)
        except FileNotFoundError:
            raise NotFound(f"{path}: no such folder") from None
        except NotADirectoryError:
            raise InvalidImage(f"{path}: a file, not an OCI layout folder; try oci-archive:{path}") from None

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _Members:
    def __init__(self, archive: OuterTar) -> None:
        self._archive, self.close = archive, archive.close

    def read_small(self, name: str) -> bytes | None:
        member = self._archive.find(name)
        if member is None:
            return None
        return self._archive.read(member, "manifest_bytes", f"{self._archive.what}: {name}")

    def open_blob(self, digest: Digest) -> tuple[BlobReader, int] | None:
        member = self._archive.find(f"blobs/{digest.algorithm}/{digest.hex}")
        return None if member is None else (self._archive.open(member), member.size)


def is_oci(archive: OuterTar) -> bool:
    """Return whether ``archive`` holds an image layout."""
    return archive.find("oci-layout") is not None and archive.find("index.json") is not None
