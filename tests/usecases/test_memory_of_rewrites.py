"""The memory of what reads or writes whole images does not depend on how much data their layers hold.

``LAYERKIT_LONG=1`` takes layers of 1 GB and of 4 GB, else of 32 and of 128 MB.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from needs import need_root

from layerkit.formats.compression.compress import compress
from layerkit.formats.compression.decompress import Compression

SMALL, LARGE = (1 << 30, 4 << 30) if os.environ.get("LAYERKIT_LONG") else (32 << 20, 128 << 20)
FILES = 8
BLOCK = os.urandom(1 << 20)
CHILD = """
import re, runpy, sys
try:
    runpy.run_module("layerkit.cli.main", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
# Not getrusage: its ru_maxrss begins with the memory of the process that this one was forked from.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
print(int(peak[1]) << 10, file=sys.stderr)
"""


def members(size: int, uid: int) -> Iterator[bytes]:
    """Yield a tar of ``FILES`` files, ``size`` bytes in all, each with content of its own."""
    each = size // FILES
    for number in range(FILES):
        info = tarfile.TarInfo(f"file{number}")
        info.size, info.uid = each, uid
        yield info.tobuf(tarfile.PAX_FORMAT)
        yield bytes([number]) + BLOCK[1:]
        for _ in range(each // len(BLOCK) - 1):
            yield BLOCK
    yield bytes(1024)


def image(folder: Path, size: int) -> Path:
    """Write a layout whose second layer is a chown of all files of the first."""
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, kind: str) -> dict[str, object]:
        name = hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return {
            "mediaType": f"application/vnd.oci.image.{kind}+json",
            "digest": f"sha256:{name}",
            "size": len(data),
        }

    layers, diff_ids = [], []
    for uid in (0, 7):
        diff, blob = hashlib.sha256(), hashlib.sha256()
        with (folder / "layer").open("wb") as out:

            def hashed(diff: hashlib._Hash = diff, uid: int = uid) -> Iterator[bytes]:
                for piece in members(size, uid):
                    diff.update(piece)
                    yield piece

            for piece in compress(hashed(), Compression.ZSTD, 1):
                blob.update(piece)
                out.write(piece)
            length = out.tell()
        (folder / "layer").rename(blobs / blob.hexdigest())
        diff_ids.append(f"sha256:{diff.hexdigest()}")
        layers.append({"mediaType": "application/vnd.oci.image.layer.v1.tar+zstd",
                       "digest": f"sha256:{blob.hexdigest()}", "size": length})  # fmt: skip
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": put(json.dumps(config).encode(), "config.v1"), "layers": layers}  # fmt: skip
    top = put(json.dumps(manifest).encode(), "manifest.v1")
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return folder


def peak(words: str, source: Path, out: Path) -> int:
    """Return the largest memory of a run in bytes; its results are removed."""
    out.mkdir()
    filled = [word.format(src=f"oci:{source}", dst=f"oci:{out}/layout:x", out=out) for word in words.split()]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *filled, "--quiet", "--store", f"{out}/store"],
        capture_output=True, text=True, check=False, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(out)
    return int(done.stderr.split()[-1])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [image(tmp_path_factory.mktemp("image"), size) for size in (SMALL, LARGE)]


MAP = "--uid-map 0:100000:65536"


@pytest.mark.parametrize(
    "words",
    [
        "optimize {src} {dst} --compression gzip --jobs 2",
        "optimize {src} {dst} --compression zstd --jobs 2",
        "flatten {src} {dst} --compression none --jobs 2",
        f"remap {{src}} {{dst}} --form portable --compression zstd --jobs 2 {MAP}",
        f"remap {{src}} {MAP}",
        f"remap {{src}} {MAP} --data objects",
        f"unpack {{src}} {{out}}/rootfs {MAP}",
        "copy {src} docker-archive:{out}/copy.tar:x:1",
    ],
)
def test_memory_is_the_same_for_more_data(
    words: str, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if MAP in words and "portable" not in words:
        need_root()  # owners that an ordinary user cannot give
    small, large = (peak(words, source, tmp_path / str(number)) for number, source in enumerate(images))
    found = f"{words}: {small / 1e6:.0f} MB for {SMALL >> 20} MiB, {large / 1e6:.0f} MB for 4x"
    if os.environ.get("LAYERKIT_LONG"):
        with capsys.disabled():
            print(f"\n{found}")
    assert large < 1.15 * small, found
