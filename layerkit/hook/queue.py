"""The queue: jobs in an SQLite database in WAL mode that several threads and processes of one machine use at once.

A job is *waiting*, *running* under a lease, or at one of four ends: *done*, *skipped* (there is nothing to remap,
as it is an artifact), *gone* (the registry does not have it any more) or *dead* (given up; a person may ask for it
again). What is told about a job a second time changes it only where that adds something.

Whatever :meth:`Queue.add` returned for is on disk: a kill, or a loss of power, does not lose it. A job is worked on
under a lease with a token; a lease ends when nobody renews it, or at once when its holder's process is seen to be
dead, as the kernel frees the lock that each holder has on a file of its own. An end that is told under an old token
changes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from layerkit.formats.toml_settings import whole
from layerkit.linux.syscalls import opened
from layerkit.model.digest import Digest
from layerkit.model.errors import NotFound, StoreError
from layerkit.store.locks import open_lock, try_lock

STATES = ("waiting", "running", "done", "skipped", "gone", "dead")
ENDS = ("done", "skipped", "gone", "dead")
_SCHEMA_VERSION = 1
_BUSY_SECONDS = 60.0
_FIGURES = ("bytes_read", "bytes_written", "bytes_mounted", "bytes_avoided", "layers_read", "layers_kept")
_SCHEMA = f"""
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, digest TEXT NOT NULL, mapping TEXT NOT NULL, options TEXT NOT NULL,
    version INTEGER NOT NULL, state TEXT NOT NULL,
    urgent INTEGER NOT NULL DEFAULT 0, anew INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0, losses INTEGER NOT NULL DEFAULT 0,
    not_before REAL NOT NULL, owner TEXT, token TEXT, lease_until REAL,
    created REAL NOT NULL, started REAL, finished REAL, why TEXT NOT NULL DEFAULT '',
    report TEXT NOT NULL DEFAULT '{{}}',
    {", ".join(f"{name} INTEGER NOT NULL DEFAULT 0" for name in _FIGURES)}
);
CREATE INDEX jobs_by_state ON jobs (state, urgent DESC, not_before);
CREATE INDEX jobs_by_digest ON jobs (digest);
CREATE INDEX jobs_by_end ON jobs (finished);
CREATE TABLE targets (
    job TEXT NOT NULL REFERENCES jobs ON DELETE CASCADE, registry TEXT NOT NULL, repository TEXT NOT NULL,
    tag TEXT NOT NULL, todo INTEGER NOT NULL, PRIMARY KEY (job, registry, repository)
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """What makes two wishes the same job.

    Attributes:
        digest: of the manifest or index.
        mapping: the id map as canonical text.
        options: what else shapes the artifact, as canonical text.
        version: of the artifact's format.
    """

    digest: Digest
    mapping: str
    options: str
    version: int

    @property
    def job(self) -> str:
        """Return the job's name: 32 hex digits of a digest over all four."""
        text = "\0".join((str(self.digest), self.mapping, self.options, str(self.version)))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """Where the artifact of a job goes: a repository of a configured registry. ``tag`` is for people."""

    registry: str
    repository: str
    tag: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Wish:
    """A job that is wanted: ``urgent`` where somebody waits for it, ``again`` where an end is to be undone."""

    key: Key
    target: Target
    urgent: bool = False
    again: bool = False


@dataclass(frozen=True, slots=True)
class Claim:
    """A job that was taken for work; whoever holds a newer one for the same job has it, not this one.

    Attributes:
        job: its name.
        key: what is to be done.
        targets: where its artifact is still missing.
        token: of the lease.
        attempt: 1 for the first.
        anew: whether the artifact is to be made even if the registry has one.
    """

    job: str
    key: Key
    targets: tuple[Target, ...]
    token: str
    attempt: int
    anew: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a job.

    Attributes:
        state: ``done``, ``skipped``, ``gone`` or ``failed``.
        why: for all but ``done``: what was found, without secrets.
        permanent: of ``failed``: trying again cannot help.
        children: manifests of an index, each to be a job of its own.
        report: figures for people and metrics: bytes read, written, mounted, avoided; layers.
    """

    state: str
    why: str = ""
    permanent: bool = False
    children: tuple[Digest, ...] = ()
    report: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Policy:
    """How often and how soon a job is tried again.

    Attributes:
        attempts: failures that are told before a job is dead.
        losses: leases that may be lost (a process or machine died under it) before it is dead.
        first_seconds: before the second attempt; doubled for each one after.
        most_seconds: bound on that.
        lease_seconds: without a heartbeat, a lease ends after this.
        recheck_seconds: see :meth:`after_wish`.
    """

    attempts: int = whole(10, 1, 1000)
    losses: int = whole(100, 1, 1_000_000)
    first_seconds: float = 2.0
    most_seconds: float = 900.0
    lease_seconds: float = 60.0
    recheck_seconds: float = 600.0

    def delay(self, attempt: int, chance: float) -> float:
        """Return the seconds to wait after the failed ``attempt`` (1 is the first).

        Jobs that failed together must not come back together: ``chance``, from 0 to 1, makes the wait something
        between half and all of what the doubling says.
        """
        whole = min(self.most_seconds, self.first_seconds * 2.0 ** min(attempt - 1, 62))
        return whole * (0.5 + 0.5 * chance)

    def after_wish(self, state: str, age: float, *, again: bool, new_target: bool) -> str:
        """Return the state of a job in ``state`` that is wished for once more.

        A dead job stays dead until somebody asks for it ``again``. One that was done runs again for a repository
        it was not wanted in before, and once its end is older than ``recheck_seconds``: the image may have been
        deleted and pushed anew, and its artifact with it. Such a run finds what is there, for two requests. The
        ``age`` is in seconds since the job came to its end.
        """
        old = state in ("done", "skipped") and (new_target or age >= self.recheck_seconds)
        return "waiting" if state in ENDS and (again or old or state == "gone") else state


class Added(NamedTuple):
    """What became of a wish: the job's name and state, and whether it was unknown before."""

    job: str
    state: str
    new: bool


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job for people: times are seconds since 1970, None where that has not happened."""

    job: str
    digest: str
    mapping: str
    options: str
    state: str
    attempts: int
    losses: int
    not_before: float
    created: float
    started: float | None
    finished: float | None
    why: str
    report: dict[str, object]
    targets: tuple[Target, ...]

    def view(self) -> dict[str, object]:
        """Return the job as the API and ``--json`` show it."""
        return {{"job": "id", "mapping": "map"}.get(name, name): value for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Stats:
    """The queue as a whole: jobs by state, the age of the oldest that waits (seconds), sums over all ends."""

    states: dict[str, int]
    oldest_seconds: float
    totals: dict[str, int]

    @property
    def depth(self) -> int:
        """Return how many jobs are waiting or running."""
        return self.states.get("waiting", 0) + self.states.get("running", 0)


def figure(report: Mapping[str, object], name: str) -> int:
    """Return a figure of a report, 0 where it has none."""
    value = report.get(name)
    return value if isinstance(value, int) and value > 0 else 0


class Queue:
    """The jobs of one hook. Safe to use from several threads; not across a fork."""

    def __init__(
        self,
        folder: Path,
        policy: Policy | None = None,
        *,
        clock: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """Open the queue in ``folder``, made if it is not there; on a local disk, as SQLite's WAL needs.

        ``clock`` gives seconds since 1970; ``chance``, from 0 to 1, is for the jitter.

        Raises:
            StoreError: a queue of a newer version, or a disk that refuses.
        """
        self.policy = policy or Policy()
        self._clock, self._chance = clock, chance
        self._folder, self._guard = folder, threading.RLock()
        with _on_disk(folder):
            self._holders = Holders(folder / "owners")
            self._db = sqlite3.connect(
                folder / "queue.sqlite", timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            self._prepare()
            stack.pop_all()

    def _prepare(self) -> None:
        with self._read() as db:
            db.execute("PRAGMA journal_mode = WAL")
            # FULL, not NORMAL: a 202 is a promise that outlasts a loss of power.
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA foreign_keys = ON")
        with self._write() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        if version > _SCHEMA_VERSION:
            raise StoreError(
                f"{self._folder}: a queue of version {version}, newer than this layerkit; use a newer one"
            )

    def close(self) -> None:
        """Close the database, and end the leases of this process: another takes its jobs over at once."""
        with self._guard:
            self._db.close()
        self._holders.close()

    @contextlib.contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """Have the database to oneself; all of the block happens, on disk, or nothing."""
        with self._read() as db, db:
            db.execute("BEGIN IMMEDIATE")
            yield db

    @contextlib.contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        """Keep the other threads of this process away while the block runs."""
        with self._guard, _on_disk(self._folder):
            yield self._db

    # -- what is wanted

    def add(self, wishes: Sequence[Wish]) -> list[Added]:
        """Store ``wishes`` in one transaction, what is known already not twice; return what became of each."""
        with self._write() as db:
            return [self._add(db, wish) for wish in wishes]

    def _add(self, db: sqlite3.Connection, wish: Wish) -> Added:
        key, job, target, now = wish.key, wish.key.job, wish.target, self._clock()
        row = db.execute("SELECT state, urgent, finished FROM jobs WHERE id = ?", (job,)).fetchone()
        if row is None:
            db.execute(
                "INSERT INTO jobs (id, digest, mapping, options, version, state, urgent, not_before, created)"
                " VALUES (?, ?, ?, ?, ?, 'waiting', ?, ?, ?)",
                (job, str(key.digest), key.mapping, key.options, key.version, wish.urgent, now, now),
            )
            _put_target(db, job, target)
            return Added(job, "waiting", True)
        place = (job, target.registry, target.repository)
        known = db.execute(f"SELECT 1 FROM targets WHERE {_TARGET}", place).fetchone()
        before, urgent, finished = row
        age = now - (finished or now)
        state = self.policy.after_wish(before, age, again=wish.again, new_target=known is None)
        if known is None or (state == "waiting" and before in ENDS):
            _put_target(db, job, target)
        if state != before:
            _set(db, "id = ?", (job,), state=state, anew=wish.again, why="", **_from_now(now))
        if wish.urgent and not urgent and state == "waiting":
            db.execute("UPDATE jobs SET urgent = 1, not_before = min(not_before, ?) WHERE id = ?", (now, job))
        return Added(job, state, False)

    def retry(self, jobs: Iterable[str] | None = None) -> int:
        """Let dead jobs run again, all or those named; return how many."""
        which, named = ("", ()) if jobs is None else (f" AND id {_AMONG}", (json.dumps(list(jobs)),))
        with self._write() as db:
            return _set(db, f"state = 'dead'{which}", named, state="waiting", **_from_now(self._clock()))

    def prune(self, older_seconds: float) -> int:
        """Forget what came to its end longer ago than that, the dead excepted; return how many."""
        with self._write() as db:
            return db.execute(
                "DELETE FROM jobs WHERE state IN ('done', 'skipped', 'gone') AND finished < ?",
                (self._clock() - older_seconds,),
            ).rowcount

    # -- work

    def claim(self, count: int, busy: Collection[str] = ()) -> list[Claim]:
        """Take up to ``count`` jobs for work: the urgent ones, then those that are due for longest.

        Jobs of the registries in ``busy`` wait: these are asked enough already.
        """
        if count < 1:
            return []
        now, claims = self._clock(), []
        with self._write() as db:
            owner = self._holders.me()
            rows = db.execute(
                "SELECT id, digest, mapping, options, version, attempts, anew FROM jobs WHERE state = 'waiting'"
                " AND not_before <= ? AND NOT EXISTS (SELECT 1 FROM targets WHERE job = jobs.id AND todo"
                f" AND registry {_AMONG}) ORDER BY urgent DESC, not_before LIMIT ?",
                (now, json.dumps(list(busy)), count),
            ).fetchall()
            lease: dict[str, object] = {"owner": owner, "lease_until": now + self.policy.lease_seconds}
            for job, digest, mapping, options, version, attempts, anew in rows:
                token = secrets.token_hex(8)
                _set(db, "id = ?", (job,), state="running", token=token, started=now, **lease)
                key = Key(Digest.parse(digest), mapping, options, version)
                claims.append(Claim(job, key, _targets(db, job, "AND todo"), token, attempts + 1, bool(anew)))
        return claims

    def heartbeat(self, claims: Iterable[Claim]) -> set[str]:
        """Renew the leases of ``claims``; return the names of the jobs that are somebody else's by now."""
        held = list(claims)
        if not held:
            return set()
        until = self._clock() + self.policy.lease_seconds
        with self._write() as db:
            return {each.job for each in held if not _set(db, _HELD, (each.job, each.token), lease_until=until)}

    def finish(self, claim: Claim, outcome: Outcome) -> str:
        """Store what came of ``claim``; return the job's state then, empty where the lease was lost before."""
        now = self._clock()
        with self._write() as db:
            row = _held(db, "attempts, report", claim.job, claim.token)
            if row is None:
                return ""
            if outcome.state == "failed":
                attempts = row[0] + 1
                state = "dead" if outcome.permanent or attempts >= self.policy.attempts else "waiting"
                then = now + self.policy.delay(attempts, self._chance())
                _end(db, claim.job, state, now, attempts=attempts, not_before=then, why=outcome.why)
                return state
            served = [(claim.job, target.registry, target.repository) for target in claim.targets]
            db.executemany(f"UPDATE targets SET todo = 0 WHERE {_TARGET}", served)
            # A repository that was wished for while this ran is still to be served.
            more = db.execute("SELECT 1 FROM targets WHERE job = ? AND todo", (claim.job,)).fetchone()
            state = "waiting" if more else outcome.state
            # A run that found the artifact in place has nothing to say of how it was made.
            report = {**(json.loads(row[1]) if outcome.report.get("existing") else {}), **outcome.report}
            _end(
                db, claim.job, state, now, urgent=0, anew=0, attempts=0, losses=0, not_before=now, finished=now,
                why=outcome.why, report=json.dumps(report),
            )  # fmt: skip
            db.execute(
                f"UPDATE jobs SET {', '.join(f'{name} = {name} + ?' for name in _FIGURES)} WHERE id = ?",
                (*(figure(outcome.report, name) for name in _FIGURES), claim.job),
            )
            if outcome.state == "skipped":
                # What is no image is none for any map.
                others = "digest = ? AND state = 'waiting'"
                _set(db, others, (str(claim.key.digest),), state="skipped", finished=now, why=outcome.why)
            for child in outcome.children:
                for target in claim.targets:
                    self._add(db, Wish(replace(claim.key, digest=child), target))
            return state

    def release(self, claims: Iterable[Claim]) -> None:
        """Give ``claims`` back untouched, as a service does that is asked to end: no attempt is counted."""
        with self._write() as db:
            for claim in claims:
                _set(db, _HELD, (claim.job, claim.token), state="waiting", **_FREE)

    def lose(self, claims: Iterable[Claim]) -> None:
        """Give ``claims`` back whose worker died: as :meth:`recover` would do later."""
        with self._write() as db:
            for claim in claims:
                self._lost(db, claim.job, claim.token)

    def recover(self) -> int:
        """Free the jobs whose holder is dead or silent for longer than a lease; return how many.

        A lost lease is no failed attempt: a service that is killed every minute still gets its work done. A job
        that kills its worker each time is dead after ``policy.losses``.
        """
        now = self._clock()
        with self._read() as db:
            self._holders.sweep()
            rows = db.execute("SELECT id, owner, token, lease_until FROM jobs WHERE state = 'running'").fetchall()
            alive = {owner: self._holders.alive(owner) for owner in {row[1] for row in rows}}
        lost = [row for row in rows if not alive[row[1]] or row[3] < now]
        if not lost:
            return 0
        with self._write() as db:
            # A holder that lives may have renewed its lease since.
            return sum(
                self._lost(db, job, token, now if alive[owner] else math.inf) for job, owner, token, _ in lost
            )

    def _lost(self, db: sqlite3.Connection, job: str, token: str, until: float = math.inf) -> bool:
        """End a lease that ``token`` still has and that is over before ``until``; return whether there was one."""
        row = _held(db, "losses, lease_until", job, token)
        if row is None or row[1] >= until:
            return False
        losses, now = row[0] + 1, self._clock()
        state = "dead" if losses >= self.policy.losses else "waiting"
        why = f"the process that worked on it ended {losses} times"
        _end(db, job, state, now, losses=losses, not_before=now, why=why)
        return True

    # -- what there is

    def stats(self) -> Stats:
        """Return counts, ages and sums."""
        sums = ", ".join(f"total({name})" for name in _FIGURES)
        with self._read() as db:
            states = dict(db.execute("SELECT state, count(*) FROM jobs GROUP BY state"))
            oldest = db.execute("SELECT min(created) FROM jobs WHERE state = 'waiting'").fetchone()[0]
            totals = db.execute(f"SELECT {sums} FROM jobs").fetchone()
        age = max(0.0, self._clock() - oldest) if oldest is not None else 0.0
        return Stats(states, age, dict(zip(_FIGURES, map(int, totals), strict=True)))

    def states(self, jobs: Sequence[str]) -> dict[str, str]:
        """Return the state of each of ``jobs`` that is known."""
        with self._read() as db:
            return dict(db.execute(f"SELECT id, state FROM jobs WHERE id {_AMONG}", (json.dumps(list(jobs)),)))

    def job(self, job: str) -> JobRow:
        """Return one job.

        Raises:
            NotFound: no such job.
        """
        rows = self._select("WHERE id = ?", (job,))
        if not rows:
            raise NotFound(f"no job {job!r}; `layerkit hook jobs` lists them")
        return rows[0]

    def jobs(self, state: str = "", limit: int = 100) -> list[JobRow]:
        """Return the jobs in ``state`` (all where empty), what happened last first."""
        where, values = ("WHERE state = ?", [state]) if state else ("", [])
        return self._select(f"{where} ORDER BY coalesce(finished, started, created) DESC LIMIT ?", [*values, limit])

    def _select(self, rest: str, values: Iterable[object]) -> list[JobRow]:
        names = ", ".join(("id", *(each.name for each in fields(JobRow)[1:-1])))
        with self._read() as db:
            return [
                JobRow(*plain, json.loads(report), _targets(db, plain[0]))  # type: ignore[call-arg]
                for *plain, report in db.execute(f"SELECT {names} FROM jobs {rest}", tuple(values)).fetchall()
            ]


_FREE = {"owner": None, "token": None, "lease_until": None}
_HELD = "id = ? AND token = ? AND state = 'running'"
_TARGET = "job = ? AND registry = ? AND repository = ?"
_AMONG = "IN (SELECT value FROM json_each(?))"


def _held(db: sqlite3.Connection, names: str, job: str, token: str) -> Any:
    return db.execute(f"SELECT {names} FROM jobs WHERE {_HELD}", (job, token)).fetchone()


def _set(db: sqlite3.Connection, which: str, values: Iterable[object], **columns: object) -> int:
    """Write columns of the jobs that ``which``, with ``values``, finds; return how many."""
    names = ", ".join(f"{name} = ?" for name in columns)
    return db.execute(f"UPDATE jobs SET {names} WHERE {which}", (*columns.values(), *values)).rowcount


def _end(db: sqlite3.Connection, job: str, state: str, now: float, **columns: object) -> None:
    """Write what came of a job and free it; ``finished`` is now where it is dead, and else as given."""
    columns.setdefault("finished", now if state == "dead" else None)
    _set(db, "id = ?", (job,), state=state, **columns, **_FREE)


def _from_now(now: float) -> dict[str, object]:
    """Return the columns of a job that is as if wished for now for the first time."""
    return {"attempts": 0, "losses": 0, "not_before": now, "created": now, "finished": None}


def _targets(db: sqlite3.Connection, job: str, which: str = "") -> tuple[Target, ...]:
    query = f"SELECT registry, repository, tag FROM targets WHERE job = ? {which} ORDER BY registry, repository"
    return tuple(Target(*each) for each in db.execute(query, (job,)))


def _put_target(db: sqlite3.Connection, job: str, target: Target) -> None:
    db.execute(
        "INSERT INTO targets VALUES (?, ?, ?, ?, 1) ON CONFLICT (job, registry, repository) DO UPDATE"
        " SET todo = 1, tag = CASE excluded.tag WHEN '' THEN tag ELSE excluded.tag END",
        (job, target.registry, target.repository, target.tag),
    )


@contextlib.contextmanager
def _on_disk(folder: Path) -> Iterator[None]:
    """Turn what a disk refuses while the block runs into an error that says which."""
    try:
        yield
    except (sqlite3.DatabaseError, OSError) as error:
        raise StoreError(
            f"{folder}: the queue: {error}; it needs a local disk with room, not a network share"
        ) from error


class Holders:
    """Who holds leases: a file for each process, locked for as long as it lives, whatever ends it.

    The caller keeps threads apart.
    """

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
            fd = open_lock(fresh)
            try_lock(fd)
            fresh.rename(self._folder / self._name)
            self._fd = fd
        return self._name

    def alive(self, name: str) -> bool:
        """Return whether the holder called ``name`` lives; what a dead one left is cleared away."""
        if name == self._name and self._fd >= 0:
            return True
        path = self._folder / name
        try:
            with opened(path, os.O_RDWR | os.O_NOFOLLOW) as fd:
                if not try_lock(fd):
                    return True
            path.unlink()
        except FileNotFoundError:
            pass
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
