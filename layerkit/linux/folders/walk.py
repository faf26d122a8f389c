"""The one walk through a folder on disk: by descriptors, through no link, in bytes, however deep it is."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

from layerkit.linux.syscalls import FOLDER, RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, openat2, opened
from layerkit.metaonly import Namespace, own_mark

TOP_FOLDER = FOLDER & ~os.O_NOFOLLOW
"""For the folder that a person named: a link at its end is meant."""
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

Names = Iterator[tuple[bytes, os.stat_result]]
OnError = Callable[[bytes, OSError], None]


class Folder(NamedTuple):
    """A folder on the walk.

    Attributes:
        path: below the top, ``b""`` for the top itself.
        fd: its descriptor, until the walk goes on.
        names: (name, lstat) of what lies in it, in the order of the disk. A folder that was seen here is walked
            into later; whoever stops early goes no deeper than what was seen.
    """

    path: bytes
    fd: int
    names: Names

    def below(self, name: bytes) -> bytes:
        """Return the path of a name in it."""
        return self.path + b"/" + name if self.path else name


def walk(
    top: int | str | os.PathLike[str], *, one_filesystem: bool = False, on_error: OnError | None = None
) -> Iterator[Folder]:
    """Yield ``top`` and every folder below it, each before what lies in it.

    One descriptor is open for the top and one for the folder that was yielded last.

    Args:
        top: a path, or a descriptor (``O_PATH`` too), which stays the caller's.
        one_filesystem: do not go into what is mounted below.
        on_error: called with the path of what cannot be looked at; without it that is an error.

    Raises:
        OSError: the top cannot be opened, or without ``on_error`` something below it.
    """
    failed = on_error or _fail
    with opened(b".", FOLDER, top) if isinstance(top, int) else opened(top, TOP_FOLDER) as root:
        device = os.fstat(root).st_dev if one_filesystem else None
        waiting = [b""]
        while waiting:
            path = waiting.pop()
            try:
                fd = open_below(root, path or b".", FOLDER)
            except OSError as error:
                failed(path, error)
                continue
            try:
                yield Folder(path, fd, _names(path, fd, waiting, device, failed))
            finally:
                os.close(fd)


def _names(path: bytes, fd: int, waiting: list[bytes], device: int | None, failed: OnError) -> Names:
    at = path and path + b"/"
    try:
        with os.scandir(fd) as entries:
            for entry in entries:
                name = os.fsencode(entry.name)
                try:
                    st = entry.stat(follow_symlinks=False)
                except OSError as error:
                    failed(at + name, error)
                    continue
                if stat.S_ISDIR(st.st_mode) and (device is None or st.st_dev == device):
                    waiting.append(at + name)
                yield name, st
    except OSError as error:
        failed(path, error)  # a folder that was removed meanwhile, or a disk that fails


def _fail(path: bytes, error: OSError) -> None:
    raise error


def ignore(path: bytes, error: OSError) -> None:
    """Leave out what cannot be looked at: it is gone meanwhile, or does not count."""


class DiskUsage:
    """Bytes of blocks and inodes of what is added; a file of several names counts once."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.allocated_bytes = self.inodes = 0
        self._linked: set[int] = set()

    def add(self, st: os.stat_result) -> None:
        """Add one name of a filesystem."""
        if st.st_nlink > 1 and not stat.S_ISDIR(st.st_mode):
            if st.st_ino in self._linked:
                return
            self._linked.add(st.st_ino)
        self.allocated_bytes += st.st_blocks * 512
        self.inodes += 1


def disk_usage(top: str | os.PathLike[str]) -> DiskUsage:
    """Return what a file, or a folder with all below it, takes; what is gone meanwhile counts nothing."""
    usage = DiskUsage()
    try:
        st = os.lstat(top)
    except OSError:
        return usage
    usage.add(st)
    for folder in walk(top, on_error=ignore) if stat.S_ISDIR(st.st_mode) else ():
        for _, st in folder.names:
            usage.add(st)
    return usage


def open_below(root: int, path: bytes, flags: int) -> int:
    """Return a descriptor of ``path`` below the folder ``root``, through no link on the way or at its end.

    Raises:
        OSError: as open(2); ``ELOOP`` or ``ENOTDIR`` for a link.
    """
    # In one step where the kernel can (5.6) and the path is no longer than it takes.
    fd = openat2(root, path, flags, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)
    if fd >= 0:
        return fd
    fd = os.dup(root)
    *folders, last = path.split(b"/")
    try:
        for part in folders:
            above, fd = fd, os.open(part, FOLDER, dir_fd=fd)
            os.close(above)
        return os.open(last, flags, dir_fd=fd)
    finally:
        os.close(fd)


def xattr_path(folder: int, name: bytes) -> bytes:
    """Return a path of ``name`` in ``folder``, for calls on xattrs: none takes a folder before Linux 6.13."""
    return b"/proc/self/fd/%d/%b" % (folder, name)


def make_like(
    target: bytes, source: bytes, shown: os.stat_result, leave: Namespace | None = None, *, lossy: bool = False
) -> None:
    """Give ``target`` the owner, mode, xattrs and times of ``source``, whose lstat is ``shown``.

    SELinux's label is not copied, nor overlayfs's own marks in the namespace ``leave``. With ``lossy`` xattrs are
    left out where this kind of file or its filesystem has none.
    """
    # chown clears setuid and capabilities, so it goes first (overlayfs and chown(2)); times last.
    os.chown(target, shown.st_uid, shown.st_gid, follow_symlinks=False)
    if not stat.S_ISLNK(shown.st_mode):
        os.chmod(target, stat.S_IMODE(shown.st_mode))
    with contextlib.suppress(OSError) if lossy else contextlib.nullcontext():
        for name in os.listxattr(source, follow_symlinks=False):
            if name != "security.selinux" and not (leave and own_mark(os.fsencode(name), leave)):
                value = os.getxattr(source, name, follow_symlinks=False)
                os.setxattr(target, name, value, follow_symlinks=False)
    os.utime(target, ns=(shown.st_atime_ns, shown.st_mtime_ns), follow_symlinks=False)


def xattr_names(path: bytes) -> list[str]:
    """Return the names of the xattrs at ``path``, through no link; none where its filesystem has none."""
    try:
        return os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return []
