"""What of a file is in the page cache, by cachestat(2)."""

from __future__ import annotations

import mmap
from pathlib import Path

from layerkit.linux import syscalls as sc


def cached_bytes(path: Path) -> int:
    """Return how many bytes of a plain file are cached, in whole pages."""
    with sc.opened(path) as fd:
        return sc.cachestat(fd)[0] * mmap.PAGESIZE
