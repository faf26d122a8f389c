"""How much a piece of work does, counted and not timed: a busy machine does not make it more."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the lines of Python that the block runs, and threads that it starts; the count is what it gives.

    What is done for a million rows at once is a few lines; what is done row by row is a million.
    """
    count = [0]

    def note(frame: FrameType, event: str, argument: object) -> Any:
        count[0] += event == "line"
        return note

    before = sys.gettrace()
    threading.settrace(note)
    sys.settrace(note)
    try:
        yield count
    finally:
        sys.settrace(before)
        threading.settrace(before)


def steps(work: Callable[[], object]) -> int:
    """Return how many lines ``work`` runs."""
    with counted() as count:
        work()
    return count[0]


def grows(work: Callable[[int], Callable[[], object]], size: int) -> float:
    """Return how many times the lines of ``work(size)`` those of ``work(2 * size)`` are: 2 if it is linear."""
    return steps(work(2 * size)) / steps(work(size))
