"""Layers as blobs: gzip, zstd or none, by all cores, and the same bytes however many those are.

A gzip member (RFC 1952) is compressed in blocks at the same time, as pigz does it: each block of the input is
deflated alone, with the 32 KiB before it as its dictionary, and ends on a byte (``Z_SYNC_FLUSH``, RFC 1951 section
3.2.4), so that the blocks one after the other are one deflate stream. The block's size is fixed: how many threads
work, and in what pieces the data comes, changes no byte. The reading side is ``decompress``.
"""

from __future__ import annotations

import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import zstandard
from isal import isal_zlib

from layerkit.formats.compression.decompress import Compression

LEVELS = {Compression.NONE: range(0), Compression.GZIP: range(1, 10), Compression.ZSTD: range(1, 23)}
"""The levels that each compression has."""

ZSTD_LEVEL = 3
_GZIP_LEVEL = 5
GZIP_BLOCK_BYTES = 1 << 18

# zstd keeps some 16 MiB for each thread, and more than these wait for what feeds them.
_MOST_THREADS = 16
_WINDOW_BYTES = 1 << 15
_BLOCKS_AT_ONCE = 4  # a thread gets so many, one after the other
_AT_ONCE_BYTES = _BLOCKS_AT_ONCE * GZIP_BLOCK_BYTES
_ISAL_LEVELS = 3
# Huffman codes are made for fewer symbols at once than by default: 1 % smaller for layers, and no slower.
_MEMORY_LEVEL = 7
# No name, mtime 0, "unknown" system: nothing of the moment or the machine gets into the bytes.
_T = TypeVar("_T")
_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"


def all_cores() -> int:
    """Return how many threads compress by default: those that this process may run at once."""
    return max(1, min(len(os.sched_getaffinity(0)), _MOST_THREADS))


def compressor(compression: Compression, level: int | None = None) -> str:
    """Return what :func:`compress` works with: name, version and settings, "" for none.

    Where this text and the input are equal, the bytes are.
    """
    if compression is Compression.ZSTD:
        version = ".".join(map(str, zstandard.ZSTD_VERSION))
        return f"zstd {version} level {ZSTD_LEVEL if level is None else level}"
    if compression is Compression.NONE:
        return ""
    level = _GZIP_LEVEL if level is None else level
    if level <= _ISAL_LEVELS:
        import isal

        name = f"isal {isal.__version__}"
    else:
        from zlib_ng import zlib_ng

        name = f"zlib-ng {zlib_ng.ZLIBNG_RUNTIME_VERSION}"
    return f"{name} level {level} blocks {GZIP_BLOCK_BYTES}"


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
        level: gzip 1 to 3 (ISA-L: fast) or 4 to 9 (zlib-ng: small; the default, 5, packs as zlib's 6 does in about
            a third of the time), zstd 1 to 22 (default 3).
        jobs: threads that compress, default all cores; they change no byte of the result.
    """
    jobs = all_cores() if jobs is None else jobs
    if compression is Compression.NONE:
        for chunk in chunks:
            yield bytes(chunk)
        return
    if compression is Compression.GZIP:
        yield from _gzip(chunks, _GZIP_LEVEL if level is None else level, jobs)
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


def in_order(tasks: Iterable[Callable[[], _T]], jobs: int, name: str) -> Iterator[_T]:
    """Yield the results of ``tasks`` in their order; ``jobs`` are done at once, in threads called ``name``."""
    with ThreadPoolExecutor(jobs, thread_name_prefix=name) as pool:
        running: deque[Future[_T]] = deque()
        try:
            for task in tasks:
                running.append(pool.submit(task))
                # One task waits for each that runs, so that no thread is ever idle.
                while len(running) > 2 * jobs:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _gzip(chunks: Iterable[bytes | bytearray | memoryview], level: int, jobs: int) -> Iterator[bytes]:
    yield _HEADER
    crc = size = 0

    def tasks() -> Iterator[Callable[[], list[bytes]]]:
        nonlocal crc, size
        # The data of one task lies behind the window before it.
        room = memoryview(bytearray(_WINDOW_BYTES + _AT_ONCE_BYTES))
        start = at = _WINDOW_BYTES
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            crc = isal_zlib.crc32(view, crc)
            size += len(view)
            while view:
                if at == len(room):
                    # Full, and more to come: whether a task is the last one is known only now.
                    yield partial(_deflated, room, start, at, level, last=False)
                    tail = room[-_WINDOW_BYTES:]
                    room = memoryview(bytearray(len(room)))
                    room[:_WINDOW_BYTES] = tail
                    start, at = 0, _WINDOW_BYTES
                step = min(len(view), len(room) - at)
                room[at : at + step] = view[:step]
                at += step
                view = view[step:]
        yield partial(_deflated, room, start, at, level, last=True)

    for blocks in in_order(tasks(), jobs, "deflate"):
        yield from blocks
    yield crc.to_bytes(4, "little") + (size & 0xFFFFFFFF).to_bytes(4, "little")


def _deflated(room: memoryview, start: int, end: int, level: int, *, last: bool) -> list[bytes]:
    """Return the blocks of ``room`` from the window's length to ``end``; ``start`` is where the window begins."""
    out: list[bytes] = []
    for at in range(_WINDOW_BYTES, max(end, _WINDOW_BYTES + 1), GZIP_BLOCK_BYTES):
        window = room[max(start, at - _WINDOW_BYTES) : at]
        stream = _stream(level, window)
        stop = min(at + GZIP_BLOCK_BYTES, end)
        out.append(stream.compress(room[at:stop]))
        out.append(stream.flush(zlib.Z_FINISH if last and stop == end else zlib.Z_SYNC_FLUSH))
    return out


def _stream(level: int, window: memoryview) -> Any:
    known: dict[str, Any] = {"zdict": window} if window else {}
    if level <= _ISAL_LEVELS:
        return isal_zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS, **known)
    from zlib_ng import zlib_ng

    return zlib_ng.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS, _MEMORY_LEVEL, **known)
