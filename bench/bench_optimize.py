"""The real sample image made smaller: optimize and flatten, beside docker-squash and ``podman build --squash-all``.

The peers begin with the image in their engine's store; ours begin with the archive and read what they wrote
back before it counts. docker-squash writes an archive, as ours do; podman leaves its result in its store. What
is written is not compressed, but for the rows that say so: both peers do not compress.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench_end_to_end import HERE, timed
from bench_unpack import _sample

sys.path.insert(0, str(HERE.parent / "tests"))

ROUNDS = 3
_NAME = "example.com/bench:1"


def rows(work: Path) -> list[dict[str, Any]]:
    """Return a row for each command and peer; ``work`` is an empty folder."""
    if os.geteuid() != 0:
        raise SystemExit("the engines want root")
    from engines import dockerd, podman

    image = _sample()
    docker_image = work / "image.tar"
    subprocess.run(
        ["skopeo", "copy", "-q", f"oci-archive:{image}", f"docker-archive:{docker_image}:{_NAME}"], check=True
    )
    runs: dict[str, Callable[[], tuple[float, int]]] = {
        "optimize": lambda: _layerkit(work, "optimize", image, "oci-archive", "--compression", "none"),
        "optimize, gzip": lambda: _layerkit(work, "optimize", image, "oci-archive"),
        "flatten": lambda: _layerkit(work, "flatten", docker_image, "docker-archive", "--compression", "none"),
        "flatten, gzip": lambda: _layerkit(work, "flatten", image, "oci-archive"),
    }
    peers: list[str] = []
    with ExitStack() as stack:
        squash = _docker_squash()
        if squash and shutil.which("dockerd"):
            engine = stack.enter_context(dockerd())
            engine("load", "-i", docker_image)
            runs["docker-squash"] = lambda: _peer(
                work, [squash, "--output-path", str(work / "squashed.tar"), _NAME],
                {**engine.env, "PATH": os.environ["PATH"]},
            )  # fmt: skip
            peers.append("docker-squash")
        if shutil.which("podman"):
            other = stack.enter_context(podman())
            other("load", "-i", docker_image)
            (work / "Containerfile").write_text(f"FROM {_NAME}\n")
            empty = stack.enter_context(tempfile.TemporaryDirectory())
            command = [
                *other.command, "build", "--squash-all", "--network", "none", "--no-cache", "-q",
                "-f", str(work / "Containerfile"), empty,
            ]  # fmt: skip
            runs["podman"] = lambda: _peer(work, command, dict(other.env))
            peers.append("podman")
        found: dict[str, list[tuple[float, int]]] = {name: [] for name in runs}
        for number in range(ROUNDS + 1):
            for name, run in runs.items():
                result = run()
                if number:  # the first one warms caches
                    found[name].append(result)
    times = {name: statistics.median(seconds for seconds, _ in got) for name, got in found.items()}
    memory = {name: max(peak for _, peak in got) for name, got in found.items()}
    labels = {"docker-squash": "docker-squash", "podman": "podman build --squash-all"}
    out: list[dict[str, Any]] = [
        {
            "what": f"{ours}{_shrunk(work, image, ours)}", "ours_s": times[ours], "peer": labels[peer],
            "peer_s": times[peer], "ratio": times[peer] / times[ours],
            "target": "" if ours.endswith("gzip") else ">= 1", "memory": memory[ours],
        }
        for ours in ("optimize", "optimize, gzip", "flatten", "flatten, gzip")
        for peer in peers
    ]  # fmt: skip
    return out


def _docker_squash() -> str | None:
    beside = Path(sys.executable).with_name("docker-squash")
    return str(beside) if beside.exists() else shutil.which("docker-squash")


def _layerkit(work: Path, command: str, image: Path, kind: str, *words: str) -> tuple[float, int]:
    out = work / f"{command}{'' if words else ', gzip'}.tar"
    out.unlink(missing_ok=True)
    base: list[str | Path] = [sys.executable, "-m", "layerkit.cli.main", command, image, f"{kind}:{out}:{_NAME}"]
    return timed([*base, "--store", work / "store", "--quiet", *words])


def _peer(work: Path, command: list[str], env: dict[str, str]) -> tuple[float, int]:
    (work / "squashed.tar").unlink(missing_ok=True)
    words = [f"{key}={value}" for key, value in env.items()]
    return timed(["env", *words, *command])


def _shrunk(work: Path, image: Path, ours: str) -> str:
    """Return how much smaller than the image's the layers of ours are, where both are compressed."""
    if not ours.endswith("gzip"):
        return ", not compressed"
    before, after = _blob_bytes(image), _blob_bytes(work / f"{ours}.tar")
    return f": {before / 1e6:.1f} MB to {after / 1e6:.1f} MB, {100 * (1 - after / before):.1f} % less"


def _blob_bytes(archive: Path) -> int:
    with tarfile.open(archive) as tar:

        def read(name: str) -> Any:
            member = tar.extractfile(name)
            assert member is not None
            return json.loads(member.read())

        listed = read("index.json")["manifests"][0]["digest"]
        return sum(layer["size"] for layer in read(f"blobs/{listed.replace(':', '/')}")["layers"])
