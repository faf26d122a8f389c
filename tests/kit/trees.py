"""Trees for tests, built straight from entries, inodes or columns: no layer, no merge, no image."""

from __future__ import annotations

import hashlib
import stat
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from layerkit.model import sparse as sparse_maps
from layerkit.model.digest import Digest
from layerkit.model.entry import Entry, Kind, XattrSet
from layerkit.model.index import path_key
from layerkit.model.strings import Strings
from layerkit.model.tree import Tree

ACL_ACCESS, ACL_DEFAULT = b"system.posix_acl_access", b"system.posix_acl_default"
CAPABILITY = b"security.capability"


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


@dataclass
class Spec:
    """An inode; ``links`` are its further names."""

    mode: int
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    mtime_ns: int = 0
    content: bytes | None = None
    size: int = 0
    major: int = 0
    minor: int = 0
    target: bytes = b""
    xattrs: XattrSet = ()
    links: list[bytes] = field(default_factory=list)

    def entry(self, path: bytes) -> Entry:
        """Return it as an entry at ``path``."""
        sha = b"" if self.content is None else hashlib.sha256(self.content).digest()
        return Entry(
            path, Kind(stat.S_IFMT(self.mode) >> 12), stat.S_IMODE(self.mode), self.uid, self.gid, self.mtime,
            self.mtime_ns, self.size, self.major, self.minor, self.target, self.xattrs, sha256=sha,
        )  # fmt: skip


def directory(perm: int = 0o755, **more: object) -> Spec:
    return Spec(stat.S_IFDIR | perm, **more)  # type: ignore[arg-type]


def regular(content: bytes = b"", perm: int = 0o644, **more: object) -> Spec:
    return Spec(stat.S_IFREG | perm, content=content, size=len(content), **more)  # type: ignore[arg-type]


def symlink(target: bytes, **more: object) -> Spec:
    return Spec(stat.S_IFLNK | 0o777, target=target, size=len(target), **more)  # type: ignore[arg-type]


def make_tree(specs: dict[bytes, Spec]) -> Tree:
    """Return the tree of ``specs`` by path; missing parents are made."""
    entries = [spec.entry(path) for path, spec in ({b"": directory()} | specs).items()]
    entries += [Entry(link, Kind.HARDLINK, link=path) for path, spec in specs.items() for link in spec.links]
    return tree_of(entries)


def acl(*entries: tuple[int, int, int]) -> bytes:
    """Return a POSIX ACL value of (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def user_acl(uid: int, gid: int = 50) -> bytes:
    """Return a valid ACL that names a user and a group."""
    none = 0xFFFFFFFF
    return acl((1, 7, none), (2, 5, uid), (4, 5, none), (8, 4, gid), (0x10, 7, none), (0x20, 5, none))


def capability(rootid: int) -> bytes:
    """Return a v3 file capability."""
    return struct.pack("<IIIIII", 0x03000001, 1 << 10, 0, 0, 0, rootid)


def big_columns(n: int, per_dir: int = 16, links: float = 0.05) -> Tree:
    """Return a tree of about ``n`` names made straight from columns, as a large image has them."""
    rng = np.random.default_rng(n)
    dirs = max(1, n // (per_dir + 1))
    files = n - dirs - 1
    per = np.full(dirs, files // dirs)
    per[: files - int(per.sum())] += 1
    is_dir = np.zeros(n, bool)
    starts = 1 + np.cumsum(per + 1) - (per + 1)
    is_dir[0] = True
    is_dir[starts] = True
    parent = np.zeros(n, np.int32)
    parent[1:] = np.repeat(starts, per + 1)
    parent[starts] = 0
    parent[0] = -1
    width = len(str(n))
    texts = [b""] + [b"name-%0*d.py" % (width, row) for row in range(1, n)]
    kind = np.where(is_dir, stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644).astype(np.uint32)
    link = ~is_dir & (rng.random(n) < links)
    kind[link] = stat.S_IFLNK | 0o777
    size = np.where(kind >> 12 == 8, rng.integers(0, 100_000, n), 0).astype(np.int64)
    size[link] = 24
    sha = np.frombuffer(rng.bytes(32 * n), np.uint8).reshape(-1, 32).copy()
    sha[kind >> 12 != 8] = 0
    nlink = np.where(is_dir, 2, 1).astype(np.uint32)
    nlink[0] = 2 + dirs
    caps: XattrSet = ((CAPABILITY, capability(0)),)
    shown = (ACL_ACCESS, user_acl(1000))
    return Tree(
        parent=parent,
        name=Strings.of(texts),
        inode=np.arange(n, dtype=np.int32),
        mode=kind,
        uid=rng.integers(0, 65536, n).astype(np.uint32),
        gid=rng.integers(0, 65536, n).astype(np.uint32),
        nlink=nlink,
        size=size,
        mtime=rng.integers(-(1 << 31), 1 << 33, n),
        mtime_ns=rng.integers(0, 10**9, n).astype(np.uint32),
        major=np.zeros(n, np.uint32),
        minor=np.zeros(n, np.uint32),
        target=np.where(link, 0, -1).astype(np.int32),
        targets=Strings.of([b"../lib/libsomething.so.1"]),
        xattr=np.where(~is_dir & ~link & (rng.random(n) < 0.001), rng.integers(1, 3, n), 0).astype(np.int32),
        xattr_sets=((), caps, (shown,)),
        layer=np.zeros(n, np.int32),
        offset=np.zeros(n, np.int64),
        sha256=sha,
        sparse=np.full(n, -1, np.int32),
        sparse_maps=sparse_maps.NONE,
        layers=(Digest.of(b"layer"),),
    )


def mapped(tree: Tree, shift: int = 100_000) -> Tree:
    """Return ``tree`` with every id moved up by ``shift``, in ACLs and capabilities too."""
    sets = _with_ids(tree, lambda number: number + shift)
    return replace(tree, uid=tree.uid + np.uint32(shift), gid=tree.gid + np.uint32(shift), xattr_sets=sets)


def squashed(tree: Tree, owner: int = 7) -> Tree:
    """Return ``tree`` with every owner the same, so that values with ids become equal."""
    same = np.full(tree.inodes, owner, np.uint32)
    return replace(tree, uid=same, gid=same, xattr_sets=_with_ids(tree, lambda number: owner))


def _with_ids(tree: Tree, new: Callable[[int], int]) -> tuple[XattrSet, ...]:
    """Return the sets of xattrs with other ids in their values."""

    def value(name: bytes, old: bytes) -> bytes:
        if name == CAPABILITY:
            return old[:20] + struct.pack("<I", new(struct.unpack("<I", old[20:])[0]))
        if name in (ACL_ACCESS, ACL_DEFAULT):
            entries = struct.iter_unpack("<HHI", old[4:])
            return acl(*((t, p, i if i == 0xFFFFFFFF else new(i)) for t, p, i in entries))
        return old

    return tuple(tuple((n, value(n, v)) for n, v in pairs) for pairs in tree.xattr_sets)
