"""One suite for every engine: threads, processes, and a dask cluster of two workers, one of which is killed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from fault_proxy import Fault, fault_proxy
from hook_service import MAP_A, settings
from programs import answer, run_layerkit, wait_for
from pushed_images import Pushed, artifacts, push
from registry_server import docker_registry

from layerkit.hook.batch.one_pass import parse_shard
from layerkit.hook.config import ClusterTls
from layerkit.hook.queue import Queue, Target, Wish
from layerkit.hook.telemetry import Metrics
from layerkit.hook.work import executors
from layerkit.hook.work.access import Place
from layerkit.hook.work.executors import open_executor
from layerkit.hook.work.layers import Fleet
from layerkit.hook.work.tasks import Task, execute
from layerkit.hook.work.worker import make_worker
from layerkit.idmap import Mapping
from layerkit.images.registry.options import RegistryOptions
from layerkit.model.digest import Digest
from layerkit.model.errors import UnsupportedHost, UsageError
from layerkit.usecases.attach import AttachOptions
from layerkit.usecases.settings import Settings

PLAIN = RegistryOptions(tls_verify=False)
MAP = "uid=0:100000:65536;gid=0:100000:65536"
INDEXES = "layerkit/indexes"


class Cluster:
    """A scheduler and two workers, processes of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = (folder / "dask.log").open("ab")
        self._scheduler = self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        found: list[str] = []

        def listening() -> bool:
            found[:] = re.findall(r"Scheduler at:\s+tcp://(\S+)", (folder / "dask.log").read_text())
            return bool(found)

        wait_for(listening)
        self.address = found[0]
        self.workers = [self._worker(n) for n in range(2)]
        wait_for(lambda: (folder / "dask.log").read_text().count("Registered to") >= 2)

    def _start(self, *words: str, cwd: Path | None = None) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "dask", *words], cwd=cwd or self._folder, stdout=self._log, stderr=self._log,
            env={**os.environ, "DASK_DISTRIBUTED__WORKER__USE_FILE_LOCKING": "False",
                 "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip

    def _worker(self, number: int) -> subprocess.Popen[bytes]:
        folder = self._folder / f"w{number}"
        folder.mkdir()
        # In a folder of its own, where a relative path means a store of its own.
        return self._start(
            "worker", f"tcp://{self.address}", "--nthreads", "1", "--no-nanny", "--no-dashboard",
            "--name", str(number), "--local-directory", str(folder), cwd=folder,
        )  # fmt: skip

    def close(self) -> None:
        for process in (*self.workers, self._scheduler):
            process.kill()
            process.wait()
        self._log.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with closing(Cluster(tmp_path_factory.mktemp("dask"))) as found:
        yield found


@pytest.fixture(params=["threads", "processes", "dask"])
def engine(request: pytest.FixtureRequest) -> str:
    if request.param != "dask":
        return str(request.param)
    found: Cluster = request.getfixturevalue("cluster")
    return f"dask://{found.address}"


@contextlib.contextmanager
def opened(engine: str) -> Iterator[Executor]:
    executor = open_executor(engine, 2)
    try:
        yield executor
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def tasks(host: str, images: list[Pushed], store: Path) -> list[Task]:
    options = AttachOptions(Mapping.parse_canonical(MAP))
    places = [Place(host, each.name, PLAIN) for each in images]
    return [
        Task(Digest.parse(each.digest), options, (place,), Fleet(Settings(store), place))
        for each, place in zip(images, places, strict=True)
    ]


def test_every_engine_does_the_same(engine: str, tmp_path: Path) -> None:
    """Images that share layers: the same outcomes, one artifact each, each layer read once among all workers."""
    with docker_registry(tmp_path / "r") as registry, fault_proxy(registry.host) as wire:
        images = [push(registry.host, number) for number in range(6)]
        with opened(engine) as executor:
            futures = [executor.submit(execute, task) for task in tasks(wire.host, images, tmp_path / "store")]
            outcomes = [future.result(120) for future in futures]
            again = executor.submit(execute, tasks(wire.host, images[:1], tmp_path / "store")[0]).result(60)
        assert [outcome.state for outcome in outcomes] == ["done"] * 6, outcomes
        assert again.report["existing"] is True
        layers = {layer for each in images for layer in each.layers}
        assert sum(int(str(outcome.report["layers_read"])) for outcome in outcomes) == len(layers)
        reads = [path.rpartition("/blobs/")[2] for method, path, passed in wire.seen if method == "GET" and passed]
        assert sorted(at for at in reads if at in layers) == sorted(layers)
        for each in images:
            assert len(artifacts(registry.host, each)) == 1


def _stay(folder: Path) -> int:
    """Return how many of these calls ran when this one began."""
    mine = folder / uuid.uuid4().hex
    mine.touch()
    seen = len(list(folder.iterdir()))
    time.sleep(0.05)
    mine.unlink()
    return seen


def test_no_more_calls_run_at_once_than_asked_for(engine: str, tmp_path: Path) -> None:
    """However many workers there are: a registry is not to be asked by all of a cluster."""
    executor = open_executor(engine, 1)
    futures = [executor.submit(_stay, tmp_path) for _ in range(6)]
    executor.shutdown(wait=True)
    assert [future.result(0) for future in futures] == [1] * 6
    with opened(engine) as executor:
        assert max(future.result(60) for future in [executor.submit(_stay, tmp_path) for _ in range(8)]) <= 2


def test_what_has_not_begun_is_cancelled(engine: str, tmp_path: Path) -> None:
    executor = open_executor(engine, 1)
    futures = [executor.submit(_stay, tmp_path) for _ in range(200)]  # seconds of work
    futures[0].result(60)
    executor.shutdown(wait=True, cancel_futures=True)
    assert futures[-1].cancelled()
    assert all(future.done() for future in futures[2:])


def test_every_engine_tells_failures_as_values(engine: str, tmp_path: Path) -> None:
    """An error of ours, and one of the network, come back as outcomes and leave the workers alive."""
    with docker_registry(tmp_path / "r") as registry, opened(engine) as executor:
        image = push(registry.host, 1)
        task = tasks(registry.host, [image], tmp_path / "store")[0]
        narrow = AttachOptions(Mapping.parse_canonical("uid=5:5:1;gid=5:5:1"))
        unmapped = executor.submit(execute, replace(task, options=narrow)).result(60)
        assert unmapped.state == "failed" and unmapped.permanent and "outside the map" in unmapped.why
        gone = executor.submit(execute, replace(task, digest=Digest.of(b"absent"))).result(60)
        assert gone.state == "gone"
        away = executor.submit(execute, replace(task, targets=(Place("127.0.0.1:1", "a", PLAIN),))).result(60)
        assert away.state == "failed" and not away.permanent
        assert executor.submit(execute, task).result(60).state == "done"


@pytest.mark.parametrize("kind", ["processes", "dask"])
def test_a_worker_that_is_killed_costs_nothing_but_time(kind: str, tmp_path: Path) -> None:
    """The queue on top of each engine: a worker dies in the middle of a job, and every image is done once."""
    with contextlib.ExitStack() as stack:
        registry = stack.enter_context(docker_registry(tmp_path / "r"))
        wire = stack.enter_context(fault_proxy(registry.host))
        own = stack.enter_context(closing(Cluster(tmp_path))) if kind == "dask" else None
        images = [push(registry.host, number) for number in range(5)]
        config = settings(tmp_path / "hook", wire.host, maps=(MAP_A,), workers=2, retry={"first_seconds": 0.2},
                          engine=f"dask://{own.address}" if own else "processes")  # fmt: skip
        queue = stack.enter_context(closing(Queue(config.state, config.policy)))
        metrics = Metrics(queue.stats)
        worker = make_worker(config, queue, metrics)
        wire.add(Fault("GET", "/blobs/sha256", bytes_per_second=500, times=4))
        target = [Target("main", each.name) for each in images]
        queue.add([Wish(key, t) for each, t in zip(images, target, strict=True)
                   for key in config.keys(Digest.parse(each.digest))])  # fmt: skip
        worker.start()
        stack.callback(worker.stop)
        wait_for(lambda: any("/blobs/sha256" in path for _, path, _ in list(wire.seen)) or wire.hits)
        victim = own.workers[0].pid if own else next(iter(worker._executor._processes))  # type: ignore[union-attr]
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: queue.stats().depth == 0, seconds=120)
        assert queue.stats().states == {"done": len(images)}
        for each in images:
            assert len(artifacts(registry.host, each)) == 1


@pytest.mark.parametrize(("killed", "shared"), [(False, INDEXES), (True, INDEXES), (False, "")])
def test_workers_without_a_common_store_read_each_layer_once(tmp_path: Path, killed: bool, shared: str) -> None:
    """One task of the cluster for each layer, whoever asks; what it gives is in the registry for all others."""
    with contextlib.ExitStack() as stack:
        registry = stack.enter_context(docker_registry(tmp_path / "r"))
        wire = stack.enter_context(fault_proxy(registry.host))
        own = stack.enter_context(closing(Cluster(tmp_path)))
        images = [push(registry.host, number) for number in range(6)]
        layers = {layer for each in images for layer in each.layers}
        indexes = Place(wire.host, shared, PLAIN) if shared else None
        wanted = [
            replace(t, fleet=replace(t.fleet, shared=indexes)) for t in tasks(wire.host, images, Path("store"))
        ]
        # So slow that both workers want the common layer while one of them reads it.
        wire.add(Fault("GET", f"/blobs/{images[0].layers[0]}", bytes_per_second=60, times=1))
        with opened(f"dask://{own.address}") as executor:
            futures = [executor.submit(execute, task) for task in wanted]
            if killed:
                wait_for(lambda: any("/blobs/sha256" in path for _, path, _ in list(wire.seen)) or wire.hits)
                os.kill(own.workers[0].pid, signal.SIGKILL)
            outcomes = [future.result(120) for future in futures]
        assert [outcome.state for outcome in outcomes] == ["done"] * 6, outcomes
        reads = [path.rpartition("/blobs/")[2] for method, path, passed in wire.seen if method == "GET" and passed]
        again = sorted(at for at in reads if at in layers)
        assert set(again) == layers
        if not shared:
            # The one that both wanted at once went from one to the other; nothing is kept for those who come later.
            assert again.count(images[0].layers[0]) == 1
        elif not killed:
            assert again == sorted(layers)
            assert sum(int(str(outcome.report["layers_read"])) for outcome in outcomes) == len(layers)
            stores = [tmp_path / f"w{number}/store" for number in range(2)]
            assert all(store.is_dir() for store in stores), "one worker has done it all"
        for each in images:
            assert len(artifacts(registry.host, each)) == 1
        if not shared:
            return
        # Whoever comes later reads nothing, whatever store it has.
        wire.seen.clear()
        with opened("threads") as executor:
            options = AttachOptions(Mapping.parse_canonical(MAP.replace("100000", "300000")))
            settings = Settings(tmp_path / "later")
            later = [replace(t, fleet=replace(t.fleet, settings=settings), options=options) for t in wanted]
            outcomes = [future.result(120) for future in [executor.submit(execute, task) for task in later]]
        assert [outcome.report["layers_read"] for outcome in outcomes] == [0] * 6
        assert not [path for method, path, _ in wire.seen if method == "GET" and path.rpartition("/")[2] in layers]


def test_shards_do_the_whole_list_once(tmp_path: Path) -> None:
    with docker_registry(tmp_path / "r") as registry:
        images = [push(registry.host, number) for number in range(6)]
        listed = tmp_path / "images.txt"
        refs = [f"docker://{registry.host}/{each.name}:v1" for each in images]
        listed.write_text("# images\n\n" + "\n".join(refs) + "  # the last\n")
        seen = []
        for shard in range(3):
            words = ["--from", str(listed), "--shard", f"{shard}/3", "--tls-verify=false", "--uid-map", MAP_A]
            words += ("--engine", "threads", "--wait", "0.5")  # one after the other: there is nobody to wait for
            done = answer("batch", *words, "--store", str(tmp_path / f"s{shard}"))
            assert done["schema"] == "layerkit.batch.v1" and done["shard"] == shard and done["failed"] == []
            seen += [job["targets"][0]["repository"] for job in done["jobs"]]
        assert sorted(seen) == sorted(each.name for each in images)
        assert [len(artifacts(registry.host, each)) for each in images] == [1] * 6
        listed.write_text(refs[0] + f"\ndocker://{registry.host}/absent:v1\n")
        words = ["--from", str(listed), "--tls-verify=false", "--uid-map", MAP_A, "--store", str(tmp_path / "s"),
                 "--engine", "threads"]  # fmt: skip
        assert "absent:v1: not in the registry" in run_layerkit("batch", *words, code=5).stderr
        run_layerkit("batch", *words, "--shard", "3/3", code=2)
    assert parse_shard("3/4") == (3, 4)
    for wrong in ("3/3", "x", "-1/2", "1", "1/0", "1/2/3", "٣/٤"):
        with pytest.raises(UsageError):
            parse_shard(wrong)


def test_batch_on_the_cluster(cluster: Cluster, tmp_path: Path) -> None:
    with docker_registry(tmp_path / "r") as registry:
        image = push(registry.host, 2)
        words = ["--tls-verify=false", "--uid-map", MAP_A, "--store", str(tmp_path / "s")]
        run_layerkit(
            "batch", f"docker://{registry.host}/{image.name}:v1", *words, "--engine", f"dask://{cluster.address}"
        )
        assert len(artifacts(registry.host, image)) == 1


def test_engines_that_are_none() -> None:
    for wrong in ("magic", "dask://", "dask+tls://127.0.0.1:1", "http://x"):
        with pytest.raises(UsageError):
            open_executor(wrong, 1)
    with pytest.raises(UsageError):
        open_executor("dask://127.0.0.1:1", 1, tls=ClusterTls(Path("a"), Path("b"), Path("c")))


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    """A parent that is killed leaves no worker, although these ignore the signals of its terminal."""
    program = (
        "import os, sys, time\n"
        "from layerkit.hook.work.executors import open_executor\n"
        "if __name__ == '__main__':\n"
        "    executor = open_executor('processes', 2)\n"
        "    executor.submit(os.getpid).result()\n"
        "    print(list(executor._processes), flush=True)\n"
        "    executor.submit(time.sleep, 60)\n"
        "    time.sleep(60)\n"
    )
    (tmp_path / "p.py").write_text(program)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "p.py")], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = {int(pid) for pid in re.findall(r"\d+", parent.stdout.readline())}
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.3)
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(_runs(pid) for pid in pids))


def test_a_broken_pool_ends_with_all_its_workers() -> None:
    """Those that are left ignore the SIGTERM that Python sends them then, and newer Pythons wait for them."""
    executor = open_executor("processes", 2)
    futures = [executor.submit(time.sleep, 60) for _ in range(2)]
    wait_for(lambda: len(executor._processes) == 2)  # type: ignore[attr-defined]
    pids = list(executor._processes)  # type: ignore[attr-defined]
    os.kill(pids[0], signal.SIGKILL)
    assert isinstance(futures[0].exception(30), BrokenExecutor)
    executor.shutdown(wait=False, cancel_futures=True)
    wait_for(lambda: not any(_runs(pid) for pid in pids))


def _runs(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_a_scheduler_that_is_away_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "_CONNECT_SECONDS", 1)
    with pytest.raises(UnsupportedHost, match="does not answer"):
        open_executor("dask://127.0.0.1:1", 1)
