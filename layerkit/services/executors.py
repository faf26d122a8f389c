"""Where work runs: threads, processes of this machine, or a dask cluster, behind ``concurrent.futures.Executor``.

What is submitted must be a function of a module with values as arguments, and idempotent: whoever submits it may
have to do so again, as a worker can die at any moment.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path

from layerkit.errors import UnsupportedHost, UsageError

ENGINES = "processes, threads or dask://HOST:PORT"


def open_executor(engine: str, workers: int, *, tls: tuple[Path, Path, Path] | None = None) -> Executor:
    """Return a new executor.

    Args:
        engine: ``processes``, ``threads``, or ``dask://HOST:PORT`` of a scheduler (``dask+tls://`` with ``tls``).
        workers: how many at the same time; a cluster has its own number.
        tls: files of CA, certificate and key for a cluster that speaks TLS.

    Raises:
        UsageError: another engine.
        UnsupportedHost: dask is not installed, or the scheduler does not answer.
    """
    if engine == "threads":
        return ThreadPoolExecutor(workers, thread_name_prefix="layerkit")
    if engine == "processes":
        # Spawned, not forked: this process has threads, and a lock that one of them holds would stay held.
        return ProcessPoolExecutor(
            workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_worker
        )
    scheme, _, address = engine.partition("://")
    if scheme not in ("dask", "dask+tls") or not address or (scheme == "dask+tls") != (tls is not None):
        raise UsageError(f"engine {engine!r}: want {ENGINES}, and certificates with dask+tls:// only")
    try:
        from distributed import Client
        from distributed.security import Security
    except ImportError:
        raise UnsupportedHost("dask", "pip install 'layerkit[fleet]'") from None
    security = None
    if tls is not None:
        ca, cert, key = map(str, tls)
        security = Security(tls_ca_file=ca, tls_client_cert=cert, tls_client_key=key, require_encryption=True)
    try:
        client = Client(
            f"{'tls' if tls else 'tcp'}://{address}", security=security, timeout="15s", set_as_default=False
        )
    except OSError as error:
        raise UnsupportedHost(f"a dask scheduler at {address}", f"it does not answer: {error}") from error
    executor: Executor = client.get_executor(pure=False, retries=2)
    return executor


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


__all__ = ["ENGINES", "open_executor"]
