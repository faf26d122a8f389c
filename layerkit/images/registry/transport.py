"""HTTP to registries: pooled connections, waits and repeats, redirects that carry nothing they must not.

One request is tried again after faults that may pass (no connection, a cut one, 429 and 5xx), a bounded
number of times with waits that double, a random part of each taken; a ``Retry-After`` is obeyed up to a bound.
"""

from __future__ import annotations

import email.utils
import functools
import importlib.metadata
import logging
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import httpx2

from layerkit.formats.strict_json import JsonObject, load_object
from layerkit.images.registry import credentials
from layerkit.images.registry.auth import Authenticator, TokenRequest, parse_challenges
from layerkit.images.registry.hosts import Endpoint, base_url
from layerkit.images.registry.names import api_host
from layerkit.images.registry.options import RegistryOptions
from layerkit.images.registry.redirects import REDIRECTS, next_url, origin
from layerkit.images.registry.words import Words, cause_of, read_body
from layerkit.model.errors import InvalidImage, RegistryError

_TOKEN_BYTES = 1 << 20
_MAX_REDIRECTS = 6

_log = logging.getLogger("layerkit.registry")

Body = bytes | Callable[[], Iterable[bytes | memoryview]] | None
"""What a request carries; a callable is called again for each attempt."""


@dataclass(slots=True)
class Traffic:
    """What went over the wire, for reports and metrics; counts only grow."""

    requests: int = 0
    retries: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    blobs_read: int = 0
    blobs_written: int = 0
    blobs_mounted: int = 0
    bytes_mounted: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, **counts: int) -> None:
        """Add to counts by name; callable from several threads."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request.

    Attributes:
        endpoint: of the registry, which says what is sent along.
        method: of HTTP.
        path: below ``/v2``, with a leading slash; "" where ``url`` is given.
        what: names it in errors.
        ok: statuses that are answers and not errors.
        scopes: what the token must allow.
        params: of the query.
        headers: further ones.
        body: what is sent.
        url: whole, as a registry gave it (checked by the caller).
        follow: go where redirects lead.
        attempts: None takes those of the options.
    """

    endpoint: Endpoint
    method: str
    path: str
    what: str
    ok: frozenset[int]
    scopes: frozenset[str] = frozenset()
    params: Sequence[tuple[str, str]] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Body = None
    url: str = ""
    follow: bool = True
    attempts: int | None = None


class Transport:
    """Connections to any number of registries; used from several threads."""

    def __init__(self, options: RegistryOptions, *, sleep: Callable[[float], None] = time.sleep) -> None:
        """Nothing is connected yet. ``sleep`` waits between attempts."""
        self.options, self.traffic, self.words = options, Traffic(), Words()
        self._sleep = sleep
        self._lock = threading.Lock()
        self._clients: dict[tuple[object, ...], httpx2.Client] = {}
        self._schemes: dict[str, str] = {}
        self._auths: dict[tuple[str, str], Authenticator] = {}
        for name in ("httpx2", "httpcore2"):
            # They log whole URLs and headers, and a redirect's URL may be signed.
            logger = logging.getLogger(name)
            if logger.level == logging.NOTSET:
                logger.setLevel(logging.WARNING)

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            client.close()

    # Requests

    def send(self, ask: Ask) -> httpx2.Response:
        """Send a request and return the answer, its body not read yet: the caller closes it.

        Raises:
            RegistryError: another status than ``ask.ok``, no connection, or a redirect that is refused.
        """
        attempts = ask.attempts or self.options.retry.attempts
        for attempt in range(1, attempts + 1):
            try:
                response = self._once(ask)
                if response.status_code in ask.ok:
                    return response
                error = self.words.error(response, ask.what)
                wait = _retry_after(response)
            except httpx2.TransportError as fault:
                error, wait = self.words.fault(fault, ask.what, ask.url or ask.endpoint.host), None
            if not error.temporary or attempt == attempts:
                raise error
            _log.debug("%s %s: %s; attempt %d of %d", ask.method, ask.what, error, attempt, attempts)
            self.traffic.add(retries=1)
            self.pause(attempt, wait)
        raise AssertionError("the last attempt returns or raises")

    def pause(self, attempt: int, asked_seconds: float | None = None) -> None:
        """Wait before another attempt, as long as the server asked, or by how many there were."""
        retry = self.options.retry
        most = min(retry.base_seconds * 2 ** (attempt - 1), retry.most_seconds)
        seconds = random.uniform(most / 2, most)
        if asked_seconds is not None:
            seconds = max(seconds, min(asked_seconds, retry.most_seconds))
        self._sleep(seconds)

    def _once(self, ask: Ask) -> httpx2.Response:
        endpoint = ask.endpoint
        home = base_url(endpoint, self.scheme(endpoint))
        url = ask.url or home + ask.path
        params = [*ask.params] + ([("ns", endpoint.ns)] if endpoint.ns and not ask.url else [])
        auth = self._auth(endpoint)
        authorization, answered, hops = auth.header(ask.scopes), False, 0
        while True:
            headers = {"User-Agent": _user_agent(), "Accept-Encoding": "identity", **ask.headers}
            at_home = origin(url) == origin(home)
            if at_home:
                headers |= dict(endpoint.headers)
                if authorization:
                    headers["Authorization"] = authorization
            response = self._raw(endpoint, ask.method, url, params, headers, ask.body)
            status = response.status_code
            if at_home:
                self.words.warnings(response, endpoint.host)
            if status == 401 and at_home and not answered:
                challenges = parse_challenges(response.headers.get_list("www-authenticate"))
                message = self.words.error(response, ask.what)
                answered, sent = True, authorization
                authorization = auth.answer(challenges, ask.scopes, sent)
                if not authorization:
                    raise message
                continue
            if status in REDIRECTS and ask.follow and status not in ask.ok:
                location = response.headers.get("location", "")
                response.close()
                hops += 1
                if hops > _MAX_REDIRECTS:
                    raise RegistryError(ask.what, status, f"more than {_MAX_REDIRECTS} redirects")
                url, params = next_url(url, location, endpoint.host, ask.what, status), []
                continue
            return response

    def _raw(
        self, endpoint: Endpoint, method: str, url: str, params: Sequence[tuple[str, str]],
        headers: Mapping[str, str], body: Body,
    ) -> httpx2.Response:  # fmt: skip
        client = self._client(endpoint)
        # Buffers are as good as bytes: the sockets take both, and a copy of each megabyte is saved.
        content = cast("bytes | Iterable[bytes] | None", body() if callable(body) else body)
        try:
            # An empty list of parameters would take away the query that the URL has.
            request = client.build_request(
                method, url, headers=dict(headers), content=content, params=list(params) or None
            )
        except (httpx2.InvalidURL, ValueError):
            raise RegistryError(
                endpoint.host, 0, f"sent an address that is no URL: {self.words.show(url)}"
            ) from None
        self.traffic.add(requests=1)
        start = time.monotonic()
        response = client.send(request, stream=True)
        seconds = time.monotonic() - start
        _log.debug("%s %s: %d in %.3f s", method, self.words.show(url), response.status_code, seconds)
        return response

    def _client(self, endpoint: Endpoint) -> httpx2.Client:
        with self._lock:
            client = self._clients.get(endpoint.tls_key)
            if client is None:
                options = self.options
                client = httpx2.Client(
                    verify=endpoint.ssl_context(),
                    timeout=httpx2.Timeout(options.read_seconds, connect=options.connect_seconds, pool=None),
                    limits=httpx2.Limits(max_connections=64, max_keepalive_connections=16, keepalive_expiry=30.0),
                    follow_redirects=False,
                )
                self._clients[endpoint.tls_key] = client
            return client

    def scheme(self, endpoint: Endpoint) -> str:
        """Return ``https``, or ``http`` where that is allowed and the registry speaks nothing else."""
        if endpoint.scheme:
            return endpoint.scheme
        known = self._schemes.get(endpoint.host)
        if known is None:
            known = self._find_scheme(endpoint)
            self._schemes[endpoint.host] = known
        return known

    def _find_scheme(self, endpoint: Endpoint) -> str:
        """Ask by TLS; plain HTTP is taken only if what answers is no TLS at all, never after a silence."""
        headers = {"User-Agent": _user_agent()}
        try:
            self._raw(endpoint, "GET", base_url(endpoint, "https") + "/", (), headers, None).close()
        except httpx2.ConnectError as error:
            has_port = api_host(endpoint.host).rpartition(":")[2].isdigit()
            no_tls = cause_of(error, ssl.SSLError) is not None
            if not no_tls and (has_port or cause_of(error, ConnectionRefusedError) is None):
                raise
            return "http"
        return "https"

    # Authentication

    def _auth(self, endpoint: Endpoint) -> Authenticator:
        key = (endpoint.host, endpoint.repository)
        scheme = self.scheme(endpoint)
        with self._lock:
            found = self._auths.get(key)
            if found is None:
                found = self._auths[key] = Authenticator(
                    endpoint.host,
                    lambda: credentials.find(endpoint.host, endpoint.repository, authfile=self.options.authfile),
                    lambda request: self._ask_token(endpoint, request),
                    secure=scheme == "https",
                    on_secret=self.words.keep_secret,
                )
            return found

    def _ask_token(self, endpoint: Endpoint, request: TokenRequest) -> JsonObject:
        what = f"token server of {endpoint.host}"
        headers = {"User-Agent": _user_agent(), "Accept": "application/json"}
        if request.authorization:
            headers["Authorization"] = request.authorization
        retry = self.options.retry
        for attempt in range(1, retry.attempts + 1):
            try:
                if request.post:
                    headers["Content-Type"] = "application/x-www-form-urlencoded"
                    form = str(httpx2.QueryParams(list(request.fields))).encode()
                    response = self._raw(endpoint, "POST", request.url, (), headers, form)
                else:
                    response = self._raw(endpoint, "GET", request.url, request.fields, headers, None)
                if response.status_code == 200:
                    data = read_body(response, _TOKEN_BYTES, what)
                    self.traffic.add(bytes_read=len(data))
                    try:
                        return load_object(data, what)
                    except InvalidImage as bad:
                        raise RegistryError(what, 200, self.words.redact(str(bad))) from None
                error, wait = self.words.error(response, what), _retry_after(response)
            except httpx2.TransportError as fault:
                error, wait = self.words.fault(fault, what, request.url), None
            if not error.temporary or attempt == retry.attempts:
                raise error
            self.traffic.add(retries=1)
            self.pause(attempt, wait)
        raise AssertionError("the last attempt returns or raises")


@functools.cache
def _user_agent() -> str:
    try:
        return f"layerkit/{importlib.metadata.version('layerkit')}"
    except importlib.metadata.PackageNotFoundError:
        return "layerkit"


def _retry_after(response: httpx2.Response) -> float | None:
    text = response.headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


__all__ = ["Ask", "Body", "Traffic", "Transport"]
