"""The hook's door: who gets in, with what, and what is stored when the answer comes."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import socket
import threading
import time
from pathlib import Path
from typing import Any

from hook_service import BEARER, MAP_A, MAP_B, TOKEN, call, event, hook, settings
from programs import wait_for

from layerkit.hook import telemetry
from layerkit.hook.front.guard import Buckets, Token
from layerkit.hook.queue import Outcome
from layerkit.hook.telemetry import JsonFormatter
from layerkit.hook.work.tasks import Task
from layerkit.model.digest import Digest
from layerkit.model.errors import RegistryError

DIGEST = str(Digest.of(b"one"))
JSON = {"Content-Type": "application/json"}


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode()


def test_the_token_and_nothing_else_opens(tmp_path: Path) -> None:
    wrong = [
        "", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer", "Bearer ", TOKEN, f"Token {TOKEN}", basic("no"),
        "Basic !!!", "Basic " + base64.b64encode(TOKEN.encode()).decode(), f"Bearer {TOKEN.upper()}",
    ]  # fmt: skip
    with hook(settings(tmp_path)) as (url, queue):
        for path in ("/", "/metrics", "/v1/jobs", "/v1/status", "/health", "/nowhere"):
            assert call(url + path, headers={})[0] == 401
        for header in wrong:
            status, headers, body = call(
                f"{url}/v1/events", {"events": [event("a", DIGEST)]}, headers={**JSON, "Authorization": header}
            )
            assert status == 401, header
            assert TOKEN.encode() not in body
            assert "WWW-Authenticate" in {name.title().replace("Www", "WWW"): 1 for name in headers}
        assert queue.stats().depth == 0
        for header in (f"Bearer {TOKEN}", f"bearer  {TOKEN}", basic(TOKEN)):
            assert call(f"{url}/health", headers={"Authorization": header})[0] == 200
        # Probes of an orchestrator have no token; they learn nothing but yes or no.
        assert json.loads(call(f"{url}/healthz", headers={})[2]) == {"status": "ok"}
        assert call(f"{url}/readyz", headers={})[0] == 200


def test_two_authorization_headers_are_none() -> None:
    assert Token(TOKEN).matches(f"Bearer {TOKEN}")
    assert not Token(TOKEN).matches(None)
    assert not Token(TOKEN).matches("Bearer " + "x" * 100_000)


def test_events_are_stored_before_they_are_acknowledged(tmp_path: Path) -> None:
    with hook(settings(tmp_path, maps=(MAP_A, MAP_B))) as (url, queue):
        body = {"events": [event("team/app", DIGEST, tag="v1"), event("team/app", DIGEST), event("b", DIGEST)]}
        for path in ("/v1/events/main", "/v1/events", "/registry/notifications"):
            status, _, answer = call(url + path, body)
            assert status == 202
        found = json.loads(answer)
        assert found["count"] == 4  # two maps for two repositories
        assert queue.stats().states == {"waiting": 2}
        (job, _) = queue.jobs()
        assert {t.repository for t in job.targets} == {"team/app", "b"}
        shown = json.loads(call(f"{url}/v1/jobs/{job.job}", headers=BEARER)[2])
        assert shown["digest"] == DIGEST and shown["state"] == "waiting"
        assert call(f"{url}/v1/jobs/nothing", headers=BEARER)[0] == 404
        assert call(f"{url}/v1/events/other", body)[0] == 404


def test_repositories_and_registries_that_are_not_served_are_left_out(tmp_path: Path) -> None:
    served: dict[str, Any] = {"registry": {"repositories": ["team/*", "deep/**"], "aliases": ["mirror.example"]}}
    with hook(settings(tmp_path, **served)) as (url, queue):
        names = ["team/app", "team/app/x", "deep/a/b/c", "deep", "other", "xteam/app"]
        body = json.loads(call(f"{url}/v1/events/main", {"events": [event(n, DIGEST) for n in names]})[2])
        assert body["ignored"] == 4
        (job,) = queue.jobs()
        assert {t.repository for t in job.targets} == {"team/app", "deep/a/b/c"}
        assert call(f"{url}/v1/jobs", {"repository": "other", "reference": "v1"})[0] == 403
        assert call(f"{url}/v1/jobs", {"repository": "team/app", "reference": "v1", "registry": "x"})[0] == 404


def test_with_several_registries_an_event_must_name_one(tmp_path: Path) -> None:
    registries = [{"name": n, "host": f"{n}.example:5000", "aliases": [f"{n}.alias"]} for n in ("one", "two")]
    config = settings(tmp_path)
    from layerkit.formats.toml_settings import Table
    from layerkit.hook.config import Config

    values = {"registry": registries, "map": [{"uid_map": [MAP_A]}], "state": str(tmp_path / "s"),
              "store": str(tmp_path / "t")}  # fmt: skip
    config = Config.read(Table(values, "t", tmp_path))
    with hook(config) as (url, queue):
        for host, want in (("two.example:5000", 1), ("two.alias", 1), ("evil.example", 0), ("", 0)):
            body = json.loads(call(f"{url}/v1/events", {"events": [event("a", DIGEST, host=host)]})[2])
            assert body["count"] == want, host
        call(f"{url}/v1/events/one", {"events": [event("a", DIGEST, host="evil.example")]})
        assert {t.registry for t in queue.jobs()[0].targets} == {"one", "two"}


def test_a_tag_is_resolved_at_once_and_a_registry_that_is_away_means_come_again(tmp_path: Path) -> None:
    asked: list[tuple[str, str, str]] = []

    def resolve(registry: Any, repository: str, tag: str) -> Digest:
        asked.append((registry.host, repository, tag))
        if tag == "down":
            raise RegistryError("registry", 503, "the registry failed", temporary=True)
        return Digest.of(tag.encode())

    with hook(settings(tmp_path, "configured.example:5000"), resolve=resolve) as (url, queue):
        assert call(f"{url}/v1/jobs", {"repository": "a", "reference": "v1"})[0] == 202
        assert queue.jobs()[0].digest == str(Digest.of(b"v1"))
        mixed = {"events": [event("a", DIGEST), event("a", "", tag="down")]}
        status, headers, _ = call(f"{url}/v1/events/main", mixed)
        assert status == 503 and headers["retry-after"]
        # Nothing of a refused request is stored: the sender repeats all of it.
        assert len(queue.jobs()) == 1
    assert {host for host, _, _ in asked} == {"configured.example:5000"}


def test_no_url_of_an_event_is_ever_opened(tmp_path: Path) -> None:
    """SSRF: a listener that no request may reach, under every name that an event has for a place."""
    hits: list[bytes] = []
    trap = socket.create_server(("127.0.0.1", 0))
    place = f"127.0.0.1:{trap.getsockname()[1]}"

    def listen() -> None:
        while True:
            try:
                connection, _ = trap.accept()
            except OSError:
                return
            hits.append(connection.recv(100))
            connection.close()

    threading.Thread(target=listen, daemon=True).start()
    done: list[Task] = []

    def execute(task: Task) -> Outcome:
        done.append(task)
        return Outcome("done")

    evil = f"http://{place}/v2/a/manifests/{DIGEST}"
    with hook(settings(tmp_path, "configured.example"), execute=execute) as (url, queue):
        pushed = event("a", DIGEST, tag="v1", host=place, url=evil, href=evil)
        pushed |= {"source": {"addr": place}, "callback": evil, "actor": {"name": evil}}
        harbor = {"type": "PUSH_ARTIFACT", "event_data": {
            "resources": [{"digest": DIGEST, "tag": "v1", "resource_url": evil}],
            "repository": {"repo_full_name": "a", "url": evil}}}  # fmt: skip
        zot = {"specversion": "1.0", "id": "1", "source": f"http://{place}", "type": "zotregistry.image.updated",
               "dataschema": evil,
               "data": {"name": "a", "digest": DIGEST, "reference": "v1", "manifest": evil}}  # fmt: skip
        for body in ({"events": [pushed]}, harbor, zot, {"events": [event(f"{place}/a", DIGEST)]}):
            assert call(f"{url}/v1/events/main", body)[0] == 202
        job = {"repository": "a", "reference": "v1", "registry": place}
        assert call(f"{url}/v1/jobs", job)[0] == 404
        assert call(f"{url}/v1/jobs", {"repository": "a", "reference": "v1", "url": evil})[0] == 400
        wait_for(lambda: queue.stats().depth == 0)
    trap.close()
    assert hits == []
    assert {place.host for task in done for place in task.targets} == {"configured.example"}


def test_bodies_have_a_bound_and_a_type(tmp_path: Path) -> None:
    with hook(settings(tmp_path, limits={"body_bytes": 2048, "events": 3})) as (url, queue):
        at = f"{url}/v1/events/main"
        assert call(at, raw=b"x" * 2049)[0] == 413
        assert call(at, raw=b" " * 2048)[0] == 400
        assert call(at, {"events": [event("a", DIGEST)] * 4})[0] == 400
        assert call(at, {"events": []}, headers={**BEARER, "Content-Type": "text/plain"})[0] == 415
        assert (
            call(at, {"events": []}, headers={**BEARER, "Content-Type": "application/x-www-form-urlencoded"})[0]
            == 415
        )
        assert call(at, {"events": []}, headers={**BEARER, **JSON, "Content-Encoding": "gzip"})[0] == 415
        assert (
            call(at, {"events": []}, headers={**BEARER, "Content-Type": "application/vnd.x+json; charset=utf-8"})[0]
            == 202
        )
        vendor = {**BEARER, "Content-Type": "application/vnd.x+json; charset=utf-8"}
        assert call(at, {"events": []}, headers=vendor)[0] == 202
        assert call(at, headers=BEARER)[0] == 405
        # A body without a length is counted as it comes.
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as sock:
            head = f"POST /v1/events/main HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
            head += "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
            sock.sendall(head.encode())
            for _ in range(5):
                sock.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
            assert b"413" in sock.recv(4096).splitlines()[0]
        assert queue.stats().depth == 0


def test_too_many_requests_wait_and_others_do_not_suffer(tmp_path: Path) -> None:
    with hook(settings(tmp_path, limits={"rate": 0.001, "burst": 5, "failures": 3})) as (url, _):
        codes = [call(f"{url}/health", headers=BEARER)[0] for _ in range(8)]
        assert codes == [200] * 5 + [429] * 3
        assert call(f"{url}/healthz", headers={})[0] == 200


def test_guessing_the_token_is_slow(tmp_path: Path) -> None:
    with hook(settings(tmp_path, limits={"failures": 3})) as (url, _):
        codes = [call(f"{url}/health", headers={"Authorization": "Bearer wrong"})[0] for _ in range(6)]
        assert codes == [401] * 3 + [429] * 3
        # The right one does not help this address either: an oracle would be one.
        assert call(f"{url}/health", headers=BEARER)[0] == 429


def test_buckets_are_bounded_and_fill_again() -> None:
    now = [0.0]
    buckets = Buckets(2.0, 2, lambda: now[0])
    assert [buckets.wait("a") for _ in range(3)] == [0.0, 0.0, 0.5]
    assert buckets.wait("b") == 0.0
    now[0] = 0.5
    assert buckets.wait("a") == 0.0
    for n in range(20_000):
        buckets.wait(str(n))
    assert len(buckets._level) <= 10_000


def test_jobs_metrics_and_retry(tmp_path: Path) -> None:
    outcomes = {
        str(Digest.of(b"done")): Outcome("done", report={"bytes_read": 7, "bytes_written": 3, "bytes_mounted": 2,
                                                         "bytes_avoided": 11, "layers_read": 1, "layers_kept": 4}),
        str(Digest.of(b"bad")): Outcome("failed", "no", permanent=True),
        str(Digest.of(b"art")): Outcome("skipped", "an artifact"),
    }  # fmt: skip
    with hook(settings(tmp_path), execute=lambda task: outcomes[str(task.digest)]) as (url, queue):
        call(f"{url}/v1/events/main", {"events": [event("a", digest) for digest in outcomes]})
        wait_for(lambda: queue.stats().depth == 0)
        wanted = (
            'layerkit_hook_jobs_total{result="done"} 1.0', 'layerkit_hook_jobs_total{result="dead"} 1.0',
            'layerkit_hook_jobs_total{result="skipped"} 1.0', 'layerkit_hook_bytes_total{what="read"} 7.0',
            'layerkit_hook_bytes_total{what="written"} 3.0', 'layerkit_hook_bytes_total{what="mounted"} 2.0',
            'layerkit_hook_bytes_total{what="avoided"} 11.0', 'layerkit_hook_layers_total{cache="hit"} 4.0',
            'layerkit_hook_layers_total{cache="miss"} 1.0', "layerkit_hook_queue_depth 0.0",
            "layerkit_hook_queue_oldest_seconds 0.0", 'layerkit_hook_queue_jobs{state="dead"} 1.0',
            'layerkit_hook_events_total{kind="distribution",result="new"} 3.0',
            'layerkit_hook_job_seconds_count{result="done"} 1.0',
        )  # fmt: skip

        def missing() -> set[str]:
            return set(wanted) - set(call(f"{url}/metrics", headers=BEARER)[2].decode().splitlines())

        # A job has ended in the queue before it is counted here.
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: not missing(), seconds=20)
        assert not missing()
        (dead,) = json.loads(call(f"{url}/v1/jobs?state=dead", headers=BEARER)[2])["jobs"]
        assert dead["why"] == "no"
        outcomes[dead["digest"]] = Outcome("done")
        # A retry is a POST of JSON: a page of somebody else in a browser cannot send one.
        assert call(f"{url}/v1/jobs/{dead['id']}/retry", raw=b"", headers=BEARER)[0] == 415
        assert call(f"{url}/v1/jobs/{dead['id']}/retry", {})[0] == 202
        wait_for(lambda: queue.job(dead["id"]).state == "done")
        assert call(f"{url}/v1/jobs/{dead['id']}/retry", {})[0] == 409
        for wrong in ("state=x", "limit=0", "limit=x", "limit=100000"):
            assert call(f"{url}/v1/jobs?{wrong}", headers=BEARER)[0] == 400


def test_ten_thousand_events_in_a_burst(tmp_path: Path) -> None:
    """One event in each request, from eight senders, half of them repeated: nothing lost, one job each."""
    senders, each = 8, 1250
    digests = [str(Digest.of(b"%d" % n)) for n in range(senders * each // 2)]
    codes: list[int] = []

    def send(which: int) -> None:
        import http.client

        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)
        for n in range(each):
            digest = digests[(which * each + n) % len(digests)]
            connection.request(
                "POST", "/v1/events/main", json.dumps({"events": [event("a", digest)]}), {**BEARER, **JSON}
            )
            answer = connection.getresponse()
            answer.read()
            codes.append(answer.status)
        connection.close()

    with hook(settings(tmp_path)) as (url, queue):
        start = time.monotonic()
        threads = [threading.Thread(target=send, args=(n,)) for n in range(senders)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - start
        assert codes == [202] * 10_000
        assert queue.stats().states == {"waiting": len(digests)}
        print(f"{10_000 / seconds:.0f} requests a second")
        # And the same as one request for each thousand.
        again = [event("b", digest) for digest in digests]
        for at in range(0, len(again), 1000):
            assert call(f"{url}/v1/events/main", {"events": again[at : at + 1000]})[0] == 202
        assert queue.stats().states == {"waiting": len(digests)}


def test_not_ready_while_it_stops(tmp_path: Path) -> None:
    release = threading.Event()

    def slow(task: Task) -> Outcome:
        release.wait(30)
        return Outcome("done")

    config = settings(tmp_path, drain_seconds=20.0)
    with hook(config, execute=slow) as (url, queue):
        call(f"{url}/v1/events/main", {"events": [event("a", DIGEST), event("a", str(Digest.of(b"2")))]})
        wait_for(lambda: queue.stats().states.get("running") == 2)
        threading.Timer(0.5, release.set).start()
    from layerkit.hook.queue import Queue

    # What ran when the stop came was let finish and is stored.
    assert Queue(config.state).stats().states == {"done": 2}


def test_what_does_not_end_in_time_goes_back_uncounted(tmp_path: Path) -> None:
    release = threading.Event()

    def stuck(task: Task) -> Outcome:
        release.wait(30)
        return Outcome("done")

    config = settings(tmp_path, drain_seconds=0.2)
    with hook(config, execute=stuck) as (url, queue):
        call(f"{url}/v1/events/main", {"events": [event("a", DIGEST)]})
        wait_for(lambda: queue.stats().states.get("running") == 1)
    release.set()
    from layerkit.hook.queue import Queue

    left = Queue(config.state)
    assert left.stats().states == {"waiting": 1}
    assert left.claim(1)[0].attempt == 1


def test_logs_are_json_and_hold_no_secret() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter([TOKEN, 'quo"ted-secret']))
    log = logging.getLogger("layerkit.test-hook")
    log.propagate = False
    log.addHandler(handler)
    log.warning("token %s", TOKEN, extra={"header": f"Bearer {TOKEN}", "url": "https://user:pass@host/x", "n": 1})
    log.warning('a quo"ted-secret', extra={"authorization": "Basic dXNlcjpwYXNzd29yZA=="})
    try:
        raise ValueError(TOKEN)
    except ValueError:
        log.exception("failed\nwith two lines")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert [json.loads(line)["level"] for line in lines] == ["warning", "warning", "error"]
    for secret in (TOKEN, "pass@", "ted-secret", "dXNlcjpwYXNzd29yZA"):
        assert secret not in stream.getvalue()
    assert json.loads(lines[0])["n"] == 1


def test_spans_go_to_opentelemetry_where_it_is_installed(tmp_path: Path) -> None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(provider)
    telemetry._tracer.cache_clear()
    with hook(settings(tmp_path), execute=lambda task: Outcome("done")) as (url, queue):
        call(f"{url}/v1/events/main", {"events": [event("a", DIGEST)]})
        wait_for(lambda: queue.stats().states == {"done": 1})
    assert {span.name for span in spans.get_finished_spans()} == {"hook.events", "hook.job"}
