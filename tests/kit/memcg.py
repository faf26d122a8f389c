"""Page cache charged to one command alone: what other processes read meanwhile does not count."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))


@contextmanager
def memory_group(name: str) -> Iterator[Path | None]:
    """Give a new memory cgroup (v1 or v2), or None where there is none to be had."""
    tops = [_V1] if (_V1 / "memory.stat").exists() else []
    tops += [p for p in _V2 if "memory" in _words(p / "cgroup.subtree_control")]
    if not tops:
        yield None
        return
    group = tops[0] / f"layerkit-test-{name}-{os.getpid()}"
    group.mkdir()
    try:
        yield group
    finally:
        group.rmdir()


def cache_bytes(group: Path) -> int:
    """Return the page cache that processes of ``group`` brought in, in bytes."""
    facts = dict(line.split()[:2] for line in (group / "memory.stat").read_text().splitlines())
    # v1 calls it "total_cache" with the groups below, v2 "file".
    return int(facts["total_cache"] if "total_cache" in facts else facts["file"])


def run_in(group: Path, command: Sequence[str | Path]) -> None:
    """Run ``command`` in ``group`` to its end."""
    script = 'echo $$ > "$0" && exec "$@"'
    subprocess.run(
        ["/bin/sh", "-c", script, str(group / "cgroup.procs"), *map(str, command)],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
