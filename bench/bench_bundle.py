"""From an image to a running container of an OCI runtime, beside what podman and umoci do.

The real sample image under the map 0:100000:65536, `true` as the command, runc for everybody. Whole commands,
Python's start and every fsync of ours in them; the peers sync nothing. Bytes on disk are in the first column.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(Path(__file__).resolve().parent)]

from bench_podman import _image  # noqa: E402
from engines import Engine, podman_run  # noqa: E402

LAYERKIT = str(Path(sys.executable).with_name("layerkit"))
ROUNDS = 3
_CONF = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
runtime = "runc"
"""


class Bench:
    """One run's folders; every repetition gets fresh ones."""

    def __init__(self, work: Path, archive: Path) -> None:
        self.work, self.archive = work, archive
        self.number = itertools.count(1)
        self.maps = (f"0:{first}:65536" for first in range(100_000, 10**9, 100_000))

    def folder(self, name: str) -> Path:
        return self.work / f"{name}{next(self.number)}"

    def layerkit(self, store: Path, *words: str | Path) -> None:
        # By the environment: what follows "--" is the container's command.
        _run([LAYERKIT, *map(str, words)], LAYERKIT_STORE=str(store))

    def bundle(self, store: Path, image: str | Path, *, run: bool = True) -> tuple[float, int]:
        """Make a bundle, and run it once; return the seconds and the bytes that it takes."""
        folder = self.folder("b")
        before = _disk(store) if store.exists() else 0
        start = _start()
        self.layerkit(store, "bundle", image, folder, "--uid-map", next(self.maps), "-q", "--", "true")
        if run:
            _runc(folder)
        taken = time.perf_counter() - start
        # The root filesystem that is mounted in it is not on the bundle's disk.
        own = _disk(folder / "state") + _disk(folder / "volumes") + _disk(store) - before
        _run([LAYERKIT, "bundle", "--remove", str(folder)])
        return taken, own

    def podman(self, *, first: bool) -> tuple[float, int]:
        """Load the image and run it (``first``), or run it under one map more; seconds and bytes."""
        with tempfile.TemporaryDirectory(prefix="lk-", dir="/var/tmp") as short:
            engine = _podman(self.folder("p"), Path(short))
            try:
                return self._podman(engine, first=first)
            finally:
                engine.run("rmi", "--all", "--force")
                subprocess.run(["umount", "--quiet", engine.folder / "root/overlay"], check=False)

    def _podman(self, engine: Engine, *, first: bool) -> tuple[float, int]:
        def run() -> None:
            uid_map = next(self.maps)
            engine(*podman_run("--uidmap", uid_map, "--gidmap", uid_map, "--user", "0", "app", "true"))

        def load() -> None:
            engine("tag", engine("load", "--quiet", "--input", self.archive).split()[-1], "app")

        if first:
            start = _start()
            load()
            run()
            return time.perf_counter() - start, _disk(engine.folder / "root")
        load()
        run()
        before = _disk(engine.folder / "root")
        start = _start()
        run()
        return time.perf_counter() - start, _disk(engine.folder / "root") - before

    def umoci(self, layout: Path) -> tuple[float, int]:
        folder = self.folder("u")
        start = _start()
        uid_map = next(self.maps)
        _run(
            [
                "umoci",
                "unpack",
                "--uid-map",
                uid_map,
                "--gid-map",
                uid_map,
                "--image",
                f"{layout}:latest",
                str(folder),
            ]
        )
        return time.perf_counter() - start, _disk(folder)


def _disk(folder: Path) -> int:
    """Return the allocated bytes of a folder, without what is mounted in it."""
    words = ["du", "-sx", "--block-size=1", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if not done.stdout:
        raise RuntimeError(f"du: {done.stderr}")
    return int(done.stdout.split()[0])


def _start() -> float:
    os.sync()
    return time.perf_counter()


def _run(words: list[str], **env: str) -> None:
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env={**os.environ, **env}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[:3])}: exit code {done.returncode}: {done.stderr[-800:]}")


def _runc(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="lk-runc-") as state:
        _run(["runc", "--root", state, "run", "-b", str(folder), f"bench-{os.getpid()}"])


def _podman(folder: Path, short: Path) -> Engine:
    folder.mkdir()
    (folder / "containers.conf").write_text(_CONF)
    # podman takes no run folder of more than 50 characters.
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/root"\nrunroot = "{short}/run"\n'
    )
    env = {
        "CONTAINERS_CONF": f"{folder}/containers.conf", "CONTAINERS_STORAGE_CONF": f"{folder}/storage.conf",
        "TMPDIR": str(folder),
    }  # fmt: skip
    return Engine(folder, ("podman", "--tmpdir", f"{short}/tmp"), env)


def _rounds(*runs: Callable[[], tuple[float, int]]) -> list[tuple[float, int]]:
    results: list[list[tuple[float, int]]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for run, collected in zip(runs, results, strict=True):
            collected.append(run())
    return [(median(s for s, _ in found), int(median(b for _, b in found))) for found in results]


def _size(what: str, size: int) -> str:
    return f"{what} ({size / 1e6:,.1f} MB)" if size >= 50_000 else f"{what} ({size / 1e3:,.0f} kB)"


def rows(work: Path) -> list[dict[str, Any]]:
    """Return the table."""
    if os.geteuid() != 0:
        raise SystemExit("bundle mounts: run it as root")
    # A container's root has to reach its bundle; what holds a benchmark's folder may be closed.
    for folder in (work, *work.parents):
        if not folder.stat().st_mode & 1:
            folder.chmod(folder.stat().st_mode | 0o111)
    archive = work / "app.tar"
    shutil.copyfile(_image(), archive)
    layout = work / "layout"
    _run(["skopeo", "copy", "--quiet", f"oci-archive:{archive}", f"oci:{layout}:latest"])
    bench = Bench(work, archive)
    store = work / "store"
    bench.layerkit(store, "remap", archive, "--uid-map", "0:100000:65536", "-q")
    cold, kept, alone, load, more, umoci = _rounds(
        lambda: bench.bundle(bench.folder("s"), archive),
        lambda: bench.bundle(store, "store:app:latest"),
        lambda: bench.bundle(store, "store:app:latest", run=False),
        lambda: bench.podman(first=True),
        lambda: bench.podman(first=False),
        lambda: bench.umoci(layout),
    )

    def row(
        what: str, ours: tuple[float, int], peer: str, theirs: tuple[float, int], target: str
    ) -> dict[str, Any]:
        return {
            "what": _size(what, ours[1]), "ours_s": ours[0], "peer": _size(peer, theirs[1]), "peer_s": theirs[0],
            "ratio": theirs[0] / ours[0], "target": target,
        }  # fmt: skip

    loaded = "podman load, podman run --uidmap"
    return [
        row("image in the store to a running container", kept, loaded, load, ">= 4"),
        row("archive to a running container", cold, loaded, load, ""),
        row("archive to a running container", cold, "umoci unpack --uid-map, not yet run", umoci, ""),
        row("one more map, the bundle", alone, "podman run --uidmap, rootful", more, "<= 0.3 s"),
        row("one more map, the bundle, and run", kept, "podman run --uidmap, rootful", more, ""),
    ]
