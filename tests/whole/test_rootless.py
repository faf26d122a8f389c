"""The whole way without root: an ordinary user in a user namespace, folders and ``user.overlay`` xattrs."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from judge import differences, snapshot, unpacked
from needs import need_root, need_tool
from ordinary_users import SUBIDS
from programs import KIT, ROOT

USER = 12345
# Ids of the user namespace: its root is the user, the rest are subordinate ids.
EXTENTS = ((0, 1, 65535),)

# Runs inside the namespace: mount, look, and hand out what was seen.
SCRIPT = """
import pickle, sys
from pathlib import Path
store, image, target, out, rendering, *paths = sys.argv[1:]
sys.path[:0] = paths
import layerkit
from layerkit.hosts.diagnosis import doctor
from judge import snapshot
with layerkit.open_image(image, settings=layerkit.Settings(store=Path(store))) as opened:
    with opened.mount(target, layerkit.mapping(["0:1:65535"]), rendering=rendering) as mounted:
        lines = [x for x in open("/proc/self/mountinfo") if " - overlay " in x and target in x]
        best = doctor.examine(Path(store)).rendering
        seen = (snapshot(Path(target)), {"best": best, **mounted.report.to_dict()}, lines)
Path(out).write_bytes(pickle.dumps(seen))
"""


def as_user(work: Path, image: Path, rendering: str) -> Any:
    """Mount ``image`` as an ordinary user; return (snapshot, report, mount lines)."""
    (work / "m").mkdir()
    subprocess.run(["cp", "-r", image, work / "image"], check=True)
    subprocess.run(["chown", "-R", f"{USER}:{USER}", work], check=True)
    root = ROOT
    words = (work / "store", work / "image", work / "m", work / "seen", rendering, root, KIT)
    folders = ":".join(map(str, (sys.base_prefix, sys.prefix, root, work)))
    done = subprocess.run(
        [
            sys.executable,
            KIT / "ordinary_users.py",
            "namespace",
            str(USER),
            folders,
            sys.executable,
            "-c",
            SCRIPT,
            *map(str, words),
        ],
        env={**os.environ, "HOME": str(work), "XDG_RUNTIME_DIR": str(work)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return pickle.loads((work / "seen").read_bytes())


@pytest.mark.parametrize("rendering", ["auto", "directory", "fuse"])
@pytest.mark.parametrize("which", ["tiny", "app"])
def test_an_ordinary_user_sees_what_umoci_and_the_kernel_show(
    which: str, rendering: str, tiny_archive: Callable[..., Path], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    need_root()
    need_tool("umoci", "skopeo")
    if which == "tiny":
        image = tiny_archive("oci", "gzip", devices=False)
    else:
        image = tmp_path / "layout"
        archive = request.getfixturevalue("app_image")
        subprocess.run(["skopeo", "copy", "--quiet", f"oci-archive:{archive}", f"oci:{image}:latest"], check=True)
    with unpacked(f"{image}:latest", tmp_path, EXTENTS) as shown:
        want = snapshot(shown)
    (tmp_path / "work").mkdir()
    seen, report, lines = as_user(tmp_path / "work", image, rendering)
    assert report["data_backend"] == "objects"
    assert report["best"] == "fuse", "the device of these tests is open to everybody"
    assert report["rendering"] == (report["best"] if rendering == "auto" else rendering)
    if report["rendering"] == "fuse":
        # No file for an entry, and nothing for the map.
        assert len(list((tmp_path / "work/store/meta").rglob("*"))) <= 3
        assert report["meta_bytes"] == 0
    assert len(lines) == 1
    assert "userxattr" in lines[0]
    assert differences(seen, want, skip=frozenset({b"."})) == []
    # On the host the files belong to the user's subordinate ids, and to nobody else.
    owners = {path.lstat().st_uid for path in (tmp_path / "work/store").rglob("*")}
    assert all(owner == USER or SUBIDS <= owner < SUBIDS + 65536 for owner in owners)
