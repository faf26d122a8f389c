"""The whole way without root: an ordinary user in a user namespace, folders and ``user.overlay`` xattrs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from in_userns import SUBIDS
from support import need_root

from layerkit.merge import merge

USER = 12345
HELPER = Path(__file__).resolve().parent.parent / "in_userns.py"

# Runs inside the namespace: mount, look, and say what was seen. The map shifts by 1 inside of it.
SCRIPT = """
import json, os, subprocess, sys
store, image, target, root = sys.argv[1:5]
sys.path.insert(0, root)
import layerkit
from pathlib import Path
settings = layerkit.Settings(store=Path(store))
with layerkit.open_image(image, settings=settings) as opened:
    with opened.mount(target, layerkit.mapping(["0:1:65536"])) as mounted:
        seen = {}
        for place, folders, files in os.walk(target):
            for name in folders + files:
                path = os.path.join(place, name)
                st = os.lstat(path)
                data = open(path, "rb").read() if os.path.isfile(path) and not os.path.islink(path) else b""
                seen[os.path.relpath(path, target)] = [st.st_mode, st.st_uid, st.st_gid, len(data), data[:64].hex()]
        how = mounted.report.to_dict()
        lines = [x for x in open("/proc/self/mountinfo") if " - overlay " in x and target in x]
print(json.dumps({"seen": seen, "how": how, "mount": lines}))
"""


def test_an_ordinary_user_mounts_a_remapped_image(tiny_archive: Callable[..., Path], tmp_path: Path) -> None:
    need_root()
    import layerkit

    image = tiny_archive("oci-archive", "gzip", devices=False)
    work = tmp_path / "work"
    work.mkdir()
    (work / "m").mkdir()
    (work / "image.tar").write_bytes(image.read_bytes())
    for path in (work, work / "m", work / "image.tar"):
        os.chown(path, USER, USER)
    root = HELPER.parent.parent
    done = subprocess.run(
        [sys.executable, HELPER, str(USER), f"{sys.base_prefix}:{sys.prefix}:{root}:{work}", sys.executable, "-c", SCRIPT,
         str(work / "store"), str(work / "image.tar"), str(work / "m"), str(root)],
        env={**os.environ, "HOME": str(work), "XDG_RUNTIME_DIR": str(work)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["how"]["rendering"] == "directory"
    assert result["how"]["data_backend"] == "objects"
    assert "userxattr" in result["mount"][0]
    with layerkit.open_image(str(image)) as opened:
        tree = merge(opened.indexes())
    want = {node.path: node for node in tree.nodes()}
    assert len(result["seen"]) == len(want) - 1
    for name, (mode, uid, gid, size, _head) in result["seen"].items():
        node = want[os.fsencode(name)]
        assert (mode, uid, gid) == (node.mode, node.uid + 1, node.gid + 1), name
        if mode >> 12 == 8:
            assert size == node.size, name
    # On the host the files belong to the user's subordinate ids, and to nobody else.
    owners = {path.lstat().st_uid for path in (work / "store").rglob("*")}
    assert all(owner == USER or SUBIDS <= owner < SUBIDS + 65536 for owner in owners)
