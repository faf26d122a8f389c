"""The temporary folder of one open store, and how to tell the dead ones from the living."""

from __future__ import annotations

import itertools
import os
import threading
import uuid
from pathlib import Path

from layerkit.linux.durable import remove
from layerkit.store.layout import FOLDER_MODE, Layout
from layerkit.store.locks import BIRTHS, file_lock, open_lock, try_lock

_OWNER = ".owner"


class Spool:
    """A folder ``tmp/PID-RANDOM`` that is made at first use and is gone after :meth:`close`.

    Its owner file, beside it, is flock'ed as long as the process lives, whatever ends it.

    Attributes:
        layout: of the store.
    """

    def __init__(self, layout: Layout) -> None:
        """Use the ``tmp`` folder of ``layout``."""
        self.layout = layout
        self._guard = threading.Lock()
        self._numbers = itertools.count()
        self._folder: Path | None = None
        self._owner = -1
        self._pid = 0

    def path(self, kind: str) -> Path:
        """Return a path that nothing lies at, in this process's own folder."""
        with self._guard:
            if self._folder is None or self._pid != os.getpid():
                self._make()
            return self._folder / f"{kind}-{next(self._numbers)}"  # type: ignore[operator]

    def folder(self, kind: str) -> Path:
        """Return a new empty folder."""
        path = self.path(kind)
        path.mkdir()
        path.chmod(FOLDER_MODE)
        return path

    @property
    def name(self) -> str:
        """Return the name of the folder under ``tmp``, "" while there is none."""
        return self._folder.name if self._folder is not None else ""

    def _make(self) -> None:
        self._pid, self._owner = os.getpid(), -1
        name = f"{self._pid}-{uuid.uuid4().hex[:12]}"
        # Known before it is there: an interrupt may come between any two of these lines.
        self._folder = self.layout.tmp / name
        try:
            with file_lock(self.layout.locks / BIRTHS):
                self._owner = open_lock(self.layout.tmp / (name + _OWNER))
                # Only ever waits for somebody who looks whether the owner lives, and they hold `births`.
                try_lock(self._owner)
                self._folder.mkdir(mode=0o700)
        except BaseException:
            self._discard()
            raise

    def close(self) -> None:
        """Remove the folder with all in it, then its owner file."""
        with self._guard:
            self._discard()

    def _discard(self) -> None:
        if self._folder is None:
            return
        if self._pid == os.getpid():
            remove(self._folder)
            self._folder.with_name(self._folder.name + _OWNER).unlink(missing_ok=True)
        if self._owner >= 0:
            os.close(self._owner)
        self._folder, self._owner = None, -1


def dead(layout: Layout) -> list[Path]:
    """Return what in ``tmp`` belongs to no living process: folders, owner files, anything else."""
    with file_lock(layout.locks / BIRTHS):
        found = {path.name: path for path in layout.tmp.iterdir()}
        alive: set[str] = set()
        for name, path in found.items():
            if name.endswith(_OWNER) and path.is_file() and not path.is_symlink():
                fd = open_lock(path)
                if not try_lock(fd):
                    alive.update((name, name.removesuffix(_OWNER)))
                os.close(fd)
    return sorted(path for name, path in found.items() if name not in alive)
