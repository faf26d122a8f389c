"""Two EROFS images of one file, small enough to be spelled out: what the probes mount.

Kept apart from the real writer on purpose: a probe asks about the kernel, so it must not fail because of
the writer, and the bytes are few (fs/erofs/erofs_fs.h).
"""

from __future__ import annotations

import struct

CONTENT = b"layerkit probe\n"
FILE_NAME = "f"
UID = 7
_MAGIC = 0xE0F5E1E2
_SUPERBLOCK_AT = 1024
_DEVICE_SLOT_AT = 1152
_ROOT_NID = 40  # in units of 32 bytes: right behind the superblock and the device slot
_FILE_NID = 43
_CHUNKED_FILE, _DEVICE_TABLE = 0x4, 0x8
_INLINE, _CHUNK_BASED = 2, 4
_EIGHT_BYTE_INDEXES = 0x20
_IMAGE_BYTES = 4096


def plain() -> bytes:
    """Return an image with blocks of 4 KiB whose file ``f``, owned by 7:7, holds ``CONTENT``."""
    return _image(12, external=False)


def over_device() -> tuple[bytes, bytes]:
    """Return (image with blocks of 512 bytes, the device that the data of ``f`` lies on)."""
    return _image(9, external=True), bytes(512) + CONTENT.ljust(512, b"\0")


def _image(block_bits: int, *, external: bool) -> bytes:
    image = bytearray(_IMAGE_BYTES)
    struct.pack_into(
        "<IIIBBHQQIIII16s16sIHHHBB",
        image, _SUPERBLOCK_AT,
        _MAGIC, 0, 0, block_bits, 0, _ROOT_NID, 2, 0, 0, _IMAGE_BYTES >> block_bits, 0, 0,
        b"layerkit probe", b"probe",
        _CHUNKED_FILE | _DEVICE_TABLE if external else 0, 0, int(external), _DEVICE_SLOT_AT // 128, 0, 0,
    )  # fmt: skip
    if external:
        struct.pack_into("<64sII", image, _DEVICE_SLOT_AT, b"", 2, 0)
    names = ((b".", _ROOT_NID, 2), (b"..", _ROOT_NID, 2), (FILE_NAME.encode(), _FILE_NID, 1))
    listing, text, at = b"", b"", 12 * len(names)
    for name, nid, kind in names:
        listing += struct.pack("<QHBB", nid, at + len(text), kind, 0)
        text += name
    listing += text
    _inode(image, _ROOT_NID, _INLINE, 0o40755, 2, len(listing), 0, listing)
    if external:
        index = struct.pack("<HHI", 0, 1, 1)  # block 1 of device 1
        _inode(image, _FILE_NID, _CHUNK_BASED, 0o100644, 1, len(CONTENT), _EIGHT_BYTE_INDEXES, index)
    else:
        _inode(image, _FILE_NID, _INLINE, 0o100644, 1, len(CONTENT), 0, CONTENT)
    return bytes(image)


def _inode(
    image: bytearray, nid: int, layout: int, mode: int, nlink: int, size: int, union: int, tail: bytes
) -> None:
    """Write a compact inode (32 bytes) and what stands behind it."""
    struct.pack_into(
        "<HHHHIIIIHHI", image, nid * 32, layout << 1, 0, mode, nlink, size, 0, union, nid, UID, UID, 0
    )  # fmt: skip
    image[nid * 32 + 32 : nid * 32 + 32 + len(tail)] = tail
