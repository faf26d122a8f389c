"""Shared helpers of the tests: what the machine must offer, and why a test skips where it does not."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import NoReturn

import pytest


def missing(reason: str) -> NoReturn:
    """Skip for ``reason``, or fail in CI."""
    # In CI everything is installed: a skip there would be a check that silently does not run.
    if os.environ.get("CI"):
        pytest.fail(f"CI must offer this: {reason}")
    pytest.skip(reason)


def need_root() -> None:
    """Skip unless the test runs as root in the initial user namespace."""
    whole = Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]
    if os.geteuid() != 0 or not whole:
        missing("needs root in the initial user namespace")


def need_tool(*names: str) -> None:
    """Skip unless every program of ``names`` is installed."""
    absent = [name for name in names if shutil.which(name) is None]
    if absent:
        missing(f"needs {', '.join(absent)} (apt-get install)")


def mounts_below(folder: Path) -> list[bytes]:
    """Return the mount points below ``folder``, in the order they were mounted."""
    prefix = os.fsencode(folder.resolve()) + b"/"
    found = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        # proc_pid_mountinfo(5): blanks and backslashes in names are written as three octal digits.
        target = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), line.split(b" ")[4])
        if target.startswith(prefix):
            found.append(target)
    return found
