"""The hook beside a real registry: pushes that share layers, kills, and a registry that fails."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fault_proxy import Fault, FaultProxy, fault_proxy
from hook_service import BEARER, MAP_A, MAP_B, TOKEN, call, event, hook_process, write_config
from made_images import INDEX, MANIFEST, digest, dump
from programs import answer, free_port, run, run_layerkit, wait_for
from pushed_images import REMAP, Pushed, artifacts, ask, image, map_of, push, settled, states
from registry_server import Registry, docker_registry

IMAGES = 30


@dataclass
class Site:
    """A registry that tells a hook of pushes, and a proxy between the hook and the registry."""

    registry: Registry
    wire: FaultProxy
    folder: Path
    port: int

    def config(self, *maps: str, more: str = "", indexes_in: str = "", drain: int = 5) -> Path:
        registry = f"""index_repository = "{indexes_in}"
[retry]
first_seconds = 0.3
most_seconds = 2
attempts = 200
losses = 1000
"""
        more = f"drain_seconds = {drain}\n{more}"
        return write_config(self.folder, self.wire.host, *maps, port=self.port, more=more, registry=registry)

    def at_work(self, url: str, count: int) -> Callable[[], bool]:
        """Say whether the hook has asked for something since now, or has nothing left to do."""
        before = len(self.wire.seen)
        return lambda: len(self.wire.seen) > before or settled(url, count)

    def blob_reads(self, layers: set[str]) -> Counter[str]:
        """How often each layer blob was asked for through the wire, and answered with bytes."""
        reads: Counter[str] = Counter()
        for method, path, passed in list(self.wire.seen):
            at = path.rpartition("/blobs/")[2]
            if method == "GET" and at in layers and passed:
                reads[at] += 1
        return reads


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    port = free_port()
    notify = f"""
notifications:
  endpoints:
    - name: hook
      url: http://127.0.0.1:{port}/v1/events/main
      timeout: 5s
      threshold: 2
      backoff: 300ms
      headers: {{Authorization: ["Bearer {TOKEN}"]}}
      ignoredmediatypes: [application/octet-stream]
"""
    with docker_registry(tmp_path / "registry", more=notify) as registry, fault_proxy(registry.host) as wire:
        yield Site(registry, wire, tmp_path, port)


def test_thirty_images_that_share_layers(site: Site, tmp_path: Path) -> None:
    """Each distinct layer is read once; a second map reads none; nothing loops; the originals stay."""
    with hook_process(site.config(MAP_A), log=tmp_path / "log") as (_, url):
        images = [push(site.registry.host, number) for number in range(IMAGES)]
        layers = {layer for each in images for layer in each.layers}
        assert len(layers) == 1 + 5 + IMAGES
        wait_for(lambda: settled(url, IMAGES))
        assert site.blob_reads(layers) == Counter(dict.fromkeys(layers, 1))
        for each in images:
            (document,) = artifacts(site.registry.host, each)
            assert map_of(document) == "uid=0:100000:65536;gid=0:100000:65536"
            assert digest(ask(site.registry.host, f"{each.name}/manifests/v1", Accept=MANIFEST)[1]) == each.digest
        # Its own artifacts were told to it too; they end as what they are.
        time.sleep(1.0)
        wait_for(lambda: settled(url, IMAGES))
        assert states(url)["done"] == IMAGES
        jobs = json.loads(call(f"{url}/v1/jobs?limit=1000", headers=BEARER)[2])["jobs"]
        assert {job["why"] for job in jobs if job["state"] == "skipped"} <= {
            f"an artifact ({REMAP})", "no image for the wanted platforms",
        }  # fmt: skip
        figures = call(f"{url}/metrics", headers=BEARER)[2].decode()
        assert f'layerkit_hook_layers_total{{cache="miss"}} {len(layers)}.0' in figures
        assert f'layerkit_hook_layers_total{{cache="hit"}} {IMAGES * 3 - len(layers)}.0' in figures

    before = len(site.wire.seen)
    with hook_process(site.config(MAP_A, MAP_B), log=tmp_path / "log") as (_, url):
        pushed = {"events": [event(each.name, each.digest, tag="v1") for each in images]}
        assert call(f"{url}/v1/events/main", pushed)[0] == 202
        wait_for(lambda: settled(url, 2 * IMAGES))
    site.wire.seen[:] = site.wire.seen[before:]
    assert site.blob_reads(layers) == Counter()
    for each in images:
        assert {map_of(document) for document in artifacts(site.registry.host, each)} == {
            "uid=0:100000:65536;gid=0:100000:65536", "uid=0:300000:65536;gid=0:300000:65536",
        }  # fmt: skip


def test_what_is_published_is_what_a_remap_gives(site: Site, tmp_path: Path) -> None:
    """The META of the hook is the one that ``remap`` makes of the same image, pulled by a foreign tool."""
    from needs import need_tool

    need_tool("skopeo")
    with hook_process(site.config(MAP_A), log=tmp_path / "log") as (_, url):
        pushed = push(site.registry.host, 7)
        wait_for(lambda: settled(url, 1))
    (document,) = artifacts(site.registry.host, pushed)
    layers = document["layers"]
    assert isinstance(layers, list)
    subprocess.run(["skopeo", "copy", "-q", "--src-tls-verify=false", site.registry.ref(f"{pushed.name}:v1"),
                    f"oci:{tmp_path / 'pulled'}:v1"], check=True, timeout=60)  # fmt: skip
    run_layerkit("remap", f"oci:{tmp_path / 'pulled'}:v1", f"oci:{tmp_path / 'mapped'}:v1", "--uid-map", MAP_A,
        "--store", str(tmp_path / "other"))  # fmt: skip
    blob = layers[0]["digest"].partition(":")[2]
    assert (tmp_path / "mapped/blobs/sha256" / blob).exists()


FAULTS = [
    Fault("", "/v2/", status=503, headers={"Retry-After": "0"}, chance=0.06, times=None),
    Fault("", "/v2/", status=500, chance=0.04, times=None),
    Fault("", "/v2/", status=429, headers={"Retry-After": "0"}, chance=0.03, times=None),
    Fault("GET", "/blobs/sha256", reset_after=40, chance=0.15, times=None),
    Fault("GET", "/blobs/sha256", truncate_after=60, chance=0.15, times=None),
    Fault("GET", "/blobs/sha256", corrupt_at=20, chance=0.05, times=None),
    Fault("GET", "/blobs/sha256", bytes_per_second=400, chance=0.05, times=None),
    Fault("GET", "/manifests/", truncate_after=100, chance=0.05, times=None),
    Fault("PUT", "/v2/", lose_answer=True, chance=0.08, times=None),
    Fault("PATCH", "/v2/", reset_upload_after=50, chance=0.1, times=None),
    Fault("POST", "/v2/", lose_answer=True, chance=0.05, times=None),
]


def test_kills_and_a_failing_registry_lose_nothing_and_repeat_nothing(site: Site, tmp_path: Path) -> None:
    """kill -9 again and again, 5xx, resets, slow, cut and changed bodies: in the end one whole artifact each."""
    count = 12 * int(os.environ.get("LAYERKIT_TEST_FUZZ", "1"))
    config = site.config(MAP_A, more="workers = 3", indexes_in="layerkit/indexes")
    log = tmp_path / "log"
    images: list[Pushed] = []
    problems: list[str] = []
    over = threading.Event()

    def watch() -> None:
        """Look all the time whether something half-made can be seen."""
        while not over.is_set():
            for each in list(images):
                try:
                    artifacts(site.registry.host, each)
                except AssertionError as error:
                    problems.append(f"{each.name}: {error}")
            over.wait(0.1)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    rng = random.Random(3)
    site.wire.add(*FAULTS)
    try:
        with hook_process(config, log=log) as (process, url):
            for number in range(count):
                images.append(push(site.registry.host, number))
            process.send_signal(signal.SIGKILL)
        for _ in range(6):
            with hook_process(config, log=log) as (process, url):
                # Both count from when it is at work: on a busy machine it would be killed before that, each time.
                wait_for(site.at_work(url, count))
                stop, hits = time.monotonic() + rng.uniform(1.5, 3.0), site.wire.hits
                wait_for(lambda: time.monotonic() >= stop and (site.wire.hits >= hits + 2 or settled(url, count)))  # noqa: B023
                process.send_signal(signal.SIGKILL)
        site.wire.clear()  # every registry gets well again
        for _ in range(2):
            with hook_process(config, log=log) as (_, url):
                # The registry may still hold back pushes that it could not tell while the hook was down.
                wait_for(lambda: settled(url, count))
                found = states(url)
    finally:
        over.set()
        watcher.join()
    assert problems == []
    assert site.wire.hits >= 10
    assert found["done"] == count and "dead" not in found
    for each in images:
        assert len(artifacts(site.registry.host, each)) == 1, each.name
    left = ["pgrep", "-f", str(config)]
    wait_for(lambda: run(*left, code=None).stdout == "", "workers live on")


def test_one_pass_for_cron(site: Site, tmp_path: Path) -> None:
    images = [push(site.registry.host, number) for number in range(3)]
    host = site.wire.host
    common = ["--tls-verify=false", "--uid-map", MAP_A, "--store", str(tmp_path / "s"), "--engine", "threads"]
    refs = [f"docker://{host}/{each.name}:v1" for each in images]
    done = answer("hook", "run", *refs[:2], *common)
    assert [job["state"] for job in done["jobs"]] == ["done", "done"] and done["failed"] == []
    # Part of it fails: what can be done is done, the exit code is 5, and the message says which.
    failed = run_layerkit("hook", "run", refs[2], f"docker://{host}/team0/app0:absent", *common, code=5)
    assert "1 of 2 failed" in failed.stderr and "team0/app0:absent: not in the registry" in failed.stderr
    assert [len(artifacts(site.registry.host, each)) for each in images] == [1, 1, 1]
    # Once more, without a state: two requests each, no layer, nothing written.
    site.wire.seen.clear()
    again = answer("hook", "run", *refs, *common, "--state", str(tmp_path / "fresh"))
    assert all(job["report"]["existing"] for job in again["jobs"])
    assert not [seen for seen in site.wire.seen if seen[0] not in ("GET", "HEAD") or "/blobs/" in seen[1]]
    unmapped = run_layerkit(
        "hook", "run", refs[0], "--tls-verify=false", "--uid-map", "5:5:1", "--store", str(tmp_path / "s"), code=5
    )
    assert "outside the map" in unmapped.stderr
    tags = answer("hook", "run", f"docker://{host}/{images[0].name}", "--all-tags", *common)
    assert [job["targets"][0]["tag"] for job in tags["jobs"]] == ["v1"]
    shown = answer("hook", "jobs", "--state", str(tmp_path / "s-hook"), "--only", "dead")
    assert len(shown["jobs"]) == 1
    assert "1 jobs" in run_layerkit("hook", "retry", "--all", "--state", str(tmp_path / "s-hook")).stderr
    run_layerkit("hook", "run", "oci:x", *common, code=2)
    run_layerkit("hook", "run", refs[0], code=2)
    run_layerkit("hook", "retry", "--state", str(tmp_path / "s-hook"), code=2)


def test_indexes_are_published_where_that_is_wanted(site: Site, tmp_path: Path) -> None:
    """Once for an image, whatever maps; and a remap from them elsewhere reads no layer."""
    config = site.config(MAP_A, MAP_B, more="publish_indexes = true")
    with hook_process(config, log=tmp_path / "log") as (_, url):
        pushed = push(site.registry.host, 3)
        wait_for(lambda: settled(url, 2))
    listed = json.loads(
        ask(site.registry.host, f"{pushed.name}/manifests/{pushed.digest.replace(':', '-')}", Accept=INDEX)[1]
    )
    kinds = sorted(entry["artifactType"] for entry in listed["manifests"])
    assert kinds == ["application/vnd.layerkit.index.v1", REMAP, REMAP]


def test_statements_are_signed_and_a_node_can_ask_for_them(site: Site, tmp_path: Path) -> None:
    from needs import need_tool

    need_tool("openssl")
    key, public = tmp_path / "sign.key", tmp_path / "sign.pub"
    curve = ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"]
    subprocess.run(["openssl", "genpkey", *curve, "-out", key], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", public], check=True, capture_output=True)
    with hook_process(site.config(MAP_A, more=f'sign_key = "{key}"'), log=tmp_path / "log") as (_, url):
        pushed = push(site.registry.host, 3)
        wait_for(lambda: settled(url, 1))
        jobs = json.loads(call(f"{url}/v1/jobs?state=done", headers=BEARER)[2])["jobs"]
    ref = site.registry.ref(f"{pushed.name}:v1")
    words = [ref, "--uid-map", MAP_A, "--tls-verify=false", "--store", str(tmp_path / "node"), "--json"]
    pulled = json.loads(run_layerkit("pull", *words, "--key", str(public)).stdout)
    assert pulled["published"] == jobs[0]["report"]["artifact"]
    assert pulled["signed"] is True and pulled["refused"] == []
    assert "agrees with the image" in run_layerkit("verify", ref, "--tls-verify=false").stdout
    broken = site.config(MAP_A, more=f'sign_key = "{tmp_path / "absent"}"')
    assert "absent" in run_layerkit("hook", "serve", "--config", str(broken), code=2).stderr


@pytest.mark.parametrize("each", [signal.SIGTERM, signal.SIGINT])
def test_both_signals_drain(site: Site, tmp_path: Path, each: signal.Signals) -> None:
    """A job that runs when the signal comes is finished, the exit code is 0, and its workers are gone."""
    go = threading.Event()
    site.wire.add(Fault("GET", "/blobs/sha256", go=go, times=None))

    def refuses() -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", site.port)) != 0

    with hook_process(site.config(MAP_A, drain=50), log=tmp_path / "log") as (process, url):
        pushed = push(site.registry.host, 4)
        wait_for(lambda: states(url).get("running"))
        process.send_signal(each)
        # It takes nothing more from here on, and the job still waits for its first layer.
        wait_for(refuses)
        go.set()
        assert process.wait(120) == 0
    assert len(artifacts(site.registry.host, pushed)) == 1
    with contextlib.closing(__import__("sqlite3").connect(tmp_path / "state/queue.sqlite")) as db:
        assert db.execute("SELECT state FROM jobs WHERE digest = ?", (pushed.digest,)).fetchone() == ("done",)


def test_an_index_is_done_for_each_platform(site: Site, tmp_path: Path) -> None:
    size = len(image(1)[0])
    with hook_process(site.config(MAP_A), log=tmp_path / "log") as (_, url):
        one = push(site.registry.host, 1)
        host, name = site.registry.host, one.name
        attested = {"vnd.docker.reference.type": "attestation-manifest"}
        entries = [
            {"mediaType": MANIFEST, "digest": one.digest, "size": size, **more,
             "platform": {"os": os_, "architecture": arch}}
            for os_, arch, more in (
                ("linux", "amd64", {}), ("windows", "amd64", {}), ("unknown", "unknown", {"annotations": attested})
            )
        ]  # fmt: skip
        index = dump({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries})
        assert ask(host, f"{name}/manifests/multi", "PUT", index, Content_Type=INDEX)[0] == 201
        wait_for(lambda: settled(url, 2))
        jobs = json.loads(call(f"{url}/v1/jobs?limit=99", headers=BEARER)[2])["jobs"]
        (parent,) = [job for job in jobs if job["digest"] == digest(index)]
        assert parent["state"] == "done" and parent["report"]["children"] == [one.digest]
    ref = f"docker://{site.wire.host}/{name}:multi"
    run_layerkit("hook", "run", ref, "--tls-verify=false", "--uid-map", MAP_B, "--store", str(tmp_path / "s"), "-q")
    assert len(artifacts(site.registry.host, one)) == 2
