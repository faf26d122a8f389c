"""A bolt database (go.etcd.io/bbolt) read as a value: what containerd keeps its records in.

A file of pages; two meta pages, of which the valid one with the higher transaction counts; a B+ tree of buckets
below it. Layout: bbolt's ``internal/common`` (page.go, meta.go, bucket.go), little-endian on what runs containerd.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator

from layerkit.model.errors import InvalidImage

_PAGE = struct.Struct("<QHHI")
_META = struct.Struct("<IIIIQQQQQQ")
_LEAF = struct.Struct("<IIII")
_BRANCH = struct.Struct("<IIQ")
_BUCKET = struct.Struct("<QQ")
_MAGIC, _VERSION = 0xED0CDAED, 2
_IS_BRANCH, _IS_LEAF = 0x01, 0x02
_IS_BUCKET = 0x01
_DEPTH_AT_MOST = 64


class Bolt:
    """One state of a database, all of it in memory."""

    def __init__(self, data: bytes, where: str) -> None:
        """Take the bytes of a file; ``where`` names it in errors.

        Raises:
            InvalidImage: it is no bolt database.
        """
        self.data, self.where = data, where
        metas = [m for m in (_meta(data, 0), *(_meta(data, size) for size in _page_sizes(data))) if m]
        if not metas:
            raise self.broken("no valid meta page")
        self.txid, self.page_bytes, self._root = max(metas)

    @property
    def root(self) -> Bucket:
        """Return the bucket that holds all others."""
        return Bucket(self, self._root, None, 0)

    def broken(self, what: str) -> InvalidImage:
        """Return the error for a file that is damaged, or was written to while it was read."""
        return InvalidImage(f"{self.where}: {what}; not a bolt database, or damaged")

    def page(self, number: int) -> tuple[int, int, int]:
        """Return (offset, flags, elements) of a page."""
        return self.page_at(number * self.page_bytes, f"page {number}")

    def page_at(self, at: int, what: str) -> tuple[int, int, int]:
        """Return the same of ``what``, which lies at ``at``."""
        if at + _PAGE.size > len(self.data):
            raise self.broken(f"{what} lies beyond the end")
        _, flags, count, _ = _PAGE.unpack_from(self.data, at)
        return at, flags, count


class Bucket:
    """A bucket: keys with values or further buckets."""

    def __init__(self, file: Bolt, page: int, inline: int | None, depth: int) -> None:
        """Use :attr:`Bolt.root` and :meth:`bucket`."""
        self._file, self._page, self._inline, self._depth = file, page, inline, depth
        if depth > _DEPTH_AT_MOST:
            raise file.broken("buckets nest too deep")

    def items(self) -> Iterator[tuple[bytes, bytes | Bucket]]:
        """Yield all keys in order, with their values or buckets."""
        yield from self._below(self._at(), 0)

    def get(self, *keys: bytes) -> bytes | Bucket | None:
        """Return what is found by following ``keys`` from bucket to bucket, None where one is missing."""
        here: bytes | Bucket | None = self
        for key in keys:
            if not isinstance(here, Bucket):
                return None
            here = here._find(key)
        return here

    def bucket(self, *keys: bytes) -> Bucket | None:
        """Return the bucket at the end of ``keys``, None if there is none."""
        found = self.get(*keys)
        return found if isinstance(found, Bucket) else None

    def value(self, *keys: bytes) -> bytes:
        """Return the value at the end of ``keys``, ``b""`` if there is none."""
        found = self.get(*keys)
        return found if isinstance(found, bytes) else b""

    def _at(self) -> tuple[int, int, int]:
        if self._inline is None:
            return self._file.page(self._page)
        return self._file.page_at(self._inline, "a bucket")

    def _find(self, wanted: bytes) -> bytes | Bucket | None:
        at, flags, count = self._at()
        for _ in range(_DEPTH_AT_MOST):
            if flags & _IS_LEAF:
                for key, value in self._leaves(at, count):
                    if key == wanted:
                        return value
                return None
            children = list(self._branches(at, count))
            place = max(bisect_right([key for key, _ in children], wanted) - 1, 0)
            if not flags & _IS_BRANCH or not children:
                break
            at, flags, count = self._file.page(children[place][1])
        raise self._file.broken("a page that is neither branch nor leaf")

    def _below(self, page: tuple[int, int, int], depth: int) -> Iterator[tuple[bytes, bytes | Bucket]]:
        at, flags, count = page
        if flags & _IS_LEAF:
            yield from self._leaves(at, count)
        elif flags & _IS_BRANCH and depth < _DEPTH_AT_MOST:
            for _, child in self._branches(at, count):
                yield from self._below(self._file.page(child), depth + 1)
        else:
            raise self._file.broken("a page that is neither branch nor leaf")

    def _leaves(self, page: int, count: int) -> Iterator[tuple[bytes, bytes | Bucket]]:
        file, data = self._file, self._file.data
        for i in range(count):
            at = page + _PAGE.size + i * _LEAF.size
            if at + _LEAF.size > len(data):
                raise file.broken("an element lies beyond the end")
            flags, offset, key_bytes, value_bytes = _LEAF.unpack_from(data, at)
            start = at + offset
            middle, end = start + key_bytes, start + key_bytes + value_bytes
            if end > len(data):
                raise file.broken("a value lies beyond the end")
            key = data[start:middle]
            if not flags & _IS_BUCKET:
                yield key, data[middle:end]
                continue
            if value_bytes < _BUCKET.size:
                raise file.broken("a bucket without a head")
            root, _ = _BUCKET.unpack_from(data, middle)
            yield key, Bucket(file, root, None if root else middle + _BUCKET.size, self._depth + 1)

    def _branches(self, page: int, count: int) -> Iterator[tuple[bytes, int]]:
        data = self._file.data
        for i in range(count):
            at = page + _PAGE.size + i * _BRANCH.size
            if at + _BRANCH.size > len(data):
                raise self._file.broken("an element lies beyond the end")
            offset, key_bytes, child = _BRANCH.unpack_from(data, at)
            yield data[at + offset : at + offset + key_bytes], child


def _page_sizes(data: bytes) -> list[int]:
    first = _meta(data, 0)
    # Without a valid first page the second is looked for where the usual sizes would put it.
    return [first[1]] if first else [4096, 8192, 16384, 65536]


def _meta(data: bytes, at: int) -> tuple[int, int, int] | None:
    """Return (transaction, bytes of a page, root page) of a valid meta page, else None."""
    start = at + _PAGE.size
    if start + _META.size > len(data):
        return None
    magic, version, page_bytes, _, root, _, _, _, txid, checksum = _META.unpack_from(data, start)
    if (magic, version) != (_MAGIC, _VERSION) or not 512 <= page_bytes <= 1 << 20:
        return None
    if _fnv1a(data[start : start + _META.size - 8]) != checksum:
        return None
    return txid, page_bytes, root


def _fnv1a(data: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value
