"""The hook's door: routes, authentication and bounds. What an event means is the business of ``events``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from layerkit.hook.config import Bounds, Config
from layerkit.hook.front import status
from layerkit.hook.front.events import BadRequest, parse, parse_job
from layerkit.hook.front.guard import Buckets, Token
from layerkit.hook.front.intake import Intake, Taken
from layerkit.hook.metrics import Metrics
from layerkit.hook.queue.jobs import STATES
from layerkit.hook.queue.queue import Queue
from layerkit.hook.tracing import span
from layerkit.model.errors import LayerkitError, NotFound, RegistryError

_log = logging.getLogger("layerkit.hook.http")
_BODY_SECONDS = 30.0
_OPEN = frozenset(("/healthz", "/readyz"))
_PAGE_ROWS = 400


class Worker(Protocol):
    """What works the queue off, in threads of its own."""

    def start(self) -> None:
        """Begin to claim jobs."""
        ...

    def stop(self) -> None:
        """Claim no more, wait for what runs as long as is configured, give the rest back."""
        ...

    def wake(self) -> None:
        """Look for jobs now."""
        ...

    @property
    def healthy(self) -> bool:
        """Return whether it still works the queue off."""
        ...


@dataclass(slots=True)
class Service:
    """The parts of a running hook."""

    config: Config
    queue: Queue
    intake: Intake
    metrics: Metrics
    token: Token
    worker: Worker | None
    draining: bool = False


def make_app(service: Service) -> ASGIApp:
    """Return the hook as an ASGI application; its lifespan starts and drains the worker."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        storing = asyncio.create_task(service.intake.run())
        if service.worker is not None:
            service.worker.start()
        try:
            yield
        finally:
            service.draining = True
            if service.worker is not None:
                await asyncio.to_thread(service.worker.stop)
            storing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await storing

    routes = _Routes(service)
    app = Starlette(routes=routes.all(), lifespan=lifespan, exception_handlers={Exception: _failed})
    return Guarded(app, service)


class Guarded:
    """ASGI middleware: counts and bounds requests, and lets nobody in without the token."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        """Guard ``app``."""
        self._app, self._service = app, service
        bounds: Bounds = service.config.bounds
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

        try:
            refused = self._refusal(scope)
            await (refused or self._app)(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._service.metrics.request(route, code)
            level = logging.DEBUG if scope["path"] in _OPEN else logging.INFO
            seconds = round(time.monotonic() - start, 4)
            fields = {"method": scope["method"], "route": route, "status": code, "seconds": seconds}
            _log.log(level, "request", extra={**fields, "client": _address(scope)})

    def _refusal(self, scope: Scope) -> Response | None:
        if scope["path"] in _OPEN:
            return None
        address = _address(scope)
        if wait := self._requests.wait(address):
            return _error(429, "too many requests", {"Retry-After": str(int(wait) + 1)})
        if self._failures.empty(address):
            return _error(429, "too many wrong tokens; wait a minute", {"Retry-After": "60"})
        shown = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(shown) != 1 or not self._service.token.matches(shown[0].decode("latin-1")):
            self._failures.wait(address)
            challenge = {"WWW-Authenticate": 'Basic realm="layerkit hook", charset="UTF-8"'}
            return _error(401, "show the hook's token as Bearer, or as the password of Basic", challenge)
        return None


class _Routes:
    def __init__(self, service: Service) -> None:
        self._service = service

    def all(self) -> list[Route]:
        return [
            Route("/", self.page, methods=["GET"]),
            # The two of Harbor's preheat driver; distribution's own documentation uses no fixed path.
            Route("/registry/notifications", self.events, methods=["POST"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/v1/events", self.events, methods=["POST"]),
            Route("/v1/events/{registry}", self.events, methods=["POST"]),
            Route("/v1/jobs", self.new_job, methods=["POST"]),
            Route("/v1/jobs", self.jobs, methods=["GET"]),
            Route("/v1/jobs/{job}", self.job, methods=["GET"]),
            Route("/v1/jobs/{job}/retry", self.retry, methods=["POST"]),
            Route("/v1/status", self.status, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/healthz", self.health, methods=["GET"]),
            Route("/readyz", self.ready, methods=["GET"]),
        ]

    async def events(self, request: Request) -> Response:
        """Take what a registry sends."""
        body = await self._body(request)
        if isinstance(body, Response):
            return body
        headers = {k: v for k, v in request.headers.items() if k.startswith("ce-")}
        try:
            parsed = parse(
                body,
                request.headers.get("content-type", ""),
                headers,
                max_events=self._service.config.bounds.events,
            )
        except BadRequest as error:
            return _error(400, str(error))
        named = request.path_params.get("registry", "")
        if named and named not in self._service.config.registries:
            return _error(404, f"no registry {named[:80]!r} is configured")
        with span("hook.events", {"count": len(parsed.events)}):
            taken = await self._take(lambda intake: intake.take(parsed.events, named))
        if isinstance(taken, Response):
            return taken
        self._service.metrics.events("none", "ignored", len(parsed.ignored))
        return _accepted(taken, parsed.ignored)

    async def new_job(self, request: Request) -> Response:
        """Take one image by name."""
        body = await self._body(request)
        if isinstance(body, Response):
            return body
        try:
            asked = parse_job(body)
        except BadRequest as error:
            return _error(400, str(error))
        registry = asked.event.host
        if registry and registry not in self._service.config.registries:
            return _error(404, f"no registry {registry[:80]!r} is configured")
        taken = await self._take(lambda intake: intake.take([asked.event], registry, again=asked.again))
        if isinstance(taken, Response):
            return taken
        if taken.ignored:  # one was asked for and is refused: unlike with events, the sender wants to know
            return _error(404 if "not in the registry" in taken.ignored[0] else 403, taken.ignored[0])
        return _accepted(taken, ())

    async def _take(self, what: Callable[[Intake], Awaitable[Taken]]) -> Taken | Response:
        try:
            taken = await what(self._service.intake)
        except RegistryError as error:
            # Nothing is stored: the sender is to come again.
            return _error(503, f"the registry does not answer: {error}", {"Retry-After": "10"})
        except LayerkitError as error:
            _log.error("cannot store jobs", extra={"error": str(error)})
            return _error(503, "the queue cannot be written", {"Retry-After": "30"})
        if self._service.worker is not None and taken.jobs:
            self._service.worker.wake()
        return taken

    async def _body(self, request: Request) -> bytes | Response:
        """Return the body, or why there is none: no JSON, too long, too slow."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # Only types that a foreign page in a browser cannot send without asking first.
        if kind != "application/json" and not kind.endswith("+json"):
            return _error(415, "want a Content-Type of application/json or …+json")
        if request.headers.get("content-encoding", "identity") != "identity":
            return _error(415, "bodies are taken as they are, without Content-Encoding")
        most, body = self._service.config.bounds.body_bytes, bytearray()
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > most:
            return _error(413, f"more than {most} bytes", {"Connection": "close"})
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        return _error(413, f"more than {most} bytes", {"Connection": "close"})
        except TimeoutError:
            return _error(408, "the body came too slowly", {"Connection": "close"})
        except ClientDisconnect:
            return _error(400, "the body broke off")
        return bytes(body)

    async def jobs(self, request: Request) -> Response:
        """List jobs: ``?state=dead&limit=100``."""
        state, limit = request.query_params.get("state", ""), request.query_params.get("limit", "100")
        if state not in ("", *STATES) or not (limit.isascii() and limit.isdigit() and 0 < int(limit) <= 1000):
            return _error(400, f"state: want one of {', '.join(STATES)}; limit: 1 to 1000")
        rows = await asyncio.to_thread(self._service.queue.jobs, state, int(limit))
        return JSONResponse({"jobs": [status.job_view(row) for row in rows]})

    async def job(self, request: Request) -> Response:
        """Show one job."""
        try:
            row = await asyncio.to_thread(self._service.queue.job, request.path_params["job"])
        except NotFound as error:
            return _error(404, str(error))
        return JSONResponse(status.job_view(row))

    async def retry(self, request: Request) -> Response:
        """Let a dead job run again."""
        body = await self._body(request)  # for its content type: a foreign page must not be able to do this
        if isinstance(body, Response):
            return body
        count = await asyncio.to_thread(self._service.queue.retry, [request.path_params["job"]])
        if count and self._service.worker is not None:
            self._service.worker.wake()
        return JSONResponse({"retried": count}, 202 if count else 409)

    async def status(self, request: Request) -> Response:
        """Return the data of the page."""
        queue = self._service.queue
        stats = await asyncio.to_thread(queue.stats)
        rows = await asyncio.to_thread(queue.jobs, "", _PAGE_ROWS)
        view = status.status_view(self._service.config, stats, rows, draining=self._service.draining)
        return JSONResponse(view, headers={"Cache-Control": "no-store"})

    async def page(self, request: Request) -> Response:
        """Return the page."""
        nonce = secrets.token_urlsafe(16)
        policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'"
        headers = {
            "Content-Security-Policy": policy + "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        return Response(status.page(nonce), media_type="text/html", headers=headers)

    async def metrics(self, request: Request) -> Response:
        """Return the metrics."""
        text = await asyncio.to_thread(self._service.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def health(self, request: Request) -> Response:
        """Say that the process lives."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Say whether events are taken and worked off."""
        service = self._service
        if service.draining:
            return _error(503, "stopping")
        if service.worker is not None and not service.worker.healthy:
            return _error(503, "the worker has ended")
        try:
            await asyncio.to_thread(service.queue.stats)
        except LayerkitError:
            return _error(503, "the queue cannot be read")
        return JSONResponse({"status": "ready"})


def _accepted(taken: Taken, ignored: tuple[str, ...]) -> Response:
    left_out = [*ignored, *taken.ignored]
    jobs = [{"id": each.job, "state": each.state, "new": each.new} for each in taken.jobs[:1000]]
    body = {"jobs": jobs, "count": len(taken.jobs), "ignored": len(left_out), "why": left_out[:10]}
    return Response(json.dumps(body), 202, media_type="application/json")


def _error(code: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, code, headers)


async def _failed(request: Request, error: Exception) -> Response:
    _log.error("request failed", exc_info=error)
    return _error(500, "the hook failed; its log says more")


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else "unknown"


__all__ = ["Guarded", "Service", "Worker", "make_app"]
