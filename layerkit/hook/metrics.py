"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from layerkit.hook.queue.jobs import STATES
from layerkit.hook.queue.queue import Stats

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)
_BYTES = ("read", "written", "mounted", "avoided")


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
        counter = self._counter
        self._requests = counter("requests", "HTTP requests by route and status.", "route", "status")
        self._events = counter("events", "Events by kind and what became of them.", "kind", "result")
        self._jobs = counter("jobs", "Attempts at jobs by result.", "result")
        self._layers = counter("layers", "Layers by whether their index was kept already.", "cache")
        self._bytes = counter("bytes", "Bytes read, written, mounted across repositories, and avoided.", "what")
        self._holds = counter("proxy_holds", "Manifests that the proxy held, by how that ended.", "result")
        self._seconds = Histogram(
            "layerkit_hook_job_seconds",
            "Time of one attempt.",
            ["result"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._held = Histogram(
            "layerkit_hook_proxy_hold_seconds",
            "Time a manifest was held.",
            buckets=_SECONDS,
            registry=self.registry,
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"layerkit_hook_{name}", text, labels, registry=self.registry)

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
        self._seconds.labels(result).observe(seconds)
        for what in _BYTES:
            self._bytes.labels(what).inc(_number(report.get(f"bytes_{what}")))
        self._layers.labels("hit").inc(_number(report.get("layers_kept")))
        self._layers.labels("miss").inc(_number(report.get("layers_read")))

    def hold(self, result: str, seconds: float) -> None:
        """Count a manifest that the proxy held: ``ready``, ``known``, ``timeout``, ``failed`` or ``off``."""
        self._holds.labels(result).inc()
        self._held.observe(seconds)

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)


def _number(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


__all__ = ["Metrics"]
