"""A pull-through front for one registry: it holds a manifest for a moment while its first remap is made.

Everything passes through as it came: methods GET and HEAD, repeated headers, ranges, credentials and challenges,
bodies as they stream. The one thing that is done is a wait, with a bound, before a manifest is handed on; whatever
happens in that wait, the manifest is handed on. Who may pull is decided by the registry alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from contextlib import closing

import httpx2
from starlette.types import Receive, Scope, Send

from layerkit.formats.oci import documents as oci
from layerkit.hook.config import Config, Registry, read_token
from layerkit.hook.front.guard import Token
from layerkit.hook.front.intake import Intake, keys
from layerkit.hook.metrics import Metrics
from layerkit.hook.queue.jobs import ENDS, Target, Wish
from layerkit.hook.queue.queue import Queue
from layerkit.hook.server import make_worker, resolve_at, run_app
from layerkit.hook.work.access import upstream
from layerkit.hook.work.worker import QueueWorker, access_to
from layerkit.model.digest import Digest
from layerkit.model.errors import LayerkitError

_log = logging.getLogger("layerkit.hook.proxy")

Headers = list[tuple[bytes, bytes]]

# RFC 9110 section 7.6.1: these belong to one connection.
_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
     b"trailer", b"transfer-encoding", b"upgrade")
)  # fmt: skip
_MANIFEST_PATH = re.compile(r"/v2/(?P<repository>.+)/manifests/(?P<reference>[^/]+)")
_MANIFEST_BYTES = 8 << 20
_MAX_HOLDS = 512
_POLL_SECONDS = 0.05


class Proxy:
    """The front, as an ASGI application; nothing of it is specific to a server."""

    def __init__(
        self, config: Config, registry: Registry, queue: Queue, metrics: Metrics, token: Token,
        worker: QueueWorker | None,
    ) -> None:  # fmt: skip
        """Stand before ``registry``; ``worker`` works the queue off here, None leaves that to others."""
        self._config, self._registry, self._metrics, self._token = config, registry, metrics, token
        self._worker, self._waiter = worker, Waiter(queue)
        self._intake = Intake(config, queue, resolve_at, metrics)
        self._base, context = upstream(access_to(registry))
        self._client = httpx2.AsyncClient(
            verify=context, follow_redirects=False, trust_env=False,
            timeout=httpx2.Timeout(60.0, connect=15.0, pool=None),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
        )  # fmt: skip
        self._holds = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a connection."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        tasks = [asyncio.create_task(each) for each in (self._intake.run(), self._waiter.run())]
        if self._worker is not None:
            self._worker.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if self._worker is not None:
            await asyncio.to_thread(self._worker.stop)
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._client.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        if path == "/healthz":
            await _answer(send, 200, {"status": "ok"})
        elif path == "/metrics":
            await self._show_metrics(scope, send)
        elif not (path == "/v2" or path.startswith("/v2/")) or "/../" in f"{path}/" or "/./" in f"{path}/":
            await _answer(send, 404, _problem("NAME_UNKNOWN", "this is a front for pulls; it serves /v2/ only"))
        elif method not in ("GET", "HEAD"):
            await _answer(send, 405, _problem("UNSUPPORTED", "a front for pulls; push to the registry itself"))
        else:
            await self._pass(scope, receive, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.monotonic()
        query = scope["query_string"]
        url = self._base + scope["raw_path"].decode("ascii") + (f"?{query.decode('ascii')}" if query else "")
        # A request of its own, not the client's: that one would merge repeated headers and add some.
        headers = [(n, v) for n, v in passed(scope["headers"]) if n != b"host"]
        request = httpx2.Request(scope["method"], url, headers=headers)
        try:
            response = await self._client.send(request, stream=True)
        except httpx2.TransportError as error:
            _log.warning("the registry does not answer", extra={"error": type(error).__name__})
            await _answer(send, 502, _problem("UNKNOWN", "the registry behind this front does not answer"))
            return
        held, begun = "", False
        try:
            body: bytes | None = None
            match = _MANIFEST_PATH.fullmatch(scope["path"])
            if match is not None and response.status_code == 200 and self._registry.serves(match["repository"]):
                body = await _small(response) if scope["method"] == "GET" else b""
                if body is not None:
                    held = await self._hold(match["repository"], match["reference"], response, body)
            begun = True
            await send(
                {
                    "type": "http.response.start",
                    "status": response.status_code,
                    "headers": passed(response.headers.raw),
                }
            )
            if body is not None:
                await send({"type": "http.response.body", "body": body})
            else:
                async for chunk in response.aiter_raw():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except httpx2.TransportError as error:
            _log.warning("the registry broke off", extra={"error": type(error).__name__})
            if begun:
                # To break off as well is the only way to say that the answer is not whole.
                raise
            await _answer(send, 502, _problem("UNKNOWN", "the registry behind this front broke off"))
        finally:
            await response.aclose()
            fields = {
                "method": scope["method"],
                "path": scope["path"],
                "status": response.status_code,
                "held": held,
            }
            _log.info("passed", extra={**fields, "seconds": round(time.monotonic() - start, 4)})

    async def _hold(self, repository: str, reference: str, response: httpx2.Response, body: bytes) -> str:
        """Wait for the remaps of a manifest; return how that ended. Never raises but for a cancellation."""
        start, result = time.monotonic(), "failed"
        try:
            result = await self._wait(repository, reference, response, body)
        except Exception as error:
            _log.error("a manifest was not held", extra={"error": f"{type(error).__name__}: {error}"})
        if result != "none":
            self._metrics.hold(result, time.monotonic() - start)
        return result

    async def _wait(self, repository: str, reference: str, response: httpx2.Response, body: bytes) -> str:
        digest = _digest(reference, response, body)
        if digest is None or (body and _is_artifact(body)):
            return "none"
        if self._holds >= _MAX_HOLDS:
            return "off"
        tag = "" if ":" in reference else reference
        target = Target(self._registry.name, repository, tag)
        self._holds += 1
        try:
            async with asyncio.timeout(self._config.hold_seconds):
                added = await self._intake.store([Wish(k, target, urgent=True) for k in keys(self._config, digest)])
                jobs = [each.job for each in added if each.state not in ENDS]
                if not jobs:
                    return "known"
                if self._worker is not None:
                    self._worker.wake()
                await self._waiter.wait(jobs)
                return "ready"
        except TimeoutError:
            return "timeout"
        finally:
            self._holds -= 1

    async def _show_metrics(self, scope: Scope, send: Send) -> None:
        shown = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(shown) != 1 or not self._token.matches(shown[0].decode("latin-1")):
            await _answer(send, 401, {"error": "show the hook's token"}, [(b"www-authenticate", b"Bearer")])
            return
        text = await asyncio.to_thread(self._metrics.text)
        await _answer(send, 200, text, [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")])


class Waiter:
    """Waits for jobs of a queue that other processes may work off: one look for all who wait."""

    def __init__(self, queue: Queue) -> None:
        """Start it with :meth:`run` in a task."""
        self._queue = queue
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}
        self._some = asyncio.Event()

    async def run(self) -> None:
        """Look again and again while somebody waits."""
        while True:
            await self._some.wait()
            if not self._waiting:
                self._some.clear()
                continue
            try:
                states = await asyncio.to_thread(self._queue.states, list(self._waiting))
            except LayerkitError as error:
                _log.error("cannot look at the queue", extra={"error": str(error)})
                states = {}
            for job in [job for job in self._waiting if states.get(job) in ENDS]:
                for future in self._waiting.pop(job):
                    if not future.done():
                        future.set_result(None)
            await asyncio.sleep(_POLL_SECONDS)

    async def wait(self, jobs: Sequence[str]) -> None:
        """Return when each of ``jobs`` is at its end."""
        futures = []
        for job in jobs:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(job, []).append(future)
            futures.append((job, future))
        self._some.set()
        try:
            await asyncio.gather(*(future for _, future in futures))
        finally:
            for job, future in futures:
                if job in self._waiting:
                    self._waiting[job] = [each for each in self._waiting[job] if each is not future]
                    if not self._waiting[job]:
                        del self._waiting[job]


def passed(headers: Sequence[tuple[bytes, bytes]]) -> Headers:
    """Return the headers that are handed on, in their order, repeated ones repeated."""
    named = {
        token.strip().lower()
        for name, value in headers
        if name.lower() == b"connection"
        for token in value.split(b",")
    }
    return [(name.lower(), value) for name, value in headers if name.lower() not in _HOP | named]


async def _small(response: httpx2.Response) -> bytes | None:
    """Return a manifest's bytes as they came, None (nothing read) where it is too long or of no length."""
    length = response.headers.get("content-length", "")
    if not length.isdigit() or int(length) > _MANIFEST_BYTES or response.headers.get("content-encoding"):
        return None
    return b"".join([chunk async for chunk in response.aiter_raw()])


def _digest(reference: str, response: httpx2.Response, body: bytes) -> Digest | None:
    if body:
        return Digest.of(body)
    said = reference if ":" in reference else response.headers.get("docker-content-digest", "")
    try:
        return Digest.parse(said)
    except LayerkitError:
        return None


def _is_artifact(body: bytes) -> bool:
    try:
        document = json.loads(body)
    except ValueError:
        return True
    if not isinstance(document, dict) or document.get("artifactType"):
        return True
    config = document.get("config")
    kind = config.get("mediaType") if isinstance(config, dict) else None
    return "manifests" not in document and kind not in (oci.CONFIG, oci.DOCKER_CONFIG)


def _problem(code: str, message: str) -> dict[str, object]:
    return {"errors": [{"code": code, "message": message}]}


async def _answer(send: Send, status: int, body: object, headers: Headers | None = None) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    whole = [(b"content-length", str(len(data)).encode()), *(headers or [(b"content-type", b"application/json")])]
    await send({"type": "http.response.start", "status": status, "headers": whole})
    await send({"type": "http.response.body", "body": data})


def serve_proxy(
    config: Config, registry: Registry, *, workers: bool = True, on_listen: Callable[[str], None] | None = None
) -> None:
    """Serve the front for ``registry`` until SIGTERM or SIGINT.

    Raises:
        UsageError: no token that can be used.
        RegistryError: the registry does not answer, so that its scheme is not known.
    """
    token, _ = read_token(config)
    with closing(Queue(config.state, config.policy)) as queue:
        metrics = Metrics(queue.stats)
        worker = make_worker(config, queue, metrics) if workers else None
        proxy = Proxy(config, registry, queue, metrics, Token(token), worker)
        run_app(proxy, config, config.host, config.port, on_listen)


__all__ = ["Proxy", "Waiter", "passed", "serve_proxy"]
