"""Puts the parts of a service together and runs them until a signal: ``hook serve`` and ``hook proxy``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import ssl
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from layerkit.hook.config import Config, read_token
from layerkit.hook.front.guard import Token
from layerkit.hook.front.http import make_app
from layerkit.hook.front.intake import Intake, Service
from layerkit.hook.queue.queue import Queue
from layerkit.hook.telemetry import Metrics
from layerkit.hook.work.access import resolve
from layerkit.hook.work.worker import make_worker

_log = logging.getLogger("layerkit.hook")

OnListen = Callable[[str], None]
"""Told the URL once connections are taken."""


def serve(
    config: Config, on_listen: OnListen, door: Callable[[Service], ASGIApp] = make_app, *, workers: bool = True
) -> None:
    """Serve until SIGTERM or SIGINT, then drain: running jobs get ``drain_seconds``, the rest stays stored.

    Args:
        config: of the hook.
        on_listen: see :data:`OnListen`.
        door: makes the application: the hook's own, or a proxy.
        workers: also work the queue off; without, other processes must.

    Raises:
        UsageError: no token that can be used.
        StoreError: the queue cannot be opened.
        RegistryError: a proxy's registry does not answer, so that its scheme is not known.
    """
    token, _ = read_token(config)
    with contextlib.closing(Queue(config.state, config.policy)) as queue:
        metrics = Metrics(queue.stats)
        worker = make_worker(config, queue, metrics) if workers else None
        intake = Intake(config, queue, resolve, metrics)
        app = door(Service(config, queue, intake, metrics, Token(token), worker))
        tls = config.tls
        settings = uvicorn.Config(
            app, host=config.host, port=config.port, log_config=None, access_log=False, server_header=False,
            proxy_headers=False, timeout_keep_alive=75, timeout_graceful_shutdown=10,
            h11_max_incomplete_event_size=64 << 10, limit_concurrency=4096, backlog=4096, lifespan="on",
            ssl_certfile=tls.certificate if tls else None, ssl_keyfile=tls.key if tls else None,
            ssl_ca_certs=str(tls.client_ca) if tls and tls.client_ca else None,
            ssl_cert_reqs=ssl.CERT_REQUIRED if tls and tls.client_ca else ssl.CERT_NONE,
        )  # fmt: skip
        _Server(settings, "http" if tls is None else "https", on_listen).run()


class _Server(uvicorn.Server):
    """uvicorn, which ends with code 0 after SIGTERM and SIGINT alike, and says where it listens."""

    def __init__(self, config: uvicorn.Config, scheme: str, on_listen: OnListen) -> None:
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
                self._on_listen(url)


__all__ = ["OnListen", "serve"]
