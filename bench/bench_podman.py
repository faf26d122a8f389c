"""Starting containers of the real image under new id maps: rootless podman with our mount program, and without."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS.parent / "sample-images")]

from engines import Engine  # noqa: E402
from podman_engine import CREATE, RUN, rootless_podman, write_program  # noqa: E402

_ROUNDS = 5
IMAGE = "app"


def _image() -> Path:
    import importlib.util

    spec = importlib.util.spec_from_file_location("app", TESTS.parent / "sample-images/app.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Path(module.ensure("oci-archive"))


@contextlib.contextmanager
def _podman(work: Path, name: str, *, ours: bool) -> Iterator[Engine]:
    """Give a podman whose store lies in ``work``, with the image in it."""
    work.chmod(0o755)
    with rootless_podman(mount_program=ours, home=work / name) as engine:
        image = engine.folder / "image.tar"
        image.write_bytes(_image().read_bytes())
        engine("tag", engine("pull", "--quiet", f"oci-archive:{image}").strip(), IMAGE)
        yield engine


def _start(engine: Engine, *options: str, script: str = "true") -> float:
    subprocess.run(["sync"], check=True)
    start = time.perf_counter()
    engine(*RUN, *options, "--user", "0", IMAGE, "sh", "-c", script)
    return time.perf_counter() - start


def _map(number: int) -> tuple[str, str]:
    return ("--uidmap", f"0:{1 + number * 2000}:2000")


def _disk(folder: Path) -> int:
    words = ["du", "-s", "--block-size=1", str(folder)]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[0])


def _kept(engine: Engine, home: Path, options: tuple[str, ...]) -> int:
    """Return the bytes that a container under a new map takes while it is there."""
    before = _disk(home)
    name = engine(*CREATE, *options, IMAGE, "sleep", "600").strip()
    engine("start", name)
    used = _disk(home) - before
    engine("rm", "--force", "--time", "0", name)
    return used


def _commit(engine: Engine, options: tuple[str, ...]) -> float:
    name = engine(*CREATE, *options, "--user", "0", IMAGE, "sh", "-c", "touch /made; sleep 600").strip()
    engine("start", name)
    time.sleep(0.3)
    start = time.perf_counter()
    engine("commit", "--quiet", "--pause=false", name, "made")
    taken = time.perf_counter() - start
    engine("rm", "--force", "--time", "0", name)
    return taken


def measure(work: Path, *, ours: bool) -> dict[str, float]:
    """Return the figures of one of the two."""
    found: dict[str, float] = {}
    with _podman(work, "ours" if ours else "stock", ours=ours) as engine:
        home = work / ("ours" if ours else "stock")
        found["first"] = _start(engine, *_map(0))
        further = [_start(engine, *_map(number)) for number in range(1, 1 + (_ROUNDS if ours else 2))]
        found["further"] = median(further)
        found["again"] = median(_start(engine, *_map(1)) for _ in range(_ROUNDS))
        found["none"] = median(_start(engine) for _ in range(_ROUNDS))
        found["auto"] = _start(engine, "--userns=auto")
        found["keep-id"] = _start(engine, "--userns=keep-id")
        found["walk"] = _start(engine, *_map(1), script="find / -xdev -size +1c >/dev/null") - found["again"]
        found["kept"] = _kept(engine, home, _map(9))
        found["disk"] = _disk(home)
        found["commit"] = _commit(engine, _map(1))
        if ours:
            write_program(engine.folder, 'set -- -o "$2,rendering=directory" "$3"')
            found["directory"] = median(_start(engine, *_map(20 + number)) for number in range(3))
            found["directory walk"] = _start(engine, *_map(20), script="find / -xdev -size +1c >/dev/null")
            found["directory walk"] -= _start(engine, *_map(20))
            found["directory kept"] = _kept(engine, home, _map(29))
    return found


def rows(work: Path) -> list[dict[str, Any]]:
    """Return the table."""
    stock, ours = measure(work, ours=False), measure(work, ours=True)
    print(json.dumps({"stock": stock, "ours": ours}), file=sys.stderr)

    def row(what: str, mine: float, other: float, target: str) -> dict[str, Any]:
        return {"what": what, "ours_s": mine, "peer": "podman alone", "peer_s": other,
                "ratio": other / mine, "target": target}  # fmt: skip

    mb = 1 << 20
    kept = f"{ours['kept'] / mb:.2f} MB against {stock['kept'] / mb:.0f} MB"
    folder = f"{ours['directory kept'] / mb:.1f} MB"
    return [
        row("the very first start of the image, under a map", ours["first"], stock["first"], "-"),
        row(f"the first start under a further map ({kept})", ours["further"], stock["further"], ">= 10x, <= 0.3 s"),
        row("a second start under the same map", ours["again"], stock["again"], "-"),
        row("a start without a map", ours["none"], stock["none"], "-"),
        row("a start with --userns=auto", ours["auto"], stock["auto"], "-"),
        row("a start with --userns=keep-id", ours["keep-id"], stock["keep-id"], "-"),
        row(f"a further map as a folder of stubs ({folder})", ours["directory"], stock["further"], "-"),
        row("find over the whole image, cold, served by FUSE", ours["walk"], stock["walk"], "-"),
        row("the same over a folder of stubs", ours["directory walk"], stock["walk"], "-"),
        row("commit of a container under a map", ours["commit"], stock["commit"], "-"),
    ]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory(prefix="lk-", dir="/var/tmp") as temporary:
        for each in rows(Path(temporary)):
            print(f"{each['ours_s']:8.3f} s {each['peer_s']:8.3f} s {each['ratio']:7.1f}x  {each['what']}")
