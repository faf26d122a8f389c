"""The worker: never more at once than allowed, failures and successes told as what they are."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hook_service import settings
from programs import wait_for

from layerkit.formats.oci import documents as oci
from layerkit.formats.oci.images import no_image, wanted
from layerkit.hook.config import Config
from layerkit.hook.queue import Outcome, Queue, Target, Wish
from layerkit.hook.telemetry import Metrics
from layerkit.hook.work.tasks import Task
from layerkit.hook.work.worker import QueueWorker
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.limits import DEFAULT


def wishes(config: Config, count: int, registry: str = "main") -> list[Wish]:
    return [
        Wish(key, Target(registry, "app"))
        for n in range(count)
        for key in config.keys(Digest.of(b"%s%d" % (registry.encode(), n)))
    ]


def make(config: Config, queue: Queue, execute: Any, executor: Any = None) -> QueueWorker:
    return QueueWorker(config, queue, executor or (lambda: ThreadPoolExecutor(64)), execute, Metrics(queue.stats))


def test_never_more_at_once_than_workers(tmp_path: Path) -> None:
    """The queue holds what waits, not a pool behind a pool."""
    now, most, lock = 0, 0, threading.Lock()

    def execute(task: Task) -> Outcome:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.005)
        with lock:
            now -= 1
        return Outcome("done")

    config = settings(tmp_path, workers=3)
    with closing(Queue(config.state)) as queue:
        queue.add(wishes(config, 200))
        worker = make(config, queue, execute)
        worker.start()
        seen = 0
        while queue.stats().depth:
            seen = max(seen, queue.stats().states.get("running", 0))
            time.sleep(0.01)
        worker.stop()
        assert most <= 3 and seen <= 3
        assert queue.stats().states == {"done": 200}


def test_a_registry_is_not_asked_by_more_than_its_share_and_others_go_on(tmp_path: Path) -> None:
    config = settings(tmp_path, registry={"concurrency": 2}, workers=8)
    from dataclasses import replace

    other = replace(config.registries["main"], name="other", host="other.example", concurrency=8)
    config = replace(config, registries={**config.registries, "other": other})
    now: dict[str, int] = {}
    most: dict[str, int] = {}
    lock = threading.Lock()

    def execute(task: Task) -> Outcome:
        host = task.targets[0].host
        with lock:
            now[host] = now.get(host, 0) + 1
            most[host] = max(most.get(host, 0), now[host])
        # Nobody ends before as many run as may: a claim can take longer than any job here.
        wait_for(lambda: most.get("127.0.0.1:1", 0) >= 2 and most.get("other.example", 0) >= 3)
        time.sleep(0.02)
        with lock:
            now[host] -= 1
        return Outcome("done")

    with closing(Queue(config.state)) as queue:
        queue.add([*wishes(config, 20), *wishes(config, 20, "other")])
        worker = make(config, queue, execute)
        worker.start()
        wait_for(lambda: not queue.stats().depth)
        worker.stop()
    assert most["127.0.0.1:1"] == 2
    assert 2 < most["other.example"] <= 8


def test_a_success_after_a_failure_is_a_success(tmp_path: Path) -> None:
    tries: list[int] = []

    def execute(task: Task) -> Outcome:
        tries.append(1)
        return Outcome("failed", "HTTP 503") if len(tries) < 3 else Outcome("done", report={"bytes_read": 1})

    config = settings(tmp_path, retry={"first_seconds": 0.05})
    with closing(Queue(config.state, config.policy)) as queue:
        (added,) = queue.add(wishes(config, 1))
        worker = make(config, queue, execute)
        worker.start()
        wait_for(lambda: not queue.stats().depth)
        worker.stop()
        row = queue.job(added.job)
    assert (row.state, row.why, len(tries)) == ("done", "", 3)


def test_a_tag_that_moves_is_two_jobs(tmp_path: Path) -> None:
    """The key is what was pushed, not what it was called."""
    config = settings(tmp_path)
    with closing(Queue(config.state)) as queue:
        before, after = (
            queue.add([Wish(config.keys(Digest.of(data))[0], Target("main", "app", "latest"))])[0]
            for data in (b"yesterday", b"today")
        )
        assert before.job != after.job and before.new and after.new


class Breaking(ThreadPoolExecutor):
    """An executor whose first job kills it, as a worker process that dies does."""

    broken = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        return super().submit(self._maybe, fn, *args)

    def _maybe(self, fn: Any, *args: Any) -> Any:
        if Breaking.broken < 2:
            Breaking.broken += 1
            raise BrokenProcessPool("a worker died")
        return fn(*args)


def test_a_broken_pool_is_replaced_and_costs_a_loss_not_an_attempt(tmp_path: Path) -> None:
    made: list[Executor] = []

    def executor() -> Executor:
        made.append(Breaking(4))
        return made[-1]

    config = settings(tmp_path, workers=1)
    Breaking.broken = 0
    with closing(Queue(config.state)) as queue:
        (added,) = queue.add(wishes(config, 1))
        worker = make(config, queue, lambda task: Outcome("done"), executor)
        worker.start()
        wait_for(lambda: not queue.stats().depth)
        worker.stop()
        assert queue.job(added.job).state == "done"
    assert len(made) == 3


def test_a_fault_of_ours_ends_neither_the_worker_nor_the_job(tmp_path: Path) -> None:
    config = settings(tmp_path, retry={"first_seconds": 0.01, "attempts": 2})

    def execute(task: Task) -> Outcome:
        raise RuntimeError("a fault")

    with closing(Queue(config.state, config.policy)) as queue:
        queue.add(wishes(config, 2))
        worker = make(config, queue, execute)
        worker.start()
        wait_for(lambda: not queue.stats().depth)
        assert worker.healthy
        worker.stop()
        assert [row.why for row in queue.jobs("dead")] == ["RuntimeError: a fault"] * 2


def test_settings_that_changed_since(tmp_path: Path) -> None:
    """A job for a repository that is served no more ends without anybody being asked."""
    config = settings(tmp_path, registry={"repositories": ["other/**"]})
    with closing(Queue(config.state)) as queue:
        queue.add([*wishes(config, 1), *wishes(config, 1, "removed")])
        worker = make(config, queue, lambda task: pytest.fail("was run"))
        worker.start()
        wait_for(lambda: not queue.stats().depth)
        worker.stop()
        assert {row.why for row in queue.jobs("gone")} == {"none of its repositories is served any more"}


EMPTY = "application/vnd.oci.empty.v1+json"
LAYER = oci.LAYER_GZIP


@pytest.mark.parametrize(
    ("config", "layers", "kind", "image"),
    [
        (oci.CONFIG, [LAYER], "", True),
        (oci.DOCKER_CONFIG, ["application/vnd.docker.image.rootfs.diff.tar.gzip"], "", True),
        (oci.CONFIG, [], "", True),
        (EMPTY, [EMPTY], "application/vnd.layerkit.remap.v1", False),
        (oci.CONFIG, [LAYER], "application/vnd.layerkit.remap.v1", False),
        (
            "application/vnd.cncf.helm.config.v1+json",
            ["application/vnd.cncf.helm.chart.content.v1.tar+gzip"],
            "",
            False,
        ),
        (oci.CONFIG, ["application/vnd.dev.cosign.simplesigning.v1+json"], "", False),
        (oci.CONFIG, ["application/vnd.in-toto+json"], "", False),
    ],
)
def test_what_is_an_image_is_told_by_its_manifest(config: str, layers: list[str], kind: str, image: bool) -> None:
    """The guard against working on one's own output looks at no tag."""
    digest = Digest.of(b"x")
    data = oci.manifest_json(
        Descriptor(config, digest, 1), [Descriptor(layer, digest, 1) for layer in layers], artifact_type=kind
    )
    entry = Descriptor(oci.MANIFEST, Digest.of(data), len(data))
    assert (no_image(data, entry, DEFAULT) == "") is image


def test_which_manifests_of_an_index_are_wanted() -> None:
    from layerkit.model.descriptor import Platform

    def entry(number: int, text: str, **more: Any) -> Descriptor:
        return Descriptor(
            oci.MANIFEST, Digest.of(b"%d" % number), 1, platform=Platform.parse(text) if text else None, **more
        )

    entries = [
        entry(0, "linux/amd64"), entry(1, "linux/arm64/v8"), entry(2, "windows/amd64"), entry(3, ""),
        entry(4, "unknown/unknown", annotations={"vnd.docker.reference.type": "attestation-manifest"}),
        entry(5, "", artifact_type="application/vnd.layerkit.remap.v1"), entry(0, "linux/amd64"),
    ]  # fmt: skip
    data = oci.index_json(entries)
    top = Descriptor(oci.INDEX, Digest.of(data), len(data))
    assert wanted(data, top, (), DEFAULT) == tuple(entries[n].digest for n in (0, 1, 3))
    assert wanted(data, top, ("linux/arm64/v8",), DEFAULT) == tuple(entries[n].digest for n in (1, 3))
