"""``bundle --rootless``: an ordinary user with subordinate ids makes a bundle, and runs it by runc alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import short_folder
from made_images import special
from needs import need_root, need_tool
from ordinary_users import ACCOUNT_SUBIDS as SUBIDS
from ordinary_users import UID
from programs import KIT, ROOT
from runnable import busybox_image

LOOK = (
    "id -u; cat /proc/self/uid_map; stat -c %u:%g:%a /usr/bin/su /opt/app /srv/drop; echo new > /root/new; "
    "chown 7:8 /root/new; stat -c %u:%g /root/new; ping -c1 -W2 127.0.0.1 > /dev/null && echo pong"
)
LOOK_SMALL = "id -u; stat -c %u:%g:%a /opt/app; touch /x; chown 7:8 /x; stat -c %u:%g /x"


@pytest.fixture
def home() -> Iterator[Path]:
    """Return a home folder of the user's own, with an image in it."""
    need_root()
    need_tool("runc", "newuidmap", "newgidmap", "unshare")
    with short_folder() as folder:
        folder.chmod(0o755)
        place = folder / "home"
        place.mkdir(mode=0o755)
        (place / "run").mkdir(mode=0o700)
        busybox_image(
            place / "app", {"Cmd": ["/bin/id"]}, special("opt/app", tarfile.DIRTYPE, mode=0o750, uid=1000)
        )
        for path in (place, *place.rglob("*")):
            os.chown(path, UID, UID)
        yield place


@pytest.fixture
def real(home: Path, app_image: Path) -> Path:
    """Return the home folder with the real image in it."""
    shutil.copy(app_image, home / "real.tar")
    (home / "real.tar").chmod(0o644)
    return home


def as_user(home: Path, script: str, *, code: int = 0) -> str:
    """Run a script as the user, in the host's user namespace; ``layerkit`` is the command."""
    root = ROOT
    way = ":".join(map(str, (sys.base_prefix, sys.prefix, root, home)))
    start = f'layerkit() {{ "{sys.executable}" -m layerkit.cli.main "$@"; }}\ncd "{home}"; set -e\n'
    done = subprocess.run(
        [sys.executable, KIT / "ordinary_users.py", "account", way, "sh", "-c", start + script],
        env={
            "PATH": os.environ["PATH"], "HOME": str(home), "XDG_RUNTIME_DIR": f"{home}/run",
            "PYTHONPATH": str(root),
        },
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def test_runc_runs_it_with_nothing_around(real: Path) -> None:
    home = real
    out = as_user(
        home,
        f"layerkit bundle -q --rootless real.tar web --user 0 -- sh -c '{LOOK}' > made\n"
        "runc --root run/runc run -b web w1\n"
        "runc --root run/runc run -b web w2 > second\n"
        # Another map: yourself as root, the rest from elsewhere.
        "layerkit bundle -q --rootless store:real:latest other --uid-map 0:0:1,1:20001:40000 -- "
        "sh -c 'id -u; cat /proc/self/uid_map; stat -c %u:%g:%a /usr/bin/su /opt/app' > made2\n"
        "runc --root run/runc run -b other k1\n",
    ).split("\n")
    first, other = out[:8], out[8:]
    assert first == [
        "0", f"{0:>10} {UID:>10} {1:>10}", f"{1:>10} {SUBIDS:>10} {65536:>10}",
        "0:0:4755", "1000:1000:750", "0:1000:3777", "7:8", "pong",
    ]  # fmt: skip
    assert other[0] == "1000"
    assert [line.split() for line in other[1:3]] == [["0", str(UID), "1"], ["1", str(SUBIDS + 20000), "40000"]]
    assert other[3:5] == ["0:0:4755", "1000:1000:750"]
    # What was written: owned by subordinate ids on the host.
    new = (home / "web/state/upper/root/new").stat()
    assert (new.st_uid, new.st_gid) == (SUBIDS + 6, SUBIDS + 7)

    # The store knows of them though nothing is mounted; then they go.
    # Metadata with many owners can be deleted by root of the user namespace only.
    gc = f"unshare --user --map-root-user --map-auto {sys.executable} -m layerkit.cli.main store gc"
    as_user(home, f"layerkit store rm real:latest; {gc}; runc --root run/runc run -b web w3")
    as_user(home, f"layerkit bundle --rootless --remove web; layerkit bundle --remove other; {gc}")
    assert sorted(p.name for p in home.iterdir() if p.is_dir()) == [".local", "app", "run"]
    left = home / ".local/share/layerkit"
    assert not list((left / "meta").iterdir()) and not list((left / "objects").rglob("??????????*"))
    assert [p for p in (home / "run").rglob("*") if p.is_file() and p.suffix == ".json"] == []


def test_removing_a_running_one_is_refused(home: Path) -> None:
    said = as_user(
        home,
        "layerkit bundle -q --rootless app web --user 0 -- sleep 60 > made\n"
        "runc --root run/runc run -d -b web w1 < /dev/null > out 2>&1\n"
        "layerkit bundle --rootless --remove web && exit 9\n"
        "runc --root run/runc kill w1 KILL; until runc --root run/runc delete w1; do sleep 0.1; done; exit 5\n",
        code=5,
    )
    assert "has a running container" in said
    as_user(home, "layerkit bundle --rootless --remove web")


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_any_map_inside_a_user_namespace(home: Path, runtime: str) -> None:
    """Where the map leaves the user out, or the runtime cannot mount a root: both in one user namespace."""
    need_tool(runtime)
    said = as_user(home, "layerkit bundle -q --rootless app web --uid-map 0:1:1000 -- id", code=1)
    assert "whose root is not yourself (0:1:1000)" in said
    assert "`podman unshare`" in said
    assert not (home / "web").exists()
    flags = "--rootless=true" if runtime == "runc" else "--cgroup-manager=disabled"
    script = (
        '"$PYTHON" -m layerkit.cli.main bundle -q app web --uid-map 0:1:65000 --user 0 -- '
        f"sh -c '{LOOK_SMALL}' > made; {runtime} {flags} --root run/{runtime} run -b web w1; "
        '"$PYTHON" -m layerkit.cli.main bundle --remove web'
    )
    (home / "inside.sh").write_text(script)
    (home / "inside.sh").chmod(0o644)
    inside = "unshare --user --map-root-user --map-auto --mount"
    out = as_user(home, f"export PYTHON={sys.executable}; {inside} sh -e inside.sh").split("\n")
    assert out == ["0", "1000:0:750", "7:8", ""]
    assert not (home / "web").exists()


def test_an_answer_for_those_without_subordinate_ids(home: Path) -> None:
    program = (
        "import os, shutil, sys; sys.path.insert(0, sys.argv[1])  # while this Python can be read\n"
        "from layerkit.linux import userns\n"
        "os.setgroups([]); os.setresgid(4999, 4999, 4999); os.setresuid(4999, 4999, 4999)\n"
        "userns.enter()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT)], capture_output=True, text=True, timeout=60, check=False
    )
    assert "UnsupportedHost: this host does not offer subordinate ids for 4999 in /etc/subuid" in done.stderr
    assert "as root: usermod --add-subuids" in done.stderr
