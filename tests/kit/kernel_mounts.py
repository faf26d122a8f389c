"""What is mounted where, and overlays by mount(8) as people make them."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from programs import wait_for


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
    """Wait until nothing is mounted at ``target`` in any mount namespace, but not for ever."""
    with contextlib.suppress(TimeoutError):
        wait_for(lambda: not _is_mounted(str(target)), f"{target} is still mounted somewhere")


def _is_mounted(target: str) -> bool:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f" {target} " in (process / "mountinfo").read_text("utf-8", "surrogateescape"):
                return True
    return False


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
