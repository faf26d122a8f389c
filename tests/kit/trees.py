"""Small trees for tests, built straight from entries: no layer, no merge, no image."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from layerkit.model import sparse as sparse_maps
from layerkit.model.digest import Digest
from layerkit.model.entry import Entry, Kind
from layerkit.model.index import path_key
from layerkit.model.strings import Strings
from layerkit.model.tree import Tree


def file(path: bytes, content: bytes = b"", **more: object) -> Entry:
    """Return a regular file with the digest and size of ``content``."""
    return Entry(path, Kind.REG, size=len(content), sha256=hashlib.sha256(content).digest(), **more)  # type: ignore[arg-type]


def folder(path: bytes, perm: int = 0o755, **more: object) -> Entry:
    """Return a directory."""
    return Entry(path, Kind.DIR, perm, **more)  # type: ignore[arg-type]


def tree_of(entries: Iterable[Entry]) -> Tree:
    """Return the checked tree of ``entries`` in any order; the root and missing parents are made."""
    given = {e.path: e for e in entries}
    for path in list(given):
        while path:
            path = path.rpartition(b"/")[0]
            given.setdefault(path, folder(path))
    rows = sorted(given.values(), key=lambda e: (e.path != b"", path_key(e.path)))
    row_of = {e.path: row for row, e in enumerate(rows)}

    def origin(e: Entry) -> Entry:
        return origin(given[e.link]) if e.kind is Kind.HARDLINK else e

    inode_of: dict[bytes, int] = {}
    inode = [inode_of.setdefault(origin(e).path, len(inode_of)) for e in rows]
    inodes = [given[path] for path in inode_of]
    names = np.bincount(inode)
    folders = [row_of[e.path.rpartition(b"/")[0]] for e in rows if e.kind is Kind.DIR and e.path]
    nlink = [2 + folders.count(row_of[e.path]) if e.kind is Kind.DIR else names[i] for i, e in enumerate(inodes)]
    sets: dict[tuple[tuple[bytes, bytes], ...], int] = {(): 0}
    links = [e.link for e in inodes if e.kind is Kind.SYMLINK]
    link_rows = iter(range(len(links)))
    tree = Tree(
        parent=np.array([-1 if not e.path else row_of[e.path.rpartition(b"/")[0]] for e in rows], np.int32),
        name=Strings.of([e.path.rpartition(b"/")[2] for e in rows]),
        inode=np.array(inode, np.int32),
        mode=np.array([e.kind << 12 | e.perm for e in inodes], np.uint32),
        uid=np.array([e.uid for e in inodes], np.uint32),
        gid=np.array([e.gid for e in inodes], np.uint32),
        nlink=np.array(nlink, np.uint32),
        size=np.array([len(e.link) if e.kind is Kind.SYMLINK else e.size for e in inodes], np.int64),
        mtime=np.array([e.mtime for e in inodes], np.int64),
        mtime_ns=np.array([e.mtime_ns for e in inodes], np.uint32),
        major=np.array([e.major for e in inodes], np.uint32),
        minor=np.array([e.minor for e in inodes], np.uint32),
        target=np.array([next(link_rows) if e.kind is Kind.SYMLINK else -1 for e in inodes], np.int32),
        targets=Strings.of(links),
        xattr=np.array([sets.setdefault(e.xattrs, len(sets)) for e in inodes], np.int32),
        xattr_sets=tuple(sets),
        layer=np.array([0 if e.kind is Kind.REG and e.size else -1 for e in inodes], np.int32),
        offset=np.array([e.offset for e in inodes], np.int64),
        sha256=np.frombuffer(b"".join(e.sha256 or bytes(32) for e in inodes), np.uint8).reshape(-1, 32),
        sparse=np.full(len(inodes), -1, np.int32),
        sparse_maps=sparse_maps.NONE,
        layers=(Digest.of(b"no layer"),),
    )
    tree.check()
    return tree
