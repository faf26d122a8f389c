"""New filesystems on loop devices."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from needs import need_root, need_tool
from programs import run, wait_for


@contextmanager
def disk(folder: Path, kind: str, *flags: str, size: int, whole: bool = False) -> Iterator[Path]:
    """Mount a new filesystem of ``size`` bytes, in a file in ``folder``; nothing may be open there at the end.

    Args:
        folder: takes the file and the place of the mount.
        kind: as in ``mkfs.KIND``.
        flags: for that program.
        size: of the file, in bytes.
        whole: the file has all its blocks, so that it is this disk that gets full and never the one below it.
    """
    need_root()
    need_tool(f"mkfs.{kind}")
    image, target = folder / "disk.img", folder / "disk"
    with image.open("wb") as file:
        file.truncate(size)
        if whole:
            os.posix_fallocate(file.fileno(), 0, size)
    run(f"mkfs.{kind}", "-q", *flags, image)
    target.mkdir()
    run("mount", "-o", "loop", image, target)
    try:
        with contextlib.suppress(FileNotFoundError):
            (target / "lost+found").rmdir()
        yield target
    finally:
        gc.collect()  # an index in the traceback of an expected error is a mapped file of the disk
        # What was killed may still be about to end.
        wait_for(lambda: run("umount", target, code=None).returncode == 0, f"{target} is in use")
