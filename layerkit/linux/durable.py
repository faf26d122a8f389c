"""What makes a write whole or absent: early writeback, one sync for many files, renames that replace nothing."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sqlite3
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from layerkit.model.errors import StoreError

_SYNC_FILE_RANGE_WRITE = 2
_RENAME_NOREPLACE = 1
_NO_RENAMEAT2 = (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP)
_AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Start writing ``length`` bytes at ``offset`` to disk without waiting; only ever a hint."""
    with contextlib.suppress(AttributeError):  # musl before 1.2 and some ports do not have it
        _libc.sync_file_range(
            ctypes.c_int(fd), ctypes.c_int64(offset), ctypes.c_int64(length), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE)
        )


def sync_filesystem(fd: int) -> None:
    """Write all that is dirty on the filesystem of ``fd`` to disk (syncfs(2)).

    Open ``fd`` before writing: since Linux 5.8 the call reports what failed since then.

    Raises:
        OSError: something could not be written.
    """
    if _libc.syncfs(ctypes.c_int(fd)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def sync_path(path: Path) -> None:
    """Write a file, or a folder's entries, to disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def rename_new(source: bytes, target: bytes, source_dir: int = _AT_FDCWD, target_dir: int = _AT_FDCWD) -> bool:
    """Rename ``source`` to ``target`` unless ``target`` exists; return whether it was done.

    Filesystems without RENAME_NOREPLACE get a hard link in its place (for files).
    """
    done = _libc.renameat2(source_dir, source, target_dir, target, ctypes.c_uint(_RENAME_NOREPLACE))
    if done == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EEXIST, errno.ENOTEMPTY):
        return False
    if number not in _NO_RENAMEAT2:
        raise OSError(number, os.strerror(number), os.fsdecode(target))
    at = {
        "src_dir_fd": None if source_dir < 0 else source_dir,
        "dst_dir_fd": None if target_dir < 0 else target_dir,
    }
    folder = stat.S_ISDIR(os.stat(source, dir_fd=at["src_dir_fd"], follow_symlinks=False).st_mode)
    try:
        if folder:
            os.rename(source, target, **at)
            return True
        os.link(source, target, follow_symlinks=False, **at)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise
    os.unlink(source, dir_fd=at["src_dir_fd"])
    return True


def remove(path: Path) -> None:
    """Remove a file or a whole folder, whatever the modes in it; nothing happens if it is gone.

    Folders are first moved up to the top one, so neither their depth nor the length of their paths counts:
    a rendered image may be deeper than there are file descriptors, and longer than PATH_MAX.
    """
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            path.unlink(missing_ok=True)
            return
        top = _open_folder(os.fspath(path), None)
    except FileNotFoundError:
        return
    try:
        unique = f".removed-{uuid.uuid4().hex}-"
        made = 0
        waiting = _clear_files(top)
        while waiting:
            name = waiting.pop()
            fd = _open_folder(name, top)
            try:
                for below in _clear_files(fd):
                    moved, made = f"{unique}{made}", made + 1
                    _move_up(below, fd, moved, top)
                    waiting.append(moved)
            finally:
                os.close(fd)
            os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    path.rmdir()


def _open_folder(name: str, at: int | None) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    if os.geteuid() != 0:
        # Folders of an image may deny their owner to list or change them.
        os.chmod(name, 0o700, dir_fd=at)
    return os.open(name, flags, dir_fd=at)


def _clear_files(folder: int) -> list[str]:
    """Unlink all in ``folder`` that is no folder; return the names of those that are."""
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in found:
        if not is_folder:
            os.unlink(name, dir_fd=folder)
    return [name for name, is_folder in found if is_folder]


def _move_up(name: str, at: int, moved: str, top: int) -> None:
    try:
        os.rename(name, moved, src_dir_fd=at, dst_dir_fd=top)
    except PermissionError:
        # Moving a folder rewrites its "..", which needs write permission on it.
        os.chmod(name, 0o700, dir_fd=at)
        os.rename(name, moved, src_dir_fd=at, dst_dir_fd=top)


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
                "it holds nothing that cannot be made from them"
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
