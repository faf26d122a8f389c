"""Layers as zstd:chunked: zstd to every reader, with a table of contents for those that fetch files one by one.

The tar is cut into frames, one for each piece of a file and one for the headers between two files. Behind them
come two skippable frames (RFC 8878, section 3.1.2): the table of contents, which is zstd-compressed JSON, and a
footer that says where it begins. The layout is that of containers/storage (``pkg/chunked/internal/minimal`` and
``pkg/chunked/compressor``); the annotations of the layer repeat where the table is, and vouch for it by its
digest. A ``tar-split`` frame, which only containers/storage itself writes, is left out: it is optional there.

A sparse file is listed with its runs of data as chunks and its holes as chunks of zeros.
"""

from __future__ import annotations

import base64
import bisect
import datetime
import hashlib
import itertools
import json
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import zstandard

from layerkit.formats.compression.compress import in_order
from layerkit.formats.tar.writer import Part, marker
from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import LossyResult
from layerkit.model.index import Index

CHUNK_BYTES = 1 << 22
"""A file above this size is cut, so that memory does not depend on the sizes of files."""

CHECKSUM_KEY = "io.github.containers.zstd-chunked.manifest-checksum"
POSITION_KEY = "io.github.containers.zstd-chunked.manifest-position"
# Not also by the names of before 2023 (without "github"): the readers that know those, such as podman 4.3, look for
# the owners and times under keys that nobody writes, and give all files to root.

FOOTER_MAGIC = b"GNUlInUx"

_SKIPPABLE = b"\x50\x2a\x4d\x18"
_TYPE_CRFS = 1
_TASK_BYTES = 1 << 20
TYPES = {
    Kind.REG: "reg", Kind.HARDLINK: "hardlink", Kind.SYMLINK: "symlink", Kind.CHAR: "char", Kind.BLOCK: "block",
    Kind.DIR: "dir", Kind.FIFO: "fifo",
}  # fmt: skip
"""What tables of contents call each kind."""


@dataclass(slots=True)
class _Frame:
    """A frame that is made; ``row`` is -1 for headers. ``digest`` is that of its content."""

    row: int
    most: int
    data: bytearray = field(default_factory=bytearray)
    packed: bytes = b""
    digest: str = ""


@dataclass(slots=True)
class _Place:
    """Where the content of a row goes.

    ``runs`` are the ends of a sparse file's runs within what it stores, ``seen`` the bytes that were cut into
    frames. ``chunks`` are the offset in the blob, size and digest of each frame so far, ``end`` is where the last
    one ends.
    """

    runs: list[int]
    seen: int = 0
    chunks: list[tuple[int, int, str]] = field(default_factory=list)
    end: int = 0


class ZstdChunked:
    """One layer's blob. ``annotations`` are those of its descriptor once :meth:`blob` has ended."""

    def __init__(self, index: Index, level: int, *, jobs: int = 1) -> None:
        """Prepare for the layer with the rows of ``index``; ``jobs`` threads compress and change no byte."""
        self.annotations: dict[str, str] = {}
        self._index, self._level, self._jobs = index, level, jobs
        self._local = threading.local()
        self._places: dict[int, _Place] = {}
        self._order: list[int] = []
        self._at = 0

    def blob(self, parts: Iterable[Part]) -> Iterator[bytes]:
        """Yield the blob of a tar that comes in ``parts``.

        Raises:
            LossyResult: a name, link or time that the table of contents cannot hold.
        """
        tasks = (partial(self._pack, task) for task in self._tasks(parts))
        for frames in in_order(tasks, self._jobs, "zstd"):
            yield from self._placed(frames)
        yield from self._table()

    def _tasks(self, parts: Iterable[Part]) -> Iterator[list[_Frame]]:
        """Yield the frames, so many at once as one thread packs."""
        task: list[_Frame] = []
        held = 0
        for frame in self._frames(parts):
            task.append(frame)
            held += len(frame.data)
            if held >= _TASK_BYTES:
                yield task
                task, held = [], 0
        yield task

    def _frames(self, parts: Iterable[Part]) -> Iterator[_Frame]:
        """Yield the frames before they are packed; what lies between two files is one."""
        frame = _Frame(-1, CHUNK_BYTES)
        last = -1
        for part in parts:
            if part.row >= 0 and part.row != last:
                last = part.row
                self._order.append(last)
            row = part.row if part.is_content else -1
            data = memoryview(part.data)
            while data:
                if frame.row != row or len(frame.data) == frame.most:
                    if frame.data:
                        yield frame
                    frame = _Frame(row, self._most(row))
                step = min(frame.most - len(frame.data), len(data))
                frame.data += data[:step]
                data = data[step:]
                if row >= 0:
                    self._places[row].seen += step
        if frame.data:
            yield frame

    def _most(self, row: int) -> int:
        """Return how long the next frame of ``row`` may be: a run of a sparse file is a chunk of its own."""
        if row < 0:
            return CHUNK_BYTES
        place = self._places.get(row)
        if place is None:
            hole_map = int(self._index.sparse[row])
            runs = self._index.sparse_maps.extents(hole_map) if hole_map >= 0 else ()
            place = self._places[row] = _Place(list(itertools.accumulate(length for _, length in runs)))
        if not place.runs:
            return CHUNK_BYTES
        return min(CHUNK_BYTES, place.runs[bisect.bisect_right(place.runs, place.seen)] - place.seen)

    def _pack(self, frames: list[_Frame]) -> list[_Frame]:
        packer = getattr(self._local, "packer", None)
        if packer is None:
            packer = self._local.packer = zstandard.ZstdCompressor(level=self._level, write_checksum=True)
        for frame in frames:
            frame.packed = packer.compress(frame.data)
            if frame.row >= 0:
                frame.digest = f"sha256:{hashlib.sha256(frame.data).hexdigest()}"
        return frames

    def _placed(self, frames: list[_Frame]) -> Iterator[bytes]:
        for frame in frames:
            if frame.row >= 0:
                place = self._places[frame.row]
                place.chunks.append((self._at, len(frame.data), frame.digest))
                place.end = self._at + len(frame.packed)
            self._at += len(frame.packed)
            yield frame.packed

    def _table(self) -> Iterator[bytes]:
        entries = [entry for row in self._order for entry in self._entries(row)]
        plain = json.dumps({"version": 1, "entries": entries}, separators=(",", ":"), ensure_ascii=False).encode()
        packed = zstandard.ZstdCompressor(level=self._level).compress(plain)
        offset = self._at + 8
        self.annotations = {
            CHECKSUM_KEY: f"sha256:{hashlib.sha256(packed).hexdigest()}",
            POSITION_KEY: f"{offset}:{len(packed)}:{len(plain)}:{_TYPE_CRFS}",
        }
        numbers = (offset, len(packed), len(plain), _TYPE_CRFS, 0, 0, 0)
        footer = b"".join(number.to_bytes(8, "little") for number in numbers) + FOOTER_MAGIC
        for body in (packed, footer):
            yield _SKIPPABLE + len(body).to_bytes(4, "little") + body

    def _entries(self, row: int) -> list[dict[str, Any]]:
        """Return the entry of ``row`` and those of its further chunks."""
        entry = self._index.entry(row)
        if entry.kind >= Kind.WHITEOUT:
            return [
                {"type": "reg", "name": _text(marker(entry.path, entry.kind), entry.path), "modtime": _time(entry)}
            ]
        name = _text(entry.path, entry.path)
        main: dict[str, Any] = {
            "type": TYPES[entry.kind],
            "name": (name + "/" if name else "./") if entry.kind is Kind.DIR else name,
            "linkName": _text(entry.link, entry.path),
            "mode": entry.perm, "size": entry.size if entry.kind is Kind.REG else 0, "uid": entry.uid,
            "gid": entry.gid, "modtime": _time(entry), "devMajor": entry.major, "devMinor": entry.minor,
            "xattrs": {_text(k, entry.path): base64.b64encode(v).decode() for k, v in entry.xattrs},
        }  # fmt: skip
        # As the reference leaves out what is zero.
        main = {key: value for key, value in main.items() if value}
        if entry.kind is not Kind.REG or not entry.size:
            return [main]
        main["digest"] = f"sha256:{entry.sha256.hex()}"
        place = self._places.get(row, _Place([]))
        if place.chunks:
            main["offset"], main["endOffset"] = place.chunks[0][0], place.end
        chunks = list(_chunks(entry, place))
        if len(chunks) == 1 and "chunkType" not in chunks[0]:
            return [main]
        return [{**main, **chunks[0]}, *({"type": "chunk", "name": name, **chunk} for chunk in chunks[1:])]


def _chunks(entry: Entry, place: _Place) -> Iterator[dict[str, Any]]:
    """Yield the chunks of a file in order, those of zeros for its holes.

    Readers take a chunk to end in the blob where the next one begins, so a hole has a place too, of no bytes.
    """
    done = 0

    def chunk(size: int, offset: int, end: int, **more: str) -> dict[str, Any]:
        numbers = {"chunkSize": size, "chunkOffset": done, "offset": offset, "endOffset": end}
        return {key: value for key, value in numbers.items() if value} | more

    runs = iter(entry.sparse if entry.sparse is not None else ((0, entry.size),))
    start, left = next(runs, (entry.size, 0))
    ends = [offset for offset, _, _ in place.chunks[1:]] + [place.end]
    for (offset, size, digest), end in zip(place.chunks, ends, strict=False):
        if not left:
            start, left = next(runs)
        if start > done:
            yield chunk(start - done, offset, offset, chunkType="zeros")
            done = start
        yield chunk(size, offset, end, chunkDigest=digest)
        done, start, left = done + size, start + size, left - size
    if done < entry.size:
        yield chunk(entry.size - done, place.end, place.end, chunkType="zeros")


def _text(name: bytes, path: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise LossyResult(
            path, "its name, link or xattr is not UTF-8, which the JSON of zstd:chunked cannot hold; use zstd"
        ) from None


def _time(entry: Entry) -> str:
    """Return an mtime as RFC 3339 with as many digits as it needs."""
    try:
        whole = datetime.datetime.fromtimestamp(entry.mtime, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S")
    except (ValueError, OverflowError, OSError):
        raise LossyResult(
            entry.path, f"its time {entry.mtime} is in no year from 1 to 9999, as zstd:chunked wants it; use zstd"
        ) from None
    return whole.zfill(19) + (f".{entry.mtime_ns:09d}".rstrip("0") if entry.mtime_ns else "") + "Z"
