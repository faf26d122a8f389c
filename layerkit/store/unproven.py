"""Indexes that nothing has proven, kept apart from the store: what is in here never becomes a mount.

They save asking a registry again for the next map. A file that is damaged or not ours is as good as none.
"""

from __future__ import annotations

import os
from pathlib import Path

from layerkit.formats.index import file as index_file
from layerkit.formats.index.check import check_index, is_unproven
from layerkit.linux.configuration import configured
from layerkit.linux.durable import whole_file
from layerkit.model.digest import Digest
from layerkit.model.errors import LayerkitError
from layerkit.model.index import Index
from layerkit.model.limits import DEFAULT, Limits


def default_cache() -> Path:
    """Return what is configured, else ``/var/cache/layerkit`` for root or ``$XDG_CACHE_HOME/layerkit``."""
    named: Path | None = configured("cache")
    if named is not None:
        return named
    if os.geteuid() == 0:
        return Path("/var/cache/layerkit")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerkit"


class UnprovenIndexes:
    """A folder of such indexes, by diff_id."""

    def __init__(self, root: Path | None = None, *, limits: Limits = DEFAULT) -> None:
        """Use ``root`` (None: :func:`default_cache`), which need not exist."""
        self._folder, self._limits = (root or default_cache()) / "unproven-indexes", limits

    def load(self, diff_id: Digest) -> Index | None:
        """Return the index of a layer as it was saved, None if there is none that can be used."""
        path = self._folder / f"{diff_id.hex}.idx"
        try:
            index = index_file.decode(path.read_bytes(), str(path))
            check_index(index, str(path), self._limits)
        except (OSError, LayerkitError):
            return None
        return index if index.diff_id == diff_id and is_unproven(index) else None

    def save(self, index: Index) -> None:
        """Keep an unproven index; one that is there is replaced."""
        assert is_unproven(index), "proven indexes belong into the store"
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with whole_file(self._folder / f"{index.diff_id.hex}.idx") as file:
            file.writelines(index_file.encode(index))
