"""Shared helpers of the tests: what the machine must offer, and why a test skips where it does not."""

from __future__ import annotations

import os
import shutil

import pytest


def _missing(reason: str) -> None:
    # In CI everything is installed: a skip there would be a check that silently does not run.
    if os.environ.get("CI"):
        pytest.fail(f"CI must offer this: {reason}")
    pytest.skip(reason)


def need_root() -> None:
    """Skip unless the test runs as root in the initial user namespace."""
    with open("/proc/self/uid_map") as f:  # noqa: PTH123
        whole = f.read().split() == ["0", "0", "4294967295"]
    if os.geteuid() != 0 or not whole:
        _missing("needs root in the initial user namespace")


def need_tool(*names: str) -> None:
    """Skip unless every program of ``names`` is installed."""
    absent = [name for name in names if shutil.which(name) is None]
    if absent:
        _missing(f"needs {', '.join(absent)} (apt-get install)")
