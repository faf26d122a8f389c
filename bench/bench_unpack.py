"""An image to a plain root filesystem, beside umoci and GNU tar; the real sample image, whole commands.

Ours first with an empty store (the layers are read into it, with every fsync of the store), then with the layers
there, as for the second container; the peers read the compressed layers each time, and tar does no whiteouts.
Then on xfs, where the files share the store's blocks. The page cache is warm for everybody.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench_end_to_end import HERE, Bench, timed

ROUNDS = 3
XFS_GIGABYTES = 4


@contextlib.contextmanager
def _xfs(work: Path) -> Iterator[Path]:
    image, target = work / "xfs.img", work / "xfs"
    with image.open("wb") as file:
        file.truncate(XFS_GIGABYTES << 30)
    target.mkdir()
    subprocess.run(["mkfs.xfs", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, target], check=True)
    try:
        yield target
    finally:
        subprocess.run(["umount", "--lazy", target], check=True)


def _tar(bench: Bench) -> tuple[float, int]:
    rootfs = bench.folder() / "rootfs"
    rootfs.mkdir()
    steps = [f"gzip -dc {layer} | tar -x --numeric-owner --xattrs --xattrs-include='*' -C {rootfs}"
             for layer in bench.layers]  # fmt: skip
    return timed(["bash", "-euo", "pipefail", "-c", "\n".join(steps)])


def _umoci(bench: Bench, tag: str) -> tuple[float, int]:
    return timed(["umoci", "unpack", "--image", f"{bench.layout}:{tag}", bench.folder() / "bundle"])


def _medians(runs: dict[str, Callable[[], tuple[float, int]]]) -> dict[str, tuple[float, int]]:
    # In turns, so that whatever else the machine does falls on all.
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            found[name].append(run())
    return {name: (statistics.median(s for s, _ in rows), max(m for _, m in rows)) for name, rows in found.items()}


def _sample() -> Path:
    spec = importlib.util.spec_from_file_location("sample_app", HERE.parent / "sample-images/app.py")
    assert spec is not None and spec.loader is not None
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    return Path(app.ensure())


def _rows(bench: Bench, store: Path, kinds: dict[str, str], where: str) -> list[dict[str, Any]]:
    listed = json.loads((bench.layout / "index.json").read_text())["manifests"][0]
    tag = listed["annotations"]["org.opencontainers.image.ref.name"]
    bench.layerkit(store, "unpack", bench.archive, bench.folder() / "first")
    runs: dict[str, Callable[[], tuple[float, int]]] = {"tar": lambda: _tar(bench)}
    peers = [("tar", "gzip -dc | tar x, each layer")]
    # On xfs umoci 0.4 stumbles over the second names of ACLs.
    if where != "xfs" and shutil.which("umoci"):
        runs["umoci"] = lambda: _umoci(bench, tag)
        peers.append(("umoci", "umoci unpack"))
    if "cold" in kinds:

        def cold() -> tuple[float, int]:
            work = bench.folder()
            return bench.layerkit(work / "store", "unpack", bench.archive, work / "root")

        runs["cold"] = cold
    runs["warm"] = lambda: bench.layerkit(store, "unpack", bench.archive, bench.folder() / "root")
    times = _medians(runs)
    return [
        {
            "what": f"{label}, {where}", "ours_s": times[kind][0], "peer": peer, "peer_s": times[name][0],
            "ratio": times[name][0] / times[kind][0], "target": ">= 1", "memory": times[kind][1],
        }
        for kind, label in kinds.items()
        for name, peer in peers
    ]  # fmt: skip


def rows(work: Path) -> list[dict[str, Any]]:
    """Return a row for each way and peer; ``work`` lies on a fresh filesystem."""
    if os.geteuid() != 0:
        raise SystemExit("unpack gives files to other owners: run it as root")
    archive = _sample()
    (work / "ext4").mkdir()
    bench = Bench(work / "ext4", archive)
    out = _rows(
        bench, work / "store", {"cold": "unpack, empty store", "warm": "unpack, layers in the store"}, "ext4"
    )
    with _xfs(work) as place:
        bench = Bench(place, archive)
        out += _rows(bench, place / "store", {"warm": "unpack, blocks shared with the store"}, "xfs")
    return out
