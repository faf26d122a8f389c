"""Where work runs: threads, processes of this machine, or a dask cluster, behind ``concurrent.futures.Executor``.

What is submitted must be a function of a module with values as arguments, and idempotent: whoever submits it may
have to do so again, as a worker can die at any moment.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from functools import partial
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from layerkit.model.errors import UnsupportedHost, UsageError

if TYPE_CHECKING:
    from layerkit.hook.config import ClusterTls

_P = ParamSpec("_P")
_A = TypeVar("_A")
_T = TypeVar("_T")
_log = logging.getLogger("layerkit.executors")

_CONNECT_SECONDS = 15
_LOOK_SECONDS = 1


def open_executor(engine: str, workers: int, *, tls: ClusterTls | None = None) -> Executor:
    """Return a new executor; ``shutdown(wait=False)`` of it ends what runs at once, where it runs on this machine.

    Args:
        engine: ``processes``, ``threads``, or ``dask://HOST:PORT`` of a scheduler (``dask+tls://`` with ``tls``).
        workers: how many calls at the same time, however many workers a cluster has.
        tls: for a cluster that speaks TLS.

    Raises:
        UsageError: another engine.
        UnsupportedHost: dask is not installed, or the scheduler does not answer.
    """
    if engine == "threads":
        return ThreadPoolExecutor(workers, thread_name_prefix="layerkit")
    if engine == "processes":
        return _Processes(workers)
    scheme, _, address = engine.partition("://")
    if scheme not in ("dask", "dask+tls") or not address or (scheme == "dask+tls") != (tls is not None):
        want = "processes, threads or dask://HOST:PORT; dask+tls:// with certificates, and only with them"
        raise UsageError(f"engine {engine!r}: want {want}")
    return _Cluster(address, workers, tls)


class _Processes(ProcessPoolExecutor):
    """Processes that do not outlive their parent."""

    def __init__(self, most: int) -> None:
        # Spawned, not forked: this process has threads, and a lock that one of them holds would stay held.
        super().__init__(most, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_worker)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End; without ``wait``, what runs is ended too."""
        if not wait:
            # What they leave is whole or invisible: the store and the registry see to that. They go first: from
            # Python 3.12 on shutdown() waits for the workers of a broken pool, and ours do not heed its SIGTERM.
            for process in list((self._processes or {}).values()):
                process.kill()
        super().shutdown(wait=wait, cancel_futures=cancel_futures)


class _Cluster(ThreadPoolExecutor):
    """A dask cluster as an executor whose end is its connection's too; a thread waits for each call it gives."""

    def __init__(self, address: str, most: int, tls: ClusterTls | None) -> None:
        super().__init__(most, thread_name_prefix="layerkit-dask")
        try:
            dask: Any = importlib.import_module("distributed")
        except ImportError:
            raise UnsupportedHost("dask", "pip install 'layerkit[fleet]'") from None
        how: dict[str, object] = {"timeout": _CONNECT_SECONDS, "set_as_default": False}
        if tls is not None:
            files = {"tls_ca_file": tls.ca, "tls_client_cert": tls.certificate, "tls_client_key": tls.key}
            how["security"] = dask.Security(**{k: str(v) for k, v in files.items()}, require_encryption=True)
        try:
            self._client = dask.Client(f"{'tls' if tls else 'tcp'}://{address}", **how)
        except OSError as error:
            raise UnsupportedHost(f"a dask scheduler at {address}", f"it does not answer: {error}") from error
        # pure=False: the same task submitted again is meant to run again.
        self._inner = self._client.get_executor(pure=False, retries=2)
        self._over = False

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Run a call on one of the workers, once there is a place for it."""
        return super().submit(self._run, partial(fn, *args, **kwargs))

    def _run(self, call: Callable[[], _T]) -> _T:
        future: Future[_T] = self._inner.submit(call)
        # Not result() at once: a cluster that is gone might never say that it has let go.
        while not wait_for([future], _LOOK_SECONDS).done:
            if self._over:
                raise CancelledError
        return future.result()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End; what runs on workers is waited for, or let go of."""
        let_go = cancel_futures or not wait
        super().shutdown(wait=not let_go, cancel_futures=let_go)
        self._over = True
        self._inner.shutdown(wait=not let_go)
        self._client.close(timeout=5)


def run_once(key: str, function: Callable[[_A], _T], argument: _A) -> _T | None:
    """Run a call once for all workers of the cluster that this runs on, however many ask; return what it gave.

    Calls with the same ``key`` are the same; which of the askers' arguments is used is the scheduler's choice. A
    worker that dies meanwhile costs time only. None: this is no worker of a cluster, or it came to nothing.
    """
    # Nothing of dask is loaded in a process that is not one of its workers.
    if "distributed" not in sys.modules:
        return None
    from distributed import get_worker, worker_client

    try:
        get_worker()
    except ValueError:
        return None
    try:
        # Whoever waits gives its place back meanwhile, so the call finds one.
        with worker_client() as client:
            result: _T = client.submit(function, argument, key=key, retries=2).result()
            return result
    except Exception as error:
        _log.warning("a call for the whole cluster failed", extra={"error": f"{type(error).__name__}: {error}"})
        return None


def _begin_worker() -> None:
    """Run at the start of a worker process: it ends when its parent does, however that ends."""
    # The parent decides when to stop; a terminal and systemd signal the whole group.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True, name="parent-watch").start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
