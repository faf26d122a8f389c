"""An ordinary user's mounts of the real image under further maps: metadata that is served, and a folder of stubs.

Whole commands in one user namespace, Python's start in them. The peer is the copy that such a user makes without
layerkit: ``umoci unpack --rootless`` for the first map, ``cp -a`` and ``chown -R`` for a further one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench_podman import TESTS, _image

USER = 12_345
_SCRIPT = """
import json, os, subprocess, sys, time
from pathlib import Path
from statistics import median
# By its path: the working folder that comes from outside may lie below what was mounted since.
os.chdir(os.environ["HOME"])
layerkit = [sys.executable, "-m", "layerkit.cli.main"]
def timed(*words):
    os.sync()
    start = time.perf_counter()
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start
def disk(folder):
    words = ["du", "-s", "--block-size=1", folder]
    return int(subprocess.run(words, capture_output=True, check=True).stdout.split()[0])
maps = (f"0:{1 + number}:60000" for number in range(1000))
def mount(image, rendering):
    return timed(*layerkit, "mount", image, "m", "--uid-map", next(maps), "--rendering", rendering, "-q")
def umount():
    subprocess.run([*layerkit, "umount", "m", "-q"], check=True)
found = {"umoci": timed("umoci", "unpack", "--rootless", "--image", "layout:latest", "bundle")}
copies = []
for number in range(3):
    seconds = timed("cp", "-a", "bundle/rootfs", f"copy{number}")
    copies.append(seconds + timed("chown", "-R", "--no-dereference", "1000:1000", f"copy{number}"))
found["copy"], found["copied"] = median(copies), disk("copy0")
found["fuse first"] = mount("layout", "fuse")
name = json.loads(subprocess.run([*layerkit, "store", "ls", "--json"], capture_output=True, check=True).stdout)
name = "store:" + name["images"][0]["names"][0]
umount()
for rendering in ("fuse", "directory"):
    times, before, walks = [], disk("store"), []
    for _ in range(5):
        times.append(mount(name, rendering))
        walks.append(timed("find", "m", "-size", "+1c"))
        umount()
    found[rendering], found[rendering + " kept"] = median(times), (disk("store") - before) / 5
    found[rendering + " walk"] = median(walks)
print(json.dumps(found))
"""


def rows(work: Path) -> list[dict[str, Any]]:
    if os.geteuid() != 0 or shutil.which("umoci") is None or shutil.which("skopeo") is None:
        return []
    home = work / "home"
    (home / "m").mkdir(parents=True)
    copy = ["skopeo", "copy", "--quiet", f"oci-archive:{_image()}", f"oci:{home}/layout:latest"]
    subprocess.run(copy, check=True)
    subprocess.run(["chown", "-R", f"{USER}:{USER}", home], check=True)
    readable = ":".join(map(str, (sys.base_prefix, sys.prefix, TESTS.parent, home)))
    done = subprocess.run(
        [sys.executable, TESTS / "ordinary_users.py", "namespace", str(USER), readable,
         sys.executable, "-c", _SCRIPT],
        cwd=home, stdout=subprocess.PIPE, check=True,
        env={**os.environ, "HOME": str(home), "XDG_RUNTIME_DIR": str(home), "LAYERKIT_STORE": f"{home}/store",
             "PYTHONPATH": str(TESTS.parent)},
    )  # fmt: skip
    found = json.loads(done.stdout)
    print(json.dumps(found), file=sys.stderr)
    copied = f"cp -a, chown -R ({found['copied'] / 1e6:.0f} MB; loses setuid and capabilities)"

    def row(what: str, name: str, peer: str, other: str, target: str = "") -> dict[str, Any]:
        mine, theirs = found[name], found[other]
        return {
            "what": what,
            "ours_s": mine,
            "peer": peer,
            "peer_s": theirs,
            "ratio": theirs / mine,
            "target": target,
        }

    def kept(name: str) -> str:
        return f"{found[name + ' kept'] / 1e6:.2f} MB, {found[name + ' kept'] / found['copied']:.2%} of the image's"

    return [
        row("archive to mounted, served by FUSE", "fuse first", "umoci unpack --rootless, one map", "umoci"),
        row(f"a further map, served by FUSE ({kept('fuse')})", "fuse", copied, "copy", "<= 0.3 s, <= 1 %"),
        row(f"a further map, a folder of stubs ({kept('directory')})", "directory", copied, "copy"),
        row("find over all of it, cold, served by FUSE", "fuse walk", "a folder of stubs", "directory walk"),
    ]
