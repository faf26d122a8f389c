"""OCI image layouts as folders, read."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from layerkit.images.oci.blobs import FileRange, read_all
from layerkit.images.oci.source import LayoutSource, not_a_layout
from layerkit.model.digest import Digest
from layerkit.model.errors import InvalidImage, NotFound
from layerkit.model.limits import DEFAULT, Limits

if TYPE_CHECKING:
    from layerkit.model.ports import BlobReader

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# Without O_NONBLOCK a planted fifo would hold the open for ever.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def open_inside(folder_fd: int, parts: tuple[str, ...], where: str) -> int | None:
    """Return a descriptor of the regular file at ``parts`` below a folder, or None if it is not there.

    Raises:
        InvalidImage: a symbolic link on the way or at the end, something else than a file.
    """
    fd, here = folder_fd, where
    try:
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            here = f"{here}/{part}"
            below = os.open(part, _FILE if last else _FOLDER | os.O_NOFOLLOW, dir_fd=fd)
            if fd != folder_fd:
                os.close(fd)
            fd = below
    except OSError as error:
        if fd != folder_fd:
            os.close(fd)
        if error.errno == errno.ENOENT:
            return None
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            raise InvalidImage(
                f"{here}: a symbolic link or special file; a layout must hold its own files (as cp -rL makes)"
            ) from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InvalidImage(f"{here}: not a regular file")
    return fd


class _FolderFiles:
    def __init__(self, path: str, limits: Limits) -> None:
        self._path, self._limits = path, limits
        try:
            self._fd = os.open(path, _FOLDER)
        except FileNotFoundError:
            raise NotFound(f"{path}: no such folder") from None
        except NotADirectoryError:
            raise InvalidImage(f"{path}: a file, not an OCI layout folder; try oci-archive:{path}") from None

    def read_small(self, name: str) -> bytes:
        fd = open_inside(self._fd, (name,), self._path)
        if fd is None:
            raise not_a_layout(self._path, name)
        try:
            what = f"{self._path}: {name}"
            size = os.fstat(fd).st_size
            self._limits.check("manifest_bytes", size, what)
            return read_all(FileRange(fd, 0, size), size, what, "manifest_bytes")
        finally:
            os.close(fd)

    def open_blob(self, digest: Digest) -> tuple[BlobReader, int] | None:
        fd = open_inside(self._fd, ("blobs", digest.algorithm, digest.hex), self._path)
        if fd is None:
            return None
        try:
            size = os.fstat(fd).st_size
            return FileRange(fd, 0, size), size
        finally:
            os.close(fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def open_layout(
    path: str, name: str = "", digest: Digest | None = None, *, limits: Limits = DEFAULT
) -> LayoutSource:
    """Return the images in the layout folder ``path``.

    Links are never followed: a layout from a stranger could name any file of this host as its blob.

    Args:
        path: the folder.
        name: which image, by tag.
        digest: which image, by the digest of its manifest or index.
        limits: bounds.

    Raises:
        NotFound: no such folder.
        InvalidImage: no layout, or a malformed one.
    """
    return LayoutSource(_FolderFiles(path, limits), path, name, digest, limits=limits)


__all__ = ["open_inside", "open_layout"]
