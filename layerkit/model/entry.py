"""One entry of a layer or a tree as a Python value; for edges and tests, never for hot paths."""

from __future__ import annotations

import stat
from enum import IntEnum
from typing import NamedTuple

XattrSet = tuple[tuple[bytes, bytes], ...]
"""Pairs of (name, value), sorted by name, each name once. The interned form of an inode's xattrs."""

Extent = tuple[int, int]
"""A run of data in a sparse file: (offset in the file, length), both in bytes."""


class Kind(IntEnum):
    """What an entry is; up to 15 it is ``st_mode >> 12``, above it exists in layers only."""

    FIFO = stat.S_IFIFO >> 12
    CHAR = stat.S_IFCHR >> 12
    DIR = stat.S_IFDIR >> 12
    BLOCK = stat.S_IFBLK >> 12
    REG = stat.S_IFREG >> 12
    SYMLINK = stat.S_IFLNK >> 12
    HARDLINK = 16
    """Another name for the inode at the entry's link target."""
    WHITEOUT = 17
    """``.wh.NAME``: the row's path is that of NAME, which is removed from the lower layers."""
    OPAQUE = 18
    """``.wh..wh..opq``: the row's path is that of the directory whose lower content is removed."""


WHITEOUT_PREFIX = b".wh."
"""How a layer's tar names what it removes (OCI image-spec, layer.md, "Whiteouts")."""
OPAQUE_NAME = b".wh..wh..opq"


class Entry(NamedTuple):
    """One row of an index: a tar member, decoded and normalised.

    Attributes:
        path: relative, no leading ``/`` or ``./``, no empty, ``.`` or ``..`` part; ``b""`` is the root.
        kind: what it is.
        perm: permission bits, ``mode & 0o7777``.
        uid, gid: container ids.
        mtime: seconds since 1970, may be negative.
        mtime_ns: 0 to 999,999,999, added to ``mtime`` (so -1.5 s is ``-2, 500_000_000``).
        size: logical size of a regular file in bytes, holes included; 0 for every other kind.
        major, minor: of a CHAR or BLOCK device, else 0.
        link: target of a SYMLINK (as written) or a HARDLINK (normalised like ``path``), else ``b""``.
        xattrs: sorted pairs, kernel names (``user.x``, ``security.capability``, …) and raw values.
        offset: where the file's stored bytes begin in the uncompressed layer tar; -1 if it has none.
        sha256: of the logical content, holes as zeros; ``b""`` for everything but a regular file.
        sparse: None, or the runs of data; their bytes lie one after the other from ``offset`` on.
    """

    path: bytes
    kind: Kind
    perm: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    mtime_ns: int = 0
    size: int = 0
    major: int = 0
    minor: int = 0
    link: bytes = b""
    xattrs: XattrSet = ()
    offset: int = -1
    sha256: bytes = b""
    sparse: tuple[Extent, ...] | None = None
