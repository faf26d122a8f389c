"""New files past the page cache: what they hold, what stays in memory, and where the kernel does not do it."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import disk
from page_cache import cached_bytes

from layerkit.linux.durable import NewFile

PIECE = 1 << 20


def _aligned(fill: bytes, size: int = PIECE) -> memoryview:
    area = mmap.mmap(-1, size)
    area.write(fill * (size // len(fill)))
    return memoryview(area)


def _written(path: Path, pieces: list[memoryview], *, direct: bool = True) -> bytes:
    """Write ``pieces`` to ``path`` and return what they are in all."""
    file = NewFile(path, direct=direct)
    for piece in pieces:
        assert file.write(piece) == len(piece)
    file.sync()
    file.close()
    file.close()
    assert file.size == path.stat().st_size
    return b"".join(pieces)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A small ext4 of its own."""
    with disk(tmp_path, "ext4", "-F", size=24 << 20) as target:
        yield target


@pytest.mark.usefixtures("caches_stay")
def test_whole_pieces_leave_nothing_in_the_page_cache(small: Path) -> None:
    path = small / "file"
    want = _written(path, [_aligned(b"ab"), _aligned(b"cd"), _aligned(b"ef")])
    assert cached_bytes(path) == 0
    assert path.read_bytes() == want
    assert cached_bytes(path) > 0  # the check can fail


@pytest.mark.parametrize("tail", [1, 511, 512, 4095, 4096, 4097, PIECE - 1])
def test_a_tail_of_any_length(small: Path, tail: int) -> None:
    want = _written(small / "file", [_aligned(b"ab"), _aligned(b"cd")[:tail]])
    assert (small / "file").read_bytes() == want


def test_pieces_of_odd_lengths_in_between(small: Path) -> None:
    pieces = [_aligned(b"a"), _aligned(b"b")[:700], _aligned(b"c"), _aligned(b"d")[:5000], _aligned(b"e")]
    assert (_written(small / "file", pieces)) == (small / "file").read_bytes()


def test_memory_that_is_not_aligned_goes_the_usual_way(small: Path) -> None:
    """The kernel refuses it (EINVAL), and nothing is lost or written twice."""
    area = _aligned(b"xyz0", 2 * PIECE)
    want = _written(small / "file", [_aligned(b"a"), area[1 : PIECE + 1], _aligned(b"b")])
    assert (small / "file").read_bytes() == want


def test_tmpfs_and_without_direct(tmp_path: Path, small: Path) -> None:
    memory = Path("/dev/shm") / f"lk-direct-{os.getpid()}"
    for path, direct in ((memory, True), (small / "file", False)):
        try:
            assert _written(path, [_aligned(b"ab"), _aligned(b"cd")[:999]], direct=direct) == path.read_bytes()
        finally:
            path.unlink()


def test_a_full_disk_is_an_error(small: Path) -> None:
    file = NewFile(small / "file", direct=True)
    with pytest.raises(OSError) as caught:
        for _ in range(64):
            file.write(_aligned(b"ab"))
    file.close()
    assert caught.value.errno == errno.ENOSPC
