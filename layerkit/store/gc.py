"""Removing what no image and no mount uses, and what killed runs left behind."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from layerkit.linux.durable import remove
from layerkit.linux.folders.walk import disk_usage
from layerkit.model.digest import Digest
from layerkit.model.errors import StoreError
from layerkit.model.reports import Report
from layerkit.store.catalog import Catalog, LayerRow, short_name
from layerkit.store.locks import Locks
from layerkit.store.metas import chain_key
from layerkit.store.objects import needed, object_path, stored_objects
from layerkit.store.spool import dead

Used = tuple[Collection[str], Collection[str]]
InUse = Used | Callable[[], Used]
"""What mounts use: (diff_ids as text, META keys), or a function that says so when it is asked."""


@dataclass(frozen=True, slots=True)
class GcReport(Report):
    """What was (or would be) removed, as text for a person, and the bytes on disk that it took."""

    removed: tuple[str, ...]
    freed_bytes: int


class Collector:
    """One run of gc, with the store held alone."""

    def __init__(self, catalog: Catalog, locks: Locks, *, dry_run: bool) -> None:
        """Collect in the store of these parts."""
        self._layout, self._catalog, self._locks, self._dry_run = catalog.layout, catalog, locks, dry_run
        self._removed: list[str] = []
        self._freed = 0

    def run(self, used: Used, *, drop_metas: bool) -> GcReport:
        """Do it; see ``LocalStore.gc``."""
        # First what needs no room in the catalog: on a full disk this is what makes some.
        for path in dead(self._layout):
            self._drop(path, f"tmp/{path.name}: left by a run that was ended")
        for path in strays(self._catalog):
            self._drop(path, f"{path.relative_to(self._layout.root)}: left by a run that was ended")
        if not self._dry_run:
            self._locks.clear()

        layers_used, metas_used = frozenset(used[0]), frozenset(used[1])
        layers = {row.diff_id: row for row in self._catalog.layers()}
        kept_images, kept_metas = self._reachable(metas_used, drop_metas)
        chains: dict[str, list[Digest]] = {digest: [] for digest in kept_images}
        for digest, diff_id in self._catalog.image_layers():
            if digest in kept_images:
                chains[digest].append(diff_id)
        kept_layers = {diff_id for chain in chains.values() for diff_id in chain}
        kept_layers |= {diff_id for diff_id in layers if str(diff_id) in layers_used or diff_id.hex in layers_used}

        dead_images = sorted(set(self._catalog.digests()) - kept_images)
        dead_layers = [row for diff_id, row in layers.items() if diff_id not in kept_layers]
        dead_metas = [key for key, _ in self._catalog.metas() if key not in kept_metas]
        kept_chains = {chain_key(chain) for chain in chains.values()}
        dead_facts = [chain for chain, _ in self._catalog.all_tree_facts() if chain not in kept_chains]
        dead_objects = self._dead_objects([row for diff_id, row in layers.items() if diff_id in kept_layers])

        if not self._dry_run and (dead_images or dead_layers or dead_metas or dead_facts or dead_objects):
            with self._catalog.write() as db:
                Catalog.drop(db, "images", dead_images)
                Catalog.drop(db, "layers", [str(row.diff_id) for row in dead_layers])
                Catalog.drop(db, "metas", dead_metas)
                Catalog.drop(db, "tree_facts", dead_facts)
                Catalog.drop(db, "objects", map(short_name, dead_objects))
        # Rows first, on disk for sure, then files: killed in between, this leaves strays and no damage.
        for digest in dead_images:
            self._removed.append(f"image {digest}")
        for key in dead_metas:
            self._drop(self._layout.meta(key), f"metadata layer {key}")
        for row in dead_layers:
            self._drop_layer(row)
        if dead_objects:
            self._removed.append(f"{len(dead_objects)} objects")
        for sha256 in dead_objects:
            self._drop(object_path(self._layout, sha256))
        if self._removed and not self._dry_run:
            with contextlib.suppress(sqlite3.Error):  # needs room for a copy; only the size is at stake
                self._catalog.compact()
        return GcReport(tuple(self._removed), self._freed)

    def _reachable(self, metas_used: frozenset[str], drop_metas: bool) -> tuple[set[str], set[str]]:
        """Return the manifest digests of images, and the keys of METAs, that stay."""
        pairs = self._catalog.image_metas()
        images = {digest for _, digest in self._catalog.names()}
        images |= {digest for digest, key in pairs if key in metas_used}
        metas = set(metas_used)
        if not drop_metas:
            metas |= {key for digest, key in pairs if digest in images}
        return images, metas

    def _dead_objects(self, kept: Iterable[LayerRow]) -> list[bytes]:
        live: set[bytes] = set()
        for row in kept:
            if not row.objects:
                continue
            try:
                live.update(map(short_name, needed(self._layout.read_index(row.diff_id))))
            except StoreError as error:
                # What a layer needs cannot be told: then nothing is known to be dead.
                self._removed.append(f"no objects, since not all indexes can be read: {error}")
                return []
        return [row.sha256 for row in self._catalog.objects() if row.short not in live]

    def _drop_layer(self, row: LayerRow) -> None:
        kept_as = [name for name, there in (("tar", row.tar), ("objects", row.objects)) if there] or ["index only"]
        self._removed.append(f"layer {row.diff_id} ({', '.join(kept_as)})")
        for path in self._layout.layer_files(row.diff_id):
            self._drop(path)

    def _drop(self, path: Path, line: str = "") -> None:
        if line:
            self._removed.append(line)
        self._freed += disk_usage(path).allocated_bytes
        if not self._dry_run:
            remove(path)


def strays(catalog: Catalog) -> list[Path]:
    """Return the files that lie where files of the store lie, and that no row knows."""
    layout, found = catalog.layout, list[Path]()
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
