"""Run the benchmarks and write docs/benchmarks.md: ``make bench``, or ``python bench/run.py [NAME...]``.

A table goes also into each page of the documentation that has a place for it (:func:`insert`).

Every ``bench_NAME.py`` beside this file has ``rows(work: Path) -> list[dict]`` with the keys ``what``,
``ours_s``, ``peer``, ``peer_s``, ``ratio``, ``target`` and, where it is known, ``memory`` (peak bytes). Each
runs in a process of its own (its peak memory and imports are its own), in a folder of its own on a fresh ext4
in a loop file when root: after a large removal ext4 creates files up to 15 times slower.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
REPORT = HERE.parent / "docs/benchmarks.md"
HEADINGS = ("what", "ours", "peer", "peer's", "ratio", "target", "peak memory")


@contextlib.contextmanager
def fresh_filesystem(gigabytes: int) -> Iterator[tuple[Path, str]]:
    """Give an empty folder, on a new ext4 where that is possible, and what it lies on."""
    with tempfile.TemporaryDirectory(prefix="lk-bench-", dir=os.environ.get("TMPDIR", "/var/tmp")) as folder:
        base = Path(folder)
        if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
            yield base, "the machine's own filesystem (no root, or no mkfs.ext4)"
            return
        image, target = base / "disk", base / "m"
        with image.open("wb") as file:
            file.truncate(gigabytes << 30)
        target.mkdir()
        # Lazy initialisation would write behind the measurements.
        subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", image], check=True)
        # Direct, as a disk would be: else all is in the page cache twice, and a sync waits for both.
        loop: list[str | Path] = ["losetup", "--find", "--show", "--direct-io=on", image]
        device = subprocess.run(loop, capture_output=True, text=True, check=False)
        mount: list[str | Path] = ["mount", device.stdout.strip(), target]
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
        if device.stdout:
            # The device goes with its mount, whoever ends that.
            subprocess.run(["losetup", "--detach", device.stdout.strip()], check=False)
        if device.returncode or mounted.returncode:
            yield base, f"the machine's own filesystem (no loop mount: {device.stderr or mounted.stderr})"
            return
        try:
            work = target / "work"
            work.mkdir()
            yield work, "a fresh ext4 in a loop file"
        finally:
            _unmount_all(target)


def _unmount_all(target: Path) -> None:
    """Unmount ``target`` and whatever a failed benchmark left below it, the deepest first."""
    prefix = f"{target}/"
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split(" ")[4] for line in lines]
    for point in reversed([p for p in points if p == str(target) or p.startswith(prefix)]):
        done = subprocess.run(["umount", point], capture_output=True, check=False)
        if done.returncode:
            subprocess.run(["umount", "--lazy", point], check=False)


def load(name: str) -> Any:
    """Import ``bench_NAME.py``; its neighbours can be imported by it."""
    sys.path.insert(0, str(HERE))
    spec = importlib.util.spec_from_file_location(f"bench_{name}", HERE / f"bench_{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


def measure(name: str, work: Path) -> list[dict[str, Any]]:
    """Run one benchmark in a process of its own and return its rows."""
    out = work / "rows.json"
    scratch = work / "scratch"
    scratch.mkdir()
    command = [sys.executable, __file__, "--child", name, str(scratch), str(out)]
    subprocess.run(command, check=True, cwd=HERE)
    rows: list[dict[str, Any]] = json.loads(out.read_text())
    return rows


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} s" if value >= 0.995 else f"{value * 1000:.3g} ms"


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row as text."""
    ratio, memory = row.get("ratio"), row.get("memory")
    return [
        row["what"], _seconds(row.get("ours_s")), row.get("peer") or "", _seconds(row.get("peer_s")),
        "" if ratio is None else f"{ratio:.2f}", row.get("target") or "",
        "" if memory is None else f"{memory / 1e6:,.0f} MB",
    ]  # fmt: skip


def facts() -> list[str]:
    """Return what the figures depend on, without anything that names the machine."""
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    model = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]  # fmt: skip
    return [
        f"{os.cpu_count()} cores" + (f" ({model[0]})" if model else ""),
        f"{int(memory.split()[1]) / 1e6:.0f} GB of memory",
        f"Linux {platform.release().split('-')[0]}, {platform.machine()}",
        f"Python {platform.python_version()}",
    ]


INTRODUCTION = """# Benchmarks

Made by `make bench` (`python bench/run.py`), as root; do not edit. `python bench/run.py NAME...` measures some
of them again and leaves the others as they are. Times are medians; each run alternates with the peer. Look at the
ratios: the peer's time divided by ours; above 1 means faster than the peer. If the target says `<=`, the ratio is
ours divided by the peer's.
"""


def section(rows: list[dict[str, Any]], place: str) -> str:
    """Return what the report says of one benchmark."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|---:|---|---:|---:|---|---:|"]
    lines += ["| " + " | ".join(text.replace("|", "\\|") for text in cells(row)) + " |" for row in rows]
    day = datetime.datetime.now(datetime.UTC).date()
    return "\n".join([*lines, "", f"{day}; {'; '.join(facts())}; {place}."])


def report(old: str, new: dict[str, str]) -> str:
    """Return docs/benchmarks.md with the sections of ``old``, those of ``new`` in their place."""
    kept = {}
    for text in old.split("\n## ")[1:]:
        name, _, body = text.partition("\n")
        kept[name.replace(" ", "_")] = body.strip()
    sections = {**kept, **new}
    return INTRODUCTION + "".join(
        f"\n## {name.replace('_', ' ')}\n\n{sections[name]}\n"
        for name in sorted(sections) if (HERE / f"bench_{name}.py").exists()
    )  # fmt: skip


def insert(text: str, new: dict[str, str]) -> str:
    """Return a page of the documentation with the tables of ``new`` in the places that it marks for them."""
    for name, table in new.items():
        begin, end = f"<!-- bench: {name} -->\n", "<!-- end of bench -->"
        before, marker, rest = text.partition(begin)
        if marker:
            text = f"{before}{begin}{table}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        name, scratch, out = sys.argv[2:5]
        Path(out).write_text(json.dumps(load(name).rows(Path(scratch))))
        return 0
    known = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(known)} [default: all]")
    parser.add_argument("--gigabytes", type=int, default=32, help="size of the (sparse) loop file")
    args = parser.parse_args()
    if unknown := set(args.names) - set(known):
        parser.error(f"no benchmark called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    # pip compiles what it installs; an editable install in an environment without bytecode would compile all
    # of layerkit at every start, and that would be measured.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    compileall.compile_dir(str(HERE.parent / "layerkit"), quiet=2)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    sections: dict[str, str] = {}
    failed: list[str] = []
    for name in args.names or known:
        with fresh_filesystem(args.gigabytes) as (work, place):
            try:
                rows = measure(name, work)
            except subprocess.CalledProcessError as error:
                console.print(f"[red]{name}: failed with exit code {error.returncode}[/]")
                failed.append(name)
                continue
        table = Table(title=name, title_justify="left")
        for number, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if number in (1, 3, 4, 6) else "left")
        for row in rows:
            table.add_row(*cells(row))
        console.print(table)
        sections[name] = section(rows, place)
        # At once: a later one that fails, or is stopped, takes nothing away.
        REPORT.write_text(report(REPORT.read_text() if REPORT.exists() else "", sections))
        for page in REPORT.parent.glob("*.md"):
            old = page.read_text()
            if page != REPORT and (changed := insert(old, sections)) != old:
                page.write_text(changed)
    console.print(f"written: {REPORT.relative_to(HERE.parent)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
