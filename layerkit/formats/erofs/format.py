"""On-disk structures of EROFS, as numpy dtypes and ``struct`` formats. All numbers are little-endian.

The rules come from the kernel's ``fs/erofs/erofs_fs.h`` (the structures), ``Documentation/filesystems/erofs.rst``
(the layout in words) and, where those are silent, from what ``fs/erofs/*.c`` of Linux 6.18 accepts.

Addresses: a *block address* counts blocks from the start of the device; a *nid* counts 32-byte slots from
the block ``meta_blkaddr`` and is the inode number that ``stat`` shows; a *shared xattr id* counts 4-byte
words from the block ``xattr_blkaddr``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum, IntFlag

import numpy as np
from numpy.typing import NDArray

SUPER_OFFSET = 1024
"""Where the superblock lies, in bytes, whatever the block size."""

MAGIC = 0xE0F5E1E2
SUPER_BYTES = 128
SLOT_BYTES = 32
"""Unit of nids; every inode starts on a slot."""

META_BLOCK_BITS = 12
"""fsck.erofs 1.5 and kernels before 6.4 know page-sized blocks only."""

DATA_BLOCK_BITS = 9
"""A tar is made of 512-byte blocks, so that is what maps its files (kernels from about 6.4 on)."""

COMPACT_INODE_BYTES = 32
EXTENDED_INODE_BYTES = 64
DIRENT_BYTES = 12
DEVICE_SLOT_BYTES = 128
XATTR_BODY_BYTES = 12
"""``struct erofs_xattr_ibody_header`` without its array of shared ids."""

XATTR_ENTRY_BYTES = 4
XATTR_VALUE_MAX = 0xFFFF
XATTR_SHARED_MAX = 0xFF
XATTR_BODY_MAX = XATTR_BODY_BYTES + 4 * (0xFFFF - 1)
XATTR_FILTER_SEED = 0x25BBE08F
NAME_MAX = 255
NULL_BLOCK = 0xFFFFFFFF
"""The address of a chunk that is a hole."""

MAX_CHUNK_BITS = 31
"""Largest chunk is ``block << 31``: the size field has five bits."""


class Compat(IntFlag):
    """``feature_compat``: a kernel that does not know a bit mounts the image all the same."""

    SB_CHKSUM = 0x1
    MTIME = 0x2
    XATTR_FILTER = 0x4


class Incompat(IntFlag):
    """``feature_incompat``: bits of which a kernel must know every one."""

    CHUNKED_FILE = 0x4
    DEVICE_TABLE = 0x8


class Layout(IntEnum):
    """Data layouts of an inode, bits 1 to 3 of ``i_format``."""

    FLAT_PLAIN = 0
    FLAT_INLINE = 2
    CHUNK_BASED = 4


CHUNK_BITS_MASK = 0x1F
CHUNK_INDEXES = 0x20
"""Chunks are listed as 8-byte indexes with a device, not as 4-byte block addresses."""

SUPER = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQB23s")
"""magic, checksum, compat, block bits, extra slots, root nid, inodes, build time, its ns, blocks, meta
block, xattr block, uuid, volume name, incompat, compression, extra devices, device table slot, directory
block bits, xattr prefixes, their start, packed nid, xattr filter reserved, reserved."""

DEVICE_SLOT = struct.Struct("<64sII56s")
"""tag, blocks, block address in a flat address space (0: none), reserved."""

_INODE_FIELDS = {
    "format": (0, "<u2"), "xattr_icount": (2, "<u2"), "mode": (4, "<u2"), "size": (8, "<u8"), "u": (16, "<u4"),
    "ino": (20, "<u4"), "uid": (24, "<u4"), "gid": (28, "<u4"), "mtime": (32, "<i8"), "mtime_ns": (40, "<u4"),
    "nlink": (44, "<u4"),
}  # fmt: skip


def record(fields: dict[str, tuple[int, object]], itemsize: int) -> np.dtype[np.void]:
    """Return the structured dtype with ``fields`` (name -> offset, dtype) in ``itemsize`` bytes."""
    formats = [f for _, f in fields.values()]
    offsets = [o for o, _ in fields.values()]
    return np.dtype({"names": list(fields), "formats": formats, "offsets": offsets, "itemsize": itemsize})


def extended_inode(itemsize: int, extra: dict[str, tuple[int, object]] | None = None) -> np.dtype[np.void]:
    """Return the dtype of an extended inode followed by the fields ``extra``, ``itemsize`` bytes in all."""
    return record({**_INODE_FIELDS, **(extra or {})}, itemsize)


EXTENDED = extended_inode(EXTENDED_INODE_BYTES)
"""``u`` is a block address, a device number (new encoding) or a chunk format, by layout and mode."""

COMPACT_FIELDS: dict[str, tuple[int, object]] = {
    "format": (0, "<u2"), "xattr_icount": (2, "<u2"), "mode": (4, "<u2"), "nlink": (6, "<u2"), "size": (8, "<u4"),
    "u": (16, "<u4"), "ino": (20, "<u4"), "uid": (24, "<u2"), "gid": (26, "<u2"),
}  # fmt: skip
COMPACT = record(COMPACT_FIELDS, COMPACT_INODE_BYTES)

DIRENT = record({"nid": (0, "<u8"), "nameoff": (8, "<u2"), "type": (10, "u1")}, DIRENT_BYTES)

CHUNK_INDEX = record({"device": (2, "<u2"), "block": (4, "<u4")}, 8)

OWNER_OFFSET = 24
"""Where uid and gid lie in an extended inode, as one aligned 64-bit word: uid low, gid high."""

FILE_TYPE = {0o01: 5, 0o02: 3, 0o04: 2, 0o06: 4, 0o10: 1, 0o12: 7}
"""``st_mode >> 12`` to the type of a dirent (``include/linux/fs_types.h``)."""

XATTR_PREFIXES = ((1, b"user."), (4, b"trusted."), (6, b"security."))
"""Name index and the prefix that it stands for."""

XATTR_WHOLE_NAMES = ((2, b"system.posix_acl_access"), (3, b"system.posix_acl_default"))
"""Name index of names that are stored with no name bytes at all."""


def inode_format(layout: Layout, *, extended: bool = True) -> int:
    """Return ``i_format`` of an inode."""
    return layout << 1 | extended


def xattr_icount(body_bytes: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Return ``i_xattr_icount`` for inline xattr areas of ``body_bytes`` (multiples of 4; 0 for none)."""
    return np.where(body_bytes, (body_bytes - XATTR_BODY_BYTES) // 4 + 1, 0)


def align(value: int, unit: int) -> int:
    """Return ``value`` rounded up to a multiple of ``unit``."""
    return -(-value // unit) * unit


def decode_device(value: int) -> tuple[int, int]:
    """Return (major, minor) of a device number in the kernel's "new" 32-bit encoding."""
    return value >> 8 & 0xFFF, value & 0xFF | value >> 12 & 0xFFF00


def split_xattr_name(name: bytes) -> tuple[int, bytes] | None:
    """Return (name index, name bytes) of an xattr; None if EROFS cannot hold such a name."""
    for index, whole in XATTR_WHOLE_NAMES:
        if name == whole:
            return index, b""
    for index, prefix in XATTR_PREFIXES:
        if name.startswith(prefix) and len(prefix) < len(name) <= NAME_MAX:
            return index, name[len(prefix) :]
    return None


def xattr_entry(index: int, name: bytes, value: bytes) -> bytes:
    """Return one xattr entry, padded to a multiple of 4 bytes."""
    raw = struct.pack("<BBH", len(name), index, len(value)) + name + value
    return raw + bytes(-len(raw) % 4)


def name_filter(names: Iterable[tuple[int, bytes]]) -> int:
    """Return ``h_name_filter`` for xattrs of these (index, name): a 1 bit says "surely not here"."""
    value = 0xFFFFFFFF
    for index, name in names:
        value &= ~(1 << (xxh32(name, (XATTR_FILTER_SEED + index) & 0xFFFFFFFF) & 31))
    return value


_P1, _P2, _P3, _P4, _P5 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1
_M = 0xFFFFFFFF


def _rotate(value: int, bits: int) -> int:
    return (value << bits | value >> 32 - bits) & _M


def xxh32(data: bytes, seed: int) -> int:
    """Return the 32-bit xxHash of ``data`` (the xxHash specification, "XXH32 Algorithm Description")."""
    at = 0
    if len(data) >= 16:
        lanes = [(seed + _P1 + _P2) & _M, (seed + _P2) & _M, seed, (seed - _P1) & _M]
        for at in range(0, len(data) - 15, 16):
            words = struct.unpack_from("<4I", data, at)
            lanes = [_rotate((a + w * _P2) & _M, 13) * _P1 & _M for a, w in zip(lanes, words, strict=True)]
        at += 16
        h = sum(_rotate(a, bits) for a, bits in zip(lanes, (1, 7, 12, 18), strict=True)) & _M
    else:
        h = (seed + _P5) & _M
    h = (h + len(data)) & _M
    while at + 4 <= len(data):
        h = _rotate((h + int.from_bytes(data[at : at + 4], "little") * _P3) & _M, 17) * _P4 & _M
        at += 4
    for byte in data[at:]:
        h = _rotate((h + byte * _P5) & _M, 11) * _P1 & _M
    h = (h ^ h >> 15) * _P2 & _M
    h = (h ^ h >> 13) * _P3 & _M
    return h ^ h >> 16


_CRC_TABLE = list(range(256))
for _ in range(8):
    _CRC_TABLE = [value >> 1 ^ (0x82F63B78 if value & 1 else 0) for value in _CRC_TABLE]


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """Return the CRC-32C of ``data`` from the start value ~0, without the final inversion."""
    crc = _M
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc


def superblock_span(block_bits: int) -> int:
    """Return how many bytes from the superblock's start on its checksum covers."""
    block = 1 << block_bits
    return block - SUPER_OFFSET if block > SUPER_OFFSET else block


@dataclass(frozen=True, slots=True)
class Superblock:
    """What the head of an image says.

    Attributes:
        block_bits: log2 of the block size in bytes.
        compat: features; ``SB_CHKSUM`` is added, and to the incompatible ones chunked files and the device table.
        root_nid: below 65536.
        inodes: their number.
        blocks: of the image itself.
        meta_block: block address that nids count from. xattr_block: the one that shared xattr ids count from.
        uuid: 16 bytes.
        device_blocks: size of the one extra device in blocks; None where there is none.
    """

    block_bits: int
    compat: Compat
    root_nid: int
    inodes: int
    blocks: int
    meta_block: int
    xattr_block: int
    uuid: bytes
    device_blocks: int | None = None

    def encode(self, size: int) -> bytes:
        """Return the first ``size`` bytes of the image: zeros, the superblock with its checksum, a device slot."""
        out = bytearray(size)
        slot, incompat = 0, Incompat.CHUNKED_FILE
        if self.device_blocks is not None:
            incompat |= Incompat.DEVICE_TABLE
            slot = (SUPER_OFFSET + SUPER_BYTES) // DEVICE_SLOT_BYTES
            DEVICE_SLOT.pack_into(out, slot * DEVICE_SLOT_BYTES, b"", self.device_blocks, 0, b"")
        SUPER.pack_into(
            out, SUPER_OFFSET, MAGIC, 0, self.compat | Compat.SB_CHKSUM, self.block_bits, 0, self.root_nid,
            self.inodes, 0, 0, self.blocks, self.meta_block, self.xattr_block, self.uuid, b"", incompat, 0,
            int(self.device_blocks is not None), slot, 0, 0, 0, 0, 0, b"",
        )  # fmt: skip
        crc = crc32c(out[SUPER_OFFSET : SUPER_OFFSET + superblock_span(self.block_bits)])
        struct.pack_into("<I", out, SUPER_OFFSET + 4, crc)
        return bytes(out)


def uuid8(digest: bytes) -> bytes:
    """Return a UUID of version 8 (RFC 9562) made of a digest."""
    raw = bytearray(digest[:16])
    raw[6] = raw[6] & 0x0F | 0x80
    raw[8] = raw[8] & 0x3F | 0x80
    return bytes(raw)
