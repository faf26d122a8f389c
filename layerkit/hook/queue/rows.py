"""What the queue tells about its jobs, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from layerkit.hook.queue.jobs import Target


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


__all__ = ["Added", "JobRow", "Stats"]
