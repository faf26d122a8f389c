"""The hook's door: routes, authentication, bounds, the status page, and the server that runs it until a signal.

What an event means is the business of ``events``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import signal
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from layerkit.hook.config import Config, read_token
from layerkit.hook.front.events import BadRequest, Event, parse, parse_job
from layerkit.hook.front.guard import Buckets, Token
from layerkit.hook.front.intake import Service, Taken
from layerkit.hook.queue import STATES, JobRow, Queue, Stats
from layerkit.hook.telemetry import Metrics, span
from layerkit.hook.work.access import resolve
from layerkit.hook.work.worker import make_worker
from layerkit.model.errors import LayerkitError, NotFound, RegistryError

_log = logging.getLogger("layerkit.hook.http")
_BODY_SECONDS = 30.0
_OPEN = frozenset(("/healthz", "/readyz"))
_PAGE = Path(__file__).with_name("status.html")
_PAGE_ROWS = 400


def make_app(service: Service) -> ASGIApp:
    """Return the hook as an ASGI application; its lifespan starts and drains the worker."""
    handlers = dict.fromkeys((_Refused, BadRequest, NotFound, Exception), _explained)
    routes = _Routes(service).all()
    app = Starlette(routes=routes, lifespan=lambda _: service.running(), exception_handlers=handlers)
    return Guarded(app, service)


class Guarded:
    """ASGI middleware: counts and bounds requests, and lets nobody in without the token."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        """Guard ``app``."""
        self._app, self._service = app, service
        bounds = service.config.bounds
        self._requests = Buckets(bounds.rate, bounds.burst)
        self._failures = Buckets(bounds.failures / 60.0, bounds.failures)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, code = time.monotonic(), 500

        async def noted(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        client = scope.get("client")
        address = str(client[0]) if client else "unknown"
        try:
            await (self._refusal(scope, address) or self._app)(scope, receive, noted)
        finally:
            route = scope["route"].path if "route" in scope else "none"
            self._service.metrics.request(route, code)
            level = logging.DEBUG if scope["path"] in _OPEN else logging.INFO
            seconds = round(time.monotonic() - start, 4)
            fields = {"method": scope["method"], "route": route, "status": code, "seconds": seconds}
            _log.log(level, "request", extra={**fields, "client": address})

    def _refusal(self, scope: Scope, address: str) -> Response | None:
        if scope["path"] in _OPEN:
            return None
        if wait := self._requests.wait(address):
            return answer_error(429, "too many requests", {"Retry-After": str(int(wait) + 1)})
        if self._failures.empty(address):
            return answer_error(429, "too many wrong tokens; wait a minute", {"Retry-After": "60"})
        if not self._service.token.shown_in(scope):
            self._failures.wait(address)
            challenge = {"WWW-Authenticate": 'Basic realm="layerkit hook", charset="UTF-8"'}
            return answer_error(401, "show the hook's token as Bearer, or as the password of Basic", challenge)
        return None


class _Routes:
    def __init__(self, service: Service) -> None:
        self._service, self._queue = service, service.queue

    def all(self) -> list[Route]:
        routes: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
            ("GET", "/", self.page),
            # The two of Harbor's preheat driver; distribution's own documentation uses no fixed path.
            ("POST", "/registry/notifications", self.events),
            ("GET", "/health", self.health),
            ("POST", "/v1/events", self.events),
            ("POST", "/v1/events/{registry}", self.events),
            ("POST", "/v1/jobs", self.new_job),
            ("GET", "/v1/jobs", self.jobs),
            ("GET", "/v1/jobs/{job}", self.job),
            ("POST", "/v1/jobs/{job}/retry", self.retry),
            ("GET", "/v1/status", self.status),
            ("GET", "/metrics", self.metrics),
            ("GET", "/healthz", self.health),
            ("GET", "/readyz", self.ready),
        ]
        return [Route(path, endpoint, methods=[method]) for method, path, endpoint in routes]

    async def events(self, request: Request) -> Response:
        body = await self._body(request)
        headers = {k: v for k, v in request.headers.items() if k.startswith("ce-")}
        most = self._service.config.bounds.events
        parsed = parse(body, request.headers.get("content-type", ""), headers, max_events=most)
        with span("hook.events", {"count": len(parsed.events)}):
            taken = await self._take(parsed.events, request.path_params.get("registry", ""))
        self._service.metrics.events("none", "ignored", len(parsed.ignored))
        return _accepted(taken, parsed.ignored)

    async def new_job(self, request: Request) -> Response:
        event, again = parse_job(await self._body(request))
        taken = await self._take([event], event.host, again=again)
        if taken.ignored:  # one was asked for and is refused: unlike with events, the sender wants to know
            raise _Refused(404 if "not in the registry" in taken.ignored[0] else 403, taken.ignored[0])
        return _accepted(taken, ())

    async def _take(self, events: Sequence[Event], registry: str, *, again: bool = False) -> Taken:
        if registry and registry not in self._service.config.registries:
            raise _Refused(404, f"no registry {registry[:80]!r} is configured")
        try:
            taken = await self._service.take(events, registry, again=again)
        except RegistryError as error:
            # Nothing is stored: the sender is to come again.
            raise _Refused(503, f"the registry does not answer: {error}", {"Retry-After": "10"}) from None
        except LayerkitError as error:
            _log.error("cannot store jobs", extra={"error": str(error)})
            raise _Refused(503, "the queue cannot be written", {"Retry-After": "30"}) from None
        if taken.jobs:
            self._service.wake()
        return taken

    async def _body(self, request: Request) -> bytes:
        """Return the body, unless it is no JSON, too long, or too slow."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # Only types that a foreign page in a browser cannot send without asking first.
        if kind != "application/json" and not kind.endswith("+json"):
            raise _Refused(415, "want a Content-Type of application/json or …+json")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise _Refused(415, "bodies are taken as they are, without Content-Encoding")
        most, body = self._service.config.bounds.body_bytes, bytearray()
        length = request.headers.get("content-length", "0")
        close = {"Connection": "close"}
        too_long = _Refused(413, f"more than {most} bytes", close)
        if length.isdigit() and int(length) > most:
            raise too_long
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        raise too_long
        except TimeoutError:
            raise _Refused(408, "the body came too slowly", close) from None
        except ClientDisconnect:
            raise _Refused(400, "the body broke off") from None
        return bytes(body)

    async def jobs(self, request: Request) -> Response:
        """List jobs: ``?state=dead&limit=100``."""
        state, limit = request.query_params.get("state", ""), request.query_params.get("limit", "100")
        if state not in ("", *STATES) or not (limit.isascii() and limit.isdigit() and 0 < int(limit) <= 1000):
            raise _Refused(400, f"state: want one of {', '.join(STATES)}; limit: 1 to 1000")
        rows = await asyncio.to_thread(self._queue.jobs, state, int(limit))
        return JSONResponse({"jobs": [row.view() for row in rows]})

    async def job(self, request: Request) -> Response:
        return JSONResponse((await asyncio.to_thread(self._queue.job, request.path_params["job"])).view())

    async def retry(self, request: Request) -> Response:
        await self._body(request)  # for its content type: a foreign page must not be able to do this
        count = await asyncio.to_thread(self._queue.retry, [request.path_params["job"]])
        if count:
            self._service.wake()
        return JSONResponse({"retried": count}, 202 if count else 409)

    async def status(self, request: Request) -> Response:
        stats = await asyncio.to_thread(self._queue.stats)
        rows = await asyncio.to_thread(self._queue.jobs, "", _PAGE_ROWS)
        view = status_view(self._service.config, stats, rows, draining=self._service.draining)
        return JSONResponse(view, headers={"Cache-Control": "no-store"})

    async def page(self, request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'"
        headers = {
            "Content-Security-Policy": policy + "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        page = _PAGE.read_bytes().replace(b"{{nonce}}", nonce.encode("ascii"))
        return Response(page, media_type="text/html", headers=headers)

    async def metrics(self, request: Request) -> Response:
        return await figures(self._service)

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        service = self._service
        if service.draining:
            raise _Refused(503, "stopping")
        if service.worker is not None and not service.worker.healthy:
            raise _Refused(503, "the worker has ended")
        try:
            await asyncio.to_thread(self._queue.stats)
        except LayerkitError:
            raise _Refused(503, "the queue cannot be read") from None
        return JSONResponse({"status": "ready"})


async def figures(service: Service) -> Response:
    """Return the answer to whoever collects metrics."""
    text = await asyncio.to_thread(service.metrics.text)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _accepted(taken: Taken, ignored: tuple[str, ...]) -> Response:
    left_out = [*ignored, *taken.ignored]
    jobs = [{"id": each.job, "state": each.state, "new": each.new} for each in taken.jobs[:1000]]
    body = {"jobs": jobs, "count": len(taken.jobs), "ignored": len(left_out), "why": left_out[:10]}
    return Response(json.dumps(body), 202, media_type="application/json")


class _Refused(Exception):
    """A request gets an answer that says why not; the arguments are those of :func:`answer_error`."""


def answer_error(code: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """Return an answer that says what is wrong."""
    return JSONResponse({"error": message}, code, headers)


async def _explained(request: Request, error: Exception) -> Response:
    match error:
        case _Refused():
            return answer_error(*error.args)
        case BadRequest():
            return answer_error(400, str(error))
        case NotFound():
            return answer_error(404, str(error))
    _log.error("request failed", exc_info=error)
    return answer_error(500, "the hook failed; its log says more")


def status_view(config: Config, stats: Stats, rows: Iterable[JobRow], *, draining: bool) -> dict[str, object]:
    """Return the whole page's data: figures, and for each image its layers and what each map costs."""
    names = {remap.mapping: remap.name for remap in config.remaps}
    images: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.state == "skipped" or row.report.get("children"):
            continue  # artifacts, and indexes whose manifests have jobs of their own
        image = images.setdefault(row.digest, {"digest": row.digest, "names": [], "layers": [], "maps": []})
        shown = (f"{each.repository}:{each.tag}" if each.tag else each.repository for each in row.targets)
        image["names"] = list(dict.fromkeys([*image["names"], *shown]))
        layers: Any = row.report.get("layers", [])
        if _read(layers) >= _read(image["layers"]) and layers:
            image["layers"] = layers  # of the map that had to read most: later ones find all of it known
        image["maps"].append(
            {
                "name": names.get(row.mapping, row.mapping),
                "job": row.job,
                "state": row.state,
                "attempts": row.attempts,
                "why": row.why,
                "seconds": (row.finished - row.started) if row.finished and row.started else None,
                **{name: row.report.get(name, 0) for name in ("meta_bytes", "bytes_read", "bytes_avoided")},
            }
        )
    return {
        **asdict(stats),
        "depth": stats.depth,
        "draining": draining,
        "maps": [remap.name for remap in config.remaps],
        "registries": [registry.name for registry in config.registries.values()],
        "images": list(images.values()),
    }


def _read(layers: list[dict[str, object]]) -> int:
    return sum(not each["kept"] for each in layers)


OnListen = Callable[[str], None]
"""Told the URL once connections are taken."""


def serve(
    config: Config, on_listen: OnListen, door: Callable[[Service], ASGIApp] = make_app, *, workers: bool = True
) -> None:
    """Serve until SIGTERM or SIGINT, then drain: running jobs get ``drain_seconds``, the rest stays stored.

    The ``door`` makes the application: the hook's own, or a proxy. Without ``workers`` other processes must work
    the queue off.

    Raises:
        UsageError: no token that can be used.
        StoreError: the queue cannot be opened.
        RegistryError: a proxy's registry does not answer, so that its scheme is not known.
    """
    token, _ = read_token(config)
    with contextlib.closing(Queue(config.state, config.policy)) as queue:
        metrics = Metrics(queue.stats)
        worker = make_worker(config, queue, metrics) if workers else None
        app = door(Service(config, queue, resolve, metrics, Token(token), worker))
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
