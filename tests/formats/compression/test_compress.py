"""Compression of what layerkit writes: the same bytes however it is run, and every tool reads them."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import zlib
from collections.abc import Iterable, Iterator

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import need_tool

from layerkit.formats.compression.compress import GZIP_BLOCK_BYTES, LEVELS, compress, compressor
from layerkit.formats.compression.decompress import Compression

FUZZ = int(os.environ.get("LAYERKIT_TEST_FUZZ", "1"))
BLOCK = GZIP_BLOCK_BYTES
TASK = 4 * BLOCK  # what one thread gets at once
# Text that repeats itself at a distance, so that a dictionary that is not carried over shows in the size.
WORDS = b"".join(hashlib.sha256(bytes([i % 7, i % 11])).hexdigest().encode() for i in range(1 << 15))
DATA = WORDS + os.urandom(TASK // 2) + bytes(TASK) + WORDS


def pieces(data: bytes, step: int) -> Iterator[memoryview]:
    """Yield ``data`` in pieces that are gone when the next is asked for."""
    for at in range(0, len(data), step):
        piece = bytearray(data[at : at + step])
        yield memoryview(piece)
        piece[:] = b"\xff" * len(piece)


def packed(
    chunks: Iterable[bytes | bytearray | memoryview], form: Compression, level: int | None, jobs: int
) -> bytes:
    return b"".join(compress(chunks, form, level, jobs=jobs))


@pytest.mark.parametrize("level", [None, 1, 3, 6])
@pytest.mark.parametrize("form", [Compression.GZIP, Compression.ZSTD])
def test_neither_threads_nor_pieces_change_the_bytes(form: Compression, level: int | None) -> None:
    want = packed([DATA], form, level, 1)
    for jobs, step in ((1, 77_777), (2, 1 << 20), (3, 1 << 16), (7, len(DATA)), (2, BLOCK), (2, TASK)):
        assert packed(pieces(DATA, step), form, level, jobs) == want
    assert b"".join(compress([DATA], form, level)) == want  # all cores


@pytest.mark.parametrize(
    "size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, TASK - 1, TASK, TASK + 1, 2 * TASK, 2 * TASK + BLOCK]
)
@pytest.mark.parametrize("form", Compression)
def test_sizes_around_the_blocks(form: Compression, size: int) -> None:
    data = DATA[:size]
    blob = packed(pieces(data, 100_000), form, None, 2)
    if form is Compression.GZIP:
        # One member and nothing after it.
        member = zlib.decompressobj(31)
        assert member.decompress(blob) == data
        assert member.eof
        assert member.unused_data == b""
    elif form is Compression.ZSTD:
        assert zstandard.ZstdDecompressor().decompressobj().decompress(blob) == data
    else:
        assert blob == data


@settings(max_examples=40 * FUZZ, deadline=None)
@given(st.lists(st.binary(max_size=300)), st.sampled_from(list(LEVELS[Compression.GZIP])))
def test_any_data_comes_back(chunks: list[bytes], level: int) -> None:
    assert gzip.decompress(packed(chunks, Compression.GZIP, level, 1)) == b"".join(chunks)


def test_higher_levels_are_smaller_and_blocks_know_what_was_before_them() -> None:
    text = WORDS[: 3 * BLOCK]
    sizes = [len(packed([text], Compression.GZIP, level, 2)) for level in LEVELS[Compression.GZIP]]
    assert max(sizes) == max(sizes[:3])
    assert sizes[-1] <= sizes[4] <= sizes[3]
    alone = sum(
        len(packed([text[at : at + BLOCK]], Compression.GZIP, None, 1)) for at in range(0, len(text), BLOCK)
    )
    assert sizes[4] < alone


@pytest.mark.parametrize(
    ("form", "tool"),
    [(Compression.GZIP, "gzip"), (Compression.GZIP, "pigz"), (Compression.ZSTD, "zstd")],
)
def test_other_tools_read_it(form: Compression, tool: str) -> None:
    need_tool(tool)
    blob = packed([DATA], form, None, 2)
    assert subprocess.run([tool, "-dc"], input=blob, capture_output=True, check=True).stdout == DATA


def test_a_reader_that_stops_or_an_error_ends_the_threads() -> None:
    running = compress(pieces(DATA * 3, 1 << 20), Compression.GZIP, jobs=2)
    next(running)
    next(running)
    running.close()  # type: ignore[attr-defined]

    def broken() -> Iterator[bytes]:
        yield DATA
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        packed(broken(), Compression.GZIP, None, 2)


def test_what_packed_it_is_named() -> None:
    assert compressor(Compression.NONE) == ""
    assert compressor(Compression.GZIP).startswith("zlib-ng ")
    assert compressor(Compression.GZIP).endswith(f"level 5 blocks {BLOCK}")
    assert compressor(Compression.GZIP, 2).startswith("isal ")
    assert compressor(Compression.ZSTD, 7).endswith("level 7")
