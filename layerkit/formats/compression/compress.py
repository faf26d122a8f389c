"""Layers as blobs: gzip, zstd or none, by all cores, and the same bytes however many those are.

The reading side is :mod:`layerkit.formats.compression.decompress`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import zstandard

from layerkit.formats.compression import gzip_blocks
from layerkit.formats.compression.decompress import Compression

ZSTD_LEVEL = 3
LEVELS = {Compression.NONE: range(0), Compression.GZIP: gzip_blocks.LEVELS, Compression.ZSTD: range(1, 23)}
"""The levels that each compression has."""

# zstd keeps some 16 MiB for each thread, and more than these wait for what feeds them.
_MOST_THREADS = 16


def all_cores() -> int:
    """Return how many threads compress by default: those that this process may run at once."""
    return max(1, min(len(os.sched_getaffinity(0)), _MOST_THREADS))


def compressor(compression: Compression, level: int | None = None) -> str:
    """Return what :func:`compress` works with: name, version and settings, "" for none.

    Where this text and the input are equal, the bytes are.
    """
    if compression is Compression.GZIP:
        return gzip_blocks.compressor(level)
    if compression is Compression.ZSTD:
        version = ".".join(map(str, zstandard.ZSTD_VERSION))
        return f"zstd {version} level {ZSTD_LEVEL if level is None else level}"
    return ""


def compress(
    chunks: Iterable[bytes | bytearray | memoryview],
    compression: Compression,
    level: int | None = None,
    *,
    jobs: int | None = None,
) -> Iterator[bytes]:
    """Yield ``chunks`` compressed as one member or frame.

    Args:
        chunks: the data in order; a chunk is read before the next is asked for.
        compression: of the result.
        level: gzip 1 to 9 (default 5), zstd 1 to 22 (default 3).
        jobs: threads that compress, default all cores; they change no byte of the result.
    """
    jobs = all_cores() if jobs is None else jobs
    if compression is Compression.NONE:
        for chunk in chunks:
            yield bytes(chunk)
        return
    if compression is Compression.GZIP:
        yield from gzip_blocks.gzip_blocks(chunks, level, jobs=jobs)
        return
    # With one worker or more libzstd cuts its input by its own rule, which does not know how many they are; with
    # none it does not cut, which gives other bytes.
    encoder = zstandard.ZstdCompressor(
        level=ZSTD_LEVEL if level is None else level, write_checksum=True, threads=jobs
    ).compressobj()
    for chunk in chunks:
        if out := encoder.compress(chunk):
            yield out
    yield encoder.flush()
