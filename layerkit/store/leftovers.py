"""TODO."""

from __future__ import annotations

import os
from pathlib import Path

from layerkit.store.catalog import Catalog
from layerkit.store.layout import Layout
from layerkit.store.locks import BIRTHS, file_lock, open_lock, try_lock
from layerkit.store.objects import object_path, stored_objects
from layerkit.store.spool import _OWNER


def strays(layout: Layout, catalog: Catalog) -> list[Path]:
    """Return the files that lie where files of the store lie, and that no row knows."""
    found: list[Path] = []
    for folder in ("tar", "data", "index", "meta"):
        found += sorted((layout.root / folder).iterdir())
    objects = [name for name, _ in stored_objects(layout)]
    # A file may be in place a moment before its row; that moment is over after this.
    catalog.settle()
    expected = {layout.meta(key) for key, _ in catalog.metas()}
    for row in catalog.layers():
        expected.add(layout.index(row.diff_id))
        if row.tar:
            expected.update((layout.tar(row.diff_id), layout.data(row.diff_id)))
    known = {object_path(layout, row.sha256) for row in catalog.objects()}
    paths = [path for path in found if path not in expected]
    paths += [path for name in objects if (path := layout.objects / os.fsdecode(name)) not in known]
    return [path for path in paths if os.path.lexists(path)]


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
