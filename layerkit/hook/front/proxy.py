"""A pull-through front for one registry: it holds a manifest for a moment while its first remap is made.

Everything passes through as it came: methods GET and HEAD, repeated headers, ranges, credentials and challenges,
bodies as they stream. The one thing that is done is a wait, with a bound, before a manifest is handed on; whatever
happens in that wait, the manifest is handed on. Who may pull is decided by the registry alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator, Sequence

import httpx2
from starlette.responses import JSONResponse, Response
from starlette.routing import Router
from starlette.types import Receive, Scope, Send

from layerkit.formats.oci import documents as oci
from layerkit.formats.oci.images import no_image
from layerkit.hook.config import Registry
from layerkit.hook.front.http import answer_error, figures
from layerkit.hook.front.intake import Service
from layerkit.hook.queue import ENDS, Queue, Target, Wish
from layerkit.hook.work.access import upstream
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import LayerkitError
from layerkit.model.limits import DEFAULT

_log = logging.getLogger("layerkit.hook.proxy")

# RFC 9110 section 7.6.1: these belong to one connection.
_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
     b"trailer", b"transfer-encoding", b"upgrade")
)  # fmt: skip
_MANIFEST_PATH = re.compile(r"/v2/(?P<repository>.+)/manifests/(?P<reference>[^/]+)")
_MANIFEST_BYTES = 8 << 20
_MAX_HOLDS = 512
_POLL_SECONDS = 0.05


class Proxy(Router):
    """The front, as an ASGI application; nothing of it is specific to a server."""

    def __init__(self, service: Service, registry: Registry) -> None:
        """Stand before ``registry``.

        Raises:
            RegistryError: it does not answer, so that its scheme is not known.
        """
        self._service, self._registry = service, registry
        self._waiter = Waiter(service.queue)
        self._base, context = upstream(registry)
        self._client = httpx2.AsyncClient(
            verify=context, follow_redirects=False, trust_env=False,
            timeout=httpx2.Timeout(60.0, connect=15.0, pool=None),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
        )  # fmt: skip
        self._holds = 0
        super().__init__(default=self._http, lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: object) -> AsyncIterator[None]:
        async with self._client, self._service.running(self._waiter.run()):
            yield

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (await self._own(scope) or self._pass)(scope, receive, send)

    async def _own(self, scope: Scope) -> Response | None:
        """Return the answer to what is not passed on."""
        path = scope["path"]
        if path == "/healthz":
            return JSONResponse({"status": "ok"})
        if path == "/metrics":
            if not self._service.token.shown_in(scope):
                return answer_error(401, "show the hook's token", {"WWW-Authenticate": "Bearer"})
            return await figures(self._service)
        if not (path == "/v2" or path.startswith("/v2/")) or "/../" in f"{path}/" or "/./" in f"{path}/":
            return _problem(404, "NAME_UNKNOWN", "this is a front for pulls; it serves /v2/ only")
        if scope["method"] not in ("GET", "HEAD"):
            return _problem(405, "UNSUPPORTED", "a front for pulls; push to the registry itself")
        return None

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
            away = _problem(502, "UNKNOWN", "the registry behind this front does not answer")
            return await away(scope, receive, send)
        held, begun = "", False
        try:
            body: bytes | None = None
            match = _MANIFEST_PATH.fullmatch(scope["path"])
            if match is not None and response.status_code == 200 and self._registry.serves(match["repository"]):
                body = await _small(response) if scope["method"] == "GET" else b""
                if body is not None:
                    held = await self._hold(match["repository"], match["reference"], response, body)
            begun = True
            start_of = {"status": response.status_code, "headers": passed(response.headers.raw)}
            await send({"type": "http.response.start", **start_of})
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
            await _problem(502, "UNKNOWN", "the registry behind this front broke off")(scope, receive, send)
        finally:
            await response.aclose()
            fields = {"method": scope["method"], "path": scope["path"], "status": response.status_code}
            _log.info("passed", extra={**fields, "held": held, "seconds": round(time.monotonic() - start, 4)})

    async def _hold(self, repository: str, reference: str, response: httpx2.Response, body: bytes) -> str:
        """Wait for the remaps of a manifest; return how that ended. Never raises but for a cancellation."""
        start, result = time.monotonic(), "failed"
        try:
            result = await self._wait(repository, reference, response, body)
        except Exception as error:
            _log.error("a manifest was not held", extra={"error": f"{type(error).__name__}: {error}"})
        if result != "none":
            self._service.metrics.hold(result, time.monotonic() - start)
        return result

    async def _wait(self, repository: str, reference: str, response: httpx2.Response, body: bytes) -> str:
        digest = _digest(reference, response, body)
        if digest is None or (body and _is_artifact(body)):
            return "none"
        if self._holds >= _MAX_HOLDS:
            return "off"
        config = self._service.config
        target = Target(self._registry.name, repository, "" if ":" in reference else reference)
        self._holds += 1
        try:
            async with asyncio.timeout(config.hold_seconds):
                wishes = [Wish(key, target, urgent=True) for key in config.keys(digest)]
                added = await self._service.store(wishes)
                jobs = [each.job for each in added if each.state not in ENDS]
                if not jobs:
                    return "known"
                self._service.wake()
                await self._waiter.wait(jobs)
                return "ready"
        except TimeoutError:
            return "timeout"
        finally:
            self._holds -= 1


class Waiter:
    """Waits for jobs of a queue that other processes may work off: one look for all who wait."""

    def __init__(self, queue: Queue) -> None:
        """Start it with :meth:`run` in a task."""
        self._queue = queue
        self._waiting: dict[asyncio.Future[None], set[str]] = {}
        self._some = asyncio.Event()

    async def run(self) -> None:
        """Look again and again while somebody waits."""
        while True:
            await self._some.wait()
            if not self._waiting:
                self._some.clear()
                continue
            try:
                states = await asyncio.to_thread(self._queue.states, [*set().union(*self._waiting.values())])
            except LayerkitError as error:
                _log.error("cannot look at the queue", extra={"error": str(error)})
                states = {}
            for future, jobs in self._waiting.items():
                jobs -= {job for job in jobs if states.get(job) in ENDS}
                if not jobs and not future.done():
                    future.set_result(None)
            await asyncio.sleep(_POLL_SECONDS)

    async def wait(self, jobs: Sequence[str]) -> None:
        """Return when each of ``jobs`` is at its end."""
        future = asyncio.get_running_loop().create_future()
        self._waiting[future] = set(jobs)
        self._some.set()
        try:
            await future
        finally:
            del self._waiting[future]


def passed(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers that are handed on, in their order, repeated ones repeated."""
    tokens = [token for name, value in headers if name.lower() == b"connection" for token in value.split(b",")]
    named = {token.strip().lower() for token in tokens}
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
        entry = Descriptor.of(oci.guess_media_type(body, "a manifest"), body)
        return entry.media_type not in oci.INDEX_TYPES and bool(no_image(body, entry, DEFAULT))
    except LayerkitError:
        return True


def _problem(status: int, code: str, message: str) -> Response:
    return JSONResponse({"errors": [{"code": code, "message": message}]}, status)
