"""Who opens and writes files of a mount, as the kernel reports it (fanotify(7)); for root of the host."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from layerkit.linux import syscalls as sc
from layerkit.model.errors import UnsupportedHost

FAN_MODIFY = 0x02
FAN_CLOSE_WRITE = 0x08
_Q_OVERFLOW = 0x4000

_CLOEXEC, _NONBLOCK, _UNLIMITED_QUEUE = 0x01, 0x02, 0x10
_MARK_ADD, _MARK_MOUNT, _MARK_FILESYSTEM = 0x01, 0x10, 0x100
_EVENT = struct.Struct("=IBBHQii")
_VERSION = 3
_BUFFER_BYTES = 1 << 16


class Event(NamedTuple):
    """What happened to a file.

    Attributes:
        mask: ``FAN_*`` bits. path: as our mount namespace names it, or from the root of a mount that it cannot see.
        inode: st_ino. pid: of the process, 0 for one of a pid namespace that we cannot see.
    """

    mask: int
    path: bytes
    inode: int
    pid: int


class Watch(AbstractContextManager["Watch"]):
    """Events of all mounts of one filesystem, from the moment it is made; use it in ``with``."""

    def __init__(self, path: Path, mask: int) -> None:
        """Watch the filesystem (for an overlay: that overlay, in every namespace) that ``path`` lies on.

        Raises:
            UnsupportedHost: not root of the host, or a kernel without fanotify.
        """
        self.overflowed = False
        self.fd = sc.libc.fanotify_init(_CLOEXEC | _NONBLOCK | _UNLIMITED_QUEUE, os.O_RDONLY | os.O_CLOEXEC)
        if self.fd < 0:
            raise _refused(ctypes.get_errno())
        for kind in (_MARK_FILESYSTEM, _MARK_MOUNT):
            result = sc.libc.fanotify_mark(
                ctypes.c_int(self.fd), ctypes.c_uint(_MARK_ADD | kind), ctypes.c_uint64(mask),
                ctypes.c_int(sc.AT_FDCWD), os.fsencode(path),
            )  # fmt: skip
            if result == 0:
                return
            number = ctypes.get_errno()
            # Before 4.20 there are no marks of filesystems.
            if number != errno.EINVAL:
                break
        os.close(self.fd)
        raise _refused(number)

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def events(self, seconds: float | None) -> Iterator[Event]:
        """Yield events as they come, for ``seconds`` (None: until the caller stops)."""
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            left = 0.5 if end is None else min(0.5, end - time.monotonic())
            ready = select.select([self.fd], [], [], max(left, 0))[0]
            if ready:
                yield from self._read()
            elif end is not None and time.monotonic() >= end:
                return

    def _read(self) -> Iterator[Event]:
        try:
            data = os.read(self.fd, _BUFFER_BYTES)
        except BlockingIOError:
            return
        found, at = [], 0
        while at + _EVENT.size <= len(data):
            length, version, _, _, mask, fd, pid = _EVENT.unpack_from(data, at)
            if version != _VERSION or length < _EVENT.size:
                raise UnsupportedHost(f"fanotify of version {_VERSION}", f"this kernel has version {version}")
            at += length
            if mask & _Q_OVERFLOW or fd < 0:
                self.overflowed = self.overflowed or bool(mask & _Q_OVERFLOW)
                continue
            try:
                path = os.readlink(b"/proc/self/fd/%d" % fd).removesuffix(b" (deleted)")
                found.append(Event(mask, path, os.fstat(fd).st_ino, pid))
            finally:
                os.close(fd)
        yield from found


def _refused(number: int) -> UnsupportedHost | OSError:
    if number in (errno.EPERM, errno.ENOSYS):
        return UnsupportedHost(
            f"fanotify on whole filesystems ({os.strerror(number)})",
            "run as root of the host, or leave out --watch",
        )
    return sc.failed(number, "fanotify")
