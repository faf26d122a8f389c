"""Tar archives byte by byte: well-formed by default, and as wrong as a test wants them."""

from __future__ import annotations

import gzip
import hashlib

import zstandard

USTAR, GNU, V7 = b"ustar\x0000", b"ustar  \0", bytes(8)
END = bytes(1024)


def octal(value: int, width: int) -> bytes:
    """Return a numeric field: octal where it fits, base-256 elsewhere."""
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    return base256(value, width)


def base256(value: int, width: int) -> bytes:
    bits = value + (1 << 8 * width) if value < 0 else value | 1 << (8 * width - 1)
    return bits.to_bytes(width, "big")


def signed(block: bytes, *, as_signed_bytes: bool = False) -> bytes:
    """Return ``block`` with its checksum filled in."""
    block = block[:148] + b" " * 8 + block[156:]
    total = sum(b - 256 if as_signed_bytes and b > 127 else b for b in block)
    return block[:148] + b"%06o\0 " % total + block[156:]


def header(
    name: bytes = b"f",
    flag: bytes = b"0",
    size: int = 0,
    *,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: int = 0,
    link: bytes = b"",
    magic: bytes = USTAR,
    major: int = 0,
    minor: int = 0,
    prefix: bytes = b"",
    patch: dict[int, bytes] | None = None,
) -> bytes:
    """Return one header block; ``patch`` overwrites bytes before the checksum is made."""
    block = bytearray(
        name.ljust(100, b"\0")[:100] + octal(mode, 8) + octal(uid, 8) + octal(gid, 8) + octal(size, 12)
        + octal(mtime, 12) + bytes(8) + flag + link.ljust(100, b"\0")[:100] + magic + bytes(64)
        + octal(major, 8) + octal(minor, 8) + prefix.ljust(155, b"\0") + bytes(12)
    )  # fmt: skip
    for at, text in (patch or {}).items():
        block[at : at + len(text)] = text
    assert len(block) == 512
    return signed(bytes(block))


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def member(name: bytes = b"f", data: bytes = b"", **fields: object) -> bytes:
    """Return a regular file (or what ``flag`` says) with ``data``."""
    fields.setdefault("size", len(data))
    return header(name, **fields) + padded(data)  # type: ignore[arg-type]


def folder(name: bytes) -> bytes:
    return header(name, b"5", mode=0o755)


def symlink(name: bytes, link: bytes) -> bytes:
    return header(name, b"2", link=link)


def hardlink(name: bytes, link: bytes) -> bytes:
    return header(name, b"1", link=link)


def record(key: bytes, value: bytes) -> bytes:
    """Return one PAX record, its length counting itself."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(b"%d" % length) + len(rest) != length:
        length += 1
    return b"%d" % length + rest


def pax(*records: tuple[bytes, bytes], flag: bytes = b"x") -> bytes:
    body = b"".join(record(key, value) for key, value in records)
    return header(b"PaxHeaders/f", flag, len(body)) + padded(body)


def long(text: bytes, flag: bytes = b"L") -> bytes:
    """Return a GNU long name (``L``) or long link (``K``)."""
    return header(b"././@LongLink", flag, len(text) + 1, magic=GNU) + padded(text + b"\0")


def packed(tar: bytes, form: str = "none") -> bytes:
    if form == "gzip":
        return gzip.compress(tar, 1, mtime=0)
    return zstandard.ZstdCompressor(level=1).compress(tar) if form == "zstd" else tar


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
