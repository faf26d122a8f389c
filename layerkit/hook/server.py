"""Puts the parts together and runs them: ``hook serve``, and ``hook run`` for one pass."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from layerkit.hook.config import Config, Registry, read_token
from layerkit.hook.front.guard import Token
from layerkit.hook.front.http import Service, make_app
from layerkit.hook.front.intake import Intake
from layerkit.hook.metrics import Metrics
from layerkit.hook.queue.queue import Queue
from layerkit.hook.work.access import resolve
from layerkit.hook.work.executors import open_executor
from layerkit.hook.work.tasks import execute
from layerkit.hook.work.worker import QueueWorker, access_to
from layerkit.model.digest import Digest
from layerkit.usecases.attach import signer_of

_log = logging.getLogger("layerkit.hook")


def resolve_at(registry: Registry, repository: str, tag: str) -> Digest:
    """Ask ``registry`` for the digest of a tag; see :data:`layerkit.hook.front.intake.Resolve`."""
    return resolve(access_to(registry), repository, tag)


def make_worker(config: Config, queue: Queue, metrics: Metrics) -> QueueWorker:
    """Return a worker that does the jobs of ``queue`` with the configured engine.

    Raises:
        UsageError: the key for statements cannot be used.
    """
    if config.sign_key is not None:
        signer_of(config.sign_key)  # a wrong key is found out now, and not by every job
    executor: Callable[[], Executor] = partial(open_executor, config.engine, config.workers, tls=config.engine_tls)
    return QueueWorker(config, queue, executor, execute, metrics)


def serve(config: Config, *, workers: bool = True, on_listen: Callable[[str], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then drain: running jobs get ``drain_seconds``, the rest stays stored.

    Args:
        config: of the hook.
        workers: also work the queue off; without, other processes must.
        on_listen: told the URL once connections are taken.

    Raises:
        UsageError: no token that can be used.
        StoreError: the queue cannot be opened.
    """
    token, _ = read_token(config)
    with contextlib.closing(Queue(config.state, config.policy)) as queue:
        metrics = Metrics(queue.stats)
        worker = make_worker(config, queue, metrics) if workers else None
        intake = Intake(config, queue, resolve_at, metrics)
        app = make_app(Service(config, queue, intake, metrics, Token(token), worker))
        run_app(app, config, config.host, config.port, on_listen)


def run_app(app: ASGIApp, config: Config, host: str, port: int, on_listen: Callable[[str], None] | None) -> None:
    """Run an ASGI application with the bounds and the TLS that ``config`` names."""
    tls = config.tls
    settings = uvicorn.Config(
        app, host=host, port=port, log_config=None, access_log=False, server_header=False, proxy_headers=False,
        timeout_keep_alive=75, timeout_graceful_shutdown=10, h11_max_incomplete_event_size=64 << 10,
        limit_concurrency=4096, backlog=4096, lifespan="on",
        ssl_certfile=tls.certificate if tls else None, ssl_keyfile=tls.key if tls else None,
        ssl_ca_certs=str(tls.client_ca) if tls and tls.client_ca else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if tls and tls.client_ca else ssl.CERT_NONE,
    )  # fmt: skip
    scheme = "http" if config.tls is None else "https"
    _Server(settings, scheme, on_listen).run()


class _Server(uvicorn.Server):
    """uvicorn, which ends with code 0 after SIGTERM and SIGINT alike, and says where it listens."""

    def __init__(self, config: uvicorn.Config, scheme: str, on_listen: Callable[[str], None] | None) -> None:
        super().__init__(config)
        self._scheme, self._on_listen = scheme, on_listen

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ask for an orderly end at the first signal; at the second, for a quick one."""
        loop = asyncio.get_running_loop()

        def ask() -> None:
            if self.should_exit:
                self.force_exit = True
            self.should_exit = True

        for each in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(each, ask)
        try:
            yield
        finally:
            # What comes later, while jobs are drained, must not cut that short.
            for each in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(each)
                signal.signal(each, signal.SIG_IGN)

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        await super().startup(sockets)  # type: ignore[arg-type]
        if not self.started:
            return
        for server in self.servers:
            for sock in server.sockets:
                name, port = sock.getsockname()[:2]
                url = f"{self._scheme}://{f'[{name}]' if ':' in name else name}:{port}"
                _log.info("listening", extra={"url": url})
                if self._on_listen is not None:
                    self._on_listen(url)


__all__ = ["make_worker", "resolve_at", "run_app", "serve"]
