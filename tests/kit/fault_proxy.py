"""A proxy that breaks HTTP on purpose: errors, resets, slow and truncated bodies, in front of a real server.

::

    with fault_proxy("localhost:5000") as proxy:
        proxy.add(Fault("GET", r"/blobs/", reset_after=1000, times=3))
        ...                       # use proxy.host instead of localhost:5000
        assert proxy.hits == 3

Rules are looked at in order; the first that matches and is not used up acts. ``chance`` makes a rule act at random
(from ``seed``, so a failure can be repeated). Everything streams: bodies of any size pass.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import random
import re
import socket
import struct
import sys
import termios
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_HOP_BY_HOP = frozenset(("connection", "keep-alive", "transfer-encoding", "te", "upgrade", "proxy-connection"))
_PIECE = 64 << 10


@dataclass
class Fault:
    """One rule.

    Attributes:
        method: of the request, "" for any.
        path: a regular expression that is searched for in path and query.
        status: answered without asking the server (0: the server is asked).
        headers: of that answer.
        body: of that answer.
        reset_after: bytes of the answer's body after which the connection is reset (RST).
        truncate_after: bytes after which it is closed, as if the body ended there.
        reset_upload_after: bytes of the request's body that the server gets before both sides are cut.
        corrupt_at: place in the answer's body where a byte is changed.
        lose_answer: the server does its work, and the client is reset instead of told.
        bytes_per_second: of the answer's body, 0 for all speed.
        delay_seconds: before anything.
        go: what is waited for before anything.
        times: how often it acts, None for always.
        chance: of acting where it matches.
    """

    method: str = ""
    path: str = ""
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    reset_after: int | None = None
    truncate_after: int | None = None
    reset_upload_after: int | None = None
    corrupt_at: int | None = None
    lose_answer: bool = False
    bytes_per_second: int = 0
    delay_seconds: float = 0.0
    go: threading.Event | None = None
    times: int | None = 1
    chance: float = 1.0


class FaultProxy:
    """The rules, and what happened.

    Attributes:
        host: where the proxy listens, ``localhost:PORT``.
        hits: how often a rule acted.
        seen: (method, path, bytes of the answer's body that were passed on) of every request.
    """

    def __init__(self, upstream: str, seed: int) -> None:
        self.upstream, self.host = upstream, ""
        self.hits = 0
        self.seen: list[tuple[str, str, int]] = []
        self._rules: list[Fault] = []
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def add(self, *faults: Fault) -> None:
        with self._lock:
            self._rules += faults

    def clear(self) -> None:
        with self._lock:
            self._rules.clear()

    def choose(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self._rules:
                if fault.times == 0 or fault.method not in ("", method) or not re.search(fault.path, path):
                    continue
                if self._random.random() >= fault.chance:
                    continue
                if fault.times is not None:
                    fault.times -= 1
                self.hits += 1
                return fault
        return None

    def note(self, method: str, path: str, passed: int) -> None:
        with self._lock:
            self.seen.append((method, path, passed))


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that hang up: they are killed on purpose."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def log_message(self, *_: object) -> None:
        pass

    def _any(self) -> None:
        passed = 0
        try:
            passed = self._pass(self.proxy.choose(self.command, self.path) or Fault())
        except (OSError, http.client.HTTPException):
            self._reset()
        finally:
            self.proxy.note(self.command, self.path, passed)

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = do_OPTIONS = _any

    def _reset(self) -> None:
        """End the connection with RST: the peer sees "connection reset", not an orderly end."""
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.close()

    def _sent(self) -> None:
        """Wait until the peer has all that was written: a reset drops what a slow one has had no room for yet."""
        end = time.monotonic() + 20
        while any(fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4))) and time.monotonic() < end:
            time.sleep(0.005)

    def _pass(self, fault: Fault) -> int:
        if fault.delay_seconds:
            time.sleep(fault.delay_seconds)
        if fault.go is not None:
            fault.go.wait(60)
        length = int(self.headers.get("Content-Length") or 0)
        if fault.status:
            self.rfile.read(length)
            self.send_response(fault.status)
            for name, value in fault.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(fault.body)))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else fault.body)
            return 0
        host, _, port = self.proxy.upstream.rpartition(":")
        upstream = http.client.HTTPConnection(host, int(port), timeout=60)
        try:
            return self._exchange(upstream, fault, length)
        finally:
            upstream.close()

    def _exchange(self, upstream: http.client.HTTPConnection, fault: Fault, length: int) -> int:
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _HOP_BY_HOP:
                upstream.putheader(name, value)
        upstream.endheaders()
        left, sent = length, 0
        while left:
            most = left if fault.reset_upload_after is None else min(left, fault.reset_upload_after - sent)
            piece = self.rfile.read(min(_PIECE, most)) if most > 0 else b""
            if not piece:
                self._reset()
                return 0
            upstream.send(piece)
            left -= len(piece)
            sent += len(piece)
        response = upstream.getresponse()
        if fault.lose_answer:
            response.read()
            self._reset()
            return 0
        self.send_response_only(response.status, response.reason)
        has_length = response.getheader("Content-Length") is not None
        for name, value in response.getheaders():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        if not has_length and self.command != "HEAD" and response.status not in (204, 304):
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command == "HEAD":
            return 0
        return self._body(response, fault)

    def _body(self, response: http.client.HTTPResponse, fault: Fault) -> int:
        passed = 0
        ends = [n for n in (fault.reset_after, fault.truncate_after) if n is not None]
        most = min(ends) if ends else None
        piece_bytes = min(_PIECE, max(fault.bytes_per_second // 10, 1)) if fault.bytes_per_second else _PIECE
        while True:
            want = piece_bytes if most is None else min(piece_bytes, most - passed)
            if want <= 0:
                self.wfile.flush()
                if fault.reset_after is not None:
                    self._sent()
                    self._reset()
                else:
                    self.close_connection = True
                    with contextlib.suppress(OSError):
                        self.connection.shutdown(socket.SHUT_RDWR)
                return passed
            piece = response.read(want)
            if not piece:
                return passed
            at = fault.corrupt_at
            if at is not None and passed <= at < passed + len(piece):
                piece = piece[: at - passed] + bytes([piece[at - passed] ^ 1]) + piece[at - passed + 1 :]
            self.wfile.write(piece)
            passed += len(piece)
            if fault.bytes_per_second:
                time.sleep(len(piece) / fault.bytes_per_second)


@contextlib.contextmanager
def fault_proxy(upstream: str, *, seed: int = 0) -> Iterator[FaultProxy]:
    """Run a proxy in front of the HTTP server at ``upstream`` (``HOST:PORT``)."""
    proxy = FaultProxy(upstream, seed)
    handler = type("ProxyHandler", (_Handler,), {"proxy": proxy})
    server = _Server(("127.0.0.1", 0), handler)
    proxy.host = f"localhost:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
