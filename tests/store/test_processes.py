"""Several processes on one store, killed at any moment, and disks that fill up."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import disk
from made_layers import make_image, put, put_meta, random_layer, state
from programs import KIT

from layerkit.model.errors import StoreError
from layerkit.store.fsck import Severity
from layerkit.store.local import LocalStore

FUZZ = int(os.environ.get("LAYERKIT_TEST_FUZZ", "1"))

WORKER = """
import contextlib, random, sys
from pathlib import Path
from made_layers import make_image, put, put_meta, random_layer
from layerkit.model.errors import NotFound, StoreError
from layerkit.store.local import LocalStore

root, mode, seed, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rng = random.Random(seed)
work = 0
print("ready", flush=True)
for _ in range(rounds):
    with LocalStore.open(root) as store:
        for number in rng.sample(range(6), 6):
            layer = random_layer(number)
            backend = rng.choice(["tar", "objects"]) if mode != "tar" else "tar"
            with store.hold():
                with store.layer_lock(layer.diff_id):
                    if not store.has_layer(layer.diff_id, backend):
                        work += 1
                        put(store, layer, backend)
                key = f"{number:064x}"
                with store.meta_lock(key):
                    if store.meta(key) is None:
                        put_meta(store, key)
                store.add_image(make_image(layer, name=str(number)), [str(number)], metas=[key])
                assert store.has_layer(layer.diff_id, backend) and store.meta(key)
            if mode == "mixed" and rng.random() < 0.5:
                with contextlib.suppress(NotFound):  # the other process was quicker
                    store.remove_image(str(number))
                try:
                    store.gc(wait_seconds=0.2)
                except StoreError as error:
                    assert "process" in str(error)
print("work", work, flush=True)
"""


def start(root: Path, mode: str, seed: int, rounds: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": f"{KIT}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(root), mode, str(seed), str(rounds)],
        stdout=subprocess.PIPE, env=environment,
    )  # fmt: skip


def finish(workers: list[subprocess.Popen[bytes]]) -> list[int]:
    works = []
    for worker in workers:
        out, _ = worker.communicate(timeout=120)
        assert worker.returncode == 0
        works.append(int(out.split()[-1]))
    return works


def test_processes_that_import_the_same_layers_share_the_work(tmp_path: Path) -> None:
    works = finish([start(tmp_path / "store", "tar", seed, 1) for seed in range(4)])
    assert sum(works) == 6  # each layer was written once, whoever came first
    with LocalStore.open(tmp_path / "store") as store:
        assert store.verify() == []
        assert len(store.ls()) == 6


def test_commits_of_one_layer_at_once_both_succeed(tmp_path: Path) -> None:
    layers = [random_layer(1), random_layer(2)]
    with LocalStore.open(tmp_path / "store") as one, LocalStore.open(tmp_path / "store") as two:
        for layer in layers:
            for backend in ("tar", "objects"):
                writers = [store.begin_layer(backend) for store in (one, two)]
                for writer in writers:
                    writer.write(memoryview(layer.tar))
                for writer in writers:
                    writer.commit(layer.index)
        assert one.verify() == []


def test_importing_removing_and_collecting_at_once(tmp_path: Path) -> None:
    finish([start(tmp_path / "store", "mixed", seed, 2 * FUZZ) for seed in range(3)])
    with LocalStore.open(tmp_path / "store") as store:
        assert store.verify() == []


def test_a_kill_at_any_moment_leaves_a_whole_store(tmp_path: Path) -> None:
    root = tmp_path / "store"
    rng = random.Random(2)
    leftovers = 0
    for number in range(60 * FUZZ):
        if number >= 10 * FUZZ and leftovers:
            break
        workers = [start(root, "mixed", 100 * number + i, 50) for i in range(2)]
        for worker in workers:
            assert worker.stdout is not None
            worker.stdout.readline()
        # Later where no kill came in the middle of anything so far: the machine is busy.
        time.sleep(rng.random() * (0.25 if leftovers else 0.25 + 0.05 * number))
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
            worker.wait()
            assert worker.stdout is not None
            worker.stdout.close()
        with LocalStore.open(root) as store:
            found = store.verify()
            assert [f for f in found if f.severity is Severity.DAMAGE] == []
            leftovers += len(found)
            if number % 2:
                store.gc(wait_seconds=5)
                assert store.verify() == []
        if number % 2:
            assert not any((root / "tmp").iterdir())
    assert leftovers, "no kill came in the middle of anything"
    assert finish([start(root, "mixed", 1, 1)])
    with LocalStore.open(root) as store:
        for stored in store.images():
            for name in stored.names:
                store.remove_image(name)
        store.gc()
        assert state(store) == set()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disk(tmp_path, "ext4", "-N", "600", "-m", "0", "-E", "nodiscard", size=12 << 20, whole=True) as small:
        yield small


@pytest.mark.parametrize("backend", ["tar", "objects"])
def test_a_full_disk_is_an_error_that_leaves_nothing(small_disk: Path, backend: str) -> None:
    base, layer = random_layer(50, 10), random_layer(51, 40, 60_000)
    image = make_image(base)
    with LocalStore.open(small_disk / "store") as store:
        put(store, base, backend)
        store.add_image(image, ["base"])
        before = state(store)
        failures = 0
        # From "nothing fits" to "all fits", so that the disk fills up in every step there is.
        for free in (8 << 10, 64 << 10, 256 << 10, 700 << 10, *range(1100 << 10, 2800 << 10, 100 << 10)):
            facts = os.statvfs(small_disk)
            filler = small_disk / "filler"
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, facts.f_bavail * facts.f_frsize - free))
            try:
                put(store, layer, backend)
                put_meta(store, "ab" * 32, bytes(200_000))
            except StoreError as error:
                failures += 1
                assert "the disk is full while" in str(error)
                assert "nothing of it was kept" in str(error)
            filler.unlink()
            left = state(store) - before
            if store.has_layer(layer.diff_id, backend):
                assert [f for f in store.verify() if f.is_damage] == []
                assert any("meta" in p for p in left) == (store.meta("ab" * 32) is not None)
            else:
                assert left == set(), free
                assert store.verify() == []
            store.gc()
            assert state(store) == before
        assert 3 < failures < 20


def test_a_disk_without_inodes_is_an_error_that_leaves_nothing(small_disk: Path) -> None:
    layer = random_layer(52, 900, 100)
    with LocalStore.open(small_disk / "store") as store:
        before = state(store)
        with pytest.raises(StoreError, match="inodes are free"):
            put(store, layer, "objects")
        assert state(store) == before
        put(store, layer, "tar")
        with pytest.raises(StoreError, match="the disk is full"):
            store.convert_layer(layer.diff_id, "objects")
        assert store.verify() == []
