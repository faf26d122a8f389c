"""Every writer, killed at any moment or out of space anywhere: no output, no leftovers, and the next run works."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import oci_schemas
import pytest
from disks import disk
from engines import dockerd, short_folder
from made_images import Layout, special, tar
from needs import need_root, need_tool
from programs import command

FUZZ = int(os.environ.get("LAYERKIT_TEST_FUZZ", "1"))
TRANSPORTS = {
    "oci": "oci:{}/out:v1",
    "oci-archive": "oci-archive:{}/out:v1",
    "docker-archive": "docker-archive:{}/out:name:v1",
}
COMMANDS: dict[str, Callable[[Path, str], list[str]]] = {
    "copy": lambda lab, dst: ["copy", f"oci:{lab}/image:v1", dst],
    "optimize": lambda lab, dst: ["optimize", f"oci:{lab}/image:v1", dst],
    "flatten": lambda lab, dst: ["flatten", f"oci:{lab}/image:v1", dst],
    "portable": lambda lab, dst: [
        "remap", f"oci:{lab}/image:v1", dst, "--form", "portable", "--uid-map", "0:1000:10",
    ],
    "artifact": lambda lab, dst: ["remap", f"oci:{lab}/image:v1", dst, "--uid-map", "0:1000:10"],
    "pack": lambda lab, dst: ["pack", f"{lab}/folder", dst, "--base", f"oci:{lab}/image:v1"],
}  # fmt: skip
# All commands into a layout, some of them into each archive; with LAYERKIT_TEST_FUZZ all into all.
CHOSEN = {
    "oci": list(COMMANDS),
    "oci-archive": list(COMMANDS) if FUZZ > 1 else ["copy", "optimize", "artifact"],
    "docker-archive": list(COMMANDS) if FUZZ > 1 else ["flatten", "portable", "pack"],
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an image of 8 MB that do not compress, half of it twice, and a folder to pack."""
    need_root()
    path = tmp_path_factory.mktemp("lab")
    big, small = os.urandom(4 << 20), os.urandom(2 << 20)
    again = special("big", b"0", mode=0o600)
    layout = Layout()
    made = layout.image(tar(("big", big), ("small", small)), tar(("big", big), ("more", small[::-1])), tar(again))
    layout.list(made, "v1")
    layout.folder(path / "image")
    subprocess.run(
        command(*COMMANDS["copy"](path, f"oci-archive:{path}/in.tar:v1")), check=True, capture_output=True
    )
    unpack = ["unpack", f"oci:{path}/image:v1", f"{path}/folder", "--store", f"{path}/store"]
    subprocess.run(command(*unpack), check=True, capture_output=True)
    (path / "folder/packed").write_bytes(os.urandom(4 << 20))
    return path


def environment(folder: Path) -> dict[str, str]:
    """Return an environment with a TMPDIR and a store below ``folder``, which is made."""
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    return {**os.environ, "TMPDIR": f"{folder}/tmp", "LAYERKIT_STORE": f"{folder}/store"}


def below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def whole(place: Path) -> bool:
    """Return whether there is an output, which then has to be whole."""
    if not (place / "index.json" if place.is_dir() else place).exists():
        return False
    oci_schemas.check(place)
    return True


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_a_full_disk(kind: str, lab: Path, tmp_path: Path) -> None:
    """The disk of the output is full at the start, in the middle, and near the end; then that of the spools."""
    env = environment(tmp_path / "home")
    with disk(tmp_path, "ext4", "-m", "0", "-O", "^has_journal", size=2800 << 10) as small:
        for name in CHOSEN[kind]:
            done = subprocess.run(
                command(*COMMANDS[name](lab, TRANSPORTS[kind].format(small))),
                env=env,
                capture_output=True,
                text=True,
                check=False,
            )
            assert (done.returncode, done.stdout) == (1, ""), done.stderr
            assert "No space left" in done.stderr and str(small) in done.stderr
            assert len(done.stderr.splitlines()) == 1
            assert below(small) == []
        assert below(tmp_path / "home") == ["tmp"]
        for name in ("optimize", "pack") if kind == "oci" else ("flatten",):
            done = subprocess.run(
                command(*COMMANDS[name](lab, TRANSPORTS[kind].format(tmp_path))), env={**env, "TMPDIR": str(small)},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 1 and "No space left" in done.stderr, done.stderr
            assert below(small) == []
            assert not (tmp_path / "out").exists()


def test_a_full_disk_while_unpacking(lab: Path, tmp_path: Path) -> None:
    """First that of the folder, then that of the store, which keeps what it got whole and nothing else."""
    env = environment(tmp_path / "home")
    words = ["unpack", f"oci:{lab}/image:v1"]
    with disk(tmp_path, "ext4", "-m", "0", "-O", "^has_journal", size=3000 << 10) as small:
        done = subprocess.run(command(*words, f"{small}/out"), env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "No space left" in done.stderr, done.stderr
        assert below(small) == []
        env["LAYERKIT_STORE"] = f"{small}/store"
        done = subprocess.run(
            command(*words, f"{tmp_path}/out"), env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1 and "the disk is full" in done.stderr, done.stderr
        assert not (tmp_path / "out").exists()
        assert below(small / "store/tmp") == []
        subprocess.run(command("store", "verify", "--store", f"{small}/store"), check=True, capture_output=True)


def test_a_full_disk_of_the_docker_daemon(lab: Path, tmp_path: Path) -> None:
    need_tool("dockerd", "docker", "containerd", "runc")
    with (
        short_folder() as short,
        disk(short, "ext4", "-m", "0", "-O", "^has_journal", size=12 << 20) as small,
        dockerd(small) as engine,
    ):
        done = subprocess.run(
            command("copy", f"oci:{lab}/image:v1", "docker-daemon:full:1"),
            env={**environment(tmp_path), "DOCKER_HOST": engine.address},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1 and "no space left" in done.stderr.lower(), done.stderr
        assert engine("images", "--all", "--quiet") == ""
        assert below(tmp_path / "tmp") == []


@pytest.fixture(scope="module")
def durations(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Return how long each command takes here and now when nobody stops it."""
    found = {}
    for name, words in COMMANDS.items():
        folder = tmp_path_factory.mktemp("time")
        start = time.monotonic()
        done = subprocess.run(
            command(*words(lab, f"oci:{folder}/out:v1")), env=environment(folder), capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found[name] = time.monotonic() - start
    return found


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_stopped_at_any_moment(kind: str, lab: Path, durations: dict[str, float], tmp_path: Path) -> None:
    """SIGKILL, SIGTERM, SIGINT at random moments: what is there is whole, and nothing lies about."""
    rng = random.Random(f"{kind}{FUZZ}")
    outcomes = set()
    for round_ in range(FUZZ + 5):
        if round_ >= FUZZ and (False, False) in outcomes:
            break
        # A machine that is busy now and was not when the time was taken, or the other way round: earlier then.
        share = 0.6 ** max(0, round_ - FUZZ + 1)
        for name in CHOSEN[kind]:
            words = COMMANDS[name]
            number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
            home, out = tmp_path / f"{round_}{name}", tmp_path / f"{round_}{name}/here"
            env = environment(home)
            out.mkdir()
            dst = TRANSPORTS[kind].format(out)
            process = subprocess.Popen(
                command(*words(lab, dst)), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            time.sleep(durations[name] * share * rng.uniform(0.2, 1))
            process.send_signal(number)
            code = process.wait(60)
            assert code in (0, -number, 130), (name, number, code)
            assert below(home / "tmp") == []
            written = whole(out / "out")
            outcomes.add((code == 0, written))
            assert code != 0 or written
            left = [path for path in below(out) if path != "out" and not (written and path.startswith("out/"))]
            if number == signal.SIGKILL and kind == "oci":
                # A folder has a name from the start. What lies in it is no layout, and the next run clears it.
                assert all(path.startswith("out/.layout.") for path in left), left
                done = subprocess.run(command(*words(lab, dst)), env=env, capture_output=True, check=False)
                assert done.returncode == 0, done.stderr
                assert whole(out / "out")
                assert sorted(os.listdir(out / "out")) == ["blobs", "index.json", "oci-layout"]
            else:
                assert left == [], (name, number)
                assert written or not (out / "out").exists()
    assert (False, False) in outcomes, "nothing was stopped in the middle"


def test_a_stopped_run_never_spoils_what_was_there(lab: Path, durations: dict[str, float], tmp_path: Path) -> None:
    """The target holds an image already: after a kill it is the old one or the new one."""
    rng = random.Random(FUZZ)
    layout = Layout()
    layout.list(layout.image(tar(("old", b"old"))), "v1")
    for kind in ("oci", "oci-archive"):
        (tmp_path / "archive").mkdir(exist_ok=True)
        old = layout.folder(tmp_path / "out") if kind == "oci" else layout.archive(tmp_path / "archive/out")
        before = old.read_bytes() if old.is_file() else json.loads((old / "index.json").read_text())
        for name in [*COMMANDS][: 2 + FUZZ]:
            env = environment(tmp_path / "home")
            dst = TRANSPORTS[kind].format(old.parent)
            process = subprocess.Popen(
                command(*COMMANDS[name](lab, dst)), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            time.sleep(durations[name] * rng.uniform(0.4, 1.0))
            process.kill()
            process.wait()
            assert whole(old)
            now = old.read_bytes() if old.is_file() else json.loads((old / "index.json").read_text())
            if now != before:
                before = now  # it came through
            assert below(tmp_path / "home/tmp") == []


@pytest.mark.parametrize("more", [[], ["--require-published"]])
def test_an_interrupt_while_pull_compares_is_no_wrong_remap(more: list[str], lab: Path, tmp_path: Path) -> None:
    """The artifact is right; Ctrl-C while it is compared ends the command, and says nothing about the artifact."""
    env = environment(tmp_path)
    attached = f"oci:{tmp_path}/attached:v1"
    subprocess.run(command(*COMMANDS["artifact"](lab, attached)), env=env, check=True, capture_output=True)
    script = (
        "import os, signal, sys\n"
        "from layerkit.usecases import verify\n"
        "from layerkit.cli.main import run\n"
        "def interrupted(*_):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "verify.plain_digest = interrupted\n"
        "sys.argv[0] = 'layerkit'\n"
        "run()\n"
    )
    pull = ["pull", attached, "--uid-map", "0:1000:10", *more]
    done = subprocess.run(
        [sys.executable, "-c", script, *pull], env=env, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "layerkit: interrupted; nothing half-made is left\n"
