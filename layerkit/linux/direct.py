"""A large new file, written past the page cache where the filesystem can.

A layer's raw tar is read through a mount with ``directio``, which does not use the page cache of the tar either.
Written in the usual way it would fill that cache with pages that nobody reads, and an import would wait for all
of them to reach the disk at its end. Written directly (O_DIRECT) each piece is on its way while the next one is
made, costs the processor next to nothing, and the last sync has nothing left to wait for.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from layerkit.linux.durable import start_writeback

WRITEBACK_BYTES = 8 << 20
"""Of what goes through the page cache after all: how much is written before the kernel is told to begin."""

_BLOCK = 4096  # no filesystem asks for more; a buffer that lies too badly is told by EINVAL


class NewFile:
    """A file that is written once from its start, in pieces; whole multiples of 4 KiB go directly."""

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
            rest = rest[self._some(rest) :]
        if self._early and not self._direct and self.size - self._written_back >= WRITEBACK_BYTES:
            start_writeback(self.fd, self._written_back, self.size - self._written_back)
            self._written_back = self.size
        return length

    def _some(self, rest: memoryview) -> int:
        if self._direct:
            whole = len(rest) // _BLOCK * _BLOCK
            if whole and self.size % _BLOCK == 0:
                try:
                    return self._advance(os.write(self.fd, rest[:whole]))
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
            # The tail of the file, or memory or a filesystem that does not do.
            self._set_direct(False)
            self._written_back = self.size
        return self._advance(os.write(self.fd, rest))

    def _advance(self, count: int) -> int:
        self.size += count
        return count

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
