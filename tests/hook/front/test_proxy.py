"""The pull-through front: what it hands on, what it holds, and that nothing that fails keeps a manifest back."""

from __future__ import annotations

import http.client
import json
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hook_service import BEARER, MAP_A, TOKEN, call, hook_process, run_asgi, settings
from made_images import CONFIG, MANIFEST, descriptor, digest, dump
from needs import need_tool
from programs import wait_for
from registry_server import PASSWORD, USER, docker_registry, write_auth

from layerkit.hook.config import Config
from layerkit.hook.front.guard import Token
from layerkit.hook.front.intake import Service
from layerkit.hook.front.proxy import Proxy, passed
from layerkit.hook.queue import Outcome, Queue
from layerkit.hook.telemetry import Metrics
from layerkit.hook.work.access import resolve
from layerkit.hook.work.tasks import Task
from layerkit.hook.work.worker import QueueWorker
from layerkit.model.errors import StoreError

LONG = 240
"""Seconds: nobody who is held for so long is answered in time."""
IMAGE = dump({"schemaVersion": 2, "mediaType": MANIFEST, "config": descriptor(b"{}", CONFIG), "layers": []})
ARTIFACT = dump({"schemaVersion": 2, "mediaType": MANIFEST, "artifactType": "application/x", "layers": [],
                 "config": descriptor(b"{}", "application/vnd.oci.empty.v1+json")})  # fmt: skip


class Upstream:
    """A server that notes every request as it came, byte for byte where it counts."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, list[tuple[str, str]]]] = []
        self.gate = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def reply(self, status: int, body: bytes, *headers: tuple[str, str], length: int | None = None) -> None:
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_GET(self) -> None:
                outer.seen.append((self.command, self.path, list(self.headers.items())))
                path = self.path.partition("?")[0]
                if path == "/v2/":
                    challenges = ('Bearer realm="https://auth.example/token",service="r"', 'Basic realm="r"')
                    self.reply(
                        401, b"{}", *(("WWW-Authenticate", c) for c in challenges), ("Link", "<a>"), ("Link", "<b>")
                    )
                elif path.endswith("/manifests/cut"):
                    self.reply(200, IMAGE[:20], ("Content-Type", MANIFEST), length=len(IMAGE))
                    self.close_connection = True
                elif "/manifests/" in path:
                    body = ARTIFACT if path.endswith("/artifact") else IMAGE
                    name = "/absent" in path
                    said = ("Docker-Content-Digest", digest(body))
                    self.reply(404 if name else 200, body, ("Content-Type", MANIFEST), said)
                elif path.endswith("/blobs/moved"):
                    self.reply(307, b"", ("Location", "https://cdn.example/blob?signed=1"))
                elif path.endswith("/blobs/slow"):
                    self.send_response(200)
                    self.send_header("Content-Length", "8")
                    self.end_headers()
                    self.wfile.write(b"half")
                    self.wfile.flush()
                    outer.gate.wait(20)
                    self.wfile.write(b"rest")
                elif "Range" in self.headers:
                    self.reply(206, b"cdef", ("Content-Range", "bytes 2-5/26"))
                else:
                    self.reply(200, b"x" * 100_000, ("ETag", '"e"'))

            do_HEAD = do_GET

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    server = Upstream()
    yield server
    server.close()


@contextmanager
def front(config: Config, execute: Any) -> Iterator[tuple[str, Queue]]:
    with closing(Queue(config.state, config.policy)) as queue:
        metrics = Metrics(queue.stats)
        worker = None if execute is None else QueueWorker(
            config, queue, lambda: ThreadPoolExecutor(4), execute, metrics
        )  # fmt: skip
        service = Service(config, queue, resolve, metrics, Token(TOKEN), worker)
        with run_asgi(Proxy(service, config.registries["main"])) as url:
            yield url, queue


def ask(url: str, method: str, path: str, *headers: tuple[str, str]) -> tuple[int, list[tuple[str, str]], bytes]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=LONG / 2)
    connection.putrequest(method, path, skip_accept_encoding=True)
    for name, value in headers:
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.getheaders(), body


def test_everything_passes_as_it_came(upstream: Upstream, tmp_path: Path) -> None:
    accepts = [("Accept", MANIFEST), ("Accept", "application/vnd.oci.image.index.v1+json"), ("accept", "*/*;q=0.1")]
    with front(settings(tmp_path, upstream.host), lambda task: Outcome("done")) as (url, _):
        status, headers, body = ask(
            url, "GET", "/v2/team/app/manifests/v1?ns=docker.io&x=%2F", *accepts, ("Authorization", "Bearer abc"),
            ("Connection", "keep-alive, X-Hop"), ("X-Hop", "1"), ("If-None-Match", '"e"'),
            ("User-Agent", "containerd"),
        )  # fmt: skip
        assert (status, body) == (200, IMAGE)
        _, path, seen = upstream.seen[-1]
        assert path == "/v2/team/app/manifests/v1?ns=docker.io&x=%2F"
        assert [value for name, value in seen if name.lower() == "accept"] == [value for _, value in accepts]
        sent = {name.lower(): value for name, value in seen}
        assert sent["authorization"] == "Bearer abc" and sent["user-agent"] == "containerd"
        assert sent["host"] == upstream.host and sent["if-none-match"] == '"e"'
        assert "x-hop" not in sent and "accept-encoding" not in sent
        assert dict(headers)["docker-content-digest"] == digest(IMAGE)

        status, headers, _ = ask(url, "GET", "/v2/")
        assert status == 401
        assert [v for n, v in headers if n.lower() == "www-authenticate"] == [
            'Bearer realm="https://auth.example/token",service="r"', 'Basic realm="r"',
        ]  # fmt: skip
        assert [v for n, v in headers if n.lower() == "link"] == ["<a>", "<b>"]

        status, headers, body = ask(url, "GET", "/v2/a/blobs/x", ("Range", "bytes=2-5"))
        assert (status, body) == (206, b"cdef") and dict(headers)["content-range"] == "bytes 2-5/26"
        status, headers, body = ask(url, "HEAD", "/v2/a/manifests/v1", *accepts)
        assert (status, body) == (200, b"") and dict(headers)["content-length"] == str(len(IMAGE))
        assert upstream.seen[-1][0] == "HEAD"
        # A redirect is the client's to follow: its address is not ours to ask, and no credentials go there.
        status, headers, _ = ask(url, "GET", "/v2/a/blobs/moved")
        assert status == 307 and dict(headers)["location"] == "https://cdn.example/blob?signed=1"
        assert len(ask(url, "GET", "/v2/a/blobs/long")[2]) == 100_000


def test_bodies_stream(upstream: Upstream, tmp_path: Path) -> None:
    """The first half is there while the registry still keeps the second."""
    with front(settings(tmp_path, upstream.host), None) as (url, _):
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
        connection.request("GET", "/v2/a/blobs/slow")
        answer = connection.getresponse()
        assert answer.read(4) == b"half"
        upstream.gate.set()
        assert answer.read() == b"rest"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("reference", ["v1", digest(IMAGE)])
def test_a_manifest_is_held_until_its_remap_is_made(
    upstream: Upstream, tmp_path: Path, method: str, reference: str
) -> None:
    finish = threading.Event()
    asked: list[str] = []

    def execute(task: Task) -> Outcome:
        asked.append(str(task.digest))
        finish.wait(LONG)
        return Outcome("done")

    with front(settings(tmp_path, upstream.host, hold_seconds=LONG), execute) as (url, queue):
        with ThreadPoolExecutor(1) as pool:
            held = pool.submit(ask, url, method, f"/v2/team/app/manifests/{reference}")
            wait_for(lambda: asked)
            with pytest.raises(TimeoutError):
                held.result(0.3)
            finish.set()
            assert held.result()[0] == 200
        assert asked == [digest(IMAGE)]
        assert ask(url, method, f"/v2/team/app/manifests/{reference}")[0] == 200
        assert len(asked) == 1
        text = call(f"{url}/metrics", headers=BEARER)[2].decode()
        assert 'layerkit_hook_proxy_holds_total{result="ready"} 1.0' in text
        assert 'layerkit_hook_proxy_holds_total{result="known"} 1.0' in text
        assert call(f"{url}/metrics", headers={})[0] == 401
        assert queue.stats().states == {"done": 1}


def test_a_hundred_who_want_the_same_cause_one_remap(upstream: Upstream, tmp_path: Path) -> None:
    runs: list[int] = []
    senders: list[int] = []

    def execute(task: Task) -> Outcome:
        runs.append(1)
        wait_for(lambda: len(senders) == 100)
        return Outcome("done")

    def send(number: int) -> int:
        senders.append(number)
        return ask(url, "GET", "/v2/a/manifests/v1")[0]

    with front(settings(tmp_path, upstream.host, hold_seconds=LONG), execute) as (url, _):
        with ThreadPoolExecutor(100) as pool:
            codes = list(pool.map(send, range(100)))
    assert codes == [200] * 100 and runs == [1]


def broken(task: Task) -> Outcome:
    return Outcome("failed", "no", permanent=True)


@pytest.mark.parametrize("worker", ["breaks", "hangs", "absent"])
def test_it_passes_whatever_happens(upstream: Upstream, tmp_path: Path, worker: str) -> None:
    end = threading.Event()

    def forever(task: Task) -> Outcome:
        end.wait(LONG)
        return Outcome("done")

    execute = {"breaks": broken, "hangs": forever, "absent": None}[worker]
    with front(settings(tmp_path, upstream.host, hold_seconds=0.5), execute) as (url, _):
        try:
            assert ask(url, "GET", "/v2/a/manifests/v1")[2] == IMAGE
            assert not end.is_set(), "it did not wait for what hangs"
        finally:
            end.set()


def test_it_passes_when_the_queue_is_broken(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with front(settings(tmp_path, upstream.host, hold_seconds=LONG), None) as (url, queue):

        def fail(*_: object) -> None:
            raise StoreError("disk full")

        monkeypatch.setattr(queue, "add", fail)
        assert ask(url, "GET", "/v2/a/manifests/v1")[2] == IMAGE


def test_what_is_not_held(upstream: Upstream, tmp_path: Path) -> None:
    """Artifacts, what is not there, repositories that are not served; and a registry that is away is said so."""
    config = settings(tmp_path, upstream.host, registry={"repositories": ["team/*"]}, hold_seconds=LONG)
    with front(config, None) as (url, queue):
        assert ask(url, "GET", "/v2/team/app/manifests/artifact")[2] == ARTIFACT
        assert ask(url, "GET", "/v2/team/absent/manifests/v1")[0] == 404
        assert ask(url, "GET", "/v2/other/manifests/v1")[2] == IMAGE
        assert ask(url, "GET", "/v2/team/app/manifests/cut")[0] == 502
        assert queue.stats().states == {}
        count = len(upstream.seen)
        for method, path in (
            ("PUT", "/v2/a/manifests/v1"),
            ("POST", "/v2/a/blobs/uploads/"),
            ("DELETE", "/v2/a/manifests/x"),
        ):
            assert ask(url, method, path, ("Content-Length", "0"))[0] == 405
        for path in ("/", "/admin", "/v2/../metrics", "/v2/a/../../x", "/v2x/"):
            assert ask(url, "GET", path)[0] == 404
        assert len(upstream.seen) == count
        assert ask(url, "GET", "/healthz")[0] == 200
        upstream.close()
        wait_for(lambda: ask(url, "GET", "/v2/a/blobs/x")[0] == 502)


def test_headers_of_one_connection_are_not_handed_on() -> None:
    headers = [
        (b"Connection", b"close, X-A"), (b"connection", b"x-b"), (b"X-A", b"1"), (b"x-b", b"2"), (b"X-C", b"3"),
        (b"Transfer-Encoding", b"chunked"), (b"Set-Cookie", b"a"), (b"Set-Cookie", b"b"), (b"TE", b"x"),
    ]  # fmt: skip
    assert passed(headers) == [(b"x-c", b"3"), (b"set-cookie", b"a"), (b"set-cookie", b"b")]


def test_skopeo_pulls_through_it_from_a_registry_with_passwords(tiny_archive: Any, tmp_path: Path) -> None:
    """The first pull by a node finds the remap made; the node's own login is what the registry sees."""
    need_tool("skopeo")
    with docker_registry(tmp_path / "registry", auth="basic") as registry:
        config = tmp_path / "hook.toml"
        auth = write_auth(tmp_path / "auth.json", registry.host)
        (tmp_path / "token").write_text(TOKEN)
        (tmp_path / "token").chmod(0o600)
        config.write_text(f"""
listen = "127.0.0.1:0"
state = "state"
store = "store"
token_file = "token"
hold_seconds = 60
[[registry]]
name = "main"
host = "{registry.host}"
tls_verify = false
authfile = "{auth}"
[[map]]
uid_map = ["{MAP_A}"]
""")
        creds = f"{USER}:{PASSWORD}"
        push = ["skopeo", "copy", "-q", "--dest-tls-verify=false", "--dest-creds", creds]
        subprocess.run(
            [*push, f"oci-archive:{tiny_archive()}", registry.ref("team/tiny:v1")], check=True, timeout=60
        )
        with hook_process(config, "proxy", "main", log=tmp_path / "log") as (process, url):
            host = url.removeprefix("http://")
            pull = ["skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{host}/team/tiny:v1"]
            refused = subprocess.run([*pull, f"oci:{tmp_path / 'no'}:v1"], capture_output=True, timeout=60)
            assert refused.returncode != 0 and b"authentication required" in refused.stderr
            subprocess.run([*pull, "--src-creds", creds, f"oci:{tmp_path / 'pulled'}:v1"], check=True, timeout=90)
            index = json.loads((tmp_path / "pulled/index.json").read_text())
            image = index["manifests"][0]["digest"]
            listed = subprocess.run(
                ["skopeo", "inspect", "--raw", "--tls-verify=false", "--creds", creds,
                 f"docker://{host}/team/tiny:{image.replace(':', '-')}"],
                capture_output=True, check=True, timeout=60,
            ).stdout  # fmt: skip
            (entry,) = json.loads(listed)["manifests"]
            assert entry["artifactType"] == "application/vnd.layerkit.remap.v1"
            process.terminate()
            assert process.wait(30) == 0
        log = (tmp_path / "log").read_text()
        assert PASSWORD not in log and TOKEN not in log
        assert '"held": "ready"' in log


def test_the_registry_must_be_known(tmp_path: Path) -> None:
    config = settings(tmp_path, "127.0.0.1:1")
    from layerkit.model.errors import RegistryError

    with closing(Queue(tmp_path / "q")) as queue, pytest.raises(RegistryError, match="does not answer"):
        service = Service(config, queue, resolve, Metrics(queue.stats), Token(TOKEN), None)
        Proxy(service, config.registries["main"])
