"""Who holds leases: a file for each process, locked for as long as it lives, whatever ends it."""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path


class Holders:
    """The holders of one queue's leases; the caller keeps threads apart."""

    def __init__(self, folder: Path) -> None:
        """Keep the files in ``folder``, made if it is not there."""
        self._folder = folder
        self._name, self._fd = "", -1
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def me(self) -> str:
        """Return the name of this process as a holder; it is alive until :meth:`close` or its end."""
        if self._fd < 0:
            self._name = f"{os.getpid()}-{secrets.token_hex(8)}"
            # Locked before it has its name: whoever sees it unlocked may take its owner for dead.
            fresh = self._folder.parent / f"new-{self._name}"
            fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
            fresh.rename(self._folder / self._name)
            self._fd = fd
        return self._name

    def alive(self, name: str) -> bool:
        """Return whether the holder called ``name`` lives; what a dead one left is cleared away."""
        if name == self._name and self._fd >= 0:
            return True
        path = self._folder / name
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        path.unlink(missing_ok=True)
        return False

    def sweep(self) -> None:
        """Clear away what all dead holders left."""
        for path in self._folder.iterdir():
            self.alive(path.name)

    def close(self) -> None:
        """Be dead: others take over at once what this process held."""
        if self._fd >= 0:
            os.close(self._fd)
            (self._folder / self._name).unlink(missing_ok=True)
            self._fd = -1


__all__ = ["Holders"]
