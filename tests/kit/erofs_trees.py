"""Trees for the tests of the EROFS renderings, made without layers or ``merge``."""

from __future__ import annotations

import hashlib
import stat
import struct
from dataclasses import dataclass, field

import numpy as np

from layerkit.model.digest import Digest
from layerkit.model.entry import XattrSet
from layerkit.model.index import path_key
from layerkit.model.sparse import NONE
from layerkit.model.strings import Strings
from layerkit.model.tree import Tree

ACL_ACCESS, ACL_DEFAULT = b"system.posix_acl_access", b"system.posix_acl_default"
CAPABILITY = b"security.capability"


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


def directory(perm: int = 0o755, **more: object) -> Spec:
    return Spec(stat.S_IFDIR | perm, **more)  # type: ignore[arg-type]


def regular(content: bytes = b"", perm: int = 0o644, **more: object) -> Spec:
    return Spec(stat.S_IFREG | perm, content=content, size=len(content), **more)  # type: ignore[arg-type]


def symlink(target: bytes, **more: object) -> Spec:
    return Spec(stat.S_IFLNK | 0o777, target=target, size=len(target), **more)  # type: ignore[arg-type]


def make_tree(specs: dict[bytes, Spec]) -> Tree:
    """Return the tree of ``specs`` by path; missing parents are made."""
    names: dict[bytes, Spec] = {b"": specs.get(b"", directory())}
    for path, spec in specs.items():
        for one in (path, *spec.links):
            parts = one.split(b"/")
            for depth in range(1, len(parts)):
                above = b"/".join(parts[:depth])
                names.setdefault(above, specs.get(above) or directory())
            names[one] = spec
    paths = sorted(names, key=path_key)
    rows = {path: row for row, path in enumerate(paths)}
    inode_of: dict[int, int] = {}
    inodes: list[Spec] = []
    for path in paths:
        if id(names[path]) not in inode_of:
            inode_of[id(names[path])] = len(inodes)
            inodes.append(names[path])
    inode = [inode_of[id(names[path])] for path in paths]
    parent = [-1] + [rows[path.rpartition(b"/")[0]] for path in paths[1:]]
    nlink = np.bincount(inode, minlength=len(inodes))
    for row, path in enumerate(paths):
        if stat.S_ISDIR(names[path].mode):
            nlink[inode[row]] += 1
            if row:
                nlink[inode[parent[row]]] += 1
    sets: dict[XattrSet, int] = {(): 0}
    targets: dict[bytes, int] = {}
    digests = [hashlib.sha256(s.content).digest() if s.content is not None else bytes(32) for s in inodes]
    m = len(inodes)

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(s, name) for s in inodes], dtype)

    tree = Tree(
        parent=np.array(parent, np.int32),
        name=Strings.of([path.rpartition(b"/")[2] for path in paths]),
        inode=np.array(inode, np.int32),
        mode=column("mode", np.uint32),
        uid=column("uid", np.uint32),
        gid=column("gid", np.uint32),
        nlink=nlink.astype(np.uint32),
        size=column("size", np.int64),
        mtime=column("mtime", np.int64),
        mtime_ns=column("mtime_ns", np.uint32),
        major=column("major", np.uint32),
        minor=column("minor", np.uint32),
        target=np.array([targets.setdefault(s.target, len(targets)) if s.target else -1 for s in inodes], np.int32),
        targets=Strings.of(targets),
        xattr=np.array([sets.setdefault(s.xattrs, len(sets)) for s in inodes], np.int32),
        xattr_sets=tuple(sets),
        layer=np.full(m, -1, np.int32),
        offset=np.full(m, -1, np.int64),
        sha256=np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32),
        sparse=np.full(m, -1, np.int32),
        sparse_maps=NONE,
        layers=(Digest.of(b"layer"),),
    )
    tree.check()
    return tree


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
        sparse_maps=NONE,
        layers=(Digest.of(b"layer"),),
    )


def mapped(tree: Tree, shift: int = 100_000) -> Tree:
    """Return ``tree`` with every id moved up by ``shift``, in ACLs and capabilities too."""

    def value(name: bytes, old: bytes) -> bytes:
        if name == CAPABILITY:
            return old[:20] + struct.pack("<I", struct.unpack("<I", old[20:])[0] + shift)
        if name in (ACL_ACCESS, ACL_DEFAULT):
            entries = struct.iter_unpack("<HHI", old[4:])
            return acl(*((t, p, i if i == 0xFFFFFFFF else i + shift) for t, p, i in entries))
        return old

    sets = tuple(tuple((n, value(n, v)) for n, v in pairs) for pairs in tree.xattr_sets)
    return tree.with_owners(tree.uid + np.uint32(shift), tree.gid + np.uint32(shift), sets)


def squashed(tree: Tree, owner: int = 7) -> Tree:
    """Return ``tree`` with every owner the same, so that values with ids become equal."""

    def value(name: bytes, old: bytes) -> bytes:
        if name == CAPABILITY:
            return old[:20] + struct.pack("<I", owner)
        if name in (ACL_ACCESS, ACL_DEFAULT):
            return acl(
                *((t, p, i if i == 0xFFFFFFFF else owner) for t, p, i in struct.iter_unpack("<HHI", old[4:]))
            )
        return old

    sets = tuple(tuple((n, value(n, v)) for n, v in pairs) for pairs in tree.xattr_sets)
    same = np.full(tree.inodes, owner, np.uint32)
    return tree.with_owners(same, same, sets)
