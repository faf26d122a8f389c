"""Starting containers of the real image under new id maps: rootless podman with our mount program, and without."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS.parent / "sample-images")]

from engines import Engine  # noqa: E402
from rootless_podman import CREATE, RUN, rootless_podman, write_program  # noqa: E402

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


_WALK = "find / -xdev -size +1c >/dev/null"
Pair = tuple[float, float]
"""Ours, and podman's alone."""


def _alternating(
    engines: tuple[Engine, Engine], what: Callable[[Engine, int], float], rounds: int = _ROUNDS
) -> Pair:
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for engine, collected in zip(engines, found, strict=True):
            collected.append(what(engine, number))
    return median(found[0]), median(found[1])


def measure(work: Path) -> dict[str, Pair]:
    """Return the figures, taken in turns."""
    found: dict[str, Pair] = {}
    with _podman(work, "ours", ours=True) as ours, _podman(work, "stock", ours=False) as stock:
        both = (ours, stock)
        homes = {id(ours): work / "ours", id(stock): work / "stock"}
        found["image"] = _alternating(both, lambda engine, _: _disk(homes[id(engine)] / "s"), 1)
        found["first"] = _alternating(both, lambda engine, _: _start(engine, *_map(0)), 1)
        found["further"] = _alternating(both, lambda engine, number: _start(engine, *_map(1 + number)))
        found["again"] = _alternating(both, lambda engine, _: _start(engine, *_map(1)))
        found["none"] = _alternating(both, lambda engine, _: _start(engine))
        # Once: podman alone copies at the first start under a map, and finds its copy at the next.
        found["auto"] = _alternating(both, lambda engine, _: _start(engine, "--userns=auto"), 1)
        found["keep-id"] = _alternating(both, lambda engine, _: _start(engine, "--userns=keep-id"), 1)
        walk = _alternating(both, lambda engine, _: _start(engine, *_map(1), script=_WALK), 3)
        found["walk"] = (walk[0] - found["again"][0], walk[1] - found["again"][1])
        found["kept"] = _alternating(both, lambda engine, _: _kept(engine, homes[id(engine)], _map(9)), 1)
        found["commit"] = _alternating(both, lambda engine, _: _commit(engine, _map(1)), 3)
        write_program(ours.folder, 'set -- -o "$2,rendering=directory" "$3"')
        folders = median(_start(ours, *_map(20 + number)) for number in range(3))
        found["directory"] = (folders, found["further"][1])
        walked = _start(ours, *_map(20), script=_WALK) - _start(ours, *_map(20))
        found["directory walk"] = (walked, found["walk"][1])
        found["directory kept"] = (_kept(ours, homes[id(ours)], _map(29)), found["kept"][1])
    return found


def rows(work: Path) -> list[dict[str, Any]]:
    """Return the table."""
    found = measure(work)
    print(json.dumps(found), file=sys.stderr)

    def row(what: str, name: str, target: str = "") -> dict[str, Any]:
        mine, other = found[name]
        return {"what": what, "ours_s": mine, "peer": "podman alone", "peer_s": other,
                "ratio": other / mine, "target": target}  # fmt: skip

    mb = 1e6
    share = found["kept"][0] / found["image"][0]
    kept = f"{found['kept'][0] / mb:.2f} MB, {share:.2%} of the image's, against {found['kept'][1] / mb:.0f} MB"
    folder = f"{found['directory kept'][0] / mb:.1f} MB"
    return [
        row("the very first start of the image, under a map", "first"),
        row(f"the first start under a further map ({kept})", "further", ">= 10, <= 0.3 s, <= 1 %"),
        row("a second start under the same map", "again"),
        row("a start without a map", "none"),
        row("a start with --userns=auto", "auto"),
        row("a start with --userns=keep-id", "keep-id"),
        row(f"a further map as a folder of stubs ({folder})", "directory"),
        row("find over the whole image, cold, served by FUSE", "walk"),
        row("the same over a folder of stubs", "directory walk"),
        row("commit of a container under a map", "commit"),
    ]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory(prefix="lk-", dir="/var/tmp") as temporary:
        for each in rows(Path(temporary)):
            print(f"{each['ours_s']:8.3f} s {each['peer_s']:8.3f} s {each['ratio']:7.1f}x  {each['what']}")
