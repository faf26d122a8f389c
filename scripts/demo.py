"""What layerkit saves, shown on this machine: ``make demo``.

Takes a real image, remaps it for two id maps, mounts both, and puts bytes and seconds beside a chown copy.
Everything that a user would type is printed before it runs. Nothing stays behind: mounts and the demo's own
store are removed at the end, also after a failure.

    demo.py [--image REF] [--tiny]
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import mmap
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import layerkit

ROOT = Path(__file__).resolve().parent.parent
LAYERKIT = Path(sys.executable).with_name("layerkit")
IMPORT = "once for all maps: read, check and keep the layers"
console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


@dataclass
class Scene:
    """What the demo works on."""

    image: Path
    maps: tuple[str, str]
    program: list[str] | None
    work: Path
    mounted: list[Path] = field(default_factory=list)

    @property
    def store(self) -> Path:
        return self.work / "store"

    def layerkit(self, *words: str | Path) -> float:
        """Show and run one command; return its seconds."""
        shown = shlex.join(["layerkit", *map(str, words)])
        console.print(f"\n[bold green]$[/] [bold]{shown}[/]", soft_wrap=True)
        start = time.perf_counter()
        environment = {**os.environ, "LAYERKIT_STORE": str(self.store)}
        done = subprocess.run([LAYERKIT, *words], env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"{shown}: exit code {done.returncode}")
        return time.perf_counter() - start


def _recipe(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"sample_{name}", ROOT / f"sample-images/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _tiny(work: Path) -> Path:
    path = work / "tiny.tar"
    # Nobody but root of the host can make /dev/null.
    _recipe("tiny").build(path, kind="oci-archive", devices=_is_root())
    return path


def _is_root() -> bool:
    ids = Path("/proc/self/uid_map").read_text().split()
    return os.geteuid() == 0 and ids == ["0", "0", "4294967295"]


def _scene(work: Path, image: str | None, tiny: bool) -> Scene:
    maps = ("0:100000:65536", "0:200000:65536")
    if not _is_root():
        # These ids exist in a user namespace that has the usual 65,536 subordinate ids.
        maps = ("0:10000:2000,65534:12000:1", "0:20000:2000,65534:22000:1")
    if image is not None:
        return Scene(Path(image), maps, None, work)
    missing = [tool for tool in ("mmdebstrap", "buildah", "setcap") if shutil.which(tool) is None]
    why = ""
    if tiny:
        why = "--tiny was given"
    elif not _is_root():
        why = "building the real image and mounting it for the whole host takes root (sudo make demo)"
    elif missing:
        why = f"{', '.join(missing)} not installed (make tools)"
    if why:
        console.print(f"[yellow]The tiny sample image is used: {why}.[/]")
        return Scene(_tiny(work), maps, None, work)
    try:
        built: Path = _recipe("app").ensure()
    except (subprocess.CalledProcessError, SystemExit) as error:
        console.print(f"[yellow]The tiny sample image is used: the real one could not be built ({error}).[/]")
        return Scene(_tiny(work), maps, None, work)
    # A name that reads well in the commands below.
    path = work / "app.tar"
    path.symlink_to(built)
    return Scene(path, maps, ["/usr/bin/python3", "/opt/app/main.py"], work)


# --- measuring ---------------------------------------------------------------------------------------


def _disk(folder: Path) -> int:
    """Return the bytes that ``folder`` takes on disk, files with several names counted once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for base, folders, files in os.walk(folder):
        for name in (*folders, *files):
            status = os.lstat(os.path.join(base, name))
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                total += status.st_blocks * 512
    return total


def _cached(files: list[Path]) -> tuple[int, int]:
    """Return (bytes in the page cache, bytes in all) of ``files``, by mincore(2); reads nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    resident = total = 0
    for path in files:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            pages = -(-size // mmap.PAGESIZE)
            with mmap.mmap(
                file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            ) as area:
                vector = (ctypes.c_ubyte * pages)()
                start = ctypes.addressof(ctypes.c_char.from_buffer(area))
                if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), vector):
                    raise OSError(ctypes.get_errno(), "mincore", os.fspath(path))
                resident += sum(byte & 1 for byte in vector)
                total += pages
    return resident * mmap.PAGESIZE, total * mmap.PAGESIZE


def _large_files(root: Path, budget: int = 40_000_000) -> list[Path]:
    """Return the largest files below ``root``, ``budget`` bytes of them."""
    sized = []
    for base, _, names in os.walk(root):
        for name in names:
            status = os.lstat(os.path.join(base, name))
            if stat.S_ISREG(status.st_mode) and status.st_size:
                sized.append((status.st_size, Path(base) / name))
    chosen: list[Path] = []
    for size, path in sorted(sized, reverse=True):
        if budget > 0:
            chosen.append(path)
            budget -= size
    return chosen


def _human(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


# --- the acts ----------------------------------------------------------------------------------------


def _say(text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}", align="left")


def _mount_both(scene: Scene) -> tuple[list[tuple[str, float, int]], list[Path]]:
    """Remap and mount for both maps; return (what, seconds, bytes) rows and the mount points."""
    rows = []
    targets = [scene.work / "map-a", scene.work / "map-b"]
    before = 0

    def row(what: str, *seconds: float) -> None:
        nonlocal before
        after = _disk(scene.store)
        rows.append((what, sum(seconds), after - before))
        before = after

    def remap(number: int, *more: str) -> float:
        return scene.layerkit("remap", scene.image, "--uid-map", scene.maps[number], "--quiet", *more)

    def mount(number: int) -> float:
        targets[number].mkdir()
        seconds = scene.layerkit("mount", scene.image, targets[number], "--uid-map", scene.maps[number])
        scene.mounted.append(targets[number])
        return seconds

    row(IMPORT, remap(0))
    row("first map: mount", mount(0))
    row("second map: remap and mount", remap(1), mount(1))
    if _is_root():  # without privileges every map has its own already
        row("second map, with metadata of its own", remap(1, "--own-meta"))
    return rows, targets


def _owners(scene: Scene, targets: list[Path]) -> None:
    _say("Owners: one image, two maps")
    with layerkit.open_image(str(scene.image), settings=layerkit.Settings(store=scene.store)) as image:
        nodes = list(image.tree().nodes())
    chosen: dict[tuple[int, int], Any] = {}
    for node in nodes:
        # One example for each owner, the shortest name first, so that the table stays short.
        best = chosen.get((node.uid, node.gid))
        if node.path.isascii() and (best is None or len(node.path) < len(best.path)):
            chosen[node.uid, node.gid] = node
    table = Table("path", "in the image", f"map {scene.maps[0]}", f"map {scene.maps[1]}")
    for (uid, gid), node in sorted(chosen.items()):
        name = os.fsdecode(node.path)
        shown = [(target / name).lstat() for target in targets]
        assert all(s.st_mode == node.mode for s in shown), f"{name}: the mode changed"
        table.add_row(f"/{name}", f"{uid}:{gid}", *(f"{s.st_uid}:{s.st_gid}" for s in shown))
    console.print(table)


def _page_cache(targets: list[Path]) -> None:
    _say("Memory: the second mount reads what the first one cached")
    first = _large_files(targets[0])
    second = [targets[1] / path.relative_to(targets[0]) for path in first]
    table = Table("", f"in the page cache, seen through {targets[1].name}")
    before, total = _cached(second)
    table.add_row("before anything is read", f"{_human(before)} of {_human(total)}")
    for path in first:
        path.read_bytes()
    after, total = _cached(second)
    table.add_row(
        f"after {len(first)} files were read through {targets[0].name} only",
        f"[bold]{_human(after)} of {_human(total)}[/]",
    )
    console.print(table)
    if after < total:
        raise SystemExit("the two mounts do not share the page cache; please report this with `layerkit doctor`")


def _program(scene: Scene, targets: list[Path]) -> None:
    if scene.program is None:
        return
    _say("A program of the image, run from both mounts as the owner of its files")
    for target, map_text in zip(targets, scene.maps, strict=True):
        user = int(map_text.split(":")[1]) + 1000
        command = ["chroot", f"--userspec={user}:{user}", str(target), *scene.program]
        console.print(f"[bold green]$[/] [bold]{shlex.join(command)}[/]", soft_wrap=True)
        subprocess.run(command, check=True)


def _copy(scene: Scene, source: Path) -> tuple[float, int]:
    """Make the copy that a runtime without remapping makes; return its seconds and bytes."""
    _say("The same with a copy, as runtimes do without remapping")
    copy = scene.work / "copy"
    owner = scene.maps[1].split(":")[1]
    commands = [["cp", "-a", str(source), str(copy)], ["chown", "-R", f"{owner}:{owner}", str(copy)]]
    start = time.perf_counter()
    for command in commands:
        console.print(f"[bold green]$[/] [bold]{shlex.join(command)}[/]", soft_wrap=True)
        subprocess.run(command, check=True)
    # What is not on disk yet has not been paid for; layerkit's own times include its fsyncs.
    subprocess.run(["sync", "-f", copy], check=True)
    return time.perf_counter() - start, _disk(copy)


def _play(scene: Scene) -> None:
    console.print(
        f"Image: [bold]{scene.image.resolve().name}[/], {_human(scene.image.stat().st_size)} as an archive. "
        f"Maps: {' and '.join(scene.maps)}."
    )
    _say("Remap and mount, twice")
    rows, targets = _mount_both(scene)
    _owners(scene, targets)
    _page_cache(targets)
    _program(scene, targets)
    copy_seconds, copy_bytes = _copy(scene, targets[1])
    _say("What it cost")
    table = Table("", "time", "disk", "against the copy")
    for column in table.columns[1:]:
        column.justify = "right"
    for label, seconds, size in rows:
        less = f"1/{copy_bytes / size:,.0f} of the disk" if size > 0 else "no disk at all"
        faster = f"{copy_seconds / seconds:.1f}x faster"
        if seconds > copy_seconds:
            faster = "slower: Python's start"
        against = "" if label == IMPORT else f"{faster}, {less}"
        table.add_row(label, f"{seconds:.2f} s", _human(size), against)
    table.add_row(
        "a chown copy, for each map (and again in memory)", f"{copy_seconds:.2f} s", _human(copy_bytes), ""
    )
    console.print(table)
    console.print("The copy also lost what layerkit keeps: chown clears setuid bits and file capabilities.")


def _clear(scene: Scene) -> None:
    for target in reversed(scene.mounted):
        scene.layerkit("umount", target)


def _in_user_namespace() -> Callable[[], None] | None:
    """Return how to start again as root of a new user namespace, None where that is not to be had."""
    flags = ["unshare", "--user", "--map-root-user", "--map-auto", "--mount", "--"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*flags, "true"], capture_output=True, check=False).returncode
    ):
        return None
    return lambda: os.execvp("unshare", [*flags, sys.executable, *sys.argv])


def main() -> None:
    parser = argparse.ArgumentParser(description="Show what layerkit saves on this machine.")
    parser.add_argument("--image", metavar="FILE", help="an image archive of your own in place of the sample")
    parser.add_argument("--tiny", action="store_true", help="use the tiny sample image")
    args = parser.parse_args()
    if os.geteuid() != 0:
        again = _in_user_namespace()
        if again is None:
            raise SystemExit(
                "The demo mounts filesystems: run it as root (sudo make demo), or on a host where an ordinary user "
                "may make user namespaces with subordinate ids (uidmap installed, a line in /etc/subuid)."
            )
        again()
    # /tmp is often in memory, where the kernel mounts no EROFS image from a file.
    with tempfile.TemporaryDirectory(prefix="layerkit-demo-", dir=os.environ.get("TMPDIR", "/var/tmp")) as folder:
        scene = _scene(Path(folder), args.image, args.tiny)
        try:
            _play(scene)
        finally:
            _say("Clean up")
            _clear(scene)


if __name__ == "__main__":
    main()
