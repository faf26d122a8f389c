"""Overlay mounts by mount(8), as people make them: what the kernel shows is the judge."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_GONE_SECONDS = 60


@contextmanager
def overlay(target: Path, **options: object) -> Iterator[Path]:
    """Mount an overlay at ``target``; ``lowerdir`` and the rest as the kernel has them, "" for a flag.

    At the end it is gone from every mount namespace: another test's ``unshare -m`` may have copied it meanwhile.
    """
    target.mkdir(exist_ok=True)
    text = ",".join(f"{key}={value}" if value != "" else key for key, value in options.items())
    subprocess.run(["mount", "-t", "overlay", "-o", text, "overlay", target], check=True, capture_output=True)
    try:
        yield target
    finally:
        subprocess.run(["umount", target], check=True)
    wait_gone(target)


def wait_gone(target: Path) -> None:
    """Wait until nothing is mounted at ``target`` in any mount namespace."""
    end = time.monotonic() + _GONE_SECONDS
    while _is_mounted(str(target)) and time.monotonic() < end:
        time.sleep(0.1)


def _is_mounted(target: str) -> bool:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f" {target} " in (process / "mountinfo").read_text("utf-8", "surrogateescape"):
                return True
    return False
