"""The values of the queue, and the rules by which a job goes on. Pure: time and chance come as arguments.

A job is *waiting*, *running* under a lease, or at one of four ends: *done*, *skipped* (there is nothing to remap,
as it is an artifact), *gone* (the registry does not have it any more) or *dead* (given up; a person may ask for it
again). What is told about a job a second time changes it only where that adds something.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from layerkit.formats.toml_settings import whole
from layerkit.model.digest import Digest

STATES = ("waiting", "running", "done", "skipped", "gone", "dead")
ENDS = ("done", "skipped", "gone", "dead")


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
        recheck_seconds: see :func:`after_wish`.
    """

    attempts: int = whole(10, 1, 1000)
    losses: int = whole(100, 1, 1_000_000)
    first_seconds: float = 2.0
    most_seconds: float = 900.0
    lease_seconds: float = 60.0
    recheck_seconds: float = 600.0

    def delay(self, attempt: int, chance: float) -> float:
        """Return the seconds to wait after the failed ``attempt`` (1 is the first).

        Args:
            attempt: counted from 1.
            chance: from 0 to 1; jobs that failed together must not come back together, so the wait is between
                half and all of what the doubling says.
        """
        whole = min(self.most_seconds, self.first_seconds * 2.0 ** min(attempt - 1, 62))
        return whole * (0.5 + 0.5 * chance)

    def after_failure(self, attempts: int, *, permanent: bool) -> str:
        """Return the state that follows the failure that makes ``attempts`` of them."""
        return "dead" if permanent or attempts >= self.attempts else "waiting"

    def after_loss(self, losses: int) -> str:
        """Return the state that follows the lost lease that makes ``losses`` of them."""
        return "dead" if losses >= self.losses else "waiting"


def after_wish(state: str, *, again: bool, new_target: bool, age: float, recheck_seconds: float) -> str:
    """Return the state of a job in ``state`` that is wished for once more.

    A dead job stays dead until somebody asks for it ``again``. One that was done runs again for a repository it was
    not wanted in before, and once its end is older than ``recheck_seconds``: the image may have been deleted and
    pushed anew, and its artifact with it. Such a run finds what is still there and costs two requests.

    Args:
        state: the present one.
        again: whatever the end, undo it.
        new_target: the wish names a repository that the job does not know.
        age: seconds since the job came to its end.
        recheck_seconds: from which age on a done job is looked at again.
    """
    if state in ("waiting", "running"):
        return state
    if again or state == "gone":
        return "waiting"
    if state in ("done", "skipped") and (new_target or age >= recheck_seconds):
        return "waiting"
    return state


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


def options_text(options: Mapping[str, str]) -> str:
    """Return options as canonical text: the same options give the same text."""
    return json.dumps(dict(options), sort_keys=True, separators=(",", ":"))


__all__ = [
    "ENDS", "STATES", "Added", "Claim", "JobRow", "Key", "Outcome", "Policy", "Stats", "Target", "Wish",
    "after_wish", "figure", "options_text",
]  # fmt: skip
