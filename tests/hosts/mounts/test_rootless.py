"""The mounter as an ordinary user who is root of a user and mount namespace of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from needs import need_root

USER = 12_345
SUBIDS = 300_000

# Everything is imported before the change of user: the interpreter may lie where that user cannot read.
# One thread only, for a process with threads may not change its user namespace.
CHILD = """
import ctypes, hashlib, json, os, subprocess, sys
from dataclasses import asdict, replace
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[1])
from layerkit.model.errors import LayerkitError, UnsupportedHost
from layerkit.hosts.mounts import mount as m
from layerkit.hosts.mounts.spec import MountLayer, MountSpec
from layerkit.linux import mounts, userns, probe
from layerkit.metaonly import Namespace, data_path
user, work = int(sys.argv[2]), Path(sys.argv[3])
os.setgroups([]); os.setresgid(user, user, user); os.setresuid(user, user, user)
libc = ctypes.CDLL(None)
libc.prctl(4, 1, 0, 0, 0)
assert libc.unshare(0x10000000 | 0x00020000) == 0
print("ready", flush=True); sys.stdin.readline()
os.setresgid(0, 0, 0); os.setresuid(0, 0, 0); os.chdir(work)

CONTENT = {b"bin/tool": b"#!/bin/sh\\necho ran\\n", b"etc/conf": b"key=value\\n" * 300}
for name in ("meta", "data", "mnt", "mnt2"):
    (work / name).mkdir()
for number, (path, data) in enumerate(CONTENT.items()):
    redirect = data_path(hashlib.sha256(data).digest())
    stub, file = work / "meta" / os.fsdecode(path), work / "data" / os.fsdecode(redirect)
    for place in (stub, file):
        place.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data); file.chmod(0o444)
    stub.touch(); os.truncate(stub, len(data))
    os.setxattr(stub, "user.overlay.metacopy", b"\\0\\4\\0\\0")
    os.setxattr(stub, "user.overlay.redirect", b"/" + redirect)
    os.chown(stub, 1000 + number, 2000 + number); stub.chmod(0o4755)
run = work / "run"
spec = MountSpec(MountLayer(work / "meta"), (MountLayer(work / "data"),), Namespace.USER, work / "mnt")
out = {"privileged": userns.is_privileged(), "can_mount": userns.can_mount()}
features = probe.Features(work)
out["features"] = [getattr(features, x) for x in
                   ("overlay_userxattr", "overlay_unprivileged", "overlay_trusted", "erofs")]
out["record"] = asdict(m.mount(spec, run=run))
out["bytes"] = all((work / "mnt" / os.fsdecode(p)).read_bytes() == d for p, d in CONTENT.items())
st = os.stat("mnt/etc/conf"); out["owner"] = [st.st_uid, st.st_gid, st.st_mode & 0o7777, st.st_size]
(top,) = [x for x in mounts.mount_table() if x.point == str(work / "mnt")]
out["options"] = top.super_options
out["refused"] = []
for change in (
    {"namespace": Namespace.TRUSTED},
    {"meta": MountLayer(work / "data" / os.fsdecode(redirect), "k")},
    {"idmap": (((0, 1000, 10),), ((0, 1000, 10),))},
):
    try:
        m.mount(replace(spec, target=work / "mnt2", **change), run=run)
        out["refused"].append("mounted")
    except LayerkitError as error:
        out["refused"].append(type(error).__name__ + ": " + str(error))
m.mount(replace(spec, target=work / "mnt2", upper=work / "upper"), run=run)
os.chmod("mnt2/etc/conf", 0o600)
out["after_chmod"] = Path("mnt2/etc/conf").read_bytes() == CONTENT[b"etc/conf"]
out["active"] = len(m.active(run))
for name in ("mnt", "mnt2"):
    m.umount(work / name, run=run)
out["left"] = [x.point for x in mounts.mount_table() if x.point.startswith(str(work))]
out["stale"] = m.clear_stale(run)
print(json.dumps(out))
"""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    need_root()
    place = tmp_path / "work"
    place.mkdir()
    os.chown(place, USER, USER)
    # pytest's own folders are closed to other users.
    for parent in tmp_path.parents[:-2]:
        parent.chmod(0o755)
    tmp_path.chmod(0o755)
    return place


def test_a_folder_meta_in_an_unprivileged_user_namespace(work: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, json.dumps([p for p in sys.path if p]), str(USER), str(work)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert child.stdin and child.stdout and child.stderr
        if child.stdout.readline() != "ready\n":
            pytest.fail(child.communicate(timeout=60)[1])
        # As newuidmap would: the user is root inside, and the subordinate ids follow.
        for kind in ("uid", "gid"):
            Path(f"/proc/{child.pid}/{kind}_map").write_text(f"0 {USER} 1\n1 {SUBIDS} 65536\n")
        stdout, stderr = child.communicate("go\n", timeout=60)
    finally:
        child.kill()
    assert child.returncode == 0, stderr
    out = json.loads(stdout)
    assert (out["privileged"], out["can_mount"]) == (False, True)
    assert out["features"] == [True, True, False, False]
    assert out["bytes"]
    assert out["owner"] == [1001, 2001, 0o4755, 3000]
    assert "userxattr" in out["options"]
    assert "metacopy=on" not in out["options"]
    trusted, erofs, idmap = out["refused"]
    assert trusted.startswith("UnsupportedHost: this host does not offer trusted.overlay")
    assert erofs.startswith("UnsupportedHost: this host does not offer mounting EROFS")
    assert idmap.startswith("UnsupportedHost: this host does not offer an idmapped mount")
    assert out["after_chmod"]
    assert out["active"] == 2
    assert (out["left"], out["stale"]) == ([], [])
    # On the disk the files belong to the user's subordinate ids.
    assert (work / "meta/etc/conf").stat().st_uid == SUBIDS + 1000
