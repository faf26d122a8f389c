"""Merge and id mapping at the size of the largest public images, against the targets of the design."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from layerkit import idmap
from layerkit.model import sparse
from layerkit.model.digest import Digest
from layerkit.model.entry import Kind
from layerkit.model.index import Index, path_key
from layerkit.model.strings import Strings
from layerkit.model.trees.merge import merge

ROWS, LAYERS = 1_000_000, 100
_ROUNDS = 5


def layers(rows: int = ROWS, count: int = LAYERS) -> list[Index]:
    """Return ``count`` layers of ``rows`` rows in all, about 60 bytes a path, a third of them overlapping."""
    random = np.random.default_rng(7)
    out = []
    for layer in range(count):
        paths: dict[bytes, int] = {
            b"usr": 4,
            b"usr/lib": 4,
            b"usr/lib/python3": 4,
            b"usr/lib/python3/dist-packages": 4,
        }
        while len(paths) < rows // count:
            package = b"usr/lib/python3/dist-packages/package_%04d" % random.integers(0, rows // 100)
            paths[package] = Kind.DIR
            for part in range(4):
                below = package + b"/part%d" % part
                paths[below] = Kind.DIR
                for file in random.integers(0, 40, 20).tolist():
                    paths[below + b"/module_%02d.py" % file] = Kind.REG
            if layer and random.integers(0, 20) == 0:
                paths[package + b"/part3"] = Kind.OPAQUE
        keys = sorted(paths, key=path_key)[: rows // count]
        out.append(_index(keys, np.array([paths[k] for k in keys], np.uint8), layer, random))
    return out


def _index(paths: list[bytes], kind: np.ndarray, layer: int, random: np.random.Generator) -> Index:
    n = len(paths)
    regular = kind == Kind.REG
    zeros = np.zeros(n, np.uint32)
    sha256 = random.integers(0, 256, (n, 32), np.uint8)
    sha256[~regular] = 0
    return Index(
        diff_id=Digest.of(b"%d" % layer),
        tar_size=n * 2048,
        path=Strings.of(paths),
        kind=kind,
        perm=np.where(regular, 0o644, 0o755).astype(np.uint16),
        uid=random.integers(0, 1000, n).astype(np.uint32),
        gid=random.integers(0, 1000, n).astype(np.uint32),
        mtime=np.full(n, 1_700_000_000, np.int64),
        mtime_ns=zeros,
        size=np.where(regular, 1000, 0).astype(np.int64),
        major=zeros,
        minor=zeros,
        link=np.full(n, -1, np.int32),
        links=Strings.of([]),
        xattr=np.zeros(n, np.int32),
        xattr_sets=((),),
        offset=np.where(regular, np.arange(n) * 2048 + 512, -1).astype(np.int64),
        sha256=sha256,
        sparse=np.full(n, -1, np.int32),
        sparse_maps=sparse.NONE,
    )


def _best(work: Any) -> float:
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def peak() -> dict[str, float]:
    """Return the names of one merge and the bytes that it needed per input row at its peak."""
    stack = layers()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    tree = merge(stack)
    return {"names": len(tree), "bytes_per_row": (_status("VmHWM") - before) / sum(map(len, stack))}


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def rows(work: Path) -> list[dict[str, Any]]:
    """Return one row per figure; ``work`` is not needed, nothing is written."""
    del work
    stack = layers()
    total = sum(map(len, stack))
    merged = _best(lambda: merge(stack))
    tree = merge(stack)
    one = idmap.IdMap.parse(["0:100000:500,500:200500:500,1000:300000:64536"])
    mapping = idmap.Mapping(one, one)
    ids = np.random.default_rng(1).integers(0, 65536, 1_000_000).astype(np.uint32)
    applied = _best(lambda: mapping.uid.apply(ids))
    whole = _best(lambda: idmap.apply(tree, mapping))
    child = subprocess.run(
        [sys.executable, "-c", "import json, bench_merge; print(json.dumps(bench_merge.peak()))"],
        cwd=Path(__file__).parent, check=True, capture_output=True, text=True,
    )  # fmt: skip
    memory = json.loads(child.stdout)
    return [
        _row(f"merge, {total} rows, {LAYERS} layers, {len(tree)} names", merged, total * 1e-6, "<= 1 µs a row"),
        _row(f"ids, {len(ids)} over 3 extents", applied, 0.010, "<= 10 ms per million"),
        _row(f"owners of a tree of {tree.inodes} inodes", whole, 0.1, "<= 100 ms per million"),
        {
            "what": f"merge, peak memory: {memory['bytes_per_row']:.0f} B per row beyond the input",
            "ours_s": None, "peer": "", "peer_s": None,
            "ratio": memory["bytes_per_row"] / 350, "target": "<= 1 (350 B per entry)",
        },
    ]  # fmt: skip


def _row(what: str, ours: float, allowed: float, target: str) -> dict[str, Any]:
    return {
        "what": what,
        "ours_s": ours,
        "peer": "target",
        "peer_s": allowed,
        "ratio": allowed / ours,
        "target": target,
    }


if __name__ == "__main__":
    for row in rows(Path(".")):
        print(json.dumps(row))
