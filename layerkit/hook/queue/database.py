"""The queue's database: SQLite in WAL mode, for several threads and processes of one machine."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from layerkit.model.errors import StoreError

SCHEMA_VERSION = 1
_BUSY_SECONDS = 60.0
FIGURES = ("bytes_read", "bytes_written", "bytes_mounted", "bytes_avoided", "layers_read", "layers_kept")
_SCHEMA = f"""
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, digest TEXT NOT NULL, mapping TEXT NOT NULL, options TEXT NOT NULL,
    version INTEGER NOT NULL, state TEXT NOT NULL,
    urgent INTEGER NOT NULL DEFAULT 0, anew INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0, losses INTEGER NOT NULL DEFAULT 0,
    not_before REAL NOT NULL, owner TEXT, token TEXT, lease_until REAL,
    created REAL NOT NULL, started REAL, finished REAL, why TEXT NOT NULL DEFAULT '',
    report TEXT NOT NULL DEFAULT '{{}}',
    {", ".join(f"{name} INTEGER NOT NULL DEFAULT 0" for name in FIGURES)}
);
CREATE INDEX jobs_by_state ON jobs (state, urgent DESC, not_before);
CREATE INDEX jobs_by_digest ON jobs (digest);
CREATE INDEX jobs_by_end ON jobs (finished);
CREATE TABLE targets (
    job TEXT NOT NULL REFERENCES jobs ON DELETE CASCADE, registry TEXT NOT NULL, repository TEXT NOT NULL,
    tag TEXT NOT NULL, todo INTEGER NOT NULL, PRIMARY KEY (job, registry, repository)
) WITHOUT ROWID;
"""


class Database:
    """The connection of one process. Safe to use from several threads; not across a fork."""

    def __init__(self, folder: Path) -> None:
        """Open the database in ``folder``, which is there; its tables are made if they are not.

        Raises:
            StoreError: a queue of a newer version, or a disk that refuses.
        """
        self._folder = folder
        self._guard = threading.RLock()
        with on_disk(folder):
            self._db = sqlite3.connect(
                folder / "queue.sqlite", timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._db.execute("PRAGMA journal_mode = WAL")
            # FULL, not NORMAL: a 202 is a promise that outlasts a loss of power.
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
            with self.write() as db:
                version = db.execute("PRAGMA user_version").fetchone()[0]
                if version == 0:
                    for statement in _SCHEMA.split(";"):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        if version > SCHEMA_VERSION:
            self.close()
            raise StoreError(f"{folder}: a queue of version {version}, newer than this layerkit; use a newer one")

    def close(self) -> None:
        """Close it."""
        with self._guard:
            self._db.close()

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Have the database to oneself; all of the block happens, on disk, or nothing."""
        with self._guard, on_disk(self._folder):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Keep the other threads of this process away while the block runs."""
        with self._guard, on_disk(self._folder):
            yield self._db

    def rows(self, query: str, values: Iterable[object] = ()) -> list[tuple[object, ...]]:
        """Return what a query finds."""
        with self.read() as db:
            return db.execute(query, tuple(values)).fetchall()


@contextlib.contextmanager
def on_disk(folder: Path) -> Iterator[None]:
    """Turn what a disk refuses while the block runs into an error that says which."""
    try:
        yield
    except (sqlite3.OperationalError, sqlite3.DatabaseError, OSError) as error:
        raise StoreError(
            f"{folder}: the queue: {error}; it needs a local disk with room, not a network share"
        ) from error


__all__ = ["FIGURES", "SCHEMA_VERSION", "Database", "on_disk"]
