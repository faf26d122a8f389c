"""The folder and tar renderings against the kernel's own metadata-only copy: chown -R on a metacopy overlay."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from layerkit.formats.meta.tar import write_tar
from layerkit.linux import mounts
from layerkit.linux.folders.writer import write_directory
from layerkit.linux.syscalls import closing
from layerkit.metaonly import MetadataLayer, metadata_layer
from layerkit.model import sparse
from layerkit.model.digest import Digest
from layerkit.model.strings import Strings
from layerkit.model.tree import Tree

FOLDERS, FILES = 500, 60
_ROUNDS = 3


def tree() -> Tree:
    """Return ``FOLDERS`` packages of ``FILES`` modules each, two levels deep, all of one mapped owner."""
    parent, name, is_file = [-1], [b""], [False]
    for package in range(FOLDERS):
        if package % 20 == 0:
            top = len(parent)
            parent.append(0)
            name.append(b"group_%04d" % package)
            is_file.append(False)
        here = len(parent)
        parent.append(top)
        name.append(b"package_%04d" % package)
        is_file.append(False)
        parent += [here] * FILES
        name += [b"module_%03d.py" % i for i in range(FILES)]
        is_file += [True] * FILES
    n = len(parent)
    regular = np.array(is_file)
    zeros = np.zeros(n, np.uint32)
    sha256 = np.random.default_rng(5).integers(0, 256, (n, 32), np.uint8)
    sha256[~regular] = 0
    folders_in = np.bincount(np.array(parent[1:])[~regular[1:]], minlength=n)
    return Tree(
        parent=np.array(parent, np.int32), name=Strings.of(name), inode=np.arange(n, dtype=np.int32),
        mode=np.where(regular, 0o100644, 0o40755).astype(np.uint32), uid=zeros + 100000, gid=zeros + 100000,
        nlink=np.where(regular, 1, 2 + folders_in).astype(np.uint32),
        size=np.where(regular, 1000, 0).astype(np.int64),
        mtime=np.full(n, 1_700_000_000, np.int64), mtime_ns=zeros + 123_456_789, major=zeros, minor=zeros,
        target=np.full(n, -1, np.int32), targets=Strings.of([]), xattr=zeros.astype(np.int32), xattr_sets=((),),
        layer=np.where(regular, 0, -1).astype(np.int32), offset=np.where(regular, 0, -1).astype(np.int64),
        sha256=sha256, sparse=np.full(n, -1, np.int32), sparse_maps=sparse.NONE, layers=(Digest.of(b""),),
    )  # fmt: skip


def _plain(root: Path, made: Tree) -> None:
    """Write the tree as ordinary files, each with its bytes: what a runtime unpacks."""
    content = bytes(1000)
    for node in made.nodes():
        path = os.path.join(os.fsencode(root), node.path)
        if node.size == 0:
            os.makedirs(path, exist_ok=True)
            continue
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.write(fd, content)
        os.close(fd)


def _chown(work: Path, lower: Path) -> Callable[[int], float]:
    def run(number: int) -> float:
        upper, scratch, target = (work / f"{name}{number}" for name in ("upper", "scratch", "at"))
        for path in (upper, scratch, target):
            path.mkdir()
        with contextlib.ExitStack() as stack:
            fds = [stack.enter_context(closing(mounts.open_folder(p))) for p in (lower, upper, scratch)]
            mount = stack.enter_context(
                closing(mounts.overlay(mounts.Layers(fds[:1], (), *fds[1:]), metacopy=True))
            )
            mounts.attach(mount, target)
        try:
            os.sync()
            start = time.perf_counter()
            subprocess.run(["chown", "-R", "100000:100000", target], check=True)
            return time.perf_counter() - start
        finally:
            mounts.detach(target)

    return run


def _folder(work: Path, layer: MetadataLayer) -> Callable[[int], float]:
    def run(number: int) -> float:
        os.sync()
        start = time.perf_counter()
        write_directory(layer, work / f"meta{number}")
        return time.perf_counter() - start

    return run


def rows(work: Path) -> list[dict[str, Any]]:
    """Return a row for each rendering; ``work`` lies on a fresh filesystem."""
    if os.geteuid() != 0:
        raise SystemExit("bench_directory mounts and changes owners: run it as root")
    made = tree()
    n, layer, lower = len(made), metadata_layer(made), work / "lower"
    _plain(lower, made)
    runs = (_folder(work, layer), _chown(work, lower))
    # In turns, so that whatever else the machine does falls on both.
    times = [[run(number) for run in runs] for number in range(_ROUNDS)]
    folder, chown = (sorted(column)[_ROUNDS // 2] for column in zip(*times, strict=True))
    archive = work / "meta.tar"
    start = time.perf_counter()
    with archive.open("wb") as file:
        write_tar(layer, file)
    tar = time.perf_counter() - start
    start = time.perf_counter()
    command = ["tar", "-c", "--xattrs", "--xattrs-include=*", "--format=pax", "-f", "peer.tar", "-C", "meta0", "."]
    subprocess.run(command, check=True, cwd=work)
    gnu = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return [
        {
            "what": f"META as a folder, {n} entries: {folder / n * 1e6:.1f} µs each",
            "ours_s": folder, "peer": "kernel: chown -R on a metacopy overlay", "peer_s": chown,
            "ratio": folder / chown, "target": "<= 1.1", "memory": peak,
        },
        {
            "what": f"META as a tar, {n} entries: {tar / n * 1e6:.1f} µs each",
            "ours_s": tar, "peer": "GNU tar of the folder", "peer_s": gnu, "ratio": tar / gnu, "target": "<= 1",
        },
    ]  # fmt: skip
