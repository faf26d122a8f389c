"""Logs as one JSON object a line, for machines, without a secret in them."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Iterable
from typing import TextIO

_PLAIN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}
# Whatever looks like a credential goes, also where nobody told us of it.
_CREDENTIAL = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}|(?<=://)[^/@\s]+(?=@)")


class JsonFormatter(logging.Formatter):
    """Formats a record and its extra fields as one line of JSON."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        """Take out every one of ``secrets``, wherever it stands."""
        super().__init__()
        self._secrets = tuple(sorted((s for s in secrets if s), key=len, reverse=True))

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        fields: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {name: value for name, value in record.__dict__.items() if name not in _PLAIN}
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return self.redact(json.dumps(fields, default=str))

    def redact(self, text: str) -> str:
        """Return ``text`` without secrets."""
        for secret in self._secrets:
            text = text.replace(json.dumps(secret)[1:-1], "***").replace(secret, "***")
        return _CREDENTIAL.sub(lambda m: f"{m[1]} ***" if m[1] else "***", text)


def set_up(level: str = "info", secrets: Iterable[str] = (), stream: TextIO | None = None) -> None:
    """Send every log of this process to ``stream`` (standard error) as JSON."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(secrets))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # These tell every request once more, URLs with signed queries among them.
    for noisy in ("httpx2", "httpcore2", "httpx", "httpcore", "uvicorn.access"):
        logging.getLogger(noisy).setLevel("WARNING")


__all__ = ["JsonFormatter", "set_up"]
