"""What a test needs of the machine; it skips where that is not there, and fails in CI."""

from __future__ import annotations

import os
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
