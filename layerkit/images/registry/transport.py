"""HTTP to registries: pooled connections, waits and repeats, redirects that carry nothing they must not, and words.

One request is tried again after faults that may pass (no connection, a cut one, 429 and 5xx), a bounded
number of times with waits that double, a random part of each taken; a ``Retry-After`` is obeyed up to a bound.
What goes wrong is put into words that hold no secret.
"""

from __future__ import annotations

import email.utils
import functools
import importlib.metadata
import ipaddress
import logging
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urljoin, urlsplit

import httpx2

from layerkit.formats.strict_json import JsonObject, load_object
from layerkit.images.registry import credentials
from layerkit.images.registry.auth import Authenticator, TokenRequest, parse_challenges, scope
from layerkit.images.registry.hosts import Endpoint, base_url
from layerkit.images.registry.names import api_host, is_private
from layerkit.images.registry.options import RegistryOptions
from layerkit.model.errors import InvalidImage, LayerkitError, RegistryError, show_path

REDIRECTS = frozenset((301, 302, 303, 307, 308))
_DEFAULT_PORTS = {"https": 443, "http": 80}
_TOKEN_BYTES = 1 << 20
_MAX_REDIRECTS = 6
_TEMPORARY = frozenset((408, 429, 500, 502, 503, 504))
_NOT_SEEN_YET = "MANIFEST_BLOB_UNKNOWN"
"""A manifest is sent when its blobs are there. One that others send too is gone for a moment in some registries:
docker-registry empties the file that leads to a blob before it writes the same into it again."""
_ERROR_BYTES = 64 << 10
_ERROR_CHARS = 300
_SHORTEST_SECRET = 3
_MAX_WARNINGS = 100
# distribution-spec 1.1, "Warnings": code 299, the agent "-", and a quoted text.
_WARNING = re.compile(r'299 - "((?:[^"\\]|\\.)*)"')

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
        scopes: what the token must allow, by default to pull from the repository of ``endpoint``.
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
    ok: Collection[int] = (200,)
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
        where = ask.url or ask.endpoint.host
        return self._tried(lambda: self._once(ask), ask.ok, ask.what, where, ask.attempts)

    def _tried(
        self, once: Callable[[], httpx2.Response], ok: Collection[int], what: str, where: str, attempts: int | None
    ) -> httpx2.Response:
        """Return the answer of ``once``, called again after faults that may pass."""
        most = attempts or self.options.retry.attempts
        for attempt in range(1, most + 1):
            try:
                response = once()
                if response.status_code in ok:
                    return response
                error, wait = self.words.error(response, what), _retry_after(response)
            except httpx2.TransportError as fault:
                error, wait = self.words.fault(fault, what, where), None
            if not error.temporary or attempt == most:
                raise error
            _log.debug("%s: %s; attempt %d of %d", what, error, attempt, most)
            self.traffic.add(retries=1)
            self.pause(attempt, wait)
        raise AssertionError("the last attempt returns or raises")

    def body(self, response: httpx2.Response, most: int, what: str) -> bytes:
        """Return a whole body, counted; see :func:`read_body`."""
        data = read_body(response, most, what)
        self.traffic.add(bytes_read=len(data))
        return data

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
        params = [*ask.params] + ([("ns", endpoint.ns)] if endpoint.ns and not ask.url else [])
        url = _with_query(ask.url or home + ask.path, params)
        auth, scopes = self._auth(endpoint), ask.scopes or frozenset((scope(endpoint.repository, "pull"),))
        authorization, answered, hops = auth.header(scopes), False, 0
        while True:
            headers = {"User-Agent": _user_agent(), "Accept-Encoding": "identity", **ask.headers}
            at_home = origin(url) == origin(home)
            if at_home:
                headers |= dict(endpoint.headers)
                if authorization:
                    headers["Authorization"] = authorization
            response = self._raw(endpoint, ask.method, url, headers, ask.body)
            status = response.status_code
            if at_home:
                self.words.warnings(response, endpoint.host)
            if status == 401 and at_home and not answered:
                challenges = parse_challenges(response.headers.get_list("www-authenticate"))
                message = self.words.error(response, ask.what)
                answered, authorization = True, auth.answer(challenges, scopes, authorization)
                if not authorization:
                    raise message
                continue
            if status in REDIRECTS and ask.follow and status not in ask.ok:
                location = response.headers.get("location", "")
                response.close()
                hops += 1
                if hops > _MAX_REDIRECTS:
                    raise RegistryError(ask.what, status, f"more than {_MAX_REDIRECTS} redirects")
                url = next_url(url, location, endpoint.host, ask.what, status)
                continue
            return response

    def _raw(
        self, endpoint: Endpoint, method: str, url: str, headers: Mapping[str, str], body: Body = None
    ) -> httpx2.Response:
        client = self._client(endpoint)
        # Buffers are as good as bytes: the sockets take both, and a copy of each megabyte is saved.
        content = cast("bytes | Iterable[bytes] | None", body() if callable(body) else body)
        try:
            request = client.build_request(method, url, headers=dict(headers), content=content)
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
        if endpoint.host not in self._schemes:
            self._schemes[endpoint.host] = self._find_scheme(endpoint)
        return self._schemes[endpoint.host]

    def _find_scheme(self, endpoint: Endpoint) -> str:
        """Ask by TLS; plain HTTP is taken only if what answers is no TLS at all, never after a silence."""
        headers = {"User-Agent": _user_agent()}
        try:
            self._raw(endpoint, "GET", base_url(endpoint, "https") + "/", headers).close()
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
        body = None
        if request.post:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            method, url, body = "POST", request.url, str(httpx2.QueryParams(list(request.fields))).encode()
        else:
            method, url = "GET", _with_query(request.url, request.fields)
        data = b""

        def once() -> httpx2.Response:
            nonlocal data
            response = self._raw(endpoint, method, url, headers, body)
            if response.status_code == 200:
                data = read_body(response, _TOKEN_BYTES, what)
            return response

        self._tried(once, (200,), what, request.url, None)
        self.traffic.add(bytes_read=len(data))
        try:
            return load_object(data, what)
        except InvalidImage as bad:
            raise RegistryError(what, 200, self.words.redact(str(bad))) from None


@functools.cache
def _user_agent() -> str:
    try:
        return f"layerkit/{importlib.metadata.version('layerkit')}"
    except importlib.metadata.PackageNotFoundError:
        return "layerkit"


def _with_query(url: str, params: Sequence[tuple[str, str]]) -> str:
    # An empty list of parameters would take away the query that the URL has.
    return url.partition("#")[0].partition("?")[0] + f"?{httpx2.QueryParams(list(params))}" if params else url


def _retry_after(response: httpx2.Response) -> float | None:
    text = response.headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


# Addresses that a registry sends: which are followed, and where secrets may go along


def origin(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port: only where all are equal may credentials go."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)


def next_url(current: str, location: str, registry: str, what: str, status: int) -> str:
    """Return where ``location`` leads from ``current``, checked.

    Content is verified by digest whoever sends it; what must not happen is that secrets are sent in the
    clear, or that a stranger's registry makes this host talk to services of its own network.

    Args:
        current: the URL that was asked.
        location: the header's value.
        registry: host of the registry that the user named.
        what: names the request in errors.
        status: of the answer.

    Raises:
        RegistryError: no address, another scheme, without encryption after a request with it, or from a
            public registry to an address of this host or a private network.
    """

    def refuse(why: str) -> RegistryError:
        shown = show_path(location.partition("?")[0])[:200]
        return RegistryError(what, status, f"sends to {shown!r}, {why}; refused")

    try:
        given = urlsplit(location)
        if given.scheme and not given.hostname:
            raise refuse("which names no host")
        url = urljoin(current, location)
        parts, (_, host, _port) = urlsplit(url), origin(url)
    except ValueError:
        raise refuse("which is no address") from None
    if not location or not host or parts.scheme not in ("https", "http"):
        raise refuse("which is no address of http or https")
    if parts.username is not None or parts.password is not None:
        raise refuse("which holds a user name")
    here = urlsplit(current)
    if here.scheme == "https" and parts.scheme == "http":
        if host != (here.hostname or "").lower():
            raise refuse("which is not encrypted")
        # A registry behind a proxy that ends TLS takes its own address for http.
        return parts._replace(scheme="https", netloc=here.netloc).geturl()
    if host != (here.hostname or "").lower() and not is_private(registry) and _leads_inside(host):
        raise refuse("which is on this host or a private network")
    return url


def _leads_inside(host: str) -> bool:
    if is_private(host):
        return True
    try:
        found = socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)
    except (OSError, UnicodeError):
        return False  # behind a proxy names need not resolve here; the connection says what is wrong
    return any(not ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_global for entry in found)


# What registries answer, in words


class Words:
    """Puts what happened into words; knows every secret that was used, and shows none."""

    def __init__(self) -> None:
        """No secret is known yet."""
        self._secrets: set[str] = set()
        self._warned: set[str] = set()

    def keep_secret(self, text: str) -> None:
        """Never show ``text``."""
        if len(text) >= _SHORTEST_SECRET:
            self._secrets.add(text)

    def redact(self, text: str) -> str:
        """Return ``text`` without any secret that this transport has used."""
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        return text

    def show(self, url: str) -> str:
        """Return a URL for messages: without its query, which may be signed, and without secrets."""
        bare = url.partition("?")[0].partition("#")[0]
        scheme, slashes, rest = bare.partition("://")
        host, slash, path = rest.partition("/")
        return show_path(self.redact(scheme + slashes + host.rpartition("@")[2] + slash + path))[:_ERROR_CHARS]

    def error(self, response: httpx2.Response, what: str) -> RegistryError:
        """Return the error that an answer is; its body is read and it is closed."""
        status = response.status_code
        try:
            errors = _errors(read_body(response, _ERROR_BYTES, what))
        except (httpx2.TransportError, LayerkitError):
            errors = []
        said = show_path(self.redact("; ".join(errors[:5])))[:_ERROR_CHARS]
        message = {
            401: "the registry wants other credentials; log in with `skopeo login`, or give --authfile",
            403: "the registry denies this to the credentials in use",
            404: "the registry has no such thing",
            413: "the registry takes no blob of this size",
            429: "the registry is asked too often; wait, or log in, as accounts often have higher limits",
        }.get(status, "the registry failed" if status >= 500 else "the registry refused")
        temporary = status in _TEMPORARY or any(each.startswith(_NOT_SEEN_YET) for each in errors)
        return RegistryError(what, status, message + (f": {said}" if said else ""), temporary=temporary)

    def warnings(self, response: httpx2.Response, host: str) -> None:
        """Log what a registry warns of, each text once."""
        for value in response.headers.get_list("warning")[:_MAX_WARNINGS]:
            for match in _WARNING.finditer(value[:8192]):
                text = show_path(self.redact(re.sub(r"\\(.)", r"\1", match[1])))[:_ERROR_CHARS]
                if text not in self._warned and len(self._warned) < _MAX_WARNINGS:
                    self._warned.add(text)
                    _log.warning("%s warns: %s", host, text)

    def fault(self, error: httpx2.TransportError, what: str, url: str) -> RegistryError:
        """Return the error for a connection that failed; ``url`` or host is where to."""
        where = self.show(url)
        bad_cert = cause_of(error, ssl.SSLCertVerificationError)
        if isinstance(bad_cert, ssl.SSLCertVerificationError):
            hint = "put its CA into certs.d (or --cert-dir), or use --tls-verify=false if you trust the network"
            return RegistryError(what, 0, f"{where}: its certificate: {bad_cert.verify_message}; {hint}")
        if cause_of(error, ssl.SSLError) is not None and isinstance(error, httpx2.ConnectError):
            hint = "if it serves plain HTTP, use --tls-verify=false"
            return RegistryError(what, 0, f"{where}: no TLS connection ({_reason(error)}); {hint}")
        if isinstance(error, httpx2.UnsupportedProtocol):
            return RegistryError(what, 0, f"{where}: neither http nor https")
        kinds: dict[type[httpx2.TransportError], str] = {
            httpx2.ConnectTimeout: "no connection in time",
            httpx2.ReadTimeout: "silent for too long",
            httpx2.WriteTimeout: "takes no data any more",
        }
        reason = kinds.get(type(error)) or self.redact(_reason(error))
        return RegistryError(what, 0, f"{where}: {reason}", temporary=True)


def read_body(response: httpx2.Response, most: int, what: str) -> bytes:
    """Return a whole body and close the response.

    Raises:
        RegistryError: there are more than ``most`` bytes.
    """
    out = bytearray()
    try:
        for piece in response.iter_raw(1 << 16):
            out += piece
            if len(out) > most:
                raise RegistryError(what, response.status_code, f"sent more than {most} bytes")
    finally:
        response.close()
    return bytes(out)


def _errors(data: bytes) -> list[str]:
    """Return the codes and messages in an error body (distribution-spec, "Error codes")."""
    errors = load_object(data, "error").get("errors")
    return [
        ": ".join(str(each[name]) for name in ("code", "message") if each.get(name))
        for each in (errors if isinstance(errors, list) else ())
        if isinstance(each, dict)
    ]


def cause_of(error: BaseException, kind: type[BaseException]) -> BaseException | None:
    """Return the first error of ``kind`` that ``error`` was raised from."""
    seen: BaseException | None = error
    for _ in range(20):
        if seen is None or isinstance(seen, kind):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def _reason(error: BaseException) -> str:
    return show_path(str(error) or type(error).__name__)[:_ERROR_CHARS]
