"""runc and crun with a state folder of the test's own, also on a host of mixed cgroups."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import programs

_NUMBER = itertools.count(1)
# crun refuses a host that has cgroups of both versions; it does not need those of version 2.
_ONE_KIND = 'mount --make-rprivate /; umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"'


def name() -> str:
    """Return a container name that nobody else uses.

    runc keeps what runs under containerd in one folder for the whole machine, whatever the containerd, and so are
    cgroups: containers of one name are in each other's way.
    """
    return f"lkt-{os.getpid()}-{next(_NUMBER)}"


def words(runtime: str, state: Path, *arguments: object) -> list[str]:
    """Return the command line of ``runtime`` with its state below ``state``."""
    command = [runtime, "--root", f"{state}/{runtime}", *map(str, arguments)]
    return ["unshare", "-m", "sh", "-c", _ONE_KIND, "sh", *command] if runtime == "crun" else command


def run(runtime: str, state: Path, bundle: Path, *, code: int = 0) -> str:
    """Run a bundle to its end and return what it printed."""
    return programs.run(*words(runtime, state, "run", "-b", bundle, name()), code=code).stdout
