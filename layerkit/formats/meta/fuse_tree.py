"""A metadata layer as one file that a server of it maps into memory and answers from, without unpacking.

Little endian. A head of JSON facts, then four tables, each at a multiple of 8 bytes:

* **inodes**, 64 bytes each, in inode order: what ``lstat`` says, the row of the xattr set, of a symlink's
  target or a stub's redirect, the place of the first name, and the run of names in a directory;
* **names**, 12 bytes each, those of one directory side by side and rising, so that a lookup is a binary search:
  inode, directory's inode, where the text begins;
* **texts** of names, one after the other;
* **strings**: symlink targets and redirects, and xattr sets as counted pairs.

Owners are as in the image; whoever serves it maps them. No entry is a file of its own, so making one costs
microseconds per entry, and one serves every map. numpy is loaded for writing alone: a server starts in the time
that it takes.
"""

from __future__ import annotations

import itertools
import json
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from layerkit.model.entry import Kind, XattrSet
from layerkit.model.errors import InvalidImage, LimitExceeded

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from layerkit.metaonly import MetadataLayer

TREE_FILE = "tree.fuse"
"""Its name in a META of the store."""
MAGIC = b"lk.fuse\0"
VERSION = 1
NONE = 0xFFFF_FFFF
"""Of a row: there is none. As a stub's redirect: the path of its first name."""

HEAD = struct.Struct("<8sIIQQQQQQ")
"""magic, version, bytes of facts, inodes, names; offsets of the four tables."""
_INODE_TYPES = "IIIIqqIIIIIII"
INODE = struct.Struct(f"<{_INODE_TYPES}4x")
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


def _encode_strings(strings: Sequence[bytes]) -> bytes:
    """Return a table of strings: how many, the offset of each and of the end, then their bytes."""
    offsets = list(itertools.accumulate(map(len, strings), initial=0))
    return struct.pack(f"<{len(offsets) + 1}I", len(strings), *offsets) + b"".join(strings)


def _encode_set(pairs: XattrSet) -> bytes:
    """Return an xattr set as bytes."""
    return b"".join(struct.pack("<HI", len(name), len(value)) + name + value for name, value in pairs)


def _decode_set(text: bytes) -> XattrSet:
    """Return the xattr set that :func:`_encode_set` wrote."""
    pairs, at = [], 0
    while at < len(text):
        name, value = struct.unpack_from("<HI", text, at)
        at += 6
        pairs.append((text[at : at + name], text[at + name : at + name + value]))
        at += name + value
    return tuple(pairs)


def write_tree(meta: MetadataLayer, out: BinaryIO, more: Mapping[str, Any] | None = None) -> int:
    """Write ``meta`` to ``out``; return the number of bytes.

    Args:
        meta: its owners are those of the image: the server maps them.
        out: opened for writing.
        more: JSON-able facts to keep in the head.

    Raises:
        LimitExceeded: more than 4 GiB of names.
    """
    import numpy as np

    from layerkit.metaonly import encode_devices

    inode_dtype = np.dtype([*zip(Inode._fields, map("<".__add__, _INODE_TYPES), strict=True), ("pad", "<u4")])
    name_dtype = np.dtype([("inode", "<u4"), ("parent", "<u4"), ("start", "<u4")])
    tree = meta.tree
    n, m = len(tree), tree.inodes
    # Names of one directory side by side; they rise already, and a stable sort keeps that.
    order = np.argsort(tree.parent, kind="stable")
    place_of = np.empty(n, np.int64)
    place_of[order] = np.arange(n)
    texts = tree.name.take(order)
    if int(texts.offsets[-1]) >= NONE:
        raise LimitExceeded("bytes_of_names", int(texts.offsets[-1]), NONE, "tree")
    names = np.zeros(n + 1, name_dtype)
    names["start"] = texts.offsets
    names["inode"][:n] = tree.inode[order]
    names["parent"][:n] = tree.inode[np.maximum(tree.parent[order], 0)]
    inodes = np.zeros(m, inode_dtype)
    for column in ("mode", "uid", "gid", "nlink", "size", "mtime", "mtime_ns", "xattr"):
        inodes[column] = getattr(tree, column)
    inodes["rdev"] = encode_devices(tree.major, tree.minor)
    inodes["first"] = place_of[tree.first_name()]
    parents = tree.parent[order][1:]
    begins = np.flatnonzero(np.r_[True, parents[1:] != parents[:-1]]) + 1 if n > 1 else np.zeros(0, np.int64)
    folders = tree.inode[parents[begins - 1]]
    inodes["begin"][folders] = begins
    inodes["entries"][folders] = np.diff(np.r_[begins, n])
    inodes["link"], strings = _links(meta)
    owners = {"uids": np.unique(tree.uid).tolist(), "gids": np.unique(tree.gid).tolist()}
    said = {"namespace": meta.namespace.value, **owners, "more": dict(more or {})}
    facts = json.dumps(said, separators=(",", ":")).encode()
    facts += b" " * (-(HEAD.size + len(facts)) % 8)
    tables = [
        inodes.tobytes(), names.tobytes(), texts.blob,
        _encode_strings(strings) + _encode_strings([_encode_set(pairs) for pairs in tree.xattr_sets]),
    ]  # fmt: skip
    at = HEAD.size + len(facts)
    offsets = []
    for table in tables:
        offsets.append(at)
        at += len(table) + -len(table) % 8
    out.write(HEAD.pack(MAGIC, VERSION, len(facts), m, n, *offsets) + facts)
    for table in tables:
        out.write(table)
        out.write(bytes(-len(table) % 8))
    return at


def _links(meta: MetadataLayer) -> tuple[NDArray[np.int64], list[bytes]]:
    """Return for each inode the row of its target or redirect, and the strings."""
    import numpy as np

    tree = meta.tree
    rows = np.full(tree.inodes, NONE, np.int64)
    symlinks = tree.kind == Kind.SYMLINK
    rows[symlinks] = tree.target[symlinks]
    strings = tree.targets.tolist()
    stubs = np.flatnonzero(meta.is_stub)
    redirects = meta.redirect_list(stubs)
    if meta.places is not None:
        first = tree.first_name()[stubs].tolist()
        paths = tree.paths()
        own = np.array([b"/" + paths[row] == text for row, text in zip(first, redirects, strict=True)], np.bool_)
        redirects = [text for text, same in zip(redirects, own.tolist(), strict=True) if not same]
        stubs = stubs[~own] if len(own) else stubs
    rows[stubs] = len(strings) + np.arange(len(stubs))
    return rows, strings + redirects


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
        return [_decode_set(self._string(self._sets_at, row)) for row in range(count)]

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
