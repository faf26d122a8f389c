"""Renders a layer's contents as an EROFS image that maps them onto the raw tar, as an external device.

Blocks are of 512 bytes, as a tar's are, so every file of a tar is whole blocks of the device, and one chunk
covers it. Files that are no such run (a sparse file whose pieces do not keep to blocks) are copied into the
image itself. Each distinct non-empty content has one name, made from its digest.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from layerkit.formats.erofs import dirs
from layerkit.formats.erofs import format as f
from layerkit.metaonly import redirects
from layerkit.model.entry import Extent, Kind
from layerkit.model.errors import InvalidImage, LossyResult
from layerkit.model.index import Index
from layerkit.model.strings import Strings

_BITS = f.DATA_BLOCK_BITS
_BLOCK = 1 << _BITS
_INODES_AT = f.SUPER_OFFSET + f.superblock_span(_BITS)
_MAX_CHUNK = _BLOCK << f.MAX_CHUNK_BITS
_TAR = 1
"""Device id of the tar; 0 is the image itself."""

_PIECE_BYTES = 1 << 20
_FILES_AT_ONCE = 1 << 16
_COMPACT = f.record({**f.COMPACT_FIELDS, "device": (34, "<u2"), "block": (36, "<u4")}, 64)


@dataclass(slots=True)
class _Odd:
    """A file that is not one run of whole blocks of the tar.

    Attributes:
        size: logical size.
        runs: its data: (offset in the file, length).
        offset: where its stored bytes begin in the tar.
        bits: log2 of the chunk size in blocks.
        copied: the chunks whose bytes are copied, rising; None where all are mapped onto the tar.
        block: where the copy lies.
    """

    size: int
    runs: tuple[Extent, ...]
    offset: int
    bits: int
    copied: NDArray[np.int64] | None = None
    block: int = 0

    @property
    def chunk(self) -> int:
        return _BLOCK << self.bits

    @property
    def chunks(self) -> int:
        return -(-self.size // self.chunk)

    @property
    def copied_blocks(self) -> int:
        """Return how many blocks the copy takes; only the file's last chunk may be shorter than a chunk."""
        if self.copied is None or not len(self.copied):
            return 0
        per = self.chunk >> _BITS
        last = min(self.chunk, self.size - int(self.copied[-1]) * self.chunk)
        return (len(self.copied) - 1) * per + -(-last // _BLOCK)

    def indexes(self) -> NDArray[np.void]:
        """Return the chunk indexes."""
        out = np.zeros(self.chunks, f.CHUNK_INDEX)
        out["block"] = f.NULL_BLOCK
        per = self.chunk >> _BITS
        if self.copied is not None:
            out["block"][self.copied] = self.block + per * np.arange(len(self.copied))
            return out
        at = self.offset >> _BITS
        for start, length in self.runs:
            first, count = start // self.chunk, -(-length // self.chunk)
            out["block"][first : first + count] = at + per * np.arange(count)
            out["device"][first : first + count] = _TAR
            at += length >> _BITS
        return out


def build_data(index: Index, tar: BinaryIO | int, file: BinaryIO) -> None:
    """Write to ``file``, without seeking, the EROFS image that maps the contents of a layer onto its tar.

    Each content stands under its short name (``metaonly.redirects``). Mount it with the uncompressed tar as its one
    extra device (``device=LAYER.tar``).

    Args:
        index: of the layer.
        tar: the uncompressed tar, or its descriptor; read only for files that blocks cannot map.
        file: takes the image, some 100 bytes per file.

    Raises:
        InvalidImage: two contents of one name, or content beyond the end of the tar.
        LossyResult: more blocks than EROFS can number.
    """
    fd = tar if isinstance(tar, int) else tar.fileno()
    rows, text = _contents(index)
    tar_bytes = os.fstat(fd).st_size
    plain, odd = _sort_out(index, rows, tar_bytes)
    plan = _names(text)
    kinds = np.full(len(plan.names), f.FILE_TYPE[Kind.REG], np.uint8)
    kinds[plan.owner] = f.FILE_TYPE[Kind.DIR]
    first_file = len(plan.names) - len(rows)
    position = np.zeros(len(plan.names), np.int64)
    position[:first_file] = _INODES_AT + f.EXTENDED_INODE_BYTES * np.arange(first_file)
    at = _INODES_AT + f.EXTENDED_INODE_BYTES * first_file
    position[first_file + plain] = at + _COMPACT.itemsize * np.arange(len(plain))
    at += _COMPACT.itemsize * len(plain)
    for place, item in odd:
        position[first_file + place] = at
        at = f.align(at + f.EXTENDED_INODE_BYTES + f.CHUNK_INDEX.itemsize * item.chunks, f.SLOT_BYTES)
    inodes_end = at
    dirs_at = f.align(at, _BLOCK) >> _BITS
    dir_blocks = len(plan.block_first) - 1
    block = dirs_at + dir_blocks
    for _, item in odd:
        item.block = block
        block += item.copied_blocks
    device_blocks = -(-tar_bytes >> _BITS)
    if max(block, device_blocks) >= f.NULL_BLOCK:
        raise LossyResult(b"", f"a layer of {tar_bytes} bytes; EROFS maps some 2 TiB of 512-byte blocks")

    nid = (position // f.SLOT_BYTES).astype(np.uint32)
    uuid = f.uuid8(hashlib.sha256(f"layerkit.erofs.data.v1 {index.diff_id}".encode()).digest())
    head = f.Superblock(
        block_bits=_BITS, compat=f.Compat.MTIME, root_nid=int(nid[0]), inodes=len(plan.names), blocks=block,
        meta_block=0, xattr_block=0, uuid=uuid, device_blocks=device_blocks,
    )  # fmt: skip
    file.write(head.encode(_INODES_AT))
    file.write(_folders(plan, dirs_at))
    for start in range(0, len(plain), _FILES_AT_ONCE):
        file.write(_files(index, rows[plain[start : start + _FILES_AT_ONCE]]))
    for _, item in odd:
        file.write(_odd_inode(item))
    file.write(bytes(-inodes_end % _BLOCK))
    for dir_block in plan.blocks(np.arange(dir_blocks), nid, kinds):
        file.write(dir_block.ljust(_BLOCK, b"\0"))
    for _, item in odd:
        for piece in _copy(item, fd):
            file.write(piece)


def _contents(index: Index) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return (rows of the index, uint8 (k, 21) names): each content once, in the order of the names."""
    rows = np.flatnonzero((index.kind == Kind.REG) & (index.size > 0))
    # Where a content is there with and without holes, the form without them is the simpler to map.
    rows = rows[np.argsort(index.sparse[rows] >= 0, kind="stable")]
    digests = index.sha256[rows]
    text = np.zeros((len(rows), 24), np.uint8)
    for at in range(0, len(rows), _FILES_AT_ONCE):
        part = redirects(digests[at : at + _FILES_AT_ONCE])
        text[at : at + len(part), 0] = part[:, 2]
        text[at : at + len(part), 1:21] = part[:, 4:]
    keys = text.view(">u8").reshape(-1, 3)
    order = np.lexsort((keys[:, 2], keys[:, 1], keys[:, 0]))
    same = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    unlike = same & (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
    if unlike.any():
        at = int(np.argmax(unlike))
        first, second = (index.path[int(rows[order[i]])] for i in (at, at + 1))
        raise InvalidImage(
            f"layer {index.diff_id}: {first!r} and {second!r} differ, and the first 126 bits of their sha256 do not"
        )
    keep = order[np.concatenate([[True], ~same])] if len(order) else order
    return rows[keep], text[keep, :21]


def _names(text: NDArray[np.uint8]) -> dirs.DirPlan:
    """Return the directories: the root, a folder per first letter, the files."""
    letters, belongs = np.unique(text[:, 0], return_inverse=True)
    n = 1 + len(letters) + len(text)
    lengths = np.full(n, 20, np.int64)
    lengths[0] = 0
    lengths[1 : 1 + len(letters)] = 2
    offsets = np.zeros(n + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    folders = b"".join(b":" + bytes((letter,)) for letter in letters.tolist())
    parent = np.zeros(n, np.int32)
    parent[0] = -1
    parent[1 + len(letters) :] = 1 + belongs
    names = Strings(folders + text[:, 1:].tobytes(), offsets)
    return dirs.plan(names, parent, np.arange(n) <= len(letters), _BITS)


def _sort_out(
    index: Index, rows: NDArray[np.int64], tar_bytes: int
) -> tuple[NDArray[np.int64], list[tuple[int, _Odd]]]:
    """Return (places in ``rows`` of files that one chunk maps, the others with their places)."""
    offset, size, sparse = index.offset[rows], index.size[rows], index.sparse[rows]
    stored = size.copy()
    for place in np.flatnonzero(sparse >= 0).tolist():
        stored[place] = index.sparse_maps.stored_bytes(int(sparse[place]))
    beyond = ((offset < 0) & (stored > 0)) | (offset + stored > tar_bytes)
    if beyond.any():
        row = int(rows[np.argmax(beyond)])
        raise InvalidImage(
            f"layer {index.diff_id}: {index.path[row]!r} lies beyond the end of its tar of {tar_bytes} bytes; "
            "the kept tar is cut short, unpack the layer again"
        )
    # Reading the last block of a device that ends within it is EIO under `directio`: it is not mapped.
    cut = -(-(offset + stored) // _BLOCK) * _BLOCK > tar_bytes
    plain = (sparse < 0) & (offset % _BLOCK == 0) & (size < 1 << 32) & ~cut
    odd = []
    for place in np.flatnonzero(~plain).tolist():
        row = int(rows[place])
        number = int(index.sparse[row])
        runs = index.sparse_maps.extents(number) if number >= 0 else ((0, int(size[place])),)
        odd.append((place, _plan_odd(int(size[place]), runs, max(0, int(offset[place])), bool(cut[place]))))
    return np.flatnonzero(plain), odd


def _plan_odd(size: int, runs: tuple[Extent, ...], offset: int, copy_it: bool) -> _Odd:
    """Return how to map a file: onto the tar where its runs keep to blocks, and cheaper than a copy.

    ``copy_it`` forbids the tar; else the file is copied only where the tar cannot serve.
    """
    joined: list[Extent] = []
    for start, length in runs:
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((start, length))
    flat = np.array(joined, np.int64).reshape(-1, 2)
    starts, ends = flat[:, 0], flat[:, 0] + flat[:, 1]
    copy = min(
        (_copied(size, starts, ends, bits) for bits in range(f.MAX_CHUNK_BITS + 1)), key=lambda choice: choice[0]
    )
    edges = math.gcd(*starts.tolist(), *(end for end in ends.tolist() if end != size))
    if edges % _BLOCK == 0 and offset % _BLOCK == 0 and not copy_it:
        # The largest power of two that every edge is a multiple of; 0 is one of all.
        unit = min(edges & -edges or _MAX_CHUNK, _MAX_CHUNK)
        mapped = _Odd(size, tuple(joined), offset, (unit >> _BITS).bit_length() - 1)
        if mapped.chunks * f.CHUNK_INDEX.itemsize <= copy[0]:
            return mapped
    bits = copy[1]
    chunk = _BLOCK << bits
    touched = [
        np.arange(a, b) for a, b in zip((starts // chunk).tolist(), (-(-ends // chunk)).tolist(), strict=True)
    ]
    copied = np.unique(np.concatenate(touched)) if touched else np.zeros(0, np.int64)
    return _Odd(size, tuple(joined), offset, bits, copied)


def _copied(size: int, starts: NDArray[np.int64], ends: NDArray[np.int64], bits: int) -> tuple[int, int]:
    """Return (bytes that a copy in chunks of ``1 << bits`` blocks takes, ``bits``)."""
    chunk = _BLOCK << bits
    first, last = starts // chunk, (ends - 1) // chunk
    touched = int((last - first + 1).sum()) - int((first[1:] == last[:-1]).sum())
    return min(touched * chunk, f.align(size, _BLOCK)) + f.CHUNK_INDEX.itemsize * -(-size // chunk), bits


def _folders(plan: dirs.DirPlan, dirs_at: int) -> bytes:
    count = len(plan.owner)
    out = np.zeros(count, f.EXTENDED)
    out["format"] = f.inode_format(f.Layout.FLAT_PLAIN)
    out["mode"] = stat.S_IFDIR | 0o555
    out["size"] = plan.sizes
    out["u"] = dirs_at + plan.dir_first[:-1]
    out["ino"] = np.arange(1, count + 1)
    out["nlink"] = 2
    out["nlink"][0] = 1 + count
    return out.tobytes()


def _inodes(dtype: np.dtype[np.void], size: NDArray[np.int64], chunk_bits: int) -> NDArray[np.void]:
    """Return the inodes of regular files of these sizes, compact or extended, but for where their chunks are."""
    out = np.zeros(len(size), dtype)
    out["format"] = f.inode_format(f.Layout.CHUNK_BASED, extended=dtype == f.EXTENDED)
    out["mode"] = stat.S_IFREG | 0o444
    out["nlink"] = 1
    out["size"] = size
    out["u"] = f.CHUNK_INDEXES | chunk_bits
    return out


def _files(index: Index, rows: NDArray[np.int64]) -> memoryview:
    out = _inodes(_COMPACT, index.size[rows], f.MAX_CHUNK_BITS)
    out["device"] = _TAR
    out["block"] = index.offset[rows] >> _BITS
    return out.view(np.uint8).data


def _odd_inode(item: _Odd) -> bytes:
    out = _inodes(f.EXTENDED, np.array([item.size]), item.bits)
    raw = out.tobytes() + item.indexes().tobytes()
    return raw + bytes(-len(raw) % f.SLOT_BYTES)


def _copy(item: _Odd, tar: int) -> Iterator[bytes]:
    """Yield the copied chunks of a file, whole blocks, zeros where it has holes."""
    if item.copied is None:
        return
    stored = item.offset
    places = []
    for start, length in item.runs:
        places.append((start, start + length, stored))
        stored += length
    run = 0
    for number in item.copied.tolist():
        at = number * item.chunk
        end = min(at + item.chunk, item.size)
        while at < end:
            piece = bytearray(min(_PIECE_BYTES, end - at))
            while run < len(places) and places[run][1] <= at:
                run += 1
            for start, stop, source in places[run:]:
                a, b = max(start, at), min(stop, at + len(piece))
                if start >= at + len(piece):
                    break
                if a < b:
                    piece[a - at : b - at] = _read(tar, b - a, source + a - start)
            at += len(piece)
            yield bytes(piece) + bytes(-len(piece) % _BLOCK)


def _read(tar: int, length: int, offset: int) -> bytes:
    data = os.pread(tar, length, offset)
    while len(data) < length:
        more = os.pread(tar, length - len(data), offset + len(data))
        if not more:
            raise InvalidImage(f"the layer's tar ends at {offset + len(data)}; unpack the layer again")
        data += more
    return data
