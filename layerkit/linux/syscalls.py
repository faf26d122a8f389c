"""System calls that Python's ``os`` lacks, by ctypes; errors are ``OSError`` with the path concerned.

Numbers from 424 on are the same on every architecture of Linux, and everything older that is needed here
has a C library function. Flags and structures: ``include/uapi/linux/mount.h``, mount_setattr(2), fsopen(2).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import NamedTuple

SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = range(428, 433)
SYS_OPENAT2, SYS_MOUNT_SETATTR, SYS_CACHESTAT = 437, 442, 451

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""Flags that open a folder and no link to one."""

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
_STATX_BTIME = 0x800

FSOPEN_CLOEXEC = FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_FLAG, FSCONFIG_SET_STRING, FSCONFIG_SET_FD, FSCONFIG_CMD_CREATE = 0, 1, 5, 6
FSCONFIG_STRING_BYTES = 255
"""Longest string value that fsconfig(2) takes."""

RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH, RESOLVE_IN_ROOT = 0x02, 0x04, 0x08, 0x10

OPEN_TREE_CLONE = 1
MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH = 0x04, 0x40

MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 0x01, 0x02, 0x04, 0x08
MOUNT_ATTR_IDMAP = 0x00100000

MS_RDONLY, MS_NODEV, MS_REC, MS_PRIVATE = 0x1, 0x4, 0x4000, 1 << 18
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8

CLONE_FS, CLONE_NEWNS, CLONE_NEWUSER = 0x00000200, 0x00020000, 0x10000000

FICLONE = 0x40049409
_FIEMAP, _FIEMAP_SYNC = 0xC020660B, 0x1
_FIEMAP_HEAD, _EXTENT = struct.Struct("=QQIIII"), struct.Struct("=QQQQQIIII")
_EXTENT_LAST, _EXTENT_SHARED, _EXTENTS_AT_ONCE = 0x1, 0x2000, 256
_SMALL_BYTES = 128 << 10
"""Up to here a read and a write are faster than copy_file_range."""
_CACHE_SPAN_BYTES = 1 << 30
_NO_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)

EROFS_MAGIC = 0xE0F5E1E2
OVERLAYFS_MAGIC = 0x794C7630
FUSE_MAGIC = 0x65735546

PathLike = str | bytes | os.PathLike[str]

libc = ctypes.CDLL(None, use_errno=True)
"""For what has no wrapper here; see :func:`checked`."""
_mmap = libc.mmap
_mmap.restype = ctypes.c_void_p
_MAP_FAILED = ctypes.c_void_p(-1).value


def failed(number: int, what: str, path: PathLike | int | None = None) -> OSError:
    """Return the ``OSError`` for ``number``: its text says which call failed, its ``filename`` on what.

    A descriptor has no name to tell.
    """
    text = f"{what}: {os.strerror(number)}"
    return OSError(number, text, *(() if path is None or isinstance(path, int) else (os.fsdecode(path),)))


def checked(result: int, what: str, path: PathLike | int | None = None) -> int:
    """Return what a call of the C library gave; raise :func:`failed` with its errno where that is negative."""
    if result < 0:
        raise failed(ctypes.get_errno(), what, path)
    return result


@contextmanager
def closing(fd: int) -> Iterator[int]:
    """Close ``fd`` at the end; a detached mount goes with it."""
    try:
        yield fd
    finally:
        os.close(fd)


def opened(
    path: PathLike, flags: int = os.O_RDONLY, at: int | None = None, mode: int = 0o777
) -> AbstractContextManager[int]:
    """Give a descriptor of ``path``, relative to the folder ``at``; it is closed after the block."""
    return closing(os.open(path, flags | os.O_CLOEXEC, mode, dir_fd=at))


def born(fd: int) -> int:
    """Return the time of a file's birth in ns (statx(2)), 0 where the filesystem or the C library lacks it."""
    buffer = ctypes.create_string_buffer(256)
    with suppress(AttributeError):  # musl before 1.2 does not have it
        if libc.statx(fd, b"", AT_EMPTY_PATH, _STATX_BTIME, buffer) == 0:
            mask, seconds, fraction = struct.unpack_from("=I76xqI", buffer)
            return int(seconds) * 1_000_000_000 + int(fraction) if mask & _STATX_BTIME else 0
    return 0


def _syscall(number: int, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """Call a system call; return its result, or minus the errno."""
    # Variadic C arguments: a bare Python int would be passed as a 32-bit one.
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result: int = libc.syscall(ctypes.c_long(number), *words)
    return result if result >= 0 else -ctypes.get_errno()


def openat2(folder: int, path: PathLike, flags: int, resolve: int) -> int:
    """Open a path below the descriptor ``folder`` by the rules ``resolve`` (``RESOLVE_*``).

    Returns:
        A descriptor, or minus the errno; ``-ENOSYS`` before Linux 5.6.
    """
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, resolve)
    return _syscall(SYS_OPENAT2, folder, os.fsencode(path), how, len(how))


def fsopen(fstype: str) -> int:
    """Return a filesystem context for ``fstype``.

    Raises:
        OSError: ``ENODEV`` for an unknown filesystem, ``EPERM`` without the right to mount, ``ENOSYS``.
    """
    return checked(_syscall(SYS_FSOPEN, fstype.encode(), FSOPEN_CLOEXEC), f"fsopen {fstype}")


def fsconfig(context: int, command: int, key: str | None, value: bytes | None, aux: int) -> int:
    """Configure a context; return 0, or minus the errno (the context's log says more)."""
    return _syscall(SYS_FSCONFIG, context, command, key.encode() if key is not None else None, value, aux)


def fsmount(context: int, attributes: int = 0) -> int:
    """Return a detached mount of a created context; minus the errno on failure."""
    return _syscall(SYS_FSMOUNT, context, FSMOUNT_CLOEXEC, attributes)


def context_log(context: int) -> list[str]:
    """Return and drain what the kernel says about a context: its errors and warnings, oldest first."""
    lines = []
    for _ in range(32):
        try:
            message = os.read(context, 4096)
        except OSError:
            break
        if message[:2] in (b"e ", b"w "):
            lines.append(message[2:].decode("utf-8", "replace").strip())
    return lines


def open_tree(path: PathLike | int) -> int:
    """Return a private, detached copy of a mount with ``path``, or an open descriptor, as its root."""
    folder, name, empty = _named(path, AT_EMPTY_PATH)
    return checked(_syscall(SYS_OPEN_TREE, folder, name, os.O_CLOEXEC | OPEN_TREE_CLONE | empty), "open_tree", path)


def move_mount(mount: int, target: PathLike | int) -> None:
    """Attach the detached mount ``mount`` at ``target`` (a path, or a descriptor of the mount point)."""
    folder, name, empty = _named(target, MOVE_MOUNT_T_EMPTY_PATH)
    flags = MOVE_MOUNT_F_EMPTY_PATH | empty
    checked(_syscall(SYS_MOVE_MOUNT, mount, b"", folder, name, flags), "move_mount", target)


def _named(path: PathLike | int, empty: int) -> tuple[int, bytes, int]:
    """Return (folder, name in it, flags) for a call that takes a descriptor's own file by the flag ``empty``."""
    return (path, b"", empty) if isinstance(path, int) else (AT_FDCWD, os.fsencode(path), 0)


def mount_setattr(mount: int, *, add: int = 0, clear: int = 0, userns: int = 0) -> None:
    """Change the attributes of a mount; with ``MOUNT_ATTR_IDMAP`` give ``userns``, a descriptor.

    Raises:
        OSError: as mount_setattr(2); ``EINVAL`` where the filesystem cannot be mounted idmapped.
    """
    attributes = ctypes.create_string_buffer(struct.pack("=QQQQ", add, clear, 0, userns), 32)
    checked(_syscall(SYS_MOUNT_SETATTR, mount, b"", AT_EMPTY_PATH, attributes, len(attributes)), "mount_setattr")


def mount(source: str, target: PathLike, fstype: str, flags: int = 0, options: str = "") -> None:
    """Mount a filesystem by the one call of old."""
    names = [os.fsencode(name) for name in (source, target, fstype)]
    checked(libc.mount(*names, ctypes.c_ulong(flags), os.fsencode(options)), f"mount {fstype}", target)


def umount2(target: PathLike, flags: int = UMOUNT_NOFOLLOW) -> None:
    """Unmount what is mounted at ``target``, not following a symbolic link.

    Raises:
        OSError: ``EBUSY`` in use, ``EINVAL`` not a mount point, ``EPERM``.
    """
    checked(libc.umount2(os.fsencode(target), ctypes.c_int(flags)), "umount", target)


def unshare(flags: int) -> None:
    """Move the calling process into new namespaces."""
    checked(libc.unshare(ctypes.c_int(flags)), "unshare")


def filesystem_magic(path: PathLike | int) -> int:
    """Return the magic number of the filesystem that ``path`` (or a descriptor, also ``O_PATH``) lies on."""
    # struct statfs begins with f_type, a long; the rest is not needed and differs between architectures.
    buffer = ctypes.create_string_buffer(512)
    if isinstance(path, int):
        checked(libc.fstatfs(ctypes.c_int(path), buffer), "statfs")
    else:
        checked(libc.statfs(os.fsencode(path), buffer), "statfs", path)
    return ctypes.c_ulong.from_buffer(buffer).value & 0xFFFFFFFF


def clone_file(source: int, target: int) -> None:
    """Make ``target`` share all blocks of ``source`` (``FICLONE``).

    Raises:
        OSError: ``EOPNOTSUPP``, ``EXDEV`` or ``EINVAL`` where the filesystem cannot.
    """
    fcntl.ioctl(target, FICLONE, source)


class Blocks(NamedTuple):
    """Bytes of a file's extents: all of them, and those shared with other files."""

    mapped: int
    shared: int


def blocks_of(path: PathLike) -> Blocks | None:
    """Return the extents (FIEMAP) of the file at ``path``, through no link at its end.

    Returns:
        None where its filesystem does not tell.
    """
    mapped = shared = start = 0
    with opened(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) as fd:
        while True:
            buffer = bytearray(_FIEMAP_HEAD.size + _EXTENTS_AT_ONCE * _EXTENT.size)
            _FIEMAP_HEAD.pack_into(buffer, 0, start, 2**63 - 1 - start, _FIEMAP_SYNC, 0, _EXTENTS_AT_ONCE, 0)
            try:
                fcntl.ioctl(fd, _FIEMAP, buffer)
            except OSError as error:
                if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
                    return None
                raise
            count, flags = _FIEMAP_HEAD.unpack_from(buffer)[3], _EXTENT_LAST
            for i in range(count):
                at = _FIEMAP_HEAD.size + i * _EXTENT.size
                logical, _, length, _, _, flags, *_ = _EXTENT.unpack_from(buffer, at)
                mapped += length
                shared += length if flags & _EXTENT_SHARED else 0
                start = logical + length
            if count == 0 or flags & _EXTENT_LAST:
                return Blocks(mapped, shared)


class Run(NamedTuple):
    """Bytes to copy: from ``offset`` of the descriptor ``source`` to ``at`` of the target."""

    source: int
    offset: int
    at: int
    length: int


def copy_run(run: Run, target: int, *, in_kernel: bool = True) -> int:
    """Copy ``run`` to ``target``, inside the kernel if it can (which may share blocks); return the bytes copied.

    They are fewer than the run's only at the end of its source.
    """
    source, offset, at, left = run
    in_kernel = in_kernel and left > _SMALL_BYTES
    while left:
        if in_kernel:
            try:
                count = os.copy_file_range(source, target, min(left, 1 << 30), offset, at)
            except OSError as error:
                if error.errno not in _NO_COPY:
                    raise
                in_kernel = False
                continue
        else:
            chunk = os.pread(source, min(left, 1 << 20), offset)
            count = os.pwrite(target, chunk, at) if chunk else 0
        if count == 0:
            break
        offset, at, left = offset + count, at + count, left - count
    return run.length - left


def cached_pages(fd: int) -> int:
    """Return how many pages of a file are in the page cache (cachestat(2), Linux 6.5).

    An overlay's own descriptor shows none: its pages belong to the file below.

    Raises:
        OSError: ``ENOSYS`` where the kernel lacks it.
    """
    counts = ctypes.create_string_buffer(40)
    checked(_syscall(SYS_CACHESTAT, fd, ctypes.create_string_buffer(16), counts, 0), "cachestat")
    return int(struct.unpack_from("=Q", counts)[0])


def resident_of(fd: int, size: int) -> int:
    """Return the bytes in the page cache of an open file of ``size`` bytes, without bringing any of it in.

    Through an overlay this looks at the file below, where its pages are. The kernel tells the truth only
    to the file's owner, to those who may write to it, and to root; to all others every page looks resident.

    Raises:
        OSError: it cannot be mapped.
    """
    return sum(_resident(fd, at, min(_CACHE_SPAN_BYTES, size - at)) for at in range(0, size, _CACHE_SPAN_BYTES))


def cached_of(fd: int, size: int) -> int:
    """Return :func:`resident_of` of a plain file: by cachestat(2) where the kernel has it, which is cheaper.

    Raises:
        OSError: as :func:`resident_of`.
    """
    try:
        return min(cached_pages(fd) * mmap.PAGESIZE, size)
    except OSError:
        return resident_of(fd, size)


def _resident(fd: int, start: int, length: int) -> int:
    span = ctypes.c_size_t(length)
    found = _mmap(None, span, mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_longlong(start))
    if found == _MAP_FAILED:
        raise failed(ctypes.get_errno(), "mmap")
    address = ctypes.c_void_p(found)
    try:
        pages = -(-length // mmap.PAGESIZE)
        vector = ctypes.create_string_buffer(pages)
        checked(libc.mincore(address, span, vector), "mincore")
    finally:
        libc.munmap(address, span)
    raw = vector.raw
    if raw.strip(b"\0\1"):
        # Only the lowest bit of each byte has a meaning.
        raw = bytes(byte & 1 for byte in raw)
    total = raw.count(1) * mmap.PAGESIZE
    if raw[-1] and length % mmap.PAGESIZE:
        total -= mmap.PAGESIZE - length % mmap.PAGESIZE
    return total
