"""The page cache, which all processes of the machine share: what of a file is in it, and how to have it alone."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerkit.linux import syscalls as sc

PAGES, NAMES, ALL = 1, 2, 3
"""What :func:`drop_all` drops: pages; names and inodes that no page holds; both."""


def cached_bytes(path: Path) -> int:
    """Return how many bytes of a plain file are cached, in whole pages."""
    with sc.opened(path) as fd:
        return sc.cached_pages(fd) * mmap.PAGESIZE


def drop(*paths: Path) -> None:
    """Take files out of the page cache, also those that were just written: a dirty page would stay."""
    os.sync()
    for path in paths:
        with sc.opened(path) as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def resident_bytes(path: Path | str) -> tuple[int, int]:
    """Return (bytes in the page cache, size) of a file; through an overlay too."""
    with sc.opened(path) as fd:
        size = os.fstat(fd).st_size
        return sc.resident_of(fd, size), size


def drop_all(what: int) -> None:
    """Empty the caches of the whole machine, when no test counts on them."""
    with _held(fcntl.LOCK_EX):
        Path("/proc/sys/vm/drop_caches").write_text(str(what))


@contextmanager
def locked_in(path: Path) -> Iterator[None]:
    """Read a file and keep it in the page cache: nobody takes out what a process has locked in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    with sc.opened(path) as fd:
        size = os.fstat(fd).st_size
        at = ctypes.c_void_p(libc.mmap(None, ctypes.c_size_t(size), mmap.PROT_READ, mmap.MAP_SHARED, fd, 0))
        try:
            if libc.mlock(at, ctypes.c_size_t(size)):
                raise OSError(ctypes.get_errno(), "mlock")
            yield
        finally:
            libc.munmap(at, ctypes.c_size_t(size))


@contextmanager
def left_alone() -> Iterator[None]:
    """Hold back every :func:`drop_all`, of all test processes, while a test looks at what is cached."""
    with _held(fcntl.LOCK_SH):
        yield


@contextmanager
def _held(how: int) -> Iterator[None]:
    with open(f"{tempfile.gettempdir()}/layerkit-test-page-cache.{os.geteuid()}", "w") as lock:
        fcntl.flock(lock, how)
        yield
