"""A layer's tar to a blob: ours against pigz and zstd, time and size, with as many threads."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_index import alternate
from bench_unpack import _sample

from layerkit.formats.compression.compress import all_cores, compress
from layerkit.formats.compression.decompress import Compression

_PIECE_BYTES = 1 << 20


def rows(work: Path) -> list[dict[str, Any]]:
    """Return a row for each compression and setting; ``work`` is an empty folder."""
    tar = work / "layers.tar"
    _layers_of(_sample(), tar)
    threads = all_cores()
    out: list[dict[str, Any]] = []
    for form, level, tool, target in (
        (Compression.GZIP, None, ["pigz", "-6", f"-p{threads}"], ">= 2.5, size <= +3 %"),
        (Compression.GZIP, 6, ["pigz", "-6", f"-p{threads}"], ""),
        (Compression.GZIP, 2, ["pigz", "-1", f"-p{threads}"], ""),
        (Compression.ZSTD, None, ["zstd", "-3", f"-T{threads}", "-q"], ""),
    ):
        if shutil.which(tool[0]) is None:
            continue
        ours, theirs = work / "ours", work / "theirs"
        seconds, peer_seconds = alternate(_packer(tar, ours, form, level), _runner([*tool, "-c"], tar, theirs))
        size, peer_size, all_bytes = (path.stat().st_size for path in (ours, theirs, tar))
        name = f"{form.value}{'' if level is None else f' -{level}'}"
        out.append({
            "what": f"repack, {name}: {all_bytes / 1e6:,.0f} MB to {size / all_bytes:.3f}, {threads} threads",
            "ours_s": seconds, "peer": f"{' '.join(tool)}: to {peer_size / all_bytes:.3f}", "peer_s": peer_seconds,
            "ratio": peer_seconds / seconds, "target": target,
        })  # fmt: skip
        out.append({
            "what": f"size, {name}: {100 * (size / peer_size - 1):+.1f} %", "ours_s": None, "peer": tool[0],
            "peer_s": None, "ratio": size / peer_size,
            "target": "<= 1.03" if form is Compression.GZIP and level is None else "",
        })  # fmt: skip
    return out


def _layers_of(archive: Path, tar: Path) -> None:
    """Write the uncompressed layers of the OCI archive to ``tar``, one after the other."""
    with tarfile.open(archive) as image, tar.open("wb") as out:

        def blob(digest: str) -> bytes:
            member = image.extractfile(f"blobs/{digest.replace(':', '/')}")
            assert member is not None
            return member.read()

        listed = image.extractfile("index.json")
        assert listed is not None
        manifest = json.loads(blob(json.loads(listed.read())["manifests"][0]["digest"]))
        for layer in manifest["layers"]:
            out.write(gzip.decompress(blob(layer["digest"])))


def _packer(tar: Path, to: Path, form: Compression, level: int | None) -> Callable[[], object]:
    def run() -> None:
        with tar.open("rb", buffering=0) as source, to.open("wb", buffering=0) as out:
            pieces = iter(lambda: source.read(_PIECE_BYTES), b"")
            for piece in compress(pieces, form, level):
                out.write(piece)

    return run


def _runner(command: list[str], tar: Path, to: Path) -> Callable[[], object]:
    def run() -> None:
        with tar.open("rb") as source, to.open("wb") as out:
            subprocess.run(command, stdin=source, stdout=out, check=True, env={**os.environ, "LC_ALL": "C"})

    return run
