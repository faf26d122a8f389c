"""How much of a file is in the page cache, as seen through a path (mincore(2), cachestat(2))."""

from __future__ import annotations

import ctypes
import mmap

from layerkit.linux import syscalls as sc

_SPAN_BYTES = 1 << 30
_mmap = sc.libc.mmap
_mmap.restype = ctypes.c_void_p
_MAP_FAILED = ctypes.c_void_p(-1).value


def resident_of(fd: int, size: int) -> int:
    """Return the bytes in the page cache of an open file of ``size`` bytes, without bringing any of it in.

    Through an overlay this looks at the file below, where its pages are. The kernel tells the truth only
    to the file's owner, to those who may write to it, and to root; to all others every page looks resident.

    Raises:
        OSError: it cannot be mapped.
    """
    return sum(_resident(fd, at, min(_SPAN_BYTES, size - at)) for at in range(0, size, _SPAN_BYTES))


def cached_of(fd: int, size: int) -> int:
    """Return :func:`resident_of` of a plain file: by cachestat(2) where the kernel has it, which is cheaper.

    Raises:
        OSError: as :func:`resident_of`.
    """
    try:
        return min(sc.cached_pages(fd) * mmap.PAGESIZE, size)
    except OSError:
        return resident_of(fd, size)


def _resident(fd: int, start: int, length: int) -> int:
    span = ctypes.c_size_t(length)
    found = _mmap(None, span, mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_longlong(start))
    if found == _MAP_FAILED:
        raise sc.failed(ctypes.get_errno(), "mmap")
    address = ctypes.c_void_p(found)
    try:
        pages = -(-length // mmap.PAGESIZE)
        vector = ctypes.create_string_buffer(pages)
        sc.checked(sc.libc.mincore(address, span, vector), "mincore")
    finally:
        sc.libc.munmap(address, span)
    raw = vector.raw
    if raw.strip(b"\0\1"):
        # Only the lowest bit of each byte has a meaning.
        raw = bytes(byte & 1 for byte in raw)
    total = raw.count(1) * mmap.PAGESIZE
    if raw[-1] and length % mmap.PAGESIZE:
        total -= mmap.PAGESIZE - length % mmap.PAGESIZE
    return total
