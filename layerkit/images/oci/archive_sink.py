"""OCI archives and docker archives, written: to a file, a stream, or whatever else takes the bytes of a tar.

The same puts in the same order give the same bytes: owner 0, times 0, no names of users. An archive is an OCI
layout; with ``docker=True`` it also holds the ``manifest.json`` that ``docker load`` reads, as docker's own
archives do since version 25: one archive serves both.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tarfile
import threading
from abc import abstractmethod
from collections.abc import Iterable
from typing import BinaryIO

from layerkit.formats.oci import docker
from layerkit.formats.oci import documents as oci
from layerkit.formats.strict_json import dumps
from layerkit.images.oci.blobs import unlinked_file, verified
from layerkit.images.oci.sink import ListingSink
from layerkit.linux.durable import NEW, Staging, naming
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import NotFound, UsageError
from layerkit.model.limits import DEFAULT, Limits

_BLOCK = 512
_RECORD = 20 * _BLOCK


class ImageTar(ListingSink):
    """A sink whose puts become members of a tar."""

    def __init__(self, where: str, *, docker: bool, limits: Limits) -> None:
        """Start with nothing; ``where`` names the archive in messages."""
        super().__init__(where, limits)
        self._docker = docker
        self._lock, self._open = threading.Lock(), True
        self._sizes: dict[Digest, int] = {}
        self._folders: set[str] = set()
        self._length = 0

    @abstractmethod
    def _write(self, pieces: Iterable[bytes | memoryview]) -> None:
        """Append ``pieces``: all of them, or none where that can be had."""

    @abstractmethod
    def _deliver(self) -> None:
        """Make the archive, whose last bytes were written, visible."""

    def has_blob(self, digest: Digest) -> bool:
        """See the port."""
        return digest in self._sizes

    def put_blob(self, descriptor: Descriptor, chunks: Iterable[bytes | memoryview]) -> None:
        """See the port. Callable from several threads, one at a time."""
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
            self._member(blob_path(descriptor), pieces, descriptor.size)
            self._sizes[digest] = descriptor.size

    def _member(self, name: str, content: bytes | Iterable[bytes | memoryview] | None, size: int = 0) -> None:
        """Append a member; None is a folder."""
        info = tarfile.TarInfo(name)
        if content is None:
            info.type, info.mode = tarfile.DIRTYPE, 0o755
        if isinstance(content, bytes):
            size, content = len(content), (content,)
        info.size = size
        head = info.tobuf(tarfile.PAX_FORMAT)
        padding = bytes(-size % _BLOCK)

        def pieces() -> Iterable[bytes | memoryview]:
            yield head
            yield from content or ()
            if padding:
                yield padding

        self._write(pieces())
        self._length += len(head) + size + len(padding)

    def _commit(self) -> None:
        self._check_complete(lambda entry: self._sizes.get(entry.digest))
        index = self._index()
        listed = self._docker_manifest() if self._docker else b""
        self._member("index.json", index)
        if self._docker:
            self._member("manifest.json", listed)
        end = self._length + 2 * _BLOCK
        self._write([bytes(2 * _BLOCK + -end % _RECORD)])
        self._deliver()

    def _docker_manifest(self) -> bytes:
        """Return the ``manifest.json`` for the images that were put, one entry for each manifest.

        Raises:
            UsageError: an index, or an image with a layer that docker would take for something that it is not.
        """
        images: dict[Digest, tuple[oci.Manifest, list[str]]] = {}
        for entry, name, data in self._listed:
            what = f"{self._where}: manifest {entry.digest}"
            if entry.media_type not in oci.MANIFEST_TYPES:
                raise UsageError(f"{what}: a docker archive holds single images only; choose one with --platform")
            manifest = oci.parse_manifest(data, what, media_type=entry.media_type, limits=self._limits)
            # An artifact stays in index.json: docker has no place for it.
            if is_artifact(manifest):
                continue
            for layer in manifest.layers:
                # manifest.json has no media types: docker unpacks whatever is there as a layer's tar.
                if not docker.is_layer(layer.media_type):
                    raise UsageError(
                        f"{what}: docker cannot unpack its layer of the type {layer.media_type}; "
                        "write an OCI archive"
                    )
            _, tags = images.setdefault(entry.digest, (manifest, []))
            tags += [docker.tagged(name)] if name else []
        return dumps([
            {"Config": blob_path(made.config), "RepoTags": tags, "Layers": [blob_path(x) for x in made.layers]}
            for made, tags in images.values()
        ])  # fmt: skip


def is_artifact(manifest: oci.Manifest) -> bool:
    """Return whether a manifest is no image to run, also where it has an image's config, as cosign's have."""
    if manifest.config.media_type not in (oci.CONFIG, oci.DOCKER_CONFIG):
        return True
    return bool(manifest.layers) and not any(docker.is_layer(layer.media_type) for layer in manifest.layers)


def blob_path(entry: Descriptor) -> str:
    """Return the name of a blob's member."""
    return f"blobs/{entry.digest.algorithm}/{entry.digest.hex}"


class ArchiveSink(ImageTar):
    """A sink that makes an OCI archive; with ``docker=True`` for docker too.

    The archive grows in a file without a name in the target's folder and gets its name at the commit, so that
    neither an error nor a kill leaves anything; for a pipe it is copied out at the commit.
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
        super().__init__(target if isinstance(target, str) else "standard output", docker=docker, limits=limits)
        # Through a link, as every tool writes: the link stays and what it points at is replaced.
        self._target = os.path.realpath(target) if isinstance(target, str) else target
        self._held = contextlib.ExitStack()
        self._folder = -1
        self._staging: Staging | None = None
        try:
            self._file = self._held.enter_context(self._new_file(tmp))
            self._member("oci-layout", oci.LAYOUT_FILE)
        except BaseException:
            self.abort()
            raise

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
            raise NotFound(f"{self._where}: its parent folder does not exist; create it first") from None
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
