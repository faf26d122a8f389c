"""The whole way: from an image archive to a mounted tree with other owners, beside what people do today.

The real sample image (sample-images/app.py). Ours are whole commands, Python's start and every fsync in them;
the peers' times hold no fsync, except where "sync" is said. The page cache is warm for everybody.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LAYERKIT = str(Path(sys.executable).with_name("layerkit"))
ROUNDS = 3
MAP = "0:100000:65536"


def timed(command: Sequence[str | Path], **more: Any) -> tuple[float, int]:
    """Run ``command``; return its seconds and its peak memory in bytes, that of its children included.

    All earlier writes are on disk before it starts: nobody waits for what another one left to be written.
    """
    os.sync()
    start = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, **more)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            errors.seek(0)
            raise RuntimeError(f"{command[0]}: exit code {child.returncode}: {errors.read()[-800:]!r}")
    return time.perf_counter() - start, _rss(usage)


def _rss(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss << 10


class Bench:
    """One run's folders; every repetition gets a fresh one, so that nothing is reused by accident."""

    def __init__(self, work: Path, archive: Path) -> None:
        self.work, self.archive = work, archive
        self.count = 0
        self.layout = work / "layout"
        with tarfile.open(archive) as tar:
            for member in tar:
                (self.layout / member.name).parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                if content is not None:
                    with (self.layout / member.name).open("wb") as file:
                        shutil.copyfileobj(content, file, 1 << 20)
        index = json.loads((self.layout / "index.json").read_text())
        manifest = json.loads(self.blob(index["manifests"][0]["digest"]).read_text())
        self.layers = [self.blob(layer["digest"]) for layer in manifest["layers"]]

    def blob(self, digest: str) -> Path:
        return self.layout / "blobs/sha256" / digest.removeprefix("sha256:")

    def folder(self) -> Path:
        self.count += 1
        path = self.work / f"run{self.count}"
        path.mkdir()
        return path

    def layerkit(self, store: Path, *words: str | Path) -> tuple[float, int]:
        return timed([LAYERKIT, *words], env={**os.environ, "LAYERKIT_STORE": str(store)})

    def keep(self, store: Path, *more: str) -> str:
        """Bring the image into ``store`` and return the reference that it has there."""
        words = [LAYERKIT, "remap", str(self.archive), "--uid-map", MAP, "--json", *more]
        out = subprocess.check_output(words, env={**os.environ, "LAYERKIT_STORE": str(store)})
        return str(json.loads(out)["next_ref"])

    # --- from blob to a mounted tree with other owners

    def ours(self) -> tuple[float, int]:
        work = self.folder()
        target = work / "m"
        target.mkdir()
        seconds, memory = self.layerkit(work / "store", "mount", self.archive, target, "--uid-map", MAP)
        self.layerkit(work / "store", "umount", target)
        return seconds, memory

    def ours_own_meta(self) -> tuple[float, int]:
        work = self.folder()
        target = work / "m"
        target.mkdir()
        words = ("mount", self.archive, target, "--uid-map", MAP, "--own-meta")
        seconds, memory = self.layerkit(work / "store", *words)
        self.layerkit(work / "store", "umount", target)
        return seconds, memory

    def tar(self, *, sync: bool = False) -> tuple[float, int]:
        rootfs = self.folder() / "rootfs"
        rootfs.mkdir()
        pipes = [f"gzip -dc {layer} | tar -x --numeric-owner --xattrs --xattrs-include='*' -C {rootfs}"
                 for layer in self.layers]  # fmt: skip
        steps = [*pipes, f"chown -R 100000:100000 {rootfs}"]
        if sync:
            steps.append(f"sync -f {rootfs}")
        return timed(["bash", "-euo", "pipefail", "-c", "\n".join(steps)])

    def umoci(self) -> tuple[float, int]:
        bundle = self.folder() / "bundle"
        return timed(
            ["umoci", "unpack", "--uid-map", MAP, "--gid-map", MAP, "--image", f"{self.layout}:latest", bundle]
        )

    def podman(self) -> tuple[float, int]:
        root = self.folder()
        # podman takes no run folder of more than 50 characters.
        with tempfile.TemporaryDirectory(prefix="lk-") as run:
            storage = ["--root", str(root / "r"), "--runroot", run, "--storage-driver", "overlay"]
            result = timed(["podman", *storage, "pull", "-q", f"oci-archive:{self.archive}"])
            subprocess.run(["umount", "--quiet", root / "r/overlay"], check=False, stderr=subprocess.DEVNULL)
        return result


def _alternate(*runs: Callable[[], tuple[float, int]]) -> list[tuple[float, int]]:
    """Run all, round by round; return the median seconds and the highest memory of each."""
    results: list[list[tuple[float, int]]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for run, collected in zip(runs, results, strict=True):
            collected.append(run())
    return [(statistics.median(s for s, _ in rows), max(m for _, m in rows)) for rows in results]


def _row(what: str, ours: tuple[float, int], peer: str, theirs: float | None, target: str) -> dict[str, Any]:
    return {
        "what": what, "ours_s": ours[0], "peer": peer, "peer_s": theirs,
        "ratio": None if theirs is None else theirs / ours[0], "target": target, "memory": ours[1],
    }  # fmt: skip


def rows(work: Path) -> list[dict[str, Any]]:
    if os.geteuid() != 0:
        raise SystemExit("end_to_end mounts: run it as root")
    spec = importlib.util.spec_from_file_location("sample_app", HERE.parent / "sample-images/app.py")
    assert spec is not None and spec.loader is not None
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    archive = work / "app.tar"
    shutil.copyfile(app.ensure(), archive)
    bench = Bench(work, archive)
    peers: list[tuple[str, Callable[[], tuple[float, int]], str]] = [
        ("gzip -d | tar x of each layer, chown -R", bench.tar, ">= 2.5"),
        ("the same, and sync", lambda: bench.tar(sync=True), ""),
    ]
    for tool, run, target in (
        ("umoci unpack --uid-map", bench.umoci, ">= 10"),
        ("podman pull", bench.podman, ">= 4"),
    ):
        if shutil.which(tool.split()[0]):
            peers.append((tool, run, target))
    ours, own, *theirs = _alternate(bench.ours, bench.ours_own_meta, *(run for _, run, _ in peers))
    whole = "archive to mounted and remapped"
    out = [
        _row(whole, ours, name, seconds, target)
        for (name, _, target), (seconds, _) in zip(peers, theirs, strict=True)
    ]
    out += [
        {
            **row,
            "what": f"{whole}, metadata of its own",
            "ours_s": own[0],
            "ratio": row["peer_s"] / own[0],
            "memory": own[1],
        }
        for row in out[:1]
    ]
    return [*out, *_further_maps(bench), *_directory(bench)]


def _further_maps(bench: Bench) -> list[dict[str, Any]]:
    """Measure whole commands for one more map of an image that is in the store."""
    work = bench.folder()
    store, target = work / "store", work / "m"
    target.mkdir()
    image = bench.keep(store)
    starts = iter(range(200_000, 10**9, 100_000))

    def mount(*more: str) -> tuple[float, int]:
        result = bench.layerkit(store, "mount", image, target, "--uid-map", f"0:{next(starts)}:65536", *more)
        bench.layerkit(store, "umount", target)
        return result

    def remap() -> tuple[float, int]:
        return bench.layerkit(store, "remap", image, "--uid-map", f"0:{next(starts)}:65536", "--own-meta")

    def python() -> tuple[float, int]:
        return timed([sys.executable, "-c", "import numpy, typer"])

    idmapped, own, patched, start = _alternate(mount, lambda: mount("--own-meta"), remap, python)
    name = "Python's start with its imports"
    return [
        _row("a further map, mounted (idmapped, nothing written)", idmapped, name, start[0], "<= 0.25 s"),
        _row("a further map, mounted (metadata of its own)", own, name, start[0], "<= 0.25 s"),
        _row("a further map, remap --own-meta only", patched, name, start[0], "<= 0.25 s"),
    ]


def _directory(bench: Bench) -> list[dict[str, Any]]:
    """Measure the directory form beside the kernel's own metadata-only chown."""
    lower = bench.folder() / "rootfs"
    lower.mkdir()
    for layer in bench.layers:
        subprocess.run(f"gzip -dc {layer} | tar -x --numeric-owner -C {lower}", shell=True, check=True)
    store = bench.folder() / "store"
    common = ("--rendering", "directory", "--own-meta")
    image = bench.keep(store, *common)
    starts = iter(range(200_000, 10**9, 100_000))

    def ours() -> tuple[float, int]:
        return bench.layerkit(store, "remap", image, "--uid-map", f"0:{next(starts)}:65536", *common)

    def kernel() -> tuple[float, int]:
        work = bench.folder()
        for name in ("upper", "work", "m"):
            (work / name).mkdir()
        options = f"lowerdir={lower},upperdir={work}/upper,workdir={work}/work,metacopy=on,redirect_dir=on"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, work / "m"], check=True)
        try:
            return timed(["bash", "-ec", f"chown -R 100000:100000 {work}/m; sync -f {work}/upper"])
        finally:
            subprocess.run(["umount", work / "m"], check=True)

    directory, chown = _alternate(ours, kernel)
    name = "chown -R and sync on an overlay with metacopy=on"
    return [_row("directory form, whole command", directory, name, chown[0], ">= 0.91 (<= 1.1 of its time)")]


if __name__ == "__main__":
    for row in rows(Path(sys.argv[1])):
        print(json.dumps(row))
