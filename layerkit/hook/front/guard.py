"""Who may come in, and how often: the token, and a bound on requests of each address."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.types import Scope

_MAX_ADDRESSES = 10_000
_MAX_HEADER_CHARS = 4096


class Token:
    """The token that every client must show."""

    def __init__(self, token: str) -> None:
        """Keep a digest of ``token``, so that neither its value nor its length can be told from the time taken."""
        self._digest = hashlib.sha256(token.encode()).digest()

    def matches(self, authorization: str | None) -> bool:
        """Return whether the header shows the token: as ``Bearer TOKEN``, or as the password of ``Basic``.

        Basic is for senders that know nothing else (zot, Harbor's preheat) and for browsers.
        """
        scheme, _, rest = (authorization or "")[:_MAX_HEADER_CHARS].partition(" ")
        given = b""
        if scheme.lower() == "bearer":
            given = rest.strip().encode()
        elif scheme.lower() == "basic":
            with contextlib.suppress(binascii.Error, ValueError):
                given = base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
        # Compared in any case: a missing header takes as long as a wrong one.
        return hmac.compare_digest(hashlib.sha256(given).digest(), self._digest)

    def shown_in(self, scope: Scope) -> bool:
        """Return whether a request shows the token, once."""
        shown = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(shown) == 1 and self.matches(shown[0].decode("latin-1"))


class Buckets:
    """A token bucket for each address: ``burst`` at once, ``rate`` a second over time; bounded in memory."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with full buckets."""
        self._rate, self._burst, self._clock = rate, float(burst), clock
        self._level: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, address: str) -> float:
        """Take one from the bucket of ``address``; return 0, or the seconds until there is one if it is empty."""
        level = self._now(address)
        if level < 1.0:
            return (1.0 - level) / self._rate
        self._level[address] = (level - 1.0, self._clock())
        self._level.move_to_end(address)
        if len(self._level) > _MAX_ADDRESSES:
            self._level.popitem(last=False)
        return 0.0

    def empty(self, address: str) -> bool:
        """Return whether the bucket of ``address`` is empty, without taking from it."""
        return self._now(address) < 1.0

    def _now(self, address: str) -> float:
        level, then = self._level.get(address, (self._burst, 0.0))
        return min(self._burst, level + (self._clock() - then) * self._rate)
