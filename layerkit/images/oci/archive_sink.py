"""OCI archives and docker archives, written to a file or a stream.

The archive grows in a file without a name in the target's folder and gets its name at the commit, so that
neither an error nor a kill leaves anything; for a pipe it is copied out at the commit.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterable
from typing import BinaryIO

from layerkit.formats.oci import documents as oci
from layerkit.images.oci.blobs import unlinked_file
from layerkit.images.oci.image_tar import ImageTar
from layerkit.linux.durable import NEW, Staging, naming
from layerkit.model.errors import NotFound, UsageError
from layerkit.model.limits import DEFAULT, Limits


class ArchiveSink(ImageTar):
    """A sink that makes an OCI archive; with ``docker=True`` for docker too."""

    def __init__(
        self,
        target: str | BinaryIO,
        *,
        docker: bool = False,
        limits: Limits = DEFAULT,
        tmp: str | os.PathLike[str] | None = None,
    ) -> None:
        """Prepare to write ``target``: a path, replaced at the commit, or a stream.

        ``tmp`` is where an archive for a stream (or a device or pipe by its path) is kept until the commit.

        Raises:
            UsageError: a folder.
            NotFound: the folder it is to lie in is absent.
        """
        super().__init__(target if isinstance(target, str) else "standard output", docker=docker, limits=limits)
        # Through a link, as every tool writes: the link stays and what it points at is replaced.
        self._target = os.path.realpath(target) if isinstance(target, str) else target
        self._held = contextlib.ExitStack()
        self._folder = -1
        self._staging: Staging | None = None
        try:
            self._file = self._begin(tmp)
            self._member("oci-layout", oci.LAYOUT_FILE)
        except BaseException:
            self.abort()
            raise

    def _begin(self, tmp: str | os.PathLike[str] | None) -> BinaryIO:
        return self._held.enter_context(self._new_file(tmp))

    def _new_file(self, tmp: str | os.PathLike[str] | None) -> BinaryIO:
        if not isinstance(self._target, str):
            return unlinked_file(tmp)
        with contextlib.suppress(FileNotFoundError):
            mode = os.stat(self._target).st_mode
            if stat.S_ISDIR(mode):
                raise UsageError(f"{self._where}: a folder; use oci:{self._where} to write a layout")
            if not stat.S_ISREG(mode):
                return unlinked_file(tmp)
        try:
            self._folder = os.open(os.path.dirname(self._target), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFound(f"{self._where}: the folder it is to lie in does not exist") from None
        self._held.callback(os.close, self._folder)
        try:
            return os.fdopen(os.open(".", os.O_TMPFILE | os.O_RDWR, 0o666, dir_fd=self._folder), "w+b")
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
        # A filesystem that has no nameless files (NFS, some FUSE).
        return os.fdopen(os.open(NEW, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=self._stage()), "w+b")

    def _stage(self) -> int:
        self._staging = Staging(self._folder, os.path.basename(str(self._target)))
        self._held.callback(self._staging.drop)
        return self._staging.make()

    def _write(self, pieces: Iterable[bytes | memoryview]) -> None:
        """Append ``pieces``; of what fails nothing is kept."""
        start = self._file.tell()
        try:
            with naming(self._where):
                for piece in pieces:
                    self._file.write(piece)
                self._file.flush()
        except BaseException:
            with contextlib.suppress(OSError):  # the buffer may hold what the disk has no space for
                self._file.seek(start)
            os.ftruncate(self._file.fileno(), start)
            os.lseek(self._file.fileno(), start, os.SEEK_SET)
            raise

    def _deliver(self) -> None:
        fd, target = self._file.fileno(), self._target
        if not isinstance(target, str):
            self._file.seek(0)
            shutil.copyfileobj(self._file, target, 1 << 20)
            target.flush()
            return
        if self._folder < 0:
            self._file.seek(0)
            with os.fdopen(os.open(target, os.O_WRONLY), "wb") as stream:
                shutil.copyfileobj(self._file, stream, 1 << 20)
            return
        os.fsync(fd)
        name = os.path.basename(target)
        if self._staging is None and not self._link(fd, name, self._folder):
            self._link(fd, NEW, self._stage())
        if self._staging is not None:
            self._staging.publish(name)
        os.fsync(self._folder)

    @staticmethod
    def _link(fd: int, name: str, folder: int) -> bool:
        """Give the nameless file a name in ``folder`` if that is free; return whether it was."""
        try:
            # Only with a folder given does Python call linkat(), which follows the link in /proc.
            os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=folder, follow_symlinks=True)
        except FileExistsError:
            return False
        return True

    def _drop(self) -> None:
        with contextlib.suppress(OSError):
            self._held.close()


__all__ = ["ArchiveSink"]
