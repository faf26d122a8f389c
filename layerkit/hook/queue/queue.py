"""The queue: an SQLite database in WAL mode that several threads and processes of one machine use at once.

Whatever :meth:`Queue.add` returned for is on disk: a kill, or a loss of power, does not lose it. A job is worked on
under a lease with a token; a lease ends when nobody renews it, or at once when its holder's process is seen to be
dead, as the kernel frees the lock that each holder has on a file of its own. An end that is told under an old token
changes nothing.
"""

from __future__ import annotations

import json
import math
import random
import secrets
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from layerkit.hook.queue.database import FIGURES, Database, on_disk
from layerkit.hook.queue.holders import Holders
from layerkit.hook.queue.jobs import ENDS, Claim, Key, Outcome, Policy, Target, Wish, after_wish
from layerkit.hook.queue.rows import Added, JobRow, Stats
from layerkit.model.digest import Digest
from layerkit.model.errors import NotFound


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
        """Open the queue in ``folder``, made if it is not there.

        Args:
            folder: of the database; on a local disk, as SQLite's WAL needs.
            policy: of retries and leases.
            clock: seconds since 1970.
            chance: from 0 to 1, for the jitter.

        Raises:
            StoreError: a queue of a newer version, or a disk that refuses.
        """
        self.policy = policy or Policy()
        self._clock, self._chance = clock, chance
        with on_disk(folder):
            self._holders = Holders(folder / "owners")
        try:
            self._data = Database(folder)
        except BaseException:
            self._holders.close()
            raise

    def close(self) -> None:
        """Close the database, and end the leases of this process: another takes its jobs over at once."""
        self._data.close()
        self._holders.close()

    # -- what is wanted

    def add(self, wishes: Sequence[Wish]) -> list[Added]:
        """Store ``wishes`` in one transaction; what is known already is not stored twice.

        Returns:
            For each wish, in order, what became of it. All of it is on disk.
        """
        with self._data.write() as db:
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
        known = db.execute(
            "SELECT 1 FROM targets WHERE job = ? AND registry = ? AND repository = ?",
            (job, target.registry, target.repository),
        ).fetchone()
        before, urgent, finished = row
        state = after_wish(
            before, again=wish.again, new_target=known is None, age=now - (finished or now),
            recheck_seconds=self.policy.recheck_seconds,
        )  # fmt: skip
        if known is None or (state == "waiting" and before in ENDS):
            _put_target(db, job, target)
        if state != before:
            db.execute(
                "UPDATE jobs SET state = ?, anew = ?, attempts = 0, losses = 0, not_before = ?, created = ?,"
                " finished = NULL, why = '' WHERE id = ?",
                (state, wish.again, now, now, job),
            )
        if wish.urgent and not urgent and state == "waiting":
            db.execute("UPDATE jobs SET urgent = 1, not_before = min(not_before, ?) WHERE id = ?", (now, job))
        return Added(job, state, False)

    def retry(self, jobs: Iterable[str] | None = None) -> int:
        """Let dead jobs run again, all or those named; return how many."""
        condition, values = "state = 'dead'", [] if jobs is None else list(jobs)
        if jobs is not None:
            condition += f" AND id IN ({','.join('?' * len(values))})"
        now = self._clock()
        with self._data.write() as db:
            return db.execute(
                "UPDATE jobs SET state = 'waiting', attempts = 0, losses = 0, not_before = ?, created = ?,"
                f" finished = NULL WHERE {condition}",
                (now, now, *values),
            ).rowcount

    def prune(self, older_seconds: float) -> int:
        """Forget what came to its end longer ago than that, the dead excepted; return how many."""
        with self._data.write() as db:
            return db.execute(
                "DELETE FROM jobs WHERE state IN ('done', 'skipped', 'gone') AND finished < ?",
                (self._clock() - older_seconds,),
            ).rowcount

    # -- work

    def claim(self, count: int, busy: Collection[str] = ()) -> list[Claim]:
        """Take up to ``count`` jobs for work: the urgent ones, then those that are due for longest.

        Args:
            count: how many at most.
            busy: registries that are asked enough already; their jobs wait.
        """
        if count < 1:
            return []
        now, claims = self._clock(), []
        with self._data.write() as db:
            owner = self._holders.me()
            marks = ",".join("?" * len(busy))
            rows = db.execute(
                "SELECT id, digest, mapping, options, version, attempts, anew FROM jobs WHERE state = 'waiting'"
                " AND not_before <= ? AND NOT EXISTS (SELECT 1 FROM targets WHERE job = jobs.id AND todo"
                f" AND registry IN ({marks})) ORDER BY urgent DESC, not_before LIMIT ?",
                (now, *busy, count),
            ).fetchall()
            for job, digest, mapping, options, version, attempts, anew in rows:
                token = secrets.token_hex(8)
                db.execute(
                    "UPDATE jobs SET state = 'running', owner = ?, token = ?, lease_until = ?, started = ?"
                    " WHERE id = ?",
                    (owner, token, now + self.policy.lease_seconds, now, job),
                )
                targets = tuple(
                    Target(*each)
                    for each in db.execute(
                        "SELECT registry, repository, tag FROM targets WHERE job = ? AND todo"
                        " ORDER BY registry, repository",
                        (job,),
                    )
                )
                key = Key(Digest.parse(digest), mapping, options, version)
                claims.append(Claim(job, key, targets, token, attempts + 1, bool(anew)))
        return claims

    def heartbeat(self, claims: Iterable[Claim]) -> set[str]:
        """Renew the leases of ``claims``; return the names of the jobs that are somebody else's by now."""
        held = list(claims)
        if not held:
            return set()
        lost = set()
        with self._data.write() as db:
            for claim in held:
                renewed = db.execute(
                    "UPDATE jobs SET lease_until = ? WHERE id = ? AND token = ? AND state = 'running'",
                    (self._clock() + self.policy.lease_seconds, claim.job, claim.token),
                )
                if not renewed.rowcount:
                    lost.add(claim.job)
        return lost

    def finish(self, claim: Claim, outcome: Outcome) -> str:
        """Store what came of ``claim``; return the job's state then, empty where the lease was lost before."""
        now = self._clock()
        with self._data.write() as db:
            row = db.execute(
                "SELECT attempts, report FROM jobs WHERE id = ? AND token = ? AND state = 'running'",
                (claim.job, claim.token),
            ).fetchone()
            if row is None:
                return ""
            if outcome.state == "failed":
                return self._failed(db, claim, outcome, row[0] + 1, now)
            for target in claim.targets:
                db.execute(
                    "UPDATE targets SET todo = 0 WHERE job = ? AND registry = ? AND repository = ?",
                    (claim.job, target.registry, target.repository),
                )
            # A repository that was wished for while this ran is still to be served.
            more = db.execute("SELECT 1 FROM targets WHERE job = ? AND todo", (claim.job,)).fetchone()
            state = "waiting" if more else outcome.state
            # A run that found the artifact in place has nothing to say of how it was made.
            report = {**(json.loads(row[1]) if outcome.report.get("existing") else {}), **outcome.report}
            figures = [_number(outcome.report.get(name)) for name in FIGURES]
            db.execute(
                "UPDATE jobs SET state = ?, urgent = 0, anew = 0, attempts = 0, losses = 0, owner = NULL,"
                " token = NULL, lease_until = NULL, not_before = ?, finished = ?, why = ?, report = ?, "
                + ", ".join(f"{name} = {name} + ?" for name in FIGURES)
                + " WHERE id = ?",
                (state, now, now, outcome.why, json.dumps(report), *figures, claim.job),
            )
            if outcome.state == "skipped":
                # What is no image is none for any map.
                db.execute(
                    "UPDATE jobs SET state = 'skipped', finished = ?, why = ?"
                    " WHERE digest = ? AND state = 'waiting'",
                    (now, outcome.why, str(claim.key.digest)),
                )
            for child in outcome.children:
                key = Key(child, claim.key.mapping, claim.key.options, claim.key.version)
                for target in claim.targets:
                    self._add(db, Wish(key, target))
            return state

    def _failed(self, db: sqlite3.Connection, claim: Claim, outcome: Outcome, attempts: int, now: float) -> str:
        state = self.policy.after_failure(attempts, permanent=outcome.permanent)
        db.execute(
            "UPDATE jobs SET state = ?, attempts = ?, not_before = ?, finished = ?, why = ?, owner = NULL,"
            " token = NULL, lease_until = NULL WHERE id = ?",
            (
                state, attempts, now + self.policy.delay(attempts, self._chance()),
                now if state == "dead" else None, outcome.why, claim.job,
            ),
        )  # fmt: skip
        return state

    def release(self, claims: Iterable[Claim]) -> None:
        """Give ``claims`` back untouched, as a service does that is asked to end: no attempt is counted."""
        with self._data.write() as db:
            for claim in claims:
                db.execute(
                    "UPDATE jobs SET state = 'waiting', owner = NULL, token = NULL, lease_until = NULL"
                    " WHERE id = ? AND token = ? AND state = 'running'",
                    (claim.job, claim.token),
                )

    def lose(self, claims: Iterable[Claim]) -> None:
        """Give ``claims`` back whose worker died: as :meth:`recover` would do later."""
        with self._data.write() as db:
            for claim in claims:
                row = db.execute(
                    "SELECT losses FROM jobs WHERE id = ? AND token = ? AND state = 'running'",
                    (claim.job, claim.token),
                ).fetchone()
                if row is not None:
                    self._lost(db, claim.job, row[0] + 1)

    def recover(self) -> int:
        """Free the jobs whose holder is dead or silent for longer than a lease; return how many.

        A lost lease is no failed attempt: a service that is killed every minute still gets its work done. A job
        that kills its worker each time is dead after ``policy.losses``.
        """
        now, freed = self._clock(), 0
        with self._data.read():
            self._holders.sweep()
        rows = self._data.rows("SELECT id, owner, token, lease_until, losses FROM jobs WHERE state = 'running'")
        with self._data.read():
            alive = {owner: self._holders.alive(str(owner)) for owner in {row[1] for row in rows}}
        lost = [row for row in rows if not alive[row[1]] or float(str(row[3])) < now]
        if not lost:
            return 0
        with self._data.write() as db:
            for job, owner, token, _, losses in lost:
                # A holder that lives may have renewed its lease since.
                still = "SELECT 1 FROM jobs WHERE id = ? AND token = ? AND state = 'running' AND lease_until < ?"
                if db.execute(still, (job, token, now if alive[owner] else math.inf)).fetchone():
                    self._lost(db, str(job), int(str(losses)) + 1)
                    freed += 1
        return freed

    def _lost(self, db: sqlite3.Connection, job: str, losses: int) -> None:
        now, state = self._clock(), self.policy.after_loss(losses)
        db.execute(
            "UPDATE jobs SET state = ?, losses = ?, not_before = ?, owner = NULL, token = NULL, lease_until = NULL,"
            " finished = ?, why = ? WHERE id = ?",
            (
                state, losses, now, now if state == "dead" else None,
                f"the process that worked on it ended {losses} times", job,
            ),
        )  # fmt: skip

    # -- what there is

    def stats(self) -> Stats:
        """Return counts, ages and sums."""
        sums = ", ".join(f"total({name})" for name in FIGURES)
        with self._data.read() as db:
            states = dict(db.execute("SELECT state, count(*) FROM jobs GROUP BY state"))
            oldest = db.execute("SELECT min(created) FROM jobs WHERE state = 'waiting'").fetchone()[0]
            totals = db.execute(f"SELECT {sums} FROM jobs").fetchone()
        age = max(0.0, self._clock() - oldest) if oldest is not None else 0.0
        return Stats(states, age, dict(zip(FIGURES, map(int, totals), strict=True)))

    def states(self, jobs: Sequence[str]) -> dict[str, str]:
        """Return the state of each of ``jobs`` that is known."""
        found: dict[str, str] = {}
        for start in range(0, len(jobs), 500):
            part = jobs[start : start + 500]
            marks = ",".join("?" * len(part))
            rows = self._data.rows(f"SELECT id, state FROM jobs WHERE id IN ({marks})", part)
            found |= {str(job): str(state) for job, state in rows}
        return found

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
        names = (
            "id, digest, mapping, options, state, attempts, losses, not_before, created, started, finished, why,"
            " report"
        )
        found = []
        with self._data.read() as db:
            for row in db.execute(f"SELECT {names} FROM jobs {rest}", tuple(values)).fetchall():
                targets = db.execute("SELECT registry, repository, tag FROM targets WHERE job = ?", (row[0],))
                *plain, report = row
                found.append(JobRow(*plain, json.loads(report), tuple(Target(*each) for each in targets)))  # type: ignore[call-arg]
        return found


def _put_target(db: sqlite3.Connection, job: str, target: Target) -> None:
    db.execute(
        "INSERT INTO targets VALUES (?, ?, ?, ?, 1) ON CONFLICT (job, registry, repository) DO UPDATE"
        " SET todo = 1, tag = CASE excluded.tag WHEN '' THEN tag ELSE excluded.tag END",
        (job, target.registry, target.repository, target.tag),
    )


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


__all__ = ["Added", "JobRow", "Queue", "Stats"]
