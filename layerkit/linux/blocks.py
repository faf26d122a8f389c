"""Where the blocks of a file lie, and whether other files have them too (FIEMAP)."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import NamedTuple

from layerkit.linux.syscalls import opened

_FIEMAP = 0xC020660B
_HEAD = struct.Struct("=QQIIII")
_EXTENT = struct.Struct("=QQQQQIIII")
_LAST, _SHARED = 0x1, 0x2000
_SYNC = 0x1
_AT_ONCE = 256


class Blocks(NamedTuple):
    """Bytes of a file's extents: all of them, and those shared with other files."""

    mapped: int
    shared: int


def blocks(fd: int) -> Blocks | None:
    """Return the extents of an open file, None where its filesystem does not tell.

    Raises:
        OSError: as ioctl_fiemap.
    """
    mapped = shared = start = 0
    while True:
        buffer = bytearray(_HEAD.size + _AT_ONCE * _EXTENT.size)
        _HEAD.pack_into(buffer, 0, start, 2**63 - 1 - start, _SYNC, 0, _AT_ONCE, 0)
        try:
            fcntl.ioctl(fd, _FIEMAP, buffer)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
                return None
            raise
        count = _HEAD.unpack_from(buffer)[3]
        flags = _LAST
        for i in range(count):
            logical, _, length, _, _, flags, *_ = _EXTENT.unpack_from(buffer, _HEAD.size + i * _EXTENT.size)
            mapped += length
            shared += length if flags & _SHARED else 0
            start = logical + length
        if count == 0 or flags & _LAST:
            return Blocks(mapped, shared)


def blocks_of(path: str | bytes) -> Blocks | None:
    """Return :func:`blocks` of the file at ``path``, through no link at its end."""
    with opened(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) as fd:
        return blocks(fd)
