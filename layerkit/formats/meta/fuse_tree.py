"""A metadata layer as one file that a server of it maps into memory and answers from, without unpacking.

Little endian. A head of JSON facts, then four tables, each at a multiple of 8 bytes:

* **inodes**, 64 bytes each, in inode order: what ``lstat`` says, the row of the xattr set, of a symlink's
  target or a stub's redirect, the place of the first name, and the run of names in a directory;
* **names**, 12 bytes each, those of one directory side by side and rising, so that a lookup is a binary search:
  inode, directory's inode, where the text begins;
* **texts** of names, one after the other;
* **strings**: symlink targets and redirects, and xattr sets as counted pairs.

Owners are as in the image; whoever serves it maps them. This module needs no more than the standard library:
a server starts in the time that numpy takes to be imported. The writer is ``emit.fuse``.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from layerkit.model.entry import XattrSet
from layerkit.model.errors import InvalidImage

TREE_FILE = "tree.fuse"
"""Its name in a META of the store."""
MAGIC = b"lk.fuse\0"
VERSION = 1
NONE = 0xFFFF_FFFF
"""Of a row: there is none. As a stub's redirect: the path of its first name."""

HEAD = struct.Struct("<8sIIQQQQQQ")
"""magic, version, bytes of facts, inodes, names; offsets of the four tables."""
INODE = struct.Struct("<IIIIqqIIIIIII4x")
NAME = struct.Struct("<III")
_COUNT = struct.Struct("<I")


class Inode(NamedTuple):
    """One inode as it is stored.

    Attributes:
        mode: with the type bits. uid, gid: of the image.
        size: bytes. mtime: seconds, mtime_ns: the rest.
        rdev: device number as the kernel encodes it in 32 bits.
        xattr: row of the xattr set.
        link: row among the strings: of a symlink its target, of a stub its redirect; :data:`NONE`.
        first: place of its first name.
        begin, entries: places of the names in a directory: the first, and how many.
    """

    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    mtime: int
    mtime_ns: int
    rdev: int
    xattr: int
    link: int
    first: int
    begin: int
    entries: int


@dataclass(frozen=True, slots=True)
class Facts:
    """What the head says of the whole tree.

    Attributes:
        namespace: ``trusted`` or ``user``: where the overlay looks for a stub's xattrs.
        uids, gids: every owner that occurs, rising.
        more: what the maker added; JSON-able.
    """

    namespace: str
    uids: tuple[int, ...]
    gids: tuple[int, ...]
    more: dict[str, Any]


def encode_facts(facts: Facts) -> bytes:
    """Return the JSON text of ``facts``, padded to 8 bytes."""
    text = json.dumps(
        {"namespace": facts.namespace, "uids": facts.uids, "gids": facts.gids, "more": facts.more},
        separators=(",", ":"),
    ).encode()
    return text + b" " * (-(HEAD.size + len(text)) % 8)


def encode_strings(strings: Sequence[bytes]) -> bytes:
    """Return a table of strings: how many, the offset of each and of the end, then their bytes."""
    offsets = [0]
    for text in strings:
        offsets.append(offsets[-1] + len(text))
    return struct.pack(f"<{len(offsets) + 1}I", len(strings), *offsets) + b"".join(strings)


def encode_set(pairs: XattrSet) -> bytes:
    """Return an xattr set as bytes."""
    return b"".join(struct.pack("<HI", len(name), len(value)) + name + value for name, value in pairs)


def decode_set(text: bytes) -> XattrSet:
    """Return the xattr set that :func:`encode_set` wrote."""
    pairs, at = [], 0
    while at < len(text):
        name, value = struct.unpack_from("<HI", text, at)
        at += 6
        pairs.append((text[at : at + name], text[at + name : at + name + value]))
        at += name + value
    return tuple(pairs)


class FuseTree:
    """The file, mapped into memory; what a server asks it.

    Places that the file names are checked when they are used: Python raises on those that lie outside, and
    whoever serves answers with an error.
    """

    def __init__(self, buffer: mmap.mmap | bytes, where: str) -> None:
        """Read the head of ``buffer``; ``where`` names the file.

        Raises:
            InvalidImage: it is no such file, or is cut off.
        """
        self._buffer = buffer
        if len(buffer) < HEAD.size or buffer[:8] != MAGIC:
            raise InvalidImage(f"{where}: no tree to serve; remove its folder, and it is made again")
        _, version, facts, inodes, names, *offsets = HEAD.unpack_from(buffer)
        if version != VERSION:
            raise InvalidImage(f"{where}: a tree of version {version}, this layerkit serves {VERSION}")
        self.inodes, self.names = inodes, names
        self._inode_at, self._name_at, self._text_at, self._strings_at = offsets
        ends = (
            (HEAD.size + facts, self._inode_at),
            (self._inode_at + inodes * INODE.size, self._name_at),
            (self._name_at + (names + 1) * NAME.size, self._text_at),
        )
        if not inodes or any(end > start for end, start in ends) or self._strings_at > len(buffer) - 4:
            raise InvalidImage(f"{where}: the tree is cut off; remove its folder, and it is made again")
        try:
            said = json.loads(buffer[HEAD.size : HEAD.size + facts])
            self.facts = Facts(said["namespace"], tuple(said["uids"]), tuple(said["gids"]), said["more"])
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidImage(f"{where}: its head is damaged ({error!r})") from error
        self._sets_at = self._strings_at + self._strings_size(self._strings_at)

    def inode(self, row: int) -> Inode:
        """Return inode ``row``.

        Raises:
            IndexError: there is none.
        """
        if not 0 <= row < self.inodes:
            raise IndexError(row)
        return Inode(*INODE.unpack_from(self._buffer, self._inode_at + row * INODE.size))

    def name(self, place: int) -> tuple[bytes, int, int]:
        """Return (text, inode, directory's inode) of the name at ``place``."""
        at = self._name_at + place * NAME.size
        inode, parent, start = NAME.unpack_from(self._buffer, at)
        (end,) = _COUNT.unpack_from(self._buffer, at + NAME.size + 8)
        return self._buffer[self._text_at + start : self._text_at + end], inode, parent

    def find(self, directory: Inode, wanted: bytes) -> int:
        """Return the inode called ``wanted`` in ``directory``, -1 where there is none."""
        low, high = directory.begin, directory.begin + directory.entries
        while low < high:
            middle = (low + high) // 2
            text, inode, _ = self.name(middle)
            if text == wanted:
                return inode
            if text < wanted:
                low = middle + 1
            else:
                high = middle
        return -1

    def path(self, inode: Inode) -> bytes:
        """Return the absolute path of an inode's first name."""
        parts = []
        for _ in range(self.inodes):
            text, _, parent = self.name(inode.first)
            if not text:
                break
            parts.append(text)
            inode = self.inode(parent)
        return b"/" + b"/".join(reversed(parts))

    def string(self, row: int) -> bytes:
        """Return a symlink's target, or a redirect that is not a first name's path."""
        return self._string(self._strings_at, row)

    def xattr_sets(self) -> list[XattrSet]:
        """Return all xattr sets, by row."""
        (count,) = _COUNT.unpack_from(self._buffer, self._sets_at)
        return [decode_set(self._string(self._sets_at, row)) for row in range(count)]

    def _string(self, table: int, row: int) -> bytes:
        count, *_ = _COUNT.unpack_from(self._buffer, table)
        if row >= count:
            raise IndexError(row)
        start, end = struct.unpack_from("<II", self._buffer, table + 4 + 4 * row)
        blob = table + 8 + 4 * count
        return self._buffer[blob + start : blob + end]

    def _strings_size(self, table: int) -> int:
        (count,) = _COUNT.unpack_from(self._buffer, table)
        (end,) = _COUNT.unpack_from(self._buffer, table + 4 + 4 * count)
        return int(8 + 4 * count + end)
