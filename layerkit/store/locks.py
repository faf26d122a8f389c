"""Locks between processes and between threads, released by the kernel when their holder dies.

The order in which locks are taken, so that none ever waits in a ring:

1. ``store``: shared by whoever uses what could be collected, exclusive for gc and repair;
2. ``layer-HEX``, in rising order where several are held;
3. ``meta-KEY``;
4. the catalog's write transaction.

Nothing waits for an earlier kind while it holds a later one. ``layer`` and ``meta`` locks hold ``store``
shared for as long as they are held, so gc, which has it alone, can remove their files.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from layerkit.model.errors import StoreError

STORE = "store"
BIRTHS = "births"
"""Held for a moment while a temporary folder is made, or looked at: see ``spool``."""

CATALOG = "catalog"
"""Held around the catalog's write transaction and what follows if it fails."""

_LASTING = (STORE, BIRTHS, CATALOG)

_POLL_SECONDS = 0.05


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Take the flock of ``fd`` if it is free; return whether it was."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_lock(path: Path) -> int:
    """Open a lock file, made if it is not there; return its file descriptor."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold the lock file at ``path`` alone, against other processes and other threads."""
    fd = open_lock(path)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        _release(fd)


class Locks:
    """The locks of one open store; safe to use from several threads.

    Every lock can be taken again by the thread that has it (the store lock by any thread of the process).
    A child made by fork shares its parent's locks: open the store anew there.
    """

    def __init__(self, folder: Path) -> None:
        """Keep lock files in ``folder``."""
        self._folder = folder
        self._guard = threading.Condition()
        self._store_fd = -1
        self._store_count = 0
        self._exclusive_owner: int | None = None
        self._held: dict[tuple[int, str], int] = {}

    @property
    def holds(self) -> int:
        """Return how many holds on the store this process has through here."""
        return self._store_count

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the store shared: gc waits until all such holds are gone."""
        self.acquire_shared()
        try:
            yield
        finally:
            self.release_shared()

    def acquire_shared(self) -> None:
        """Begin a hold that :meth:`release_shared` ends, perhaps in another thread."""
        me = threading.get_ident()
        with self._guard:
            self._guard.wait_for(lambda: self._exclusive_owner in (None, me))
            if self._store_count == 0 and self._exclusive_owner is None:
                fd = open_lock(self._folder / STORE)
                try:
                    # Waits for a gc elsewhere with the guard held: every other thread would have to as well.
                    fcntl.flock(fd, fcntl.LOCK_SH)
                except BaseException:
                    os.close(fd)
                    raise
                self._store_fd = fd
            self._store_count += 1

    def release_shared(self) -> None:
        """End one hold."""
        with self._guard:
            self._store_count -= 1
            if self._store_count == 0 and self._exclusive_owner is None:
                _release(self._store_fd)
                self._store_fd = -1
            self._guard.notify_all()

    @contextlib.contextmanager
    def exclusive(self, timeout: float) -> Iterator[None]:
        """Have the store alone; waits up to ``timeout`` seconds for the others.

        Raises:
            StoreError: still in use then, be it by another process or through this very object.
        """
        deadline = time.monotonic() + timeout
        with self._guard:
            if not self._guard.wait_for(lambda: not self._store_count and self._exclusive_owner is None, timeout):
                raise StoreError(f"{self._folder.parent}: this process still uses the store; finish that first")
            fd = open_lock(self._folder / STORE)
            self._exclusive_owner = threading.get_ident()
        try:
            while not try_lock(fd):
                if time.monotonic() >= deadline:
                    raise StoreError(
                        f"{self._folder.parent}: another layerkit process is using the store; "
                        f"try again when it is done (waited {timeout:g} s)"
                    )
                time.sleep(_POLL_SECONDS)
            yield
        finally:
            with self._guard:
                self._exclusive_owner = None
                _release(fd)
                self._guard.notify_all()

    @contextlib.contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Hold the lock called ``name`` alone, and the store shared with it."""
        key = (threading.get_ident(), name)
        with self.shared():
            if key in self._held:  # only this thread ever writes this key
                self._held[key] += 1
                try:
                    yield
                finally:
                    self._held[key] -= 1
                return
            fd = open_lock(self._folder / name)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                self._held[key] = 1
                yield
            finally:
                self._held.pop(key, None)
                _release(fd)

    def clear(self) -> list[str]:
        """Remove the files of locks that nobody can hold; call it with :meth:`exclusive` held."""
        names = [name for name in os.listdir(self._folder) if name not in _LASTING]
        for name in names:
            (self._folder / name).unlink(missing_ok=True)
        return names


def _release(fd: int) -> None:
    # By hand before close: a forked child may still have the same open file, and with it the lock.
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)
