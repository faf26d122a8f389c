"""From an image to a running container under containerd, ours beside stock, the real sample image, whole commands.

Each run has a containerd and a snapshotter of its own, empty at the start; in ours the image lies in layerkit's
store, for stock it is the archive that ``ctr image import`` takes. Then what one more id map costs, in time and on
disk, where the image is there already. Stock is containerd's overlayfs, which in 1.x chowns a copy for each map.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench_end_to_end import HERE, LAYERKIT
from bench_unpack import _sample

sys.path.insert(0, str(HERE.parent / "tests"))

ROUNDS = 3
MAPS = 5
NAME = "layerkit.example/app:latest"


@contextlib.contextmanager
def _engine(folder: Path, store: Path) -> Iterator[tuple[Any, Any]]:
    """Give an empty containerd and an empty snapshotter."""
    from engines import containerd
    from snapshot_client import snapshotter

    from layerkit.hosts.containerd.config_toml import proxy_plugin

    folder.mkdir(mode=0o711)
    with snapshotter(folder, store) as process:
        with containerd(folder, config=proxy_plugin("layerkit", process.socket)) as engine:
            yield engine, process


def _run(engine: Any, folder: Path, snapshotter: str, name: str, image: str, shift: int) -> list[str]:
    words = [*engine.command, "run", "--rm", "--runc-root", f"{folder}/runc", "--snapshotter", snapshotter]
    if shift:
        extent = f"0:{shift}:65536"
        words += ["--uidmap", extent, "--gidmap", extent]
        words += ["--remap-labels"] if snapshotter == "layerkit" else []
    return [*words, image, name, "/bin/true"]


def _seconds(*commands: list[str]) -> float:
    os.sync()
    start = time.perf_counter()
    for command in commands:
        subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


class _Bench:
    def __init__(self, work: Path, archive: Path) -> None:
        self.work, self.archive, self.store, self.count = work, archive, work / "store", 0
        for path in (work, *work.parents):
            # Root of a container is nobody here, and has to get to its root filesystem.
            if path.name.startswith("lk-bench-") or path == work:
                path.chmod(0o711)
        env = {**os.environ, "LAYERKIT_STORE": str(self.store)}
        out = subprocess.check_output([LAYERKIT, "remap", str(archive), "--json"], env=env)
        self.ref = str(json.loads(out)["next_ref"])

    def folder(self) -> Path:
        self.count += 1
        return self.work / f"e{self.count}"

    def import_into(self, snapshotter: str) -> list[str]:
        """Return the words of ctr that import the archive under :data:`NAME`."""
        base = NAME.partition(":")[0]
        return ["image", "import", "--snapshotter", snapshotter, "--base-name", base, str(self.archive)]

    def ours(self, shift: int) -> float:
        folder = self.folder()
        with _engine(folder, self.store) as (engine, _):
            add = [
                LAYERKIT, "containerd", "add", self.ref, "--store", str(self.store), "--containerd", engine.address,
                "--name", NAME, "--quiet",
            ]  # fmt: skip
            return _seconds(add, _run(engine, folder, "layerkit", "one", NAME, shift))

    def stock(self, shift: int, snapshotter: str = "overlayfs") -> float:
        folder = self.folder()
        with _engine(folder, self.store) as (engine, _):
            take = [*engine.command, *self.import_into(snapshotter)]
            return _seconds(take, _run(engine, folder, snapshotter, "one", NAME, shift))

    def maps(self, snapshotter: str) -> tuple[float, int]:
        """Return the median seconds of a container with a new map, and the bytes on disk that each map takes."""
        folder = self.folder()
        with _engine(folder, self.store) as (engine, _):
            engine(*self.import_into(snapshotter))
            subprocess.run(
                _run(engine, folder, snapshotter, "first", NAME, 100_000), check=True, capture_output=True
            )
            before, found = _used(folder), []
            for number in range(MAPS):
                words = _run(engine, folder, snapshotter, f"m{number}", NAME, 100_000 * (2 + number))
                words = [w for w in words if w != "--rm"]  # what is there while it runs counts
                found.append(_seconds(words))
            return statistics.median(found), (_used(folder) - before) // MAPS


def _used(folder: Path) -> int:
    os.sync()
    facts = os.statvfs(folder)
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize


def _median(run: Callable[[], float]) -> float:
    return statistics.median(run() for _ in range(ROUNDS))


def rows(work: Path) -> list[dict[str, Any]]:
    if os.geteuid() != 0 or shutil.which("containerd") is None:
        return []
    bench = _Bench(work, _sample())
    found = []
    for what, shift in (("plain", 0), ("under an id map", 100_000)):
        ours, stock = _median(partial(bench.ours, shift)), _median(partial(bench.stock, shift))
        found.append(
            {
                "what": f"containerd: image in our store → container ended, {what}",
                "ours_s": ours, "peer": "ctr image import, ctr run", "peer_s": stock, "ratio": stock / ours,
                "target": ">= 4",
            }
        )  # fmt: skip
    unpacked = _median(lambda: bench.stock(100_000, "layerkit"))
    found.append(
        {
            "what": "containerd: archive → mapped container, unpacked by containerd into ours",
            "ours_s": unpacked, "peer": "the same with overlayfs", "peer_s": stock, "ratio": stock / unpacked,
            "target": "",
        }
    )  # fmt: skip
    (ours, disk), (stock, copied) = bench.maps("layerkit"), bench.maps("overlayfs")
    # Where stock idmaps, too, its own may be nothing at all.
    share = disk / max(copied, 1)
    found.append(
        {
            "what": f"containerd: a further id map and a container that ends, {disk / 1e6:.2f} MB on disk against "
            f"{copied / 1e6:.0f} MB ({share:.2%})",
            "ours_s": ours, "peer": "ctr run --uidmap", "peer_s": stock, "ratio": stock / ours,
            "target": "<= 0.3 s, <= 1 %",
        }
    )  # fmt: skip
    return found
