"""Reads EROFS images back: those this package writes, and any other uncompressed one.

It shares the structures with the writer and nothing else, so each checks the other. It trusts nothing: an
image may be damaged or made to hurt. Every offset is checked against the image, every directory is entered
once, and the parts of an image (names, xattrs, chunk lists) may in sum not be larger than the image, so
that parts that overlap cannot make a small file cost hours.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from layerkit.formats.erofs import format as f
from layerkit.model.entry import XattrSet
from layerkit.model.errors import InvalidImage
from layerkit.model.limits import DEFAULT, Limits

_TYPES = {5: stat.S_IFIFO, 3: stat.S_IFCHR, 2: stat.S_IFDIR, 4: stat.S_IFBLK, 1: stat.S_IFREG, 7: stat.S_IFLNK}
_KNOWN_INCOMPAT = f.Incompat.CHUNKED_FILE | f.Incompat.DEVICE_TABLE
_CHUNKS_AT_ONCE = 1 << 16


class Extent(NamedTuple):
    """A run of a file's bytes.

    Attributes:
        offset: in the file.
        length: in bytes.
        device: 0 for the image, 1 for the first extra device; -1 for a hole.
        place: in the device, in bytes; 0 for a hole.
    """

    offset: int
    length: int
    device: int
    place: int


@dataclass(frozen=True, slots=True)
class Node:
    """An inode; hard links are one node under several paths."""

    nid: int
    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    mtime: int
    mtime_ns: int
    major: int
    minor: int
    target: bytes
    xattrs: XattrSet
    extents: tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class Image:
    """What an image holds.

    Attributes:
        block_bytes: the block size.
        blocks: of the image.
        uuid: 16 bytes.
        inodes: their number, by the superblock.
        device_blocks: of each extra device.
        nodes: by path, ``b""`` is the root; a parent stands before its children, siblings rise by name.
    """

    block_bytes: int
    blocks: int
    uuid: bytes
    inodes: int
    device_blocks: tuple[int, ...]
    nodes: dict[bytes, Node] = field(repr=False)
    data: memoryview = field(repr=False)

    def content(self, path: bytes, *devices: bytes | memoryview) -> bytes:
        """Return the bytes of the regular file at ``path``; ``devices`` are the extra ones, in order.

        Raises:
            InvalidImage: an extent beyond the end of its device, or a device that is not given.
        """
        node, out = self.nodes[path], bytearray()
        for extent in node.extents:
            if extent.device < 0:
                out += bytes(extent.length)
                continue
            if extent.device > len(devices):
                raise InvalidImage(f"erofs: {path!r} lies on extra device {extent.device}, which is not given")
            source = memoryview(devices[extent.device - 1]) if extent.device else self.data
            piece = source[extent.place : extent.place + extent.length]
            if len(piece) != extent.length:
                raise InvalidImage(f"erofs: {path!r} goes beyond the end of its device")
            out += piece
        return bytes(out)


def read(source: Path | bytes | bytearray | memoryview, *, limits: Limits = DEFAULT) -> Image:
    """Return the content of an image.

    Args:
        source: the image, or the path of its file.
        limits: ``entries_per_image``, ``path_bytes``, ``path_depth`` and ``file_bytes`` bound what is read.

    Raises:
        InvalidImage: malformed, damaged, or of a form that is not read here (compression).
    """
    data = source.read_bytes() if isinstance(source, Path) else source
    return _Reader(memoryview(data).cast("B"), limits).read()


class _Reader:
    def __init__(self, data: memoryview, limits: Limits) -> None:
        self.data, self.limits = data, limits
        self.spent = dict.fromkeys(("directories", "xattrs", "shared xattrs", "chunk lists"), 0)
        self.shared: dict[int, tuple[bytes, bytes]] = {}
        self.by_nid: dict[int, Node] = {}
        self._superblock()

    def read(self) -> Image:
        nodes: dict[bytes, Node] = {}
        root = self._inode(self.root_nid)
        if not stat.S_ISDIR(root.mode):
            raise InvalidImage("erofs: the root is not a directory")
        entered = {self.root_nid}
        # Each item: (path, node, nid of the directory above, depth); the last is read first.
        stack = [(b"", root, self.root_nid, 0)]
        while stack:
            path, node, above, depth = stack.pop()
            nodes[path] = node
            if not stat.S_ISDIR(node.mode):
                continue
            self.limits.check("path_depth", depth, "erofs image")
            below = []
            for name, nid, mode in self._entries(node, above):
                child = self._inode(nid)
                if stat.S_IFMT(child.mode) != mode:
                    raise InvalidImage(f"erofs: inode {nid}: its directory entry gives it another type")
                if stat.S_ISDIR(mode):
                    if nid in entered:
                        raise InvalidImage(f"erofs: directory {nid} is reached twice")
                    entered.add(nid)
                whole = path + b"/" + name if path else name
                self.limits.check("path_bytes", len(whole), "erofs image")
                below.append((whole, child, node.nid, depth + 1))
            self.limits.check("entries_per_image", len(nodes) + len(stack) + len(below), "erofs image")
            stack.extend(reversed(below))
        return Image(1 << self.bits, self.blocks, self.uuid, self.inodes, self.device_blocks, nodes, self.data)

    def _bytes(self, start: int, length: int, what: str) -> memoryview:
        if start < 0 or length < 0 or start + length > len(self.data):
            raise InvalidImage(f"erofs: {what} at byte {start} is beyond the image of {len(self.data)} bytes")
        return self.data[start : start + length]

    def _spend(self, what: str, count: int) -> None:
        self.spent[what] += count
        if self.spent[what] > len(self.data):
            raise InvalidImage(f"erofs: {what} overlap: in sum they are larger than the image")

    def _superblock(self) -> None:
        (
            magic, checksum, compat, bits, slots, root, inodes, _, _, blocks, meta, xattr, uuid, _, incompat, _,
            devices, slot, dir_bits, _, _, _, filter_seed, _,
        ) = f.SUPER.unpack(self._bytes(f.SUPER_OFFSET, f.SUPER_BYTES, "superblock"))  # fmt: skip
        if magic != f.MAGIC:
            raise InvalidImage("erofs: no superblock at byte 1024: this is not an EROFS image")
        if not f.DATA_BLOCK_BITS <= bits <= 16 or dir_bits or slots:
            raise InvalidImage(f"erofs: block size 2^{bits} (directories 2^{dir_bits} more) is not supported")
        if incompat & ~_KNOWN_INCOMPAT:
            raise InvalidImage(f"erofs: incompatible features {incompat:#x}; only uncompressed images are read")
        if compat & f.Compat.SB_CHKSUM:
            span = bytearray(self._bytes(f.SUPER_OFFSET, f.superblock_span(bits), "superblock"))
            span[4:8] = bytes(4)
            if f.crc32c(span) != checksum:
                raise InvalidImage("erofs: the superblock's checksum does not hold; the image is damaged")
        if blocks << bits > len(self.data):
            raise InvalidImage(f"erofs: cut short: {len(self.data)} bytes of {blocks} blocks")
        self.bits, self.root_nid, self.inodes, self.blocks, self.uuid = bits, root, inodes, blocks, uuid
        self.meta, self.xattr = meta << bits, xattr << bits
        self.has_filter = bool(compat & f.Compat.XATTR_FILTER) and not filter_seed
        count = devices if incompat & f.Incompat.DEVICE_TABLE else 0
        table = self._bytes(slot * f.DEVICE_SLOT_BYTES, count * f.DEVICE_SLOT_BYTES, "device table")
        self.device_blocks = tuple(entry[1] for entry in f.DEVICE_SLOT.iter_unpack(table))

    def _inode(self, nid: int) -> Node:
        known = self.by_nid.get(nid)
        if known is not None:
            return known
        where = f"inode {nid}"
        at = self.meta + nid * f.SLOT_BYTES
        form = int.from_bytes(self._bytes(at, 2, where), "little")
        extended = bool(form & 1)
        if form >> 4 or form >> 1 not in tuple(f.Layout):
            raise InvalidImage(f"erofs: {where}: unknown format {form:#x}")
        dtype = f.EXTENDED if extended else f.COMPACT
        raw = np.frombuffer(self._bytes(at, dtype.itemsize, where), dtype)[0]
        names = dtype.names or ()
        v = dict(zip(names, raw.item(), strict=True))
        mode, size = v["mode"], v["size"]
        if stat.S_IFMT(mode) not in _TYPES.values():
            raise InvalidImage(f"erofs: {where}: mode {mode:o} has no known type")
        if v.get("mtime_ns", 0) >= 10**9:
            raise InvalidImage(f"erofs: {where}: {v['mtime_ns']} nanoseconds")
        self.limits.check("file_bytes", size, f"erofs image, {where}")
        body = f.XATTR_BODY_BYTES + 4 * (v["xattr_icount"] - 1) if v["xattr_icount"] else 0
        after = at + dtype.itemsize + body
        kind, layout = stat.S_IFMT(mode), f.Layout(form >> 1)
        device = kind in (stat.S_IFCHR, stat.S_IFBLK)
        major, minor = f.decode_device(v["u"]) if device else (0, 0)
        has_data = kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)
        extents = self._extents(where, layout, size, v["u"], after) if has_data else ()
        target = b""
        if kind == stat.S_IFLNK:
            self.limits.check("link_target_bytes", size, f"erofs image, {where}")
            target = b"".join(self._extent_bytes(e, where) for e in extents)
            if not target or b"\0" in target:
                raise InvalidImage(f"erofs: {where}: a symlink with no target, or with a NUL in it")
        node = Node(
            nid, mode, v["uid"], v["gid"], v["nlink"], size, v.get("mtime", 0), v.get("mtime_ns", 0), major, minor,
            target, self._xattrs(where, at + dtype.itemsize, body), extents,
        )  # fmt: skip
        self.by_nid[nid] = node
        return node

    def _extents(self, where: str, layout: f.Layout, size: int, u: int, after: int) -> tuple[Extent, ...]:
        if layout == f.Layout.CHUNK_BASED:
            return self._chunks(where, size, u, after)
        if not size:
            return ()
        if layout == f.Layout.FLAT_PLAIN:
            return (Extent(0, size, 0, u << self.bits),)
        # All whole blocks apart, what is left over behind the inode; a tail of a whole block is allowed.
        block = 1 << self.bits
        tail = (size - 1) % block + 1
        if after % block + tail > block:
            raise InvalidImage(f"erofs: {where}: its tail crosses a block")
        head = (Extent(0, size - tail, 0, u << self.bits),) if size > tail else ()
        return (*head, Extent(size - tail, tail, 0, after))

    def _chunks(self, where: str, size: int, form: int, after: int) -> tuple[Extent, ...]:
        if form & ~(f.CHUNK_INDEXES | f.CHUNK_BITS_MASK):
            raise InvalidImage(f"erofs: {where}: unknown chunk format {form:#x}")
        chunk = 1 << self.bits + (form & f.CHUNK_BITS_MASK)
        count = -(-size // chunk)
        width = 8 if form & f.CHUNK_INDEXES else 4
        start = f.align(after, width)
        self._spend("chunk lists", width * count)
        raw = self._bytes(start, width * count, f"{where}: chunks")
        out: list[Extent] = []
        for at in range(0, count, _CHUNKS_AT_ONCE):
            part = raw[at * width : (at + _CHUNKS_AT_ONCE) * width]
            if width == 8:
                entries = np.frombuffer(part, f.CHUNK_INDEX)
                devices, blocks = entries["device"].tolist(), entries["block"].tolist()
            else:
                blocks = np.frombuffer(part, "<u4").tolist()
                devices = [0] * len(blocks)
            for i, (device, block) in enumerate(zip(devices, blocks, strict=True)):
                offset = (at + i) * chunk
                length = min(chunk, size - offset)
                hole = block == f.NULL_BLOCK
                if not hole and device > len(self.device_blocks):
                    raise InvalidImage(f"erofs: {where}: extra device {device} of {len(self.device_blocks)}")
                new = Extent(offset, length, -1, 0) if hole else Extent(offset, length, device, block << self.bits)
                last = out[-1] if out else None
                if last and last.device == new.device and (hole or last.place + last.length == new.place):
                    out[-1] = last._replace(length=last.length + length)
                else:
                    out.append(new)
        return tuple(out)

    def _extent_bytes(self, extent: Extent, where: str) -> bytes:
        if extent.device < 0:
            return bytes(extent.length)
        if extent.device > 0:
            raise InvalidImage(f"erofs: {where}: metadata on an extra device")
        return bytes(self._bytes(extent.place, extent.length, f"{where}: data"))

    def _xattrs(self, where: str, at: int, length: int) -> XattrSet:
        if not length:
            return ()
        self._spend("xattrs", length)
        body = self._bytes(at, length, f"{where}: xattrs")
        seen_filter, count = int.from_bytes(body[:4], "little"), body[4]
        first = f.XATTR_BODY_BYTES + 4 * count
        if first > length:
            raise InvalidImage(f"erofs: {where}: {count} shared xattrs in {length} bytes")
        pairs = [self._shared(where, i) for i in np.frombuffer(body[f.XATTR_BODY_BYTES : first], "<u4").tolist()]
        while first < length:
            used, pair = self._entry(where, body[first:])
            pairs.append(pair)
            first += used
        names = {name for name, _ in pairs}
        if len(names) != len(pairs):
            raise InvalidImage(f"erofs: {where}: an xattr twice")
        if self.has_filter:
            split = {name: f.split_xattr_name(name) for name in names}
            hidden = [name for name, parts in split.items() if parts and seen_filter & ~f.name_filter([parts])]
            if hidden:
                raise InvalidImage(f"erofs: {where}: the name filter hides {hidden[0]!r}")
        return tuple(sorted(pairs))

    def _shared(self, where: str, number: int) -> tuple[bytes, bytes]:
        if number not in self.shared:
            start = self.xattr + 4 * number
            head = self._bytes(start, f.XATTR_ENTRY_BYTES, f"{where}: shared xattr")
            length = f.XATTR_ENTRY_BYTES + head[0] + int.from_bytes(head[2:4], "little")
            self._spend("shared xattrs", length)
            self.shared[number] = self._entry(where, self._bytes(start, length, f"{where}: shared xattr"))[1]
        return self.shared[number]

    def _entry(self, where: str, raw: memoryview) -> tuple[int, tuple[bytes, bytes]]:
        """Return (bytes used, (name, value)) of the xattr entry that ``raw`` begins with."""
        if len(raw) < f.XATTR_ENTRY_BYTES:
            raise InvalidImage(f"erofs: {where}: an xattr entry cut short")
        name_bytes, index, value_bytes = raw[0], raw[1], int.from_bytes(raw[2:4], "little")
        end = f.XATTR_ENTRY_BYTES + name_bytes + value_bytes
        prefixes = dict(f.XATTR_PREFIXES) | dict(f.XATTR_WHOLE_NAMES)
        if end > len(raw) or index not in prefixes or (index in dict(f.XATTR_WHOLE_NAMES)) != (name_bytes == 0):
            raise InvalidImage(f"erofs: {where}: a malformed xattr entry")
        name = bytes(raw[f.XATTR_ENTRY_BYTES : f.XATTR_ENTRY_BYTES + name_bytes])
        if b"\0" in name:
            raise InvalidImage(f"erofs: {where}: an xattr name with a NUL")
        return f.align(end, 4), (prefixes[index] + name, bytes(raw[end - value_bytes : end]))

    def _entries(self, node: Node, above: int) -> list[tuple[bytes, int, int]]:
        """Return (name, nid, type bits) of what a directory holds, ``.`` and ``..`` checked and left out."""
        where = f"directory {node.nid}"
        self._spend("directories", node.size)
        data = b"".join(self._extent_bytes(e, where) for e in node.extents)
        block = 1 << self.bits
        found: list[tuple[bytes, int, int]] = []
        for at in range(0, len(data), block):
            self._block_entries(where, data[at : at + block], found)
        names = [name for name, _, _ in found]
        if any(a >= b for a, b in pairwise(names)):
            raise InvalidImage(f"erofs: {where}: names out of order, or one twice")
        dots = {name: nid for name, nid, _ in found if name in (b".", b"..")}
        if dots != {b".": node.nid, b"..": above}:
            raise InvalidImage(f"erofs: {where}: '.' or '..' is missing or leads elsewhere")
        return [entry for entry in found if entry[0] not in dots]

    def _block_entries(self, where: str, block: bytes, out: list[tuple[bytes, int, int]]) -> None:
        bogus = InvalidImage(f"erofs: {where}: a malformed block of entries")
        first = int.from_bytes(block[8:10], "little")
        if len(block) < f.DIRENT_BYTES or not 0 < first <= len(block) or first % f.DIRENT_BYTES:
            raise bogus
        entries = np.frombuffer(block, f.DIRENT, first // f.DIRENT_BYTES)
        starts = entries["nameoff"].tolist()
        ends = [*starts[1:], len(block)]
        columns = zip(entries["nid"].tolist(), entries["type"].tolist(), starts, ends, strict=True)
        for nid, kind, start, end in columns:
            if not first <= start < end <= len(block) or kind not in _TYPES:
                raise bogus
            name = block[start:end]
            if end == len(block):
                # The last name of a block ends with it or with the padding.
                name = name.split(b"\0", 1)[0]
            if not 0 < len(name) <= f.NAME_MAX or b"\0" in name or b"/" in name:
                raise bogus
            out.append((name, nid, _TYPES[kind]))
