"""The judge of our mounts: umoci's tree of an image, its owners mapped by the kernel."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerkit.linux import mounts, userns


@contextmanager
def unpacked(image: str, work: Path, extents: tuple[tuple[int, int, int], ...]) -> Iterator[Path]:
    """Give umoci's tree of ``image`` (``LAYOUT:TAG``) through an idmapped mount; ``work`` takes some folders."""
    subprocess.run(["umoci", "unpack", "--image", image, str(work / "bundle")], check=True, capture_output=True)
    with mapped(work / "bundle/rootfs", work / "shown", extents) as shown:
        yield shown


@contextmanager
def mapped(folder: Path, shown: Path, extents: tuple[tuple[int, int, int], ...]) -> Iterator[Path]:
    """Give ``folder`` with its owners mapped by the kernel, at the new folder ``shown``."""
    shown.mkdir()
    namespace = userns.userns_fd(extents, extents)
    try:
        tree = mounts.clone(folder)
        try:
            mounts.idmap(tree, namespace)
            mounts.attach(tree, shown)
        finally:
            os.close(tree)
    finally:
        os.close(namespace)
    try:
        yield shown
    finally:
        subprocess.run(["umount", "--lazy", str(shown)], check=True)
