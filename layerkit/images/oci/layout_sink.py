"""OCI image layouts as folders, written: a new one, or more images for one that is there.

All that is put goes into a staging folder inside the layout. The commit flushes it, moves the blobs into
place and replaces ``index.json``, in this order, so whoever reads the layout at any moment, also after a
crash, finds every blob that ``index.json`` leads to. Writers take turns by a lock on the folder itself;
a staging folder is locked while its writer lives, and one without a writer is removed by the next (see
:class:`~layerkit.linux.durable.Staging`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import threading
from collections.abc import Iterable, Iterator

from layerkit.formats.oci import documents as oci
from layerkit.images.oci.blobs import verified
from layerkit.images.oci.sink import ListingSink
from layerkit.images.oci.source import FolderFiles
from layerkit.linux.durable import Staging, is_staging, naming
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import InvalidImage, NotFound, UsageError
from layerkit.model.limits import DEFAULT, Limits

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


class LayoutSink(ListingSink):
    """A sink for a layout folder."""

    parallel = 4

    def __init__(self, path: str, *, limits: Limits = DEFAULT) -> None:
        """Prepare to write into the folder ``path``, which is made where it is absent.

        Raises:
            UsageError: a file, or a folder that holds something else than a layout.
            NotFound: the folder above is absent.
        """
        super().__init__(path, limits)
        self._path = path
        self._staged: dict[Digest, int] = {}
        self._lock = threading.Lock()
        self._fd = self._stage = -1
        self._staging: Staging | None = None
        self._made = False
        self._open = True
        for attempt in range(10):  # a writer that aborts at this moment may take the new folder away
            try:
                self._begin()
                return
            except BaseException as error:
                self._drop()
                if attempt == 9 or not isinstance(error, FileNotFoundError):
                    raise

    def _begin(self) -> None:
        # What is to be made is known before it is there: an interrupt may come between any two of these lines.
        self._made = not os.path.lexists(self._path)
        try:
            os.mkdir(self._path)
        except FileExistsError:
            self._made = False
        except FileNotFoundError:
            raise NotFound(f"{self._path}: its parent folder does not exist; create it first") from None
        try:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
        except NotADirectoryError:
            raise UsageError(f"{self._path}: a file; use oci-archive:{self._path} to write an archive") from None
        self._files = FolderFiles(self._fd, self._path, self._limits)
        with self._locked():
            self._check_target()
            self._staging = Staging(self._fd, "layout")
            self._stage = self._staging.make()

    def _check_target(self) -> None:
        names = [name for name in os.listdir(self._fd) if not is_staging(name)]
        if names and "oci-layout" not in names:
            raise UsageError(f"{self._path}: holds files, but no OCI layout; choose an empty or a new folder")
        if names:
            oci.check_layout(
                self._files.read_small("oci-layout") or b"", f"{self._path}: oci-layout", limits=self._limits
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def has_blob(self, digest: Digest) -> bool:
        """See the port."""
        return digest in self._staged or self._files.size_of(digest) is not None

    def put_blob(self, descriptor: Descriptor, chunks: Iterable[bytes | memoryview]) -> None:
        """See the port."""
        digest, part = descriptor.digest, f"part-{secrets.token_hex(8)}"
        with naming(f"{self._path}/blobs/{digest.algorithm}/{digest.hex}"):
            try:
                fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=self._stage)
                with os.fdopen(fd, "wb", buffering=0) as file:
                    for piece in verified(chunks, descriptor, f"{self._path}: blob {digest}"):
                        rest = memoryview(piece)
                        while rest:
                            rest = rest[file.write(rest) :]
                    os.fsync(fd)
                with self._lock:
                    os.rename(part, _flat(digest), src_dir_fd=self._stage, dst_dir_fd=self._stage)
                    self._staged[digest] = descriptor.size
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(part, dir_fd=self._stage)
                raise

    def _commit(self) -> None:
        with self._locked():
            self._put_in_place()

    def _put_in_place(self) -> None:
        def size_of(entry: Descriptor) -> int | None:
            size = self._staged.get(entry.digest)
            return self._files.size_of(entry.digest) if size is None else size

        self._check_complete(size_of)
        # What needs space is written first: from here on there is little that can fail.
        self._write_staged("index.json", self._index(self._files.read_small("index.json")))
        new_layout = self._files.read_small("oci-layout") is None
        if new_layout:
            self._write_staged("oci-layout", oci.LAYOUT_FILE)
        moved: list[tuple[str, ...]] = []
        made: list[tuple[str, ...]] = []
        try:
            # The mark goes first: a writer killed after it leaves a layout that the next one can go on with.
            if new_layout:
                os.rename("oci-layout", "oci-layout", src_dir_fd=self._stage, dst_dir_fd=self._fd)
                moved.append(("oci-layout",))
            for digest in self._staged:
                with self._folder("blobs", digest.algorithm, made=made) as folder:
                    before = _is_there(digest.hex, folder)
                    os.rename(_flat(digest), digest.hex, src_dir_fd=self._stage, dst_dir_fd=folder)
                    if not before:
                        moved.append(("blobs", digest.algorithm, digest.hex))
            for algorithm in {digest.algorithm for digest in self._staged}:
                with self._folder("blobs", algorithm, made=made) as folder:
                    os.fsync(folder)
            if made:
                with self._folder("blobs", made=made) as folder:
                    os.fsync(folder)
            os.rename("index.json", "index.json", src_dir_fd=self._stage, dst_dir_fd=self._fd)
        except BaseException:
            for parts in reversed(moved):
                with contextlib.suppress(OSError), self._folder(*parts[:-1], made=[]) as folder:
                    os.unlink(parts[-1], dir_fd=folder)
            for parts in reversed(made):
                with contextlib.suppress(OSError), self._folder(*parts[:-1], made=[]) as folder:
                    os.rmdir(parts[-1], dir_fd=folder)
            raise
        self._made = False  # it is a layout now, and stays
        os.fsync(self._fd)

    def _write_staged(self, name: str, data: bytes) -> None:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666, dir_fd=self._stage)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)

    @contextlib.contextmanager
    def _folder(self, *parts: str, made: list[tuple[str, ...]]) -> Iterator[int]:
        """Open a folder of the layout, made where absent (and noted in ``made``); links are not followed."""
        fd = os.dup(self._fd)
        try:
            for depth, part in enumerate(parts, 1):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=fd)
                    made.append(parts[:depth])
                try:
                    below = os.open(part, _FOLDER, dir_fd=fd)
                except OSError as error:
                    if error.errno in (errno.ELOOP, errno.ENOTDIR):
                        raise InvalidImage(f"{self._path}: {part!r} is a link or a file, not a folder") from None
                    raise
                os.close(fd)
                fd = below
            yield fd
        finally:
            os.close(fd)

    def _drop(self) -> None:
        if self._staging is not None:
            with contextlib.suppress(OSError):
                self._staging.drop()
        if self._made:
            with contextlib.suppress(OSError):  # another writer may be in it by now
                os.rmdir(self._path)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._stage, self._staging = -1, -1, None
        self._made = False

    def __del__(self) -> None:
        # An interrupt may come when this is made, and its user's `try` not yet entered.
        self.abort()


def _flat(digest: Digest) -> str:
    return f"{digest.algorithm}-{digest.hex}"


def _is_there(name: str, folder: int) -> bool:
    try:
        return stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False
