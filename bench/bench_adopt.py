"""Layers that a runtime has unpacked already, under other owners: what stays to be done, beside copies.

The real sample image (sample-images/app.py), unpacked into layer folders by skopeo into containers-storage. Ours
are whole commands, Python's start and every fsync in them. The peers copy: ``cp -a`` and ``chown`` of the merged
root filesystem. Podman as root maps its layers by idmapped mounts: its row says what that costs.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LAYERKIT = str(Path(sys.executable).with_name("layerkit"))
ROUNDS = 3


def archive() -> Path:
    spec = importlib.util.spec_from_file_location("app", HERE.parent / "sample-images/app.py")
    assert spec is not None and spec.loader is not None
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    path: Path = app.ensure("oci-archive")
    return path


def timed(*command: object, **more: Any) -> float:
    os.sync()
    start = time.perf_counter()
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL, **more)
    return time.perf_counter() - start


def rows(work: Path) -> list[dict[str, Any]]:
    root = work / "containers"
    runroot = Path(tempfile.mkdtemp(prefix="lk-adopt-"))
    target, store = work / "m", work / "store"
    target.mkdir()
    name = f"[overlay@{root}+{runroot}]localhost/app:latest"
    try:
        copy = ("skopeo", "--insecure-policy", "copy", "--quiet")
        subprocess.run([*copy, f"oci-archive:{archive()}", f"containers-storage:{name}"], check=True)
        return [*_index(root), *_maps(f"containers-storage:[overlay@{root}]app", work, target, store)]
    finally:
        subprocess.run(["umount", "--lazy", root / "overlay"], check=False, capture_output=True)
        shutil.rmtree(runroot, ignore_errors=True)


def _index(root: Path) -> list[dict[str, Any]]:
    from layerkit.hosts.adopted.sources import find_unpacked
    from layerkit.linux.folders.reader import index_layer_folder, read_state

    folders = find_unpacked(f"containers-storage:[overlay@{root}]app").folders
    find = ["find", *(str(folder.path) for folder in folders), "-printf", "%p %i %m %U %G %s %T@ %C@ %n %l\\n"]
    ours, again, peer, walk = [], [], [], []
    count = 0
    for _ in range(ROUNDS):
        start = time.perf_counter()
        layers = [index_layer_folder(folder.path) for folder in folders]
        ours.append(time.perf_counter() - start)
        count = sum(len(layer.index) for layer in layers)
        start = time.perf_counter()
        for folder, layer in zip(folders, layers, strict=True):
            fd = os.open(folder.path, os.O_RDONLY)
            assert read_state(fd, layer.index) == layer.state
            os.close(fd)
        again.append(time.perf_counter() - start)
        walk.append(timed(*find))
        start = time.perf_counter()
        with subprocess.Popen(find, stdout=subprocess.PIPE) as listing:
            subprocess.run(["sha256sum"], stdin=listing.stdout, check=True, stdout=subprocess.DEVNULL)
        peer.append(time.perf_counter() - start)
    own, listed = statistics.median(ours), statistics.median(walk)
    state = statistics.median(again)
    return [
        {"what": f"index {len(layers)} layer folders, {count} entries ({own / count * 1e6:.1f} µs each)",
         "ours_s": own, "peer": "find -printf, no xattrs", "peer_s": listed, "ratio": listed / own, "target": ""},
        {"what": "see that they did not change", "ours_s": state, "peer": "find -printf | sha256sum",
         "peer_s": statistics.median(peer), "ratio": statistics.median(peer) / state, "target": ""},
    ]  # fmt: skip


def _maps(ref: str, work: Path, target: Path, store: Path) -> list[dict[str, Any]]:
    environment = {**os.environ, "LAYERKIT_STORE": str(store)}
    number = 0

    def mount(*more: str, fresh: bool = False) -> float:
        nonlocal number
        number += 1
        if fresh:
            shutil.rmtree(store, ignore_errors=True)
        mapping = f"0:{100000 * number}:65536"
        seconds = timed(LAYERKIT, "mount", ref, target, "--uid-map", mapping, *more, env=environment)
        subprocess.run([LAYERKIT, "umount", target], check=True, env=environment, capture_output=True)
        return seconds

    def median(*more: str, fresh: bool = False) -> float:
        return statistics.median(mount(*more, fresh=fresh) for _ in range(ROUNDS))

    first = median(fresh=True)
    further, own = median(), median("--own-meta")
    classic_first = median("--stacking", "classic", "--own-meta", fresh=True)
    classic = median("--stacking", "classic", "--own-meta")
    subprocess.run([LAYERKIT, "mount", ref, target], check=True, env=environment, capture_output=True)
    try:
        copies = []
        for i in range(ROUNDS):
            copy = work / f"copy{i}"
            seconds = timed("cp", "-a", f"{target}/.", copy)
            copies.append(seconds + timed("chown", "-R", "--no-dereference", "100000:100000", copy))
    finally:
        subprocess.run([LAYERKIT, "umount", target], check=True, env=environment, capture_output=True)
    copied = statistics.median(copies)
    peer = "cp -a, chown -R (loses setuid and capabilities)"
    return [
        {"what": what, "ours_s": seconds, "peer": peer, "peer_s": copied, "ratio": copied / seconds, "target": goal}
        for what, seconds, goal in (
            ("first map of unpacked layers, idmapped META", first, ""),
            ("further map, idmapped META", further, "<= 0.3 s"),
            ("further map, META of its own", own, "<= 0.3 s"),
            ("first map, classic stacking, META of its own", classic_first, ""),
            ("further map, classic stacking, META of its own", classic, ""),
        )
    ] + _stock(ref, further)


def _stock(ref: str, further: float) -> list[dict[str, Any]]:
    """Measure podman's own way as root: idmapped layers, where the filesystem can have them."""
    root = ref.partition("@")[2].partition("]")[0]
    runroot = Path(tempfile.mkdtemp(prefix="lk-adopt-"))
    podman = ("podman", "--root", root, "--runroot", runroot, "--storage-driver", "overlay")
    seconds = []
    try:
        for i in range(ROUNDS):
            mapping = f"0:{300000 + 70000 * i}:65536"
            made = timed(*podman, "create", "--name", f"c{i}", "--uidmap", mapping, "localhost/app", "/bin/true")
            seconds.append(made + timed(*podman, "mount", f"c{i}"))
            subprocess.run([*map(str, podman), "umount", f"c{i}"], check=True, capture_output=True)
    finally:
        shutil.rmtree(runroot, ignore_errors=True)
    stock = statistics.median(seconds)
    row = {"what": "further map, beside podman's idmapped layers", "ours_s": further, "target": ""}
    return [{**row, "peer": "podman create --uidmap, mount", "peer_s": stock, "ratio": stock / further}]
