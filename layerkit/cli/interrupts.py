"""SIGINT and SIGTERM: one error at the first of them, which leaves by the same road as every other."""

from __future__ import annotations

import signal
import sys
import time
from typing import TYPE_CHECKING

from layerkit.model.errors import Cancelled

if TYPE_CHECKING:
    from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_CLEARING_SECONDS = 10.0
"""For how long further signals count as impatience. An error in the middle of clearing up would leave the rest."""

_AGAIN_SECONDS = 0.01

_WHOLE = {
    ("threading", "start"), ("concurrent.futures.thread", "submit"), ("importlib._bootstrap", "_find_and_load"),
}  # fmt: skip
"""Functions, by module and name, that must not be left halfway."""


class Interrupts:
    """Turns signals into :class:`Cancelled` in the main thread."""

    def __init__(self) -> None:
        """Nothing is changed before :meth:`install`."""
        self._until = 0.0

    def install(self) -> None:
        """Take the signals over."""
        for each in (*_SIGNALS, signal.SIGALRM):
            signal.signal(each, self._stop)
        sys.unraisablehook = self._lost

    def ignore(self) -> None:
        """Let nothing more come: there is nothing left that could be stopped but the exit."""
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        # Threads that the exit cuts off complain where nobody can do anything about it.
        sys.unraisablehook = lambda _: None

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now < self._until:
            return
        if _is_halfway(frame):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
            return
        self._until = now + _CLEARING_SECONDS
        raise Cancelled("interrupted; nothing half-made is left")

    def _lost(self, what: sys.UnraisableHookArgs) -> None:
        """Raise again, in a moment, what came while Python ran something whose errors go nowhere (``__del__``)."""
        if isinstance(what.exc_value, Cancelled):
            self._until = 0.0
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        else:
            sys.__unraisablehook__(what)


def _is_halfway(frame: FrameType | None) -> bool:
    """Return whether Python's own code is about to start a thread, or imports a module.

    An error there leaves a running thread that its pool does not know, and so nobody waits for: it would go on
    writing into a folder that is being removed. Imports of C modules make another error of it.
    """
    while frame is not None:
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) in _WHOLE:
            return True
        frame = frame.f_back
    return False


INTERRUPTS = Interrupts()
