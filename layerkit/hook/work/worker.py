"""Works the queue off: claims jobs, lets an executor do them, keeps their leases, stores what came of them.

One thread does all of that; the work itself is the executor's. A worker process that dies takes its pool with it:
the jobs it had are given back with one loss counted, and a new pool is made.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from dataclasses import replace
from functools import partial

from layerkit.hook.config import Config
from layerkit.hook.queue import Claim, Outcome, Queue
from layerkit.hook.telemetry import Metrics, span
from layerkit.hook.work.executors import open_executor
from layerkit.hook.work.tasks import Task, execute, outcome_of, task_of
from layerkit.model.errors import LayerkitError
from layerkit.usecases.attach import signer_of

_log = logging.getLogger("layerkit.hook.worker")
_POLL_SECONDS = 1.0
_PRUNE_SECONDS = 3600.0

Execute = Callable[[Task], Outcome]


def make_worker(config: Config, queue: Queue, metrics: Metrics) -> QueueWorker:
    """Return a worker that does the jobs of ``queue`` with the configured engine.

    Raises:
        UsageError: the key for statements cannot be used.
    """
    if config.sign_key is not None:
        signer_of(config.sign_key)  # a wrong key is found out now, and not by every job
    make = partial(open_executor, config.engine, config.workers, tls=config.engine_tls)
    return QueueWorker(config, queue, make, execute, metrics)


class QueueWorker:
    """Works one queue off until it is stopped."""

    def __init__(
        self, config: Config, queue: Queue, executor: Callable[[], Executor], execute: Execute, metrics: Metrics
    ) -> None:
        """Nothing is started yet.

        ``executor`` makes a new one, at the start and when one has broken; where that uses processes, ``execute``
        must be a function of a module.
        """
        self._config, self._queue, self._make, self._execute = config, queue, executor, execute
        self._metrics = metrics
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="hook-worker", daemon=True)
        self._running: dict[Future[Outcome], tuple[Claim, float]] = {}
        self._executor: Executor | None = None

    def start(self) -> None:
        """Begin to claim jobs."""
        self._thread.start()

    def wake(self) -> None:
        """Look for jobs now."""
        self._wake.set()

    @property
    def healthy(self) -> bool:
        """Return whether the queue is still worked off."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Claim no more, wait for what runs up to ``drain_seconds``, give the rest back untouched."""
        self._stopping.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.run_until(lambda: False)
            except Exception:
                # A fault of ours with one job must not end the service; its lease ends by itself.
                _log.exception("the worker failed; it begins again")
                self._stopping.wait(_POLL_SECONDS)

    def run_until(self, finished: Callable[[], bool]) -> None:
        """Work in this thread until ``finished`` says so, or somebody asks for a stop; then end as :meth:`stop`."""
        last_beat = last_prune = 0.0
        try:
            while not self._stopping.is_set() and not finished():
                now = time.monotonic()
                try:
                    if now - last_beat >= min(5.0, self._config.policy.lease_seconds / 4):
                        self._beat()
                        last_beat = now
                    if now - last_prune >= _PRUNE_SECONDS:
                        self._queue.prune(self._config.keep_days * 86400)
                        last_prune = now
                    claimed = self._fill()
                    self._collect(_POLL_SECONDS if not claimed else 0.0)
                except LayerkitError as error:
                    # A full or failing disk may recover; the jobs are in no danger meanwhile.
                    _log.error("the queue cannot be used", extra={"error": str(error)})
                    self._stopping.wait(_POLL_SECONDS)
        finally:
            self._drain()

    def _beat(self) -> None:
        """Renew the leases of what runs, and take over what others left."""
        lost = self._queue.heartbeat(claim for claim, _ in self._running.values())
        for future, (claim, _) in list(self._running.items()):
            if claim.job in lost:
                _log.warning("another worker has this job by now", extra={"job": claim.job})
                future.cancel()
        if freed := self._queue.recover():
            _log.warning("took over jobs whose worker had ended", extra={"count": freed})

    def _fill(self) -> int:
        """Claim as many jobs as there is room for, and hand them to the executor."""
        room = self._config.workers - len(self._running)
        if room <= 0:
            return 0
        asked = Counter(name for claim, _ in self._running.values() for name in {t.registry for t in claim.targets})
        left = {name: each.concurrency - asked[name] for name, each in self._config.registries.items()}
        full = [name for name, places in left.items() if places <= 0]
        # One at a time where more could be too many for a registry.
        claims = self._queue.claim(room if min(left.values()) >= room else 1, full)
        for at, claim in enumerate(claims):
            try:
                task = task_of(self._config, claim.key, claim.targets, anew=claim.anew)
            except LayerkitError as error:
                self._finish(claim, outcome_of(error), time.monotonic())
                continue
            try:
                if self._executor is None:
                    self._executor = self._make()
                future = self._executor.submit(self._execute, task)
            except (BrokenExecutor, RuntimeError) as error:
                self._broken(error)
                self._queue.release(claims[at:])
                break
            self._running[future] = (claim, time.monotonic())
            future.add_done_callback(lambda _: self._wake.set())
        return len(claims)

    def _collect(self, seconds: float) -> None:
        """Wait up to ``seconds`` for something to do, then store what came of finished jobs."""
        if not any(future.done() for future in self._running):
            self._wake.wait(seconds)
        self._wake.clear()
        for future in [each for each in self._running if each.done()]:
            claim, start = self._running.pop(future)
            if future.cancelled():
                continue
            error = future.exception()
            if isinstance(error, BrokenExecutor):
                # Its process, or another one of the pool, died: nobody knows whose fault that was.
                self._broken(error)
                self._queue.lose([claim])
                self._metrics.job("lost", time.monotonic() - start, {})
            elif error is not None:
                self._finish(claim, outcome_of(error), start)
            else:
                self._finish(claim, future.result(), start)

    def _finish(self, claim: Claim, outcome: Outcome, start: float) -> None:
        outcome = replace(outcome, why=outcome.why[:2000])
        seconds = time.monotonic() - start
        with span("hook.job", {"job": claim.job, "digest": str(claim.key.digest), "result": outcome.state}):
            state = self._queue.finish(claim, outcome)
        result = {"": "lost", "waiting": "retry" if outcome.state == "failed" else outcome.state}.get(state, state)
        self._metrics.job(result, seconds, outcome.report)
        fields: dict[str, object] = {
            "job": claim.job, "digest": str(claim.key.digest), "result": result, "attempt": claim.attempt,
            "seconds": round(seconds, 3), "why": outcome.why, "repositories": [t.repository for t in claim.targets],
            **{f"job_{k}": v for k, v in outcome.report.items() if isinstance(v, (int, float, str))},
        }  # fmt: skip
        _log.log(logging.WARNING if result in ("retry", "dead") else logging.INFO, "job", extra=fields)

    def _broken(self, error: BaseException) -> None:
        if self._executor is not None:
            _log.error("the workers broke; making new ones", extra={"error": str(error)})
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None

    def _drain(self) -> None:
        """End: running jobs get their time, the others go back as if never claimed."""
        deadline = time.monotonic() + self._config.drain_seconds
        try:
            while self._running and time.monotonic() < deadline:
                self._queue.heartbeat(claim for claim, _ in self._running.values())
                self._collect(min(_POLL_SECONDS, max(0.0, deadline - time.monotonic())))
            left = [claim for claim, _ in self._running.values()]
            if left:
                _log.warning("stopped before these jobs were done; they go back", extra={"count": len(left)})
                self._queue.release(left)
        except LayerkitError as error:
            _log.error("the queue cannot be used; its leases will end by themselves", extra={"error": str(error)})
        finally:
            executor, self._executor = self._executor, None
            if executor is not None:
                executor.shutdown(wait=not self._running, cancel_futures=True)
            self._running.clear()
