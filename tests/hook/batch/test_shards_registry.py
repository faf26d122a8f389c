"""Shards of a batch with stores of their own, as pods have them, beside a real registry."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Fault, FaultProxy, fault_proxy
from hook_service import MAP_A, MAP_B, call, event, hook, settings
from made_images import MANIFEST, digest
from programs import run_layerkit, wait_for
from pushed_images import Pushed, artifacts, ask, map_of, push
from registry_server import Registry, docker_registry

from layerkit.hook.batch.one_pass import parse_refs, shard_of
from layerkit.hook.work.tasks import execute

IMAGES, FEW, PARTS = 30, 9, 3
INDEXES = "layerkit/indexes"


@dataclass
class Site:
    """A registry with images that share layers across repositories, and a proxy that counts."""

    registry: Registry
    wire: FaultProxy
    folder: Path
    images: list[Pushed]

    @property
    def layers(self) -> set[str]:
        return {layer for each in self.images for layer in each.layers}

    @property
    def listed(self) -> Path:
        path = self.folder / "images.txt"
        path.write_text("".join(f"docker://{self.wire.host}/{each.name}:v1\n" for each in self.images))
        return path

    def part_of(self, image: Pushed, parts: int = PARTS) -> int:
        return shard_of(parse_refs([f"docker://{self.wire.host}/{image.name}:v1"])[0], parts)

    def start(self, part: int, *words: str, parts: int = PARTS, uid_map: str = MAP_A) -> subprocess.Popen[str]:
        """Start one shard, a process with a store and a queue of its own."""
        command = ["batch", "--from", str(self.listed), "--shard", f"{part}/{parts}", "--uid-map", uid_map,
                   "--tls-verify=false", "--store", str(self.folder / f"s{part}"), "--json", *words]  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-m", "layerkit.cli.main", *command],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def reads(self) -> Counter[str]:
        """How often each layer blob was asked for through the wire, and answered with bytes."""
        asked = (path.rpartition("/blobs/")[2] for method, path, passed in list(self.wire.seen)
                 if method == "GET" and passed)  # fmt: skip
        return Counter(at for at in asked if at in self.layers)


@pytest.fixture
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    """A site with few images, or as many as a test is marked with."""
    count = getattr(request, "param", FEW)
    with docker_registry(tmp_path / "registry") as registry, fault_proxy(registry.host) as wire:
        yield Site(registry, wire, tmp_path, [push(registry.host, number) for number in range(count)])


def ended(*shards: subprocess.Popen[str]) -> list[dict[str, Any]]:
    said = []
    for shard in shards:
        out, err = shard.communicate(timeout=240)
        assert shard.returncode == 0, err
        said.append(json.loads(out))
    return said


def figure(done: list[dict[str, Any]], name: str) -> int:
    return sum(job["report"].get(name, 0) for each in done for job in each["jobs"])


@pytest.mark.parametrize("site", [IMAGES], indirect=True)
def test_three_shards_read_each_layer_once(site: Site) -> None:
    """30 images and repositories, 3 processes with stores of their own: one GET for each distinct layer."""
    assert len({site.part_of(each) for each in site.images}) == PARTS
    assert len(site.layers) == 1 + 5 + IMAGES
    done = ended(*[site.start(part, "--wait", "120") for part in range(PARTS)])
    assert site.reads() == Counter(dict.fromkeys(site.layers, 1))
    assert sum(len(each["jobs"]) for each in done) == IMAGES
    for each in site.images:
        (document,) = artifacts(site.registry.host, each)
        assert map_of(document) == "uid=0:100000:65536;gid=0:100000:65536"
        assert digest(ask(site.registry.host, f"{each.name}/manifests/v1", Accept=MANIFEST)[1]) == each.digest
    # What a shard did not read it took from where the others put it, and keeps apart from what it knows.
    assert figure(done, "layers_shared") > 0
    for part in range(PARTS):
        assert (site.folder / f"s{part}/unproven-indexes").is_dir()
        run_layerkit("store", "verify", "--store", str(site.folder / f"s{part}"))

    # New machines, another map: nothing of the stores is left, and no layer is read.
    site.wire.seen.clear()
    again = [site.start(part, "--store", str(site.folder / f"new{part}"), "--wait", "120", uid_map=MAP_B)
             for part in range(PARTS)]  # fmt: skip
    assert figure(ended(*again), "layers_read") == 0
    assert site.reads() == Counter()
    assert [len(artifacts(site.registry.host, each)) for each in site.images] == [2] * IMAGES


def test_a_registry_that_misses_a_blob_for_a_moment_sends_no_shard_off_alone(site: Site) -> None:
    """What docker-registry answers where three begin at once: it writes the link of the same empty blob anew."""
    unknown = json.dumps({"errors": [{"code": "DIGEST_INVALID"}, {"code": "MANIFEST_BLOB_UNKNOWN"}]}).encode()
    site.wire.add(*[Fault("PUT", f"{INDEXES}/manifests/{what}", status=400, body=unknown)
                    for what in ("wanted-", "sha256-")])  # fmt: skip
    done = ended(*[site.start(part, "--wait", "600") for part in range(PARTS)])
    assert site.wire.hits == 2 and [each["failed"] for each in done] == [[]] * PARTS
    assert site.reads() == Counter(dict.fromkeys(site.layers, 1))


def test_what_shards_publish_is_what_one_machine_publishes(site: Site, tmp_path: Path) -> None:
    """The artifacts of images whose layers others have read are, to the byte, those of one who read them all."""
    ended(*[site.start(part, "--wait", "120") for part in range(PARTS)])
    sharded = {each.name: artifacts(site.registry.host, each) for each in site.images}
    with docker_registry(tmp_path / "other") as registry, fault_proxy(registry.host) as wire:
        alone = Site(registry, wire, tmp_path / "alone", [push(registry.host, number) for number in range(FEW)])
        alone.folder.mkdir()
        ended(alone.start(0, parts=1))
        assert {each.name: artifacts(registry.host, each) for each in alone.images} == sharded
        # One machine alone has nobody to share with.
        assert ask(registry.host, f"{INDEXES}/tags/list")[0] == 404


@pytest.mark.parametrize("moment", ["before it says what it needs", "while it reads layers"])
def test_a_shard_that_is_killed_stops_nobody(site: Site, moment: str) -> None:
    """kill -9 of one of three: the others do all of theirs; the one that comes again does the rest."""
    early = moment.startswith("before")
    if early:
        victim = site.start(2, "--wait", "3")
        victim.kill()
        # Longer than one of the two can begin later than the other on a busy machine: it would count as lost too.
        others = [site.start(part, "--wait", "20") for part in range(2)]
    else:
        # Whoever reads layers is slow, so that the victim dies in the middle of one.
        site.wire.add(Fault("GET", "/blobs/sha256", bytes_per_second=300, times=12))
        victim = site.start(2, "--wait", "3")
        others = [site.start(part, "--wait", "3") for part in range(2)]
        wait_for(lambda: b"wanted-" in ask(site.registry.host, f"{INDEXES}/tags/list")[1]
                 and str(ask(site.registry.host, f"{INDEXES}/tags/list")[1]).count("wanted-") == PARTS)  # fmt: skip
        victim.send_signal(signal.SIGKILL)
    victim.wait(30)
    done = ended(*others)
    assert [each["failed"] for each in done] == [[], []]
    for each in site.images:
        assert len(artifacts(site.registry.host, each)) == (site.part_of(each) != 2), each.name
    before = site.reads()
    if early:
        # Its layers passed to the others, and each was still read by one of them only.
        assert set(before.values()) == {1}
    # It begins again on another machine, when the others are long gone.
    (last,) = ended(site.start(2, "--store", str(site.folder / "fresh"), "--wait", "1"))
    assert last["failed"] == []
    assert [len(artifacts(site.registry.host, each)) for each in site.images] == [1] * FEW
    # Only what nobody had published by then is read.
    again = site.reads() - before
    assert len(again) < len(site.layers) and set(again.values()) <= {1}


def test_a_repository_that_takes_no_indexes_costs_reads_and_nothing_else(site: Site) -> None:
    site.wire.add(Fault("POST", f"/v2/{INDEXES}/", status=403, times=None),
                  Fault("PUT", f"/v2/{INDEXES}/", status=403, times=None))  # fmt: skip
    done = ended(*[site.start(part, "--wait", "60") for part in range(PARTS)])
    assert [each["failed"] for each in done] == [[]] * PARTS
    assert [len(artifacts(site.registry.host, each)) for each in site.images] == [1] * FEW
    assert set(site.reads()) == site.layers and max(site.reads().values()) <= PARTS
    # And where none is wanted, none is asked for.
    site.wire.seen.clear()
    ended(site.start(0, "--index-repository", "", "--store", str(site.folder / "none"), uid_map=MAP_B))
    assert not [path for _, path, _ in site.wire.seen if INDEXES in path]


def test_a_forged_index_is_not_used(site: Site) -> None:
    """Somebody who may write to the repository puts each layer's index under another one's tag."""
    ended(*[site.start(part, "--wait", "120") for part in range(PARTS)])
    host = site.registry.host
    tags = [tag for tag in json.loads(ask(host, f"{INDEXES}/tags/list")[1])["tags"] if tag.startswith("sha256-")]
    right = {tag: ask(host, f"{INDEXES}/manifests/{tag}", Accept=MANIFEST)[1] for tag in tags}
    assert len(tags) == len(site.layers)
    for tag, other in zip(tags, [*tags[1:], tags[0]], strict=True):
        assert ask(host, f"{INDEXES}/manifests/{tag}", "PUT", right[other], Content_Type=MANIFEST)[0] == 201
    site.wire.seen.clear()
    again = [site.start(part, "--store", str(site.folder / f"new{part}"), "--wait", "5", uid_map=MAP_B)
             for part in range(PARTS)]  # fmt: skip
    ended(*again)
    assert set(site.reads()) == site.layers
    assert [len(artifacts(host, each)) for each in site.images] == [2] * FEW


def test_two_hooks_with_stores_of_their_own_share(site: Site, tmp_path: Path) -> None:
    """The second hook, on another machine, reads no layer that the first has read; nor do events of it loop."""
    more = {"index_repository": INDEXES}
    for number, text in enumerate((MAP_A, MAP_B)):
        config = settings(tmp_path / f"hook{number}", site.wire.host, maps=(text,), registry=more)
        site.wire.seen.clear()
        with hook(config, execute=execute) as (url, queue):
            pushed = {"events": [event(each.name, each.digest) for each in site.images]}
            assert call(f"{url}/v1/events/main", pushed)[0] == 202
            ours = {"events": [event(INDEXES, site.images[0].digest)]}
            said = json.loads(call(f"{url}/v1/events/main", ours)[2])
            assert said["ignored"] == 1 or "not among the repositories" in json.dumps(said)
            wait_for(lambda queue=queue: queue.stats().depth == 0, seconds=120)  # type: ignore[misc]
            assert queue.stats().states == {"done": FEW}
        assert site.reads() == (Counter(dict.fromkeys(site.layers, 1)) if not number else Counter())


def test_an_interrupt_ends_a_shard_that_reads_or_waits(site: Site) -> None:
    """Ctrl-C while a layer comes slowly: at once, with 130, and no worker is left."""
    site.wire.add(Fault("GET", "/blobs/sha256", bytes_per_second=2, times=None))
    shard = site.start(0, "--wait", "600")
    wait_for(lambda: site.wire.hits)
    shard.send_signal(signal.SIGINT)
    shard.communicate(timeout=60)
    assert shard.returncode == 130

    def left() -> list[str]:
        found = subprocess.run(["pgrep", "-f", str(site.folder)], capture_output=True, text=True)
        return [pid for pid in found.stdout.split() if _runs_layerkit(pid)]

    wait_for(lambda: not left(), "workers live on")


def _runs_layerkit(pid: str) -> bool:
    try:
        return b"layerkit.cli.main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
