"""The hook: events a second until they are on disk, and images a second beside a real docker-registry.

The peer of storing events is the same number of rows, one transaction and one flush each, in plain SQLite: what a
hook would do that stores every request by itself. Images: 40 small ones that share layers, so the figure is the
cost of a job and not of its bytes; a second map then reads no layer.
"""

from __future__ import annotations

import http.client
import json
import sqlite3
import sys
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

EVENTS, SENDERS, BATCH, IMAGES = 8000, 8, 100, 40


def rows(work: Path) -> list[dict[str, Any]]:
    """Return one row for each figure; ``work`` lies on the disk that is measured."""
    single, batched = events(work / "events")
    plain = plain_sqlite(work / "plain.sqlite")
    first, second = images(work / "images")
    return [
        _row(f"hook, an event of a request each, {SENDERS} senders: {1 / single:,.0f} a second", single, plain),
        _row(f"hook, {BATCH} events in a request: {1 / batched:,.0f} a second", batched, plain),
        {"what": f"hook, an image's first map: {3600 / first:,.0f} images an hour, 2 workers", "ours_s": first,
         "peer": "", "peer_s": None, "ratio": None, "target": ""},
        {"what": f"hook, its second map: {3600 / second:,.0f} images an hour, 2 workers", "ours_s": second,
         "peer": "", "peer_s": None, "ratio": None, "target": ""},
    ]  # fmt: skip


def _row(what: str, ours: float, plain: float) -> dict[str, Any]:
    return {
        "what": what, "ours_s": ours, "peer": "SQLite, a transaction an event", "peer_s": plain,
        "ratio": plain / ours, "target": "",
    }  # fmt: skip


def events(work: Path) -> tuple[float, float]:
    """Return the seconds of one event, sent alone and in batches, until it is stored."""
    from hook_service import MAP_A, TOKEN, event, hook_process

    from layerkit.model.digest import Digest

    work.mkdir()
    config = _config(work, "registry.example:5000", TOKEN, MAP_A, "repositories = ['served/**']")
    # Nobody works them off meanwhile: the registry does not exist, and what fails waits for an hour.
    head = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}

    def send(url: str, bodies: list[bytes]) -> None:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=300)
        for body in bodies:
            connection.request("POST", "/v1/events/main", body, head)
            answer = connection.getresponse()
            said = answer.read()
            assert answer.status == 202, said
        connection.close()

    def timed(url: str, bodies: list[bytes]) -> float:
        start = time.perf_counter()
        threads = [threading.Thread(target=send, args=(url, bodies[n::SENDERS])) for n in range(SENDERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return (time.perf_counter() - start) / EVENTS

    made = [[event("served/a", str(Digest.of(b"%d.%d" % (turn, n)))) for n in range(EVENTS)] for turn in range(2)]
    with hook_process(config, log=work / "log") as (_, url):
        single = timed(url, [json.dumps({"events": [each]}).encode() for each in made[0]])
        batches = [made[1][at : at + BATCH] for at in range(0, EVENTS, BATCH)]
        batched = timed(url, [json.dumps({"events": batch}).encode() for batch in batches])
    return single, batched


def plain_sqlite(path: Path) -> float:
    """Return the seconds of one row that is stored for sure by itself."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE jobs (id TEXT PRIMARY KEY, digest TEXT)")
    start = time.perf_counter()
    for n in range(1000):
        db.execute("INSERT INTO jobs VALUES (?, ?)", (str(n), "sha256:" + "a" * 64))
    seconds = (time.perf_counter() - start) / 1000
    db.close()
    return seconds


def images(work: Path) -> tuple[float, float]:
    """Return the seconds of one image: its first map, and its second."""
    from hook_service import BEARER, MAP_A, MAP_B, TOKEN, call, event, hook_process
    from programs import wait_for
    from pushed_images import push, settled
    from registry_server import docker_registry

    work.mkdir()
    times = []
    with docker_registry(work / "registry") as registry:
        pushed = [push(registry.host, number) for number in range(IMAGES + 1)]
        bodies = [event(each.name, each.digest) for each in pushed]
        for turn, maps in enumerate((MAP_A, MAP_B)):
            config = _config(work, registry.host, TOKEN, maps, "tls_verify = false")
            with hook_process(config, log=work / "log") as (_, url):
                # One before, so that both workers have started and imported what they need.
                call(
                    f"{url}/v1/events/main",
                    {"events": bodies[:1]},
                    headers={**BEARER, "Content-Type": "application/json"},
                )
                wait_for(lambda done=turn * (IMAGES + 1) + 1: settled(url, done))  # type: ignore[misc]
                start = time.perf_counter()
                call(
                    f"{url}/v1/events/main",
                    {"events": bodies[1:]},
                    headers={**BEARER, "Content-Type": "application/json"},
                )
                wait_for(lambda done=(turn + 1) * (IMAGES + 1): settled(url, done))  # type: ignore[misc]
                times.append((time.perf_counter() - start) / IMAGES)
    return times[0], times[1]


def _config(work: Path, host: str, token: str, uid_map: str, more: str) -> Path:
    (work / "token").write_text(token)
    (work / "token").chmod(0o600)
    path = work / "hook.toml"
    path.write_text(f"""
listen = "127.0.0.1:0"
state = "state"
store = "store"
token_file = "token"
[limits]
burst = 1000000
[retry]
first_seconds = 3600
most_seconds = 3600
[[registry]]
name = "main"
host = "{host}"
{more}
[[map]]
uid_map = ["{uid_map}"]
""")
    return path


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory(prefix="lk-hook-bench-", dir="/var/tmp") as folder:
        for row in rows(Path(folder)):
            print(row["what"], row["ours_s"], row["peer_s"])
