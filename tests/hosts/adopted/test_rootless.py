"""Adopting layers as an ordinary user: data-only lowers with ``userxattr``, judged by the kernel's own id map."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from judge import differences, snapshot
from needs import need_root
from ordinary_users import COUNT, SUBIDS
from programs import KIT, ROOT

from layerkit.linux import mounts

USER = 12346

# Runs inside the namespace: makes layers as a runtime would, mounts them, and hands out what it saw.
SCRIPT = """
import os, pickle, stat, sys
from pathlib import Path
rendering = sys.argv[1]
work, *paths = map(Path, sys.argv[2:])
sys.path[:0] = map(str, paths)
import layerkit
from layerkit.model.errors import UnsupportedHost
from layerkit.hosts.adopted import mount as adopt
from layerkit.hosts.mounts import mount as mounter
from layerkit.hosts.mounts.spec import MountOptions
from layerkit.hosts.adopted.sources import find_unpacked
from layerkit.store.local import LocalStore
from judge import snapshot
bottom, top = work / "bottom", work / "top"
for name in ("gone", "kept", "opaque/below", "d/private"):
    (bottom / name).parent.mkdir(parents=True, exist_ok=True)
    (bottom / name).write_text(name)
(bottom / "d/private").chmod(0o600)
os.chown(bottom / "d/private", 33, 44)
os.link(bottom / "kept", bottom / "d/link")
os.symlink("kept", bottom / "way")
os.chown(bottom / "way", 5, 6, follow_symlinks=False)
(top / "opaque").mkdir(parents=True)
os.mknod(top / "gone", stat.S_IFCHR, 0)
os.setxattr(top / "opaque", "user.overlay.opaque", b"y")
(top / "opaque/new").write_text("new")
os.setxattr(top / "opaque/new", "user.note", b"kept")
(work / "m").mkdir()
seen = {}
with LocalStore.open(work / "store") as store:
    unpacked = find_unpacked(f"folders:{top}:{bottom}")
    report = adopt.mount_unpacked(unpacked, work / "m", layerkit.mapping(["0:1:65535"]), store,
                                  MountOptions(rendering))
    seen["tree"] = snapshot(work / "m")
    seen["report"] = report.to_dict()
    mounter.umount(work / "m", run=mounter.default_run(store.root))
    try:
        adopt.mount_unpacked(unpacked, work / "m", layerkit.mapping(["0:1:65535"]), store,
                             MountOptions(stacking="classic"))
    except UnsupportedHost as error:
        seen["classic"] = str(error)
(work / "seen").write_bytes(pickle.dumps(seen))
"""


@pytest.mark.parametrize("rendering", ["auto", "directory", "fuse"])
def test_layers_of_an_ordinary_user(rendering: str, tmp_path: Path) -> None:
    need_root()
    os.chown(tmp_path, USER, USER)
    root = ROOT
    folders = ":".join(map(str, (sys.base_prefix, sys.prefix, root, tmp_path)))
    done = subprocess.run(
        [sys.executable, KIT / "ordinary_users.py", "namespace", str(USER), folders, sys.executable, "-c",
         SCRIPT, rendering, tmp_path, root, KIT],
        env={**os.environ, "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = pickle.loads((tmp_path / "seen").read_bytes())
    assert (seen["report"]["stacking"], seen["report"]["read_folders"]) == ("data-only", 2)
    assert "metacopy=on is for root" in seen["classic"]

    # Outside: 0 is the user, the rest subordinate ids. The mount moves each id of the namespace up by one.
    extents = ((USER, SUBIDS, 1), (SUBIDS, SUBIDS + 1, COUNT - 1))
    shown = tmp_path / "shown"
    shown.mkdir()
    layers = [mounts.idmapped_clone(tmp_path / name, extents, extents) for name in ("top", "bottom")]
    try:
        overlay = mounts.overlay(mounts.Layers(layers), userxattr=True)
        mounts.attach(overlay, shown)
        os.close(overlay)
        want = snapshot(shown)
    finally:
        mounts.detach(shown, lazy=True)
        for fd in layers:
            os.close(fd)
    inside = {path: one._replace(uid=one.uid - SUBIDS + 1, gid=one.gid - SUBIDS + 1) for path, one in want.items()}
    assert b"./gone" not in want
    assert b"./opaque/below" not in want
    assert differences(seen["tree"], inside) == []
