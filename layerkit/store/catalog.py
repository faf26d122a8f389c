"""The catalog: an SQLite database that says what in the store is whole.

A file counts only with its row, and a row is written only when its files lie in place, on disk. So whatever
interrupts a run leaves files without rows, which are not used, and which gc removes.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from layerkit.linux.durable import remove, rename_new, sync_path
from layerkit.model.descriptor import Descriptor, Platform
from layerkit.model.digest import Digest
from layerkit.model.errors import StoreError
from layerkit.model.image import Image, Layer
from layerkit.store.layout import DataBackend, Layout
from layerkit.store.locks import CATALOG, file_lock

SCHEMA_VERSION = 1
_KEYS = {"layers": "diff_id", "objects": "short", "images": "digest", "metas": "key", "tree_facts": "chain"}
_BUSY_MILLISECONDS = 600_000
_SCHEMA = """
CREATE TABLE layers (
    diff_id TEXT PRIMARY KEY, tar_size INTEGER NOT NULL, entries INTEGER NOT NULL,
    tar INTEGER NOT NULL, objects INTEGER NOT NULL, created REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE objects (short BLOB PRIMARY KEY, sha256 BLOB NOT NULL, size INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE images (
    digest TEXT PRIMARY KEY, manifest BLOB NOT NULL, config BLOB NOT NULL,
    facts TEXT NOT NULL, created REAL NOT NULL
);
CREATE TABLE names (
    name TEXT PRIMARY KEY, digest TEXT NOT NULL REFERENCES images ON DELETE CASCADE, created REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE image_layers (
    digest TEXT NOT NULL REFERENCES images ON DELETE CASCADE, position INTEGER NOT NULL, diff_id TEXT NOT NULL,
    PRIMARY KEY (digest, position)
) WITHOUT ROWID;
CREATE INDEX image_of_layer ON image_layers (diff_id);
CREATE TABLE metas (key TEXT PRIMARY KEY, info TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE image_metas (
    digest TEXT NOT NULL REFERENCES images ON DELETE CASCADE, key TEXT NOT NULL REFERENCES metas ON DELETE CASCADE,
    PRIMARY KEY (digest, key)
) WITHOUT ROWID;
CREATE INDEX image_of_meta ON image_metas (key);
CREATE TABLE tree_facts (chain TEXT PRIMARY KEY, facts TEXT NOT NULL, created REAL NOT NULL);
"""


class LayerRow(NamedTuple):
    """A layer: the size of its tar in bytes, its entries, and in which backends its data is whole."""

    diff_id: Digest
    tar_size: int
    entries: int
    tar: bool
    objects: bool


class ObjectRow(NamedTuple):
    """An object: the 126 bits its name is made of (last two bits zero), its whole sha256, its bytes."""

    short: bytes
    sha256: bytes
    size: int


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image with the names it has in the store."""

    image: Image
    names: tuple[str, ...]


class Catalog:
    """The database of one store; each thread has its own connection to it. ``layout`` says where the store lies."""

    def __init__(self, layout: Layout) -> None:
        """Open, or make, the database of the store at ``layout``."""
        self.layout = layout
        path = self._path = layout.catalog
        self._lock = layout.locks / CATALOG
        self._local = threading.local()
        self._guard = threading.Lock()
        self._open: list[sqlite3.Connection] = []
        version = self._one("PRAGMA user_version")[0]
        if version == 0:
            with self.write() as db:
                # Another process may have been quicker.
                if db.execute("PRAGMA user_version").fetchone()[0] == 0:
                    for statement in _SCHEMA.split(";"):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        elif version > SCHEMA_VERSION:
            self.close()
            raise StoreError(
                f"{path}: a catalog of version {version}, and this layerkit knows up to {SCHEMA_VERSION}; use a "
                "newer layerkit, or another folder with --store"
            )

    def close(self) -> None:
        """Close the connections of all threads."""
        with self._guard:
            for connection in self._open:
                connection.close()
            self._open.clear()
            self._local = threading.local()

    @property
    def _db(self) -> sqlite3.Connection:
        held: tuple[int, sqlite3.Connection] | None = getattr(self._local, "held", None)
        if held is not None and held[0] == os.getpid():
            return held[1]
        # A connection must not be carried over a fork, hence the pid.
        db = sqlite3.connect(
            self._path, timeout=_BUSY_MILLISECONDS / 1000, isolation_level=None, check_same_thread=False
        )
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA temp_store = MEMORY")
        self._local.held = (os.getpid(), db)
        with self._guard:
            self._open.append(db)
        return db

    @contextlib.contextmanager
    def write(self, undo: Callable[[], None] | None = None) -> Iterator[sqlite3.Connection]:
        """Run a transaction, the only one that writes: all of it is committed, or nothing.

        Args:
            undo: called if it fails, be it at its commit, while still no other transaction can begin.
        """
        db = self._db
        # SQLite's own lock may be gone after a commit that failed, too early for `undo`.
        with file_lock(self._lock):
            try:
                db.execute("BEGIN IMMEDIATE")
                yield db
                db.execute("COMMIT")
            except BaseException:
                if undo is not None:
                    undo()
                with contextlib.suppress(sqlite3.Error):  # a full disk has rolled it back already
                    db.execute("ROLLBACK")
                raise

    def _all(self, query: str, values: Iterable[object] = ()) -> list[Any]:
        return self._db.execute(query, tuple(values)).fetchall()

    def _one(self, query: str, values: Iterable[object] = ()) -> Any:
        return self._db.execute(query, tuple(values)).fetchone()

    # Layers

    def layer(self, diff_id: Digest) -> LayerRow | None:
        """Return the row of a layer."""
        row = self._one("SELECT * FROM layers WHERE diff_id = ?", [str(diff_id)])
        return None if row is None else _layer(row)

    def layers(self) -> list[LayerRow]:
        """Return all layers, by diff_id."""
        return [_layer(row) for row in self._all("SELECT * FROM layers ORDER BY diff_id")]

    @staticmethod
    def put_layer(db: sqlite3.Connection, row: LayerRow) -> None:
        """Add a layer, or the backends that ``row`` has to one that is there."""
        db.execute(
            "INSERT INTO layers VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (diff_id) DO UPDATE SET "
            "tar_size = excluded.tar_size, entries = excluded.entries, "
            "tar = max(tar, excluded.tar), objects = max(objects, excluded.objects)",
            (str(row.diff_id), row.tar_size, row.entries, row.tar, row.objects, time.time()),
        )

    @staticmethod
    def drop_backend(db: sqlite3.Connection, diff_id: Digest, backend: DataBackend) -> None:
        """Say that the layer's data is not whole in ``backend``."""
        db.execute(f"UPDATE layers SET {backend.value} = 0 WHERE diff_id = ?", (str(diff_id),))

    @staticmethod
    def drop(db: sqlite3.Connection, table: str, keys: Iterable[object]) -> None:
        """Forget rows, and with an image its names and relations.

        Args:
            db: inside a transaction.
            table: ``layers``, ``objects`` (their short names), ``images``, ``metas`` or ``tree_facts``.
            keys: of the rows.
        """
        db.executemany(f"DELETE FROM {table} WHERE {_KEYS[table]} = ?", ((key,) for key in keys))

    # Objects

    def objects(self) -> list[ObjectRow]:
        """Return all objects, by name."""
        return [ObjectRow(*row) for row in self._all("SELECT short, sha256, size FROM objects ORDER BY short")]

    def has_object(self, sha256: bytes) -> bool:
        """Return whether a content, by its whole digest, is an object."""
        query = "SELECT 1 FROM objects WHERE short = ? AND sha256 = ?"
        return self._one(query, [short_name(sha256), sha256]) is not None

    def known_objects(self, rows: Collection[ObjectRow]) -> set[bytes]:
        """Return the ``short`` of those of ``rows`` that are in the catalog; a transaction of this thread counts.

        Raises:
            StoreError: one of another content (or size) has the same name.
        """
        known = set()
        seen: dict[bytes, bytes] = {}
        for row in rows:
            if seen.setdefault(row.short, row.sha256) != row.sha256:
                raise _clash(seen[row.short], row.sha256)
            found = self._one("SELECT sha256, size FROM objects WHERE short = ?", [row.short])
            if found is None:
                continue
            if found[0] != row.sha256:
                raise _clash(found[0], row.sha256)
            if found[1] != row.size:
                raise StoreError(
                    f"object sha256:{row.sha256.hex()}: {found[1]} bytes in the catalog, {row.size} in the layer; "
                    "run `layerkit store verify --repair`"
                )
            known.add(row.short)
        return known

    @staticmethod
    def put_objects(db: sqlite3.Connection, rows: Collection[ObjectRow]) -> None:
        """Add objects that are not in the catalog."""
        # In the order of the key: hashes in any other order touch a page per row.
        db.executemany("INSERT INTO objects VALUES (?, ?, ?) ON CONFLICT DO NOTHING", sorted(rows))

    # Images

    def put_image(self, image: Image, names: Collection[str], metas: Collection[str] = ()) -> None:
        """Add an image, let ``names`` mean it, and connect it with METAs."""
        digest = str(image.descriptor.digest)
        facts = _facts_of(image)
        now = time.time()
        with self.write() as db:
            db.execute(
                "INSERT INTO images VALUES (?, ?, ?, ?, ?) ON CONFLICT (digest) DO UPDATE SET "
                "manifest = excluded.manifest, config = excluded.config, facts = excluded.facts",
                (digest, image.manifest, image.config, facts, now),
            )
            db.execute("DELETE FROM image_layers WHERE digest = ?", (digest,))
            db.executemany(
                "INSERT INTO image_layers VALUES (?, ?, ?)",
                [(digest, i, str(diff_id)) for i, diff_id in enumerate(image.diff_ids)],
            )
            db.executemany("INSERT OR REPLACE INTO names VALUES (?, ?, ?)", [(n, digest, now) for n in names])
            for key in metas:
                self.link_meta(db, digest, key)

    def images(self) -> list[StoredImage]:
        """Return all images, oldest first."""
        names = self.names_of()
        rows = self._all("SELECT digest, manifest, config, facts FROM images ORDER BY created, digest")
        return [StoredImage(_image(*row), tuple(names.get(row[0], ()))) for row in rows]

    def names(self) -> list[tuple[str, str]]:
        """Return all pairs of (name, manifest digest)."""
        return self._all("SELECT name, digest FROM names ORDER BY name")

    def names_of(self) -> dict[str, list[str]]:
        """Return the names of each image that has one, by manifest digest."""
        found: dict[str, list[str]] = {}
        for name, digest in self.names():
            found.setdefault(digest, []).append(name)
        return found

    def digests(self) -> list[str]:
        """Return the manifest digests of all images."""
        return [digest for (digest,) in self._all("SELECT digest FROM images ORDER BY digest")]

    def image(self, digest: str) -> StoredImage | None:
        """Return the image whose manifest has ``digest``."""
        row = self._one("SELECT digest, manifest, config, facts FROM images WHERE digest = ?", [digest])
        if row is None:
            return None
        names = self._all("SELECT name FROM names WHERE digest = ? ORDER BY name", [digest])
        return StoredImage(_image(*row), tuple(name for (name,) in names))

    def drop_name(self, name: str) -> bool:
        """Forget a name; return whether it was there."""
        with self.write() as db:
            return db.execute("DELETE FROM names WHERE name = ?", (name,)).rowcount > 0

    def image_layers(self) -> list[tuple[str, Digest]]:
        """Return all pairs of (manifest digest, diff_id), layers in order."""
        rows = self._all("SELECT digest, diff_id FROM image_layers ORDER BY digest, position")
        return [(digest, Digest.parse(diff_id)) for digest, diff_id in rows]

    # METAs

    def meta(self, key: str) -> str | None:
        """Return the info of a META as JSON."""
        row = self._one("SELECT info FROM metas WHERE key = ?", [key])
        return None if row is None else str(row[0])

    def metas(self) -> list[tuple[str, str]]:
        """Return all pairs of (key, info as JSON), oldest first."""
        return self._all("SELECT key, info FROM metas ORDER BY created, key")

    @staticmethod
    def put_meta(db: sqlite3.Connection, key: str, info: str) -> None:
        """Add a META."""
        # No "OR REPLACE": that deletes the row first, and with it its relations.
        db.execute(
            "INSERT INTO metas VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET info = excluded.info",
            (key, info, time.time()),
        )

    @staticmethod
    def link_meta(db: sqlite3.Connection, digest: str, key: str) -> None:
        """Connect a META with an image, if both are in the catalog."""
        db.execute(
            "INSERT OR IGNORE INTO image_metas SELECT images.digest, metas.key FROM images, metas "
            "WHERE images.digest = ? AND metas.key = ?",
            (digest, key),
        )

    def image_metas(self) -> list[tuple[str, str]]:
        """Return all pairs of (manifest digest, META key)."""
        return self._all("SELECT digest, key FROM image_metas ORDER BY digest, key")

    # Facts of trees

    def tree_facts(self, chain: str) -> str | None:
        """Return what is kept about the tree of a chain of layers, as JSON."""
        row = self._one("SELECT facts FROM tree_facts WHERE chain = ?", [chain])
        return None if row is None else str(row[0])

    def all_tree_facts(self) -> list[tuple[str, str]]:
        """Return all pairs of (chain, facts as JSON)."""
        return self._all("SELECT chain, facts FROM tree_facts ORDER BY chain")

    def put_tree_facts(self, chain: str, facts: str) -> None:
        """Keep what is known about the tree of a chain of layers."""
        with self.write() as db:
            db.execute("INSERT OR REPLACE INTO tree_facts VALUES (?, ?, ?)", (chain, facts, time.time()))

    # Upkeep

    def version(self) -> int:
        """Return a number that changes whenever another thread or process changes the catalog."""
        return int(self._one("PRAGMA data_version")[0])

    def settle(self) -> None:
        """Wait until the transaction that runs now, if any, has ended."""
        with file_lock(self._lock):
            pass

    def problems(self, *, deep: bool) -> list[str]:
        """Return what SQLite finds wrong with the database file and with references in it."""
        found = [text for (text,) in self._all("PRAGMA integrity_check" if deep else "PRAGMA quick_check")]
        dangling = [
            f"a row of {table} points at a row of {other} that is not there"
            for table, _, other, _ in self._all("PRAGMA foreign_key_check")
        ]
        return [text for text in found if text != "ok"] + dangling

    def compact(self) -> None:
        """Give free pages back to the filesystem and empty the write-ahead log."""
        self._db.execute("VACUUM")
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


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


def short_name(sha256: bytes) -> bytes:
    """Return the 126 bits of a digest that its object's name is made of, as 16 bytes."""
    return sha256[:15] + bytes([sha256[15] & 0xFC])


def _clash(one: bytes, other: bytes) -> StoreError:
    return StoreError(
        f"two contents share one short name: sha256:{one.hex()} and sha256:{other.hex()}; nothing was changed. "
        "This cannot happen by chance: look at where the image comes from"
    )


def _layer(row: tuple[Any, ...]) -> LayerRow:
    return LayerRow(Digest.parse(row[0]), row[1], row[2], bool(row[3]), bool(row[4]))


def _facts_of(image: Image) -> str:
    """Return as JSON all of ``image`` but for the bytes of its manifest and config."""
    return json.dumps({
        "name": image.name,
        "descriptor": _descriptor_facts(image.descriptor),
        "config_descriptor": _descriptor_facts(image.config_descriptor),
        "layers": [[_descriptor_facts(layer.descriptor), str(layer.diff_id)] for layer in image.layers],
        "platform": asdict(image.platform),
    })  # fmt: skip


def _image(digest: str, manifest: bytes, config: bytes, text: str) -> Image:
    try:
        facts = json.loads(text)
        return Image(
            name=facts["name"],
            manifest=manifest,
            descriptor=_descriptor(facts["descriptor"]),
            config=config,
            config_descriptor=_descriptor(facts["config_descriptor"]),
            layers=tuple(Layer(_descriptor(d), Digest.parse(diff_id)) for d, diff_id in facts["layers"]),
            platform=Platform(**facts["platform"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"catalog: the row of image {digest} is damaged ({error}); run `layerkit store verify --repair`"
        ) from error


def _descriptor_facts(descriptor: Descriptor) -> dict[str, object]:
    return asdict(descriptor) | {"digest": str(descriptor.digest)}


def _descriptor(facts: dict[str, Any]) -> Descriptor:
    platform = facts.pop("platform")
    digest = Digest.parse(facts.pop("digest"))
    return Descriptor(digest=digest, platform=None if platform is None else Platform(**platform), **facts)
