"""A registry on this host: push and pull beside skopeo, remaps from published indexes beside those that read.

Whole commands, start included. The registry is Debian's docker-registry on the same disk, so that what is measured
is the client's work and not a network's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROUNDS = 3
LAYERS, LAYER_BYTES = 4, 96 << 20
MAP = "0:100000:65536"
SAMPLES = Path(__file__).resolve().parent.parent / "sample-images"


def rows(work: Path) -> list[dict[str, Any]]:
    """Return the measurements, made in ``work``, an empty folder; none without docker-registry and skopeo."""
    if shutil.which("docker-registry") is None or shutil.which("skopeo") is None:
        return []
    layout = make_image(work / "image")
    size = LAYERS * LAYER_BYTES / 1e6
    with registry(work / "registry") as host:
        env = {**os.environ, "LAYERKIT_TLS_VERIFY": "false", "LAYERKIT_STORE": str(work / "no-store"),
               "LAYERKIT_CACHE": str(work / "no-cache")}  # fmt: skip
        count = iter(range(1_000_000))

        def layerkit(*args: str, **more: str) -> None:
            command = [sys.executable, "-m", "layerkit.cli.main", *args, "--quiet"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env | more)

        def skopeo(*args: str) -> None:
            subprocess.run(["skopeo", "copy", "--quiet", *args], check=True, stdout=subprocess.DEVNULL)

        def skopeo_synced(*args: str) -> None:
            # layerkit returns when what it wrote would outlive a loss of power; skopeo does not wait for that.
            skopeo(*args)
            subprocess.run(["sync", "--file-system", work], check=True)

        # A repository and a registry folder that hold nothing of it yet, each time.
        push = alternate(
            lambda: layerkit("copy", f"oci:{layout}", f"docker://{host}/push{next(count)}"),
            lambda: skopeo("--dest-tls-verify=false", f"oci:{layout}", f"docker://{host}/push{next(count)}"),
            lambda: forget(work / "registry"),
        )
        layerkit("copy", f"oci:{layout}", f"docker://{host}/pull")
        pull = alternate(
            lambda: layerkit("copy", f"docker://{host}/pull", f"oci:{work}/out"),
            lambda: skopeo("--src-tls-verify=false", f"docker://{host}/pull", f"oci:{work}/out:x"),
            lambda: shutil.rmtree(work / "out", ignore_errors=True),
        )
        synced = alternate(
            lambda: layerkit("copy", f"docker://{host}/pull", f"oci:{work}/out"),
            lambda: skopeo_synced("--src-tls-verify=false", f"docker://{host}/pull", f"oci:{work}/out:x"),
            lambda: shutil.rmtree(work / "out", ignore_errors=True),
        )
        out = [
            row(
                f"push to a registry: {LAYERS} layers, {size:,.0f} MB, {size / push[0]:,.0f} MB/s",
                push,
                "skopeo copy",
                ">= 1",
            ),
            row(
                f"pull from it into a layout: {size:,.0f} MB, {size / pull[0]:,.0f} MB/s",
                pull,
                "skopeo copy",
                ">= 1",
            ),
            row("the same, until it is on the disk", synced, "skopeo copy and sync", ">= 1"),
        ]
        app = next(iter(sorted((SAMPLES / "out").glob("app-*.tar"))), None)
        if app is not None:
            out += remap_rows(app, f"docker://{host}/app:v1", layerkit)
    return out


def remap_rows(app: Path, ref: str, layerkit: Callable[..., None]) -> list[dict[str, Any]]:
    """Return the remap of the real image from indexes beside one that reads its layers."""
    layerkit("copy", str(app), ref)
    layerkit("index", "push", ref)
    maps = iter(range(200_000, 10_000_000, 65_536))

    def remap(published: str) -> None:
        layerkit("remap", ref, ref, "--uid-map", f"0:{next(maps)}:65536", LAYERKIT_PUBLISHED=published)

    times = alternate(lambda: remap("true"), lambda: remap("false"), lambda: None)
    what = "remap in the registry from published indexes: the real image, 20,000 entries, 111 MB"
    return [row(what, times, "layerkit, reading the layers", ">= 2")]


def make_image(folder: Path) -> Path:
    """Write a layout with an image of layers that hold random bytes, compressed as fast as can be."""
    import gzip

    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    layers, diff_ids = [], []
    for i in range(LAYERS):
        source, tar = folder / f"{i}.bin", folder / f"{i}.tar"
        with source.open("wb") as file:
            for _ in range(LAYER_BYTES >> 20):
                file.write(os.urandom(1 << 20))
        with tarfile.open(tar, "w") as archive:
            archive.add(source, f"data{i}")
        data = tar.read_bytes()
        diff_ids.append(f"sha256:{hashlib.sha256(data).hexdigest()}")
        layers.append(
            {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", **put(gzip.compress(data, 0, mtime=0))}
        )
        source.unlink()
        tar.unlink()
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    manifest = {
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **put(json.dumps(config).encode())},
        "layers": layers,
    }  # fmt: skip
    entry = {"mediaType": manifest["mediaType"], **put(json.dumps(manifest).encode())}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return folder


@contextlib.contextmanager
def registry(folder: Path) -> Iterator[str]:
    """Run docker-registry over ``folder``; give its host."""
    folder.mkdir()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    (folder / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {folder}/data}}}}\n"
        f"http: {{addr: 127.0.0.1:{port}, secret: none}}\n"
    )
    process = subprocess.Popen(
        ["docker-registry", "serve", folder / "config.yml"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield f"localhost:{port}"
    finally:
        process.terminate()
        process.wait()


def forget(folder: Path) -> None:
    """Take all blobs away: a registry that has them takes none."""
    shutil.rmtree(folder / "data", ignore_errors=True)


def alternate(
    ours: Callable[[], None], theirs: Callable[[], None], before: Callable[[], None]
) -> tuple[float, float]:
    """Return the median seconds of both, by turns, so that both meet the same disturbances."""
    times: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(ROUNDS):
        for place, work in enumerate((ours, theirs)):
            before()
            os.sync()
            start = time.perf_counter()
            work()
            times[place].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def row(what: str, times: tuple[float, float], peer: str, target: str) -> dict[str, Any]:
    ours, theirs = times
    return {
        "what": what, "ours_s": ours, "peer": peer, "peer_s": theirs, "ratio": theirs / ours, "target": target,
    }  # fmt: skip
