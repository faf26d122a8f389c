"""The whole way for a large image: 122,000 entries and some 1.7 GB, as an application of Python and Node has them.

Six layers of this machine's own files, with PAX headers as GNU tar makes them, gzip -6: an image of the size that
the targets were set for. What is measured is what ``bench_end_to_end`` measures for the sample image.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench_end_to_end import Bench, _alternate, _row

ENTRIES = 122_000
BYTES = 1_740_000_000
LAYERS = 6
LARGEST_FILE = 1 << 19
SOURCES = ("/usr/lib", "/usr/share", "/usr/include", "/usr/local", "/usr/bin", "/opt", "/root", "/home", "/var/lib")


def names() -> Iterator[tuple[bytes, int]]:
    """Yield paths of folders and not too large files, with their bytes."""
    for source in SOURCES:
        for folder, folders, files in os.walk(os.fsencode(source)):
            folders.sort()
            yield folder, 0
            for name in sorted(files):
                path = os.path.join(folder, name)
                size = os.lstat(path).st_size
                if size < LARGEST_FILE:
                    yield path, size


def chosen() -> list[list[bytes]]:
    """Return the paths of each layer."""
    out: list[list[bytes]] = [[]]
    size = 0
    for path, length in itertools.islice(names(), ENTRIES):
        if size >= BYTES:
            break
        if len(out[-1]) >= ENTRIES // LAYERS and len(out) < LAYERS:
            out.append([])
        out[-1].append(path)
        size += length
    return out


def make_image(folder: Path) -> tuple[Path, int, int]:
    """Write the image as an OCI archive; return it, its entries, and the bytes of its uncompressed layers."""
    layout = folder / "made"
    blobs = layout / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes) -> dict[str, object]:
        name = hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return {"digest": f"sha256:{name}", "size": len(data)}

    layers, diff_ids, entries, total = [], [], 0, 0
    for paths in chosen():
        tar = folder / "layer.tar"
        flags = ["--format=posix", "--no-recursion", "--hard-dereference", "--ignore-failed-read"]
        command: list[str | Path] = ["tar", *flags, "-cf", tar, "-C", "/", "--null", "--files-from=-"]
        lines = b"\0".join(path.lstrip(b"/") for path in paths)
        done = subprocess.run(command, input=lines, stderr=subprocess.DEVNULL, check=False)
        if done.returncode > 1:  # 1: a file changed while it was read
            raise RuntimeError(f"tar ended with {done.returncode}")
        with tar.open("rb") as file:
            diff_ids.append("sha256:" + hashlib.file_digest(file, "sha256").hexdigest())
        total += tar.stat().st_size
        entries += len(paths)
        tool = "pigz" if shutil.which("pigz") else "gzip"
        subprocess.run([tool, "-6", "-n", "-f", tar], check=True)
        blob = tar.with_suffix(".tar.gz")
        with blob.open("rb") as file:
            name = hashlib.file_digest(file, "sha256").hexdigest()
        layers.append({"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": f"sha256:{name}",
                       "size": blob.stat().st_size})  # fmt: skip
        blob.rename(blobs / name)
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    config = {
        "architecture": machine,
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }
    manifest = {
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "layers": layers,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **put(json.dumps(config).encode())},
    }  # fmt: skip
    top = {"mediaType": manifest["mediaType"], **put(json.dumps(manifest).encode()),
           "annotations": {"org.opencontainers.image.ref.name": "latest"}}  # fmt: skip
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    archive = folder / "large.tar"
    with tarfile.open(archive, "w") as out:
        for name in ("oci-layout", "index.json", "blobs"):
            out.add(layout / name, name)
    shutil.rmtree(layout)
    return archive, entries, total


def rows(work: Path) -> list[dict[str, Any]]:
    """Return the measurements, made in ``work``, an empty folder."""
    archive, entries, size = make_image(work)
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
    ours, *theirs = _alternate(bench.ours, *(run for _, run, _ in peers))
    what = f"archive to mounted and remapped: {size / 1e6:,.0f} MB, {entries:,} entries"
    return [
        _row(what, ours, name, seconds, target)
        for (name, _, target), (seconds, _) in zip(peers, theirs, strict=True)
    ]


if __name__ == "__main__":
    for row in rows(Path(sys.argv[1])):
        print(json.dumps(row))
