"""The snapshotter's database: which snapshots there are, in containerd's words, and what mount points stand for.

SQLite in WAL mode. A row counts once its transaction is committed; folders that no row knows are what a killed
process left, and ``Snapshotter.cleanup`` removes them. The id of a row is never used for another, so a folder can
never be taken for that of another snapshot.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from layerkit.model.errors import SnapshotError, StoreError

REF_LABEL = "containerd.io/snapshot.ref"
"""On a Prepare for unpacking: the chain_id that the snapshot will have once it is committed."""
_LABEL_BYTES = 4096

SCHEMA_VERSION = 1
_BUSY_SECONDS = 60
_SCHEMA = """
CREATE TABLE snapshots (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, parent INTEGER REFERENCES snapshots (id),
    kind INTEGER NOT NULL, created INTEGER NOT NULL, updated INTEGER NOT NULL, labels TEXT NOT NULL,
    map TEXT NOT NULL, chain TEXT NOT NULL, image TEXT NOT NULL, ref TEXT NOT NULL,
    size INTEGER, inodes INTEGER
);
CREATE INDEX child ON snapshots (parent);
CREATE INDEX target ON snapshots (ref) WHERE ref != '';
CREATE TABLE places (id INTEGER PRIMARY KEY AUTOINCREMENT, what TEXT NOT NULL UNIQUE, info TEXT NOT NULL);
"""
_COLUMNS = "key, parent, kind, labels, map, chain, image, ref, id, created, updated"
_ROWS = (
    f"SELECT {', '.join('s.' + name for name in _COLUMNS.split(', '))}, coalesce(p.key, '') "
    "FROM snapshots AS s LEFT JOIN snapshots AS p ON p.id = s.parent"
)


class Kind(IntEnum):
    """What a snapshot is; the numbers are those of the service."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


@dataclass(frozen=True, slots=True)
class Usage:
    """What a snapshot alone takes on disk: bytes and inodes."""

    size: int
    inodes: int


def check_labels(labels: Mapping[str, str]) -> None:
    """Refuse a label whose key and value together are above 4096 bytes, as containerd does.

    Raises:
        SnapshotError: invalid_argument.
    """
    for key, value in labels.items():
        if len(key.encode()) + len(value.encode()) > _LABEL_BYTES:
            raise SnapshotError(
                "invalid_argument", f"label {key[:64]!r}: key and value are above {_LABEL_BYTES} bytes"
            )


@dataclass(frozen=True, slots=True)
class Row:
    """A snapshot as it is kept.

    Attributes:
        key: its name. parent: id of its parent, None for none; parent_key: its name.
        kind: what it is. labels: as clients set them.
        map: canonical id map of an active snapshot or view that shows mapped owners (or of what was committed
            from one), else "".
        chain: diff_ids, bottom first, of a snapshot whose files lie in layerkit's store, else ().
        image: manifest digest of the stored image that keeps that chain, else "".
        ref: the chain_id that a committed snapshot stands for, "" where nobody said.
        id: its number, given by the catalog; its folder is ``snapshots/ID``.
        created, updated: nanoseconds since 1970, likewise.
    """

    key: str
    parent: int | None
    kind: Kind
    labels: Mapping[str, str]
    map: str = ""
    chain: tuple[str, ...] = ()
    image: str = ""
    ref: str = ""
    id: int = 0
    created: int = 0
    updated: int = 0
    parent_key: str = ""

    def field(self, path: tuple[str, ...]) -> str | None:
        """Return a field as filters name it, None where it is not present."""
        match path:
            case ("kind",):
                return self.kind.name.lower()
            case ("name",):
                return self.key
            case ("parent",):
                return self.parent_key
            case ("labels", *rest) if rest:
                return self.labels.get(".".join(rest))
        return None


class Catalog:
    """The database of one snapshotter root; may be used from several threads."""

    def __init__(self, path: Path) -> None:
        """Open the database, made if it is not there.

        Raises:
            StoreError: it is damaged, or a later version of layerkit made it.
        """
        self._path = path
        self._lock = threading.RLock()
        with self._told("opening"):
            self._db = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            try:
                # FULL: containerd's own database is on disk when it believes that a snapshot is there.
                for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
                    self._db.execute(f"PRAGMA {pragma}")
                version = self._db.execute("PRAGMA user_version").fetchone()[0]
                if version == 0:
                    self._db.executescript(f"BEGIN; {_SCHEMA}; PRAGMA user_version = {SCHEMA_VERSION}; COMMIT")
            except BaseException:
                self._db.close()
                raise
        if version > SCHEMA_VERSION:
            self._db.close()
            raise StoreError(f"{path}: of version {version}; use the layerkit that made it, or another --root")

    @contextlib.contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            text = str(error)
            hint = "; make room on its filesystem" if "full" in text else ""
            if "malformed" in text or "not a database" in text:
                hint = (
                    "; it is damaged: stop containerd and the snapshotter, remove this root and what containerd "
                    "unpacked into it (`ctr snapshots --snapshotter NAME ls`), and pull the images again"
                )
            raise StoreError(f"{self._path}: {doing}: {text}{hint}") from error

    def close(self) -> None:
        """Close the database; harmless when called again."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def write(self) -> Iterator[None]:
        """Run a transaction, alone: what is written inside the block stays whole or not at all.

        Inside another one it is a part of that.
        """
        with self._lock, self._told("writing"):
            if self._db.in_transaction:
                yield
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                self._db.rollback()  # SQLite has done it already where the disk is full
                raise

    def _all(self, query: str, *values: object) -> list[Any]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def _rows(self, rest: str, *values: object, first: str = "") -> list[Row]:
        return [_row(values) for values in self._all(f"{first}{_ROWS} {rest}", *values)]

    # Snapshots

    def find(self, key: str) -> Row | None:
        """Return the snapshot called ``key``."""
        return next(iter(self._rows("WHERE s.key = ?", key)), None)

    def get(self, key: str) -> Row:
        """Return the snapshot called ``key``.

        Raises:
            SnapshotError: not_found.
        """
        found = self.find(key)
        if found is None:
            raise SnapshotError("not_found", f"snapshot {key!r} does not exist")
        return found

    def lineage(self, identity: int | None) -> list[Row]:
        """Return a snapshot and its ancestors, the nearest first."""
        up = (
            "WITH RECURSIVE up (depth, i) AS (SELECT 0, ? UNION ALL SELECT depth + 1, parent FROM up "
            "JOIN snapshots ON id = i WHERE parent IS NOT NULL) "
        )
        return self._rows("JOIN up ON s.id = i ORDER BY depth", identity, first=up)

    def rows(self) -> list[Row]:
        """Return all snapshots, parents before children."""
        return self._rows("ORDER BY s.id")

    def with_ref(self, ref: str) -> list[Row]:
        """Return the committed snapshots that stand for the chain_id ``ref``."""
        return self._rows("WHERE s.ref = ? AND s.ref != '' AND s.kind = ?", ref, Kind.COMMITTED)

    def has_child(self, identity: int) -> bool:
        """Return whether any snapshot has this one as its parent."""
        return bool(self._all("SELECT 1 FROM snapshots WHERE parent = ? LIMIT 1", identity))

    def insert(self, row: Row) -> int:
        """Add a snapshot, within :meth:`write`; return its id.

        Raises:
            SnapshotError: already_exists.
        """
        now = time.time_ns()
        try:
            cursor = self._db.execute(
                f"INSERT INTO snapshots ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL, ?, ?)",
                (row.key, row.parent, int(row.kind), _text(row.labels), row.map, " ".join(row.chain), row.image,
                 row.ref, now, now),
            )  # fmt: skip
        except sqlite3.IntegrityError as error:
            raise SnapshotError("already_exists", f"snapshot {row.key!r} exists") from error
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def commit(self, identity: int, name: str, labels: Mapping[str, str], ref: str) -> None:
        """Turn an active snapshot into the committed one called ``name``, within :meth:`write`."""
        now = time.time_ns()
        self._all(
            "UPDATE snapshots SET key = ?, kind = ?, created = ?, updated = ?, labels = ?, ref = ? WHERE id = ?",
            name, int(Kind.COMMITTED), now, now, _text(labels), ref, identity,
        )  # fmt: skip

    def relabel(self, identity: int, labels: Mapping[str, str]) -> None:
        """Replace a snapshot's labels, within :meth:`write`."""
        self._all(
            "UPDATE snapshots SET labels = ?, updated = ? WHERE id = ?", _text(labels), time.time_ns(), identity
        )

    def remove(self, identity: int) -> None:
        """Forget a snapshot, within :meth:`write`."""
        self._all("DELETE FROM snapshots WHERE id = ?", identity)

    def usage(self, identity: int) -> Usage | None:
        """Return what was kept about a committed snapshot's size."""
        rows = self._all("SELECT size, inodes FROM snapshots WHERE id = ? AND size IS NOT NULL", identity)
        return Usage(*rows[0]) if rows else None

    def keep_usage(self, identity: int, usage: Usage) -> None:
        """Keep the size of a committed snapshot, which does not change any more."""
        with self.write():
            self._all("UPDATE snapshots SET size = ?, inodes = ? WHERE id = ?", usage.size, usage.inodes, identity)

    # Places

    def place(self, what: str) -> int:
        """Return the number of the mount point for ``what``, given out if it has none."""
        while not (rows := self._all("SELECT id FROM places WHERE what = ?", what)):
            with self.write():
                self._all("INSERT INTO places (what, info) VALUES (?, '') ON CONFLICT DO NOTHING", what)
        return int(rows[0][0])

    def note(self, what: str) -> dict[str, Any] | None:
        """Return what :meth:`keep_note` kept for ``what``."""
        rows = self._all("SELECT info FROM places WHERE what = ? AND info != ''", what)
        note: dict[str, Any] | None = json.loads(rows[0][0]) if rows else None
        return note

    def keep_note(self, what: str, note: Mapping[str, Any]) -> None:
        """Keep a JSON-able note for ``what``."""
        with self.write():
            self._all(
                "INSERT INTO places (what, info) VALUES (?, ?) "
                "ON CONFLICT (what) DO UPDATE SET info = excluded.info",
                what, json.dumps(note),
            )  # fmt: skip

    def places(self) -> dict[str, int]:
        """Return all places: what they are for, and their numbers."""
        return {what: int(identity) for what, identity in self._all("SELECT what, id FROM places ORDER BY id")}

    def drop_place(self, what: str) -> None:
        """Forget a place; its number is not given out again."""
        with self.write():
            self._all("DELETE FROM places WHERE what = ?", what)


def _text(labels: Mapping[str, str]) -> str:
    return json.dumps(dict(labels), sort_keys=True)


def _row(values: tuple[Any, ...]) -> Row:
    key, parent, kind, labels, map_text, chain, *rest = values
    return Row(key, parent, Kind(kind), json.loads(labels), map_text, tuple(chain.split()), *rest)
