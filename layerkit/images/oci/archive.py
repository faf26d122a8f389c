"""OCI archives: an image layout inside a tar, read where it lies and written as a stream."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, BinaryIO

from layerkit.images.oci.outer_tar import OuterTar
from layerkit.images.oci.source import LayoutSource, not_a_layout
from layerkit.model.digest import Digest
from layerkit.model.limits import DEFAULT, Limits

if TYPE_CHECKING:
    from layerkit.model.ports import BlobReader


class _ArchiveFiles:
    def __init__(self, archive: OuterTar) -> None:
        self._archive = archive

    def read_small(self, name: str) -> bytes:
        member = self._archive.find(name)
        if member is None:
            raise not_a_layout(self._archive.what, name)
        return self._archive.read(member, "manifest_bytes", f"{self._archive.what}: {name}")

    def open_blob(self, digest: Digest) -> tuple[BlobReader, int] | None:
        member = self._archive.find(f"blobs/{digest.algorithm}/{digest.hex}")
        return None if member is None else (self._archive.open(member), member.size)

    def close(self) -> None:
        self._archive.close()


def is_oci(archive: OuterTar) -> bool:
    """Return whether ``archive`` holds an image layout."""
    return archive.find("oci-layout") is not None and archive.find("index.json") is not None


def source_in(
    archive: OuterTar, name: str = "", digest: Digest | None = None, *, limits: Limits = DEFAULT
) -> LayoutSource:
    """Return the images in ``archive``, which is closed with the source; see :func:`open_archive`."""
    return LayoutSource(_ArchiveFiles(archive), archive.what, name, digest, limits=limits)


def open_archive(
    file: BinaryIO,
    where: str,
    name: str = "",
    digest: Digest | None = None,
    *,
    limits: Limits = DEFAULT,
    tmp: str | os.PathLike[str] | None = None,
) -> LayoutSource:
    """Return the images in the OCI archive ``file``, which is taken over.

    Args:
        file: seekable; plain, gzip or zstd.
        where: its name in messages.
        name: which image, by tag.
        digest: which image, by the digest of its manifest or index.
        limits: bounds.
        tmp: folder for the spool of a compressed archive.

    Raises:
        InvalidImage: no OCI archive, or a malformed one.
    """
    return source_in(OuterTar(file, where, limits=limits, tmp=tmp), name, digest, limits=limits)


__all__ = ["is_oci", "open_archive", "source_in"]
