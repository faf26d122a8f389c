"""NaCl's secretbox, opened: XSalsa20 with Poly1305 (nacl.cr.yp.to/secretbox.html), for keys of a few hundred bytes.

The package ``cryptography`` has Poly1305 and no Salsa20; this is for cosign's key files alone, so speed is no aim.
"""

from __future__ import annotations

import struct

_SIGMA = struct.unpack("<4I", b"expand 32-byte k")
_MASK = 0xFFFFFFFF
_BLOCK = 64
_TAG_BYTES = 16
# Each quarter-round is (target, source, source, bits): columns, then rows.
_ROUNDS = tuple(
    (a, b, c, bits)
    for quarter in ((0, 4, 8, 12), (5, 9, 13, 1), (10, 14, 2, 6), (15, 3, 7, 11),
                    (0, 1, 2, 3), (5, 6, 7, 4), (10, 11, 8, 9), (15, 12, 13, 14))
    for a, b, c, bits in (
        (quarter[1], quarter[0], quarter[3], 7), (quarter[2], quarter[1], quarter[0], 9),
        (quarter[3], quarter[2], quarter[1], 13), (quarter[0], quarter[3], quarter[2], 18),
    )
)  # fmt: skip


def open_box(box: bytes, nonce: bytes, key: bytes) -> bytes:
    """Return what is in ``box`` (tag, then ciphertext).

    Raises:
        ValueError: another key, or damaged.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.poly1305 import Poly1305

    if len(box) < _TAG_BYTES or len(nonce) != 24 or len(key) != 32:
        raise ValueError("not a secretbox")
    tag, sealed = box[:_TAG_BYTES], box[_TAG_BYTES:]
    stream = _stream(_hsalsa20(key, nonce[:16]), nonce[16:], 32 + len(sealed))
    try:
        Poly1305.verify_tag(stream[:32], sealed, tag)
    except InvalidSignature:
        raise ValueError("a wrong key, or damaged data") from None
    return bytes(a ^ b for a, b in zip(sealed, stream[32:], strict=True))


def _start(key: bytes, middle: bytes) -> list[int]:
    k, m = struct.unpack("<8I", key), struct.unpack("<4I", middle)
    return [_SIGMA[0], *k[:4], _SIGMA[1], *m, _SIGMA[2], *k[4:], _SIGMA[3]]


def _mixed(words: list[int]) -> list[int]:
    x = list(words)
    for _ in range(10):
        for target, a, b, bits in _ROUNDS:
            total = (x[a] + x[b]) & _MASK
            x[target] ^= ((total << bits) | (total >> (32 - bits))) & _MASK
    return x


def _hsalsa20(key: bytes, middle: bytes) -> bytes:
    x = _mixed(_start(key, middle))
    return struct.pack("<8I", *(x[i] for i in (0, 5, 10, 15, 6, 7, 8, 9)))


def _stream(key: bytes, nonce: bytes, length: int) -> bytes:
    out = b""
    for counter in range((length + _BLOCK - 1) // _BLOCK):
        start = _start(key, nonce + struct.pack("<Q", counter))
        out += struct.pack("<16I", *((a + b) & _MASK for a, b in zip(start, _mixed(start), strict=True)))
    return out[:length]
