"""What makes a write whole or absent: early writeback, one sync for many files, renames, a staging place."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import re
import secrets
import sqlite3
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from layerkit.linux.syscalls import AT_FDCWD, FOLDER, checked, closing, failed, libc, opened
from layerkit.model.errors import StoreError, UsageError

_SYNC_FILE_RANGE_WRITE = 2
_RENAME_NOREPLACE = 1
_NO_RENAMEAT2 = (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP)
_STAGING = ".layerkit-tmp"
_ATTEMPTS = 100
_BLOCK = 4096  # no filesystem asks for more of O_DIRECT; a buffer that lies too badly is told by EINVAL
NEW = "new"
WRITEBACK_BYTES = 8 << 20
"""Of what goes through the page cache: how much is written before the kernel is told to begin."""


def sync_filesystem(fd: int) -> None:
    """Write all that is dirty on the filesystem of ``fd`` to disk (syncfs(2)).

    Open ``fd`` before writing: since Linux 5.8 the call reports what failed since then.

    Raises:
        OSError: something could not be written.
    """
    checked(libc.syncfs(ctypes.c_int(fd)), "syncfs")


def sync_path(path: str | Path, at: int | None = None) -> None:
    """Write a file, or a folder's entries, to disk; ``at`` is what a relative path starts at."""
    with opened(path, at=at) as fd:
        os.fsync(fd)


def rename_new(source: bytes, target: bytes, source_dir: int = AT_FDCWD, target_dir: int = AT_FDCWD) -> bool:
    """Rename ``source`` to ``target`` unless ``target`` exists; return whether it was done.

    Filesystems without RENAME_NOREPLACE get a hard link in its place (for files).
    """
    if libc.renameat2(source_dir, source, target_dir, target, ctypes.c_uint(_RENAME_NOREPLACE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EEXIST, errno.ENOTEMPTY):
        return False
    if number not in _NO_RENAMEAT2:
        raise failed(number, "rename", target)
    old, new = (None if fd < 0 else fd for fd in (source_dir, target_dir))
    folder = stat.S_ISDIR(os.stat(source, dir_fd=old, follow_symlinks=False).st_mode)
    try:
        if folder:
            os.rename(source, target, src_dir_fd=old, dst_dir_fd=new)
        else:
            os.link(source, target, src_dir_fd=old, dst_dir_fd=new, follow_symlinks=False)
            os.unlink(source, dir_fd=old)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise
    return True


class NewFile:
    """A large new file, written once from its start, in pieces; whole multiples of 4 KiB go past the page cache.

    A layer's raw tar is read through a mount with ``directio``, which does not use the tar's page cache either.
    Written in the usual way it would fill that cache with pages that nobody reads, and an import would wait for all
    of them to reach the disk at its end. Written directly (O_DIRECT) each piece is on its way while the next one is
    made, costs the processor next to nothing, and the last sync has nothing left to wait for.
    """

    def __init__(self, path: Path, *, direct: bool) -> None:
        """Make the new file ``path``; without ``direct`` it is left to the page cache and never written early."""
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self.size = 0
        self._early = direct
        self._written_back = 0
        self._direct = False
        if direct:
            self._set_direct(True)

    def write(self, piece: memoryview) -> int:
        """Write all of ``piece`` at the end; return its bytes. Direct ones come from page-aligned memory.

        Raises:
            OSError: the disk is full or refuses the bytes.
        """
        rest = piece.cast("B")
        length = len(rest)
        while rest:
            count = self._some(rest)
            self.size, rest = self.size + count, rest[count:]
        waiting = self.size - self._written_back
        if self._early and not self._direct and waiting >= WRITEBACK_BYTES:
            with contextlib.suppress(AttributeError):  # musl before 1.2 and some ports do not have it
                # Does not wait, and is only ever a hint.
                span = ctypes.c_int64(self._written_back), ctypes.c_int64(waiting)
                libc.sync_file_range(self.fd, *span, _SYNC_FILE_RANGE_WRITE)
            self._written_back = self.size
        return length

    def _some(self, rest: memoryview) -> int:
        if self._direct:
            whole = len(rest) // _BLOCK * _BLOCK
            if whole and self.size % _BLOCK == 0:
                try:
                    return os.write(self.fd, rest[:whole])
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
            # The tail of the file, or memory or a filesystem that does not do.
            self._set_direct(False)
            self._written_back = self.size
        return os.write(self.fd, rest)

    def _set_direct(self, on: bool) -> None:
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self.fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
        except OSError as error:
            if not on or error.errno != errno.EINVAL:
                raise
            return  # a filesystem without it
        self._direct = on

    def sync(self) -> None:
        """Wait until all is on disk. Reads go through the page cache from here on.

        Raises:
            OSError: something could not be written.
        """
        if self._direct:
            self._set_direct(False)
        os.fsync(self.fd)

    def close(self) -> None:
        """Close the file; harmless when called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Staging:
    """A place beside a target where it is made, before a rename puts it there whole.

    It is a folder ``.NAME.TOKEN.layerkit-tmp`` with a folder TOKEN in it, where all work goes on by descriptor.
    TOKEN is random, both are made by a mkdir that finds nothing there, and mode 0700 keeps others out. So whoever
    may write to the folder above can neither make it first nor change what lies in it. Nor can they rename another
    folder of ours so that it is taken for one that a killed run left: it has no TOKEN in it. It is locked while its
    maker lives.

    Attributes:
        fd: descriptor of the folder to work in; -1 before :meth:`make`.
        others: another process of this user was at work beside the same target.
    """

    def __init__(self, parent: int, name: str) -> None:
        """Prepare to make ``name`` in the folder that ``parent`` is a descriptor of; it stays the caller's."""
        self._parent = parent
        # What is to be made is known before it is there: an interrupt may come between any two lines below.
        self._stem = os.fsdecode(b"." + os.fsencode(name)[:190])
        self._name = self._token = ""
        self._outer = self.fd = -1
        self.others = False

    @property
    def new(self) -> Path:
        """The place of what :meth:`publish` publishes, as a path through the descriptor."""
        return Path(f"/proc/self/fd/{self.fd}/{NEW}")

    def make(self) -> int:
        """Make it, and return :attr:`fd`; what killed runs left beside the same target goes first."""
        self._sweep()
        for _ in range(_ATTEMPTS):
            self._token = secrets.token_hex(16)
            self._name = f"{self._stem}.{self._token}{_STAGING}"
            try:
                os.mkdir(self._name, 0o700, dir_fd=self._parent)
            except FileExistsError:
                self._name = ""  # not ours to remove
                continue
            if self._enter():
                return self.fd
            self.drop()
        raise FileExistsError(errno.EEXIST, "found no free name for a temporary folder; try again", self._stem)

    def _enter(self) -> bool:
        """Return False where a sweep, or somebody who may rename in the parent, took the new folder away."""
        try:
            self._outer = os.open(self._name, FOLDER, dir_fd=self._parent)
            fcntl.flock(self._outer, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.mkdir(self._token, 0o700, dir_fd=self._outer)
            # What was made tells whose we are: a file server may show another owner than the process.
            owner = os.stat(self._token, dir_fd=self._outer, follow_symlinks=False).st_uid
            if os.fstat(self._outer).st_uid == owner:
                self.fd = os.open(self._token, FOLDER, dir_fd=self._outer)
        except (FileExistsError, FileNotFoundError, NotADirectoryError, BlockingIOError):
            pass
        return self.fd >= 0

    def publish(self, name: str) -> None:
        """Rename the entry :data:`NEW` to ``name`` in the parent; a file or an empty folder there is replaced."""
        try:
            os.rename(NEW, name, src_dir_fd=self.fd, dst_dir_fd=self._parent)
        except PermissionError as error:
            mode = os.stat(NEW, dir_fd=self.fd, follow_symlinks=False).st_mode
            if error.errno != errno.EACCES or not stat.S_ISDIR(mode):
                raise
            # Moving a folder rewrites its "..", which needs write permission on it.
            os.chmod(NEW, 0o700, dir_fd=self.fd)
            with opened(NEW, FOLDER, self.fd) as moved:
                os.rename(NEW, name, src_dir_fd=self.fd, dst_dir_fd=self._parent)
                os.fchmod(moved, stat.S_IMODE(mode))

    def drop(self) -> None:
        """Remove it with what was not published; dropping twice is harmless."""
        try:
            if self.fd >= 0:
                remove(self._token, self._outer)
        finally:
            # A folder that was swapped for ours is not emptied: rmdir takes only what has nothing in it.
            with contextlib.suppress(OSError):
                if self._outer >= 0:
                    os.rmdir(self._token, dir_fd=self._outer)
            with contextlib.suppress(OSError):
                if self._name:
                    os.rmdir(self._name, dir_fd=self._parent)
            held = [fd for fd in (self.fd, self._outer) if fd >= 0]
            self._name, self._outer, self.fd = "", -1, -1
            for fd in held:
                os.close(fd)

    def _sweep(self) -> None:
        """Remove what our killed runs left beside the same target; note whether a living one is there."""
        pattern = re.compile(re.escape(self._stem) + r"\.([0-9a-f]{32})" + re.escape(_STAGING))
        with contextlib.suppress(OSError):  # a folder that we may not list
            with opened(".", FOLDER, self._parent) as above:
                found = [match for match in map(pattern.fullmatch, os.listdir(above)) if match]
            for match in found:
                with contextlib.suppress(OSError):  # gone meanwhile, or not to be removed: it disturbs nobody
                    self._sweep_one(match[0], match[1])

    def _sweep_one(self, name: str, token: str) -> None:
        with opened(name, FOLDER, self._parent) as fd:
            if os.fstat(fd).st_uid != os.geteuid():
                return
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.others = True
                return
            if set(os.listdir(fd)) <= {token}:
                remove(token, fd)
                os.rmdir(name, dir_fd=self._parent)


def is_staging(name: str) -> bool:
    """Return whether ``name`` is one that :class:`Staging` gives."""
    return name.startswith(".") and name.endswith(_STAGING)


@contextlib.contextmanager
def staging_beside(target: Path, at: int | None = None) -> Iterator[Staging]:
    """Give a :class:`Staging` beside ``target``, gone after the block; ``at`` is what a relative path starts at."""
    with opened(target.parent, os.O_PATH | os.O_DIRECTORY, at) as parent:
        staging = Staging(parent, target.name)
        try:
            staging.make()
            yield staging
        finally:
            staging.drop()


@contextlib.contextmanager
def whole_file(target: Path, at: int | None = None, *, sync: bool = False) -> Iterator[BinaryIO]:
    """Give a new file that replaces ``target`` if the block ends well.

    Args:
        target: its place.
        at: see :func:`staging_beside`.
        sync: have it on disk, name and all, before this ends.
    """
    with staging_beside(target, at) as staging:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(os.open(NEW, flags, 0o666, dir_fd=staging.fd), "w+b") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        staging.publish(target.name)
        if sync:
            sync_path(target.parent, at)


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[int]:
    """Give a descriptor of a new folder that becomes ``target`` if the block ends well, and is removed if not.

    Until then nobody else can enter it, see :class:`Staging`. An empty folder at
    ``target`` is replaced.

    Raises:
        UsageError: ``target`` cannot be made, or is not an empty folder.
        StoreError: another process writes to it just now.
    """
    # Not resolve(): that would follow a link at the end.
    target = Path(os.path.abspath(target))
    check_target(target)
    with staging_beside(target) as staging:
        if staging.others:
            raise StoreError(f"{target}: another process is writing there; wait until it ends")
        os.mkdir(NEW, 0o700, dir_fd=staging.fd)
        with opened(NEW, FOLDER, staging.fd) as fd:
            yield fd
        try:
            staging.publish(target.name)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise UsageError(
                    f"{target}: something else appeared there meanwhile, and was left alone; choose another name"
                ) from error
            raise


def check_target(target: Path) -> None:
    """Raise unless a folder can be made at ``target`` in one step.

    Raises:
        UsageError: it exists and is no empty folder, it is a mount point, or there is nothing to make it in.
    """
    if target.is_symlink():
        raise UsageError(f"{target}: a symbolic link; name the folder itself")
    if not target.parent.is_dir():
        raise UsageError(f"{target}: there is no folder {target.parent} to make it in; create that first")
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"{target}: exists and is not a folder; choose another name")
    if target.is_mount():
        raise UsageError(f"{target}: a mount point; name a new folder in it, as {target / 'rootfs'}")
    with os.scandir(target) as entries:
        if any(entries):
            raise UsageError(f"{target}: the folder is not empty; name a new one, or empty this one first")


def remove(path: str | Path, at: int | None = None) -> None:
    """Remove a file or a whole folder, whatever the modes in it; nothing happens if it is gone.

    A relative ``path`` starts at the folder that ``at`` is a descriptor of.

    Folders are first moved up to the top one, so neither their depth nor the length of their paths counts:
    a rendered image may be deeper than there are file descriptors, and longer than PATH_MAX.
    """
    try:
        if not stat.S_ISDIR(os.stat(path, dir_fd=at, follow_symlinks=False).st_mode):
            os.unlink(path, dir_fd=at)
            return
        _allow(path, at)
        top = os.open(path, FOLDER, dir_fd=at)
    except FileNotFoundError:
        return
    with closing(top):
        moved = (f".removed-{uuid.uuid4().hex}-{number}" for number in itertools.count())
        waiting = _clear_files(top)
        while waiting:
            name = waiting.pop()
            with opened(name, FOLDER, top) as fd:
                for below in _clear_files(fd):
                    waiting.append(next(moved))
                    os.rename(below, waiting[-1], src_dir_fd=fd, dst_dir_fd=top)
            os.rmdir(name, dir_fd=top)
    os.rmdir(path, dir_fd=at)


def _allow(name: str | Path, at: int | None) -> None:
    """Let this user list, change and move a folder whose mode may deny that to its owner."""
    if os.geteuid() != 0:
        os.chmod(name, 0o700, dir_fd=at)


def _clear_files(folder: int) -> list[str]:
    """Unlink all in ``folder`` that is no folder; return the names of those that are, which are open to us then."""
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in found:
        if is_folder:
            _allow(name, folder)
        else:
            os.unlink(name, dir_fd=folder)
    return [name for name, is_folder in found if is_folder]


@contextlib.contextmanager
def disk_errors(doing: str, folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into a :class:`StoreError` that says where and what to do."""
    try:
        yield
    except OSError as error:
        raise StoreError(_explain(doing, folder, error.errno or 0, str(error))) from error
    except sqlite3.Error as error:
        text = str(error)
        if "full" in text:
            raise StoreError(_explain(doing, folder, errno.ENOSPC, text)) from error
        if isinstance(error, sqlite3.DatabaseError) and ("malformed" in text or "not a database" in text):
            raise StoreError(
                f"{folder}/catalog.db: damaged ({text}); remove the store and import its images again: "
                "it can be made again from them"
            ) from error
        raise StoreError(f"{folder}/catalog.db: {doing}: {text}") from error


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give an OSError that names no file (a full disk, from write) the name ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise type(error)(error.errno, error.strerror, os.fspath(path)) from error
        raise


def _explain(doing: str, folder: Path, number: int, text: str) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT):
        try:
            free = os.statvfs(folder)
            room = f" ({free.f_bavail * free.f_frsize >> 20} MiB and {free.f_favail} inodes are free)"
        except OSError:
            room = ""
        what = "the disk is full" if number == errno.ENOSPC else "the disk quota is used up"
        return (
            f"{folder}: {what} while {doing}{room}; nothing of it was kept. Run `layerkit store gc`, free some "
            "space, or choose another folder with --store"
        )
    if number == errno.EROFS:
        return f"{folder}: the filesystem is read-only ({doing}); choose another folder with --store"
    if number in (errno.EACCES, errno.EPERM):
        return f"{folder}: no permission for {doing} ({text}); run as the store's owner, or choose --store"
    return f"{folder}: {doing} failed: {text}"
