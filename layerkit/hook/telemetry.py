"""What a hook tells of itself: logs without a secret in them, figures for Prometheus, spans for OpenTelemetry."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, TextIO

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from layerkit.hook.queue import STATES, Stats, figure

_PLAIN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}
# Whatever looks like a credential goes, also where nobody told us of it.
_CREDENTIAL = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}|(?<=://)[^/@\s]+(?=@)")
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)


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


def log_as_json(level: str = "info", secrets: Iterable[str] = (), stream: TextIO | None = None) -> None:
    """Send every log of this process to ``stream`` (standard error) as one JSON object a line."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(secrets))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # These tell every request once more, URLs with signed queries among them.
    for noisy in ("httpx2", "httpcore2", "httpx", "httpcore", "uvicorn.access"):
        logging.getLogger(noisy).setLevel("WARNING")


class _QueueCollector(Collector):
    """Reads the queue when it is asked: these figures belong to all processes that use it."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        jobs = GaugeMetricFamily("layerkit_hook_queue_jobs", "Jobs by state.", labels=["state"])
        for state in STATES:
            jobs.add_metric([state], stats.states.get(state, 0))
        yield jobs
        yield GaugeMetricFamily("layerkit_hook_queue_depth", "Jobs that wait or run.", stats.depth)
        yield GaugeMetricFamily(
            "layerkit_hook_queue_oldest_seconds", "Age of the oldest job that waits.", stats.oldest_seconds
        )


class Metrics:
    """The counters of one process."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        """``stats`` is asked whenever somebody reads the metrics."""
        self.registry = CollectorRegistry()
        self.registry.register(_QueueCollector(stats))
        counter, seconds = self._counter, self._seconds
        self._requests = counter("requests", "HTTP requests by route and status.", "route", "status")
        self._events = counter("events", "Events by kind and what became of them.", "kind", "result")
        self._jobs = counter("jobs", "Attempts at jobs by result.", "result")
        self._layers = counter("layers", "Layers by whether their index was kept already.", "cache")
        self._bytes = counter("bytes", "Bytes read, written, mounted across repositories, and avoided.", "what")
        self._holds = counter("proxy_holds", "Manifests that the proxy held, by how that ended.", "result")
        self._job_seconds = seconds("job", "Time of one attempt.", "result")
        self._hold_seconds = seconds("proxy_hold", "Time a manifest was held.")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"layerkit_hook_{name}", text, labels, registry=self.registry)

    def _seconds(self, name: str, text: str, *labels: str) -> Histogram:
        name = f"layerkit_hook_{name}_seconds"
        return Histogram(name, text, labels, buckets=_SECONDS, registry=self.registry)

    def request(self, route: str, status: int) -> None:
        """Count an HTTP request."""
        self._requests.labels(route, str(status)).inc()

    def events(self, kind: str, result: str, count: int = 1) -> None:
        """Count events; ``result`` is ``new``, ``known`` or ``ignored``."""
        if count:
            self._events.labels(kind, result).inc(count)

    def job(self, result: str, seconds: float, report: Mapping[str, object]) -> None:
        """Count an attempt: ``done``, ``skipped``, ``gone``, ``retry``, ``dead`` or ``lost``."""
        self._jobs.labels(result).inc()
        self._job_seconds.labels(result).observe(seconds)
        for what in ("read", "written", "mounted", "avoided"):
            self._bytes.labels(what).inc(figure(report, f"bytes_{what}"))
        self._layers.labels("hit").inc(figure(report, "layers_kept"))
        self._layers.labels("miss").inc(figure(report, "layers_read"))

    def hold(self, result: str, seconds: float) -> None:
        """Count a manifest that the proxy held: ``ready``, ``known``, ``timeout``, ``failed`` or ``off``."""
        self._holds.labels(result).inc()
        self._hold_seconds.observe(seconds)

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)


@cache
def _tracer() -> Any:
    try:
        from opentelemetry import trace
    except ImportError:
        return None
    return trace.get_tracer("layerkit.hook")


@contextlib.contextmanager
def span(name: str, attributes: Mapping[str, str | int]) -> Iterator[None]:
    """Run the block in an OpenTelemetry span, where its API is installed; the operator's SDK says where it goes."""
    tracer = _tracer()
    if tracer is None:
        yield
        return
    with tracer.start_as_current_span(name, attributes=dict(attributes)):
        yield
