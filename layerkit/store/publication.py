"""Moving what is whole into place, and back out if the catalog does not take it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from layerkit.linux.durable import remove, rename_new, sync_path


class Publication:
    """The files one catalog transaction makes visible; :meth:`undo` is for ``Catalog.write``.

    Nobody else can rely on a file before the transaction ends, since only rows make files count and one
    transaction runs at a time. So taking files back when it fails can harm no other run.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self._new: list[Path] = []
        self._folders: set[Path] = set()

    def undo(self) -> None:
        """Take back what was newly put into place."""
        for path in reversed(self._new):
            with contextlib.suppress(OSError):
                remove(path)
        self._new.clear()

    def place(self, source: Path, target: Path, *, keep: bool) -> bool:
        """Move ``source`` to ``target``; return whether it lies there now.

        Args:
            source: whole, on disk, on the same filesystem.
            target: its place.
            keep: let a file that is there already stand; else it is replaced (a folder must be moved
                away first).
        """
        if rename_new(os.fsencode(source), os.fsencode(target)):
            self._new.append(target)
        elif keep:
            return False
        else:
            source.replace(target)
        self._folders.add(target.parent)
        return True

    def sync(self) -> None:
        """Write the changed folders to disk; do it before the transaction ends."""
        for folder in sorted(self._folders):
            sync_path(folder)
