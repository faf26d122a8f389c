"""OCI archives and docker archives, written.

The same puts in the same order give the same bytes: owner 0, times 0, no names of users. The archive grows
in a file without a name in the target's folder and gets its name at the commit, so that neither an error
nor a kill leaves anything; for a pipe it is copied out at the commit.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import tarfile
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import BinaryIO

from layerkit.errors import NotFound, UsageError
from layerkit.formats import docker, oci
from layerkit.formats.strict_json import dumps
from layerkit.limits import DEFAULT, Limits
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.stores.blobs import unlinked_file, verified
from layerkit.stores.oci_sink import Listing, naming

_BLOCK = 512
_RECORD = 20 * _BLOCK


class ArchiveSink:
    """An :class:`~layerkit.ports.ImageSink` that makes an OCI archive; aborts at the end of a ``with`` block.

    With ``docker=True`` it also holds the ``manifest.json`` that ``docker load`` reads, as docker's own
    archives do since version 25: one file serves both.
    """

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
        self._docker, self._lock, self._open = docker, threading.Lock(), True
        self._sizes: dict[Digest, int] = {}
        self._folders: set[str] = set()
        self._temporary = ""
        if isinstance(target, str):
            self._where = target
            # Through a link, as every tool writes: the link stays and what it points at is replaced.
            self._target: str | BinaryIO = os.path.realpath(target)
        else:
            self._where, self._target = "standard output", target
        self._listing = Listing(self._where, limits)
        self._file = self._begin(tmp)
        self._member("oci-layout", oci.LAYOUT_FILE)

    def _begin(self, tmp: str | os.PathLike[str] | None) -> BinaryIO:
        if not isinstance(self._target, str):
            return unlinked_file(tmp)
        folder = os.path.dirname(self._target)
        with contextlib.suppress(FileNotFoundError):
            mode = os.stat(self._target).st_mode
            if stat.S_ISDIR(mode):
                raise UsageError(f"{self._where}: a folder; use oci:{self._where} to write a layout")
            if not stat.S_ISREG(mode):
                return unlinked_file(tmp)
        try:
            return os.fdopen(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666), "w+b")
        except FileNotFoundError:
            raise NotFound(f"{self._where}: the folder it is to lie in does not exist") from None
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
        # A filesystem that has no nameless files (NFS, some FUSE).
        self._temporary = self._temporary_name()
        return os.fdopen(os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), "w+b")

    def _temporary_name(self) -> str:
        folder, name = os.path.split(str(self._target))
        return os.path.join(folder, f".{name[:100]}.layerkit-{secrets.token_hex(8)}")

    def has_blob(self, digest: Digest) -> bool:
        """Return whether the blob was put."""
        return digest in self._sizes

    def put_blob(self, descriptor: Descriptor, chunks: Iterable[bytes | memoryview]) -> None:
        """Store a blob; see :class:`~layerkit.ports.ImageSink`. Callable from several threads, one at a time."""
        digest = descriptor.digest
        what = f"{self._where}: blob {digest}"
        with self._lock:
            pieces = verified(chunks, descriptor, what)
            if digest in self._sizes:
                for _ in pieces:  # a second copy is verified and dropped
                    pass
                return
            for folder in ("blobs", f"blobs/{digest.algorithm}"):
                if folder not in self._folders:
                    self._member(folder, None)
                    self._folders.add(folder)
            self._member(f"blobs/{digest.algorithm}/{digest.hex}", pieces, descriptor.size)
            self._sizes[digest] = descriptor.size

    def _member(self, name: str, content: bytes | Iterable[bytes | memoryview] | None, size: int = 0) -> None:
        """Append a member; of one that fails nothing is kept."""
        info = tarfile.TarInfo(name)
        if content is None:
            info.type, info.mode = tarfile.DIRTYPE, 0o755
        if isinstance(content, bytes):
            size, content = len(content), (content,)
        info.size = size
        start = self._file.tell()
        try:
            with naming(self._where):
                self._file.write(info.tobuf(tarfile.PAX_FORMAT))
                for piece in content or ():
                    self._file.write(piece)
                self._file.write(bytes(-size % _BLOCK))
                self._file.flush()
        except BaseException:
            with contextlib.suppress(OSError):  # the buffer may hold what the disk has no space for
                self._file.seek(start)
            os.ftruncate(self._file.fileno(), start)
            os.lseek(self._file.fileno(), start, os.SEEK_SET)
            raise

    def put_manifest(self, descriptor: Descriptor, data: bytes, name: str = "") -> None:
        """Store a manifest and list it in ``index.json``; see :class:`~layerkit.ports.ImageSink`."""
        self._listing.add(descriptor, data, name)
        self.put_blob(descriptor, [data])

    def commit(self) -> None:
        """Give the archive its name, or write it to the stream; see :class:`~layerkit.ports.ImageSink`.

        Raises:
            InvalidImage: a manifest names a blob that is missing; then nothing is written.
        """
        if not self._open:
            raise UsageError(f"{self._where}: written already")
        try:
            with naming(self._where):
                self._listing.check_complete(lambda entry: self._sizes.get(entry.digest))
                self._member("index.json", self._listing.index(None))
                if self._docker:
                    self._member("manifest.json", self._docker_manifest())
                end = self._file.tell() + 2 * _BLOCK
                self._file.write(bytes(2 * _BLOCK + -end % _RECORD))
                self._file.flush()
                self._deliver()
        finally:
            self.abort()

    def _deliver(self) -> None:
        fd, target = self._file.fileno(), self._target
        if not isinstance(target, str):
            self._file.seek(0)
            shutil.copyfileobj(self._file, target, 1 << 20)
            target.flush()
            return
        if os.fstat(fd).st_nlink == 0 and os.path.exists(target) and not os.path.isfile(target):
            self._file.seek(0)
            with os.fdopen(os.open(target, os.O_WRONLY), "wb") as stream:
                shutil.copyfileobj(self._file, stream, 1 << 20)
            return
        os.fsync(fd)
        folder = os.open(os.path.dirname(target), os.O_RDONLY | os.O_DIRECTORY)
        try:
            if not self._temporary:
                name = self._temporary_name()
                # Only with a folder given does Python call linkat(), which follows the link in /proc.
                os.link(f"/proc/self/fd/{fd}", os.path.basename(name), dst_dir_fd=folder, follow_symlinks=True)
                self._temporary = name
            os.rename(self._temporary, target)
            self._temporary = ""
            os.fsync(folder)
        finally:
            os.close(folder)

    def _docker_manifest(self) -> bytes:
        images: dict[Digest, dict[str, object]] = {}
        for entry, name, data in self._listing.put:
            what = f"{self._where}: manifest {entry.digest}"
            if entry.media_type not in oci.MANIFEST_TYPES:
                raise UsageError(f"{what}: a docker archive holds single images; choose one with --platform")
            manifest = oci.parse_manifest(data, what, media_type=entry.media_type)
            if manifest.config.media_type not in (oci.CONFIG, oci.DOCKER_CONFIG):
                continue  # an artifact: it stays in index.json, docker has no place for it
            tags: list[str] = [docker.tagged(name)] if name else []
            image = images.setdefault(
                entry.digest,
                {
                    "Config": _path(manifest.config),
                    "RepoTags": [],
                    "Layers": [_path(layer) for layer in manifest.layers],
                },
            )
            image["RepoTags"] = [*image["RepoTags"], *tags]  # type: ignore[misc]
        return dumps(list(images.values()))

    def abort(self) -> None:
        """Drop what was put and not committed; aborting twice is harmless."""
        if not self._open:
            return
        self._open = False
        with contextlib.suppress(OSError):
            self._file.close()
        if self._temporary:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary)

    def __enter__(self) -> ArchiveSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


def _path(entry: Descriptor) -> str:
    return f"blobs/{entry.digest.algorithm}/{entry.digest.hex}"


__all__ = ["ArchiveSink"]
