"""The hook as a service: settings, one in this process or in its own, and clients that call it."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn
from programs import command, wait_for

from layerkit.formats.toml_settings import Table
from layerkit.hook.config import Config, Registry
from layerkit.hook.front.guard import Token
from layerkit.hook.front.http import make_app
from layerkit.hook.front.intake import Service
from layerkit.hook.queue import Outcome, Queue
from layerkit.hook.telemetry import Metrics
from layerkit.hook.work.tasks import Task
from layerkit.hook.work.worker import QueueWorker
from layerkit.model.digest import Digest
from layerkit.model.errors import NotFound

TOKEN = "test-token-0123456789"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
MAP_A, MAP_B = "0:100000:65536", "0:300000:65536"


def settings(folder: Path, host: str = "127.0.0.1:1", *, maps: tuple[str, ...] = (MAP_A,), **more: Any) -> Config:
    """Settings with one registry called ``main``; ``more`` are top-level names of the file."""
    registry = {"name": "main", "host": host, "tls_verify": False, **more.pop("registry", {})}
    values = {
        "state": str(folder / "state"), "store": str(folder / "store"), "listen": "127.0.0.1:0",
        "registry": [registry], "map": [{"uid_map": [text]} for text in maps], **more,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "token").write_text(TOKEN)
    (folder / "token").chmod(0o600)
    return Config.read(Table(values | {"token_file": str(folder / "token")}, "test", folder))


def write_config(
    folder: Path, host: str, *maps: str, name: str = "", port: int = 0, more: str = "", registry: str = ""
) -> Path:
    """Write ``hook.toml`` and the file of its token: state and store are ``{name}state`` and ``{name}store``.

    ``more`` is TOML of the top, ``registry`` of the registry called ``main``.
    """
    (folder / "token").write_text(TOKEN)
    (folder / "token").chmod(0o600)
    text = f"""
listen = "127.0.0.1:{port}"
state = "{name}state"
store = "{name}store"
token_file = "token"
{more}
[[registry]]
name = "main"
host = "{host}"
tls_verify = false
{registry}
"""
    path = folder / "hook.toml"
    path.write_text(text + "".join(f'[[map]]\nuid_map = ["{each}"]\n' for each in maps))
    return path


def no_registry(registry: Registry, repository: str, tag: str) -> Digest:
    """A resolver that knows the tag ``v1`` only."""
    if tag != "v1":
        raise NotFound(f"{repository}:{tag}")
    return Digest.of(repository.encode())


@contextlib.contextmanager
def run_asgi(app: Any, **options: Any) -> Iterator[str]:
    """Serve an ASGI application from a thread; gives its URL."""
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="on", **options)
    )
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started or not thread.is_alive())
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


@contextlib.contextmanager
def hook(
    config: Config, *, execute: Callable[[Task], Outcome] | None = None, resolve: Any = no_registry
) -> Iterator[tuple[str, Queue]]:
    """A hook in this process, with threads as workers where ``execute`` is given; gives its URL and queue."""
    with contextlib.closing(Queue(config.state, config.policy)) as queue:
        metrics = Metrics(queue.stats)
        worker = None
        if execute is not None:
            worker = QueueWorker(config, queue, lambda: ThreadPoolExecutor(config.workers), execute, metrics)
        with run_asgi(make_app(Service(config, queue, resolve, metrics, Token(TOKEN), worker))) as url:
            yield url, queue


def call(
    url: str,
    body: object = None,
    *,
    headers: dict[str, str] | None = None,
    method: str = "",
    raw: bytes | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """Send a request, with the token and as JSON unless ``headers`` say otherwise; return status, headers, body."""
    data = raw if raw is not None else json.dumps(body).encode() if body is not None else None
    sent = {"Content-Type": "application/json", **BEARER} if headers is None else headers
    request = urllib.request.Request(url, data, sent, method=method or None)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


@contextlib.contextmanager
def hook_process(config: Path, *words: str, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run ``layerkit hook serve`` (or what ``words`` say) as a process of its own; gives it and its URL."""
    with log.open("ab") as out:
        start = log.stat().st_size
        process = subprocess.Popen(
            command("hook", *(words or ("serve",)), "--config", config), stdout=out, stderr=out
        )
        try:
            found: list[str] = []

            def listening() -> bool:
                assert process.poll() is None, log.read_text()
                found[:] = re.findall(r"^listening on (\S+)$", log.read_text()[start:], re.MULTILINE)
                return bool(found)

            wait_for(listening)
            yield process, found[0]
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(60)


def event(repository: str, digest: str, *, tag: str = "", host: str = "", **target: Any) -> dict[str, Any]:
    """One push, as distribution tells it."""
    return {
        "id": "x", "action": "push", "request": {"host": host},
        "target": {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest,
                   "repository": repository, "tag": tag, **target},
    }  # fmt: skip
