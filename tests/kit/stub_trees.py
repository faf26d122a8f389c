"""A metadata layer before its judge: an entry of every kind, what must be shown of a tree, and what is shown."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

from judge import xattrs
from trees import acl, file, folder

from layerkit.metaonly import Namespace, data_path
from layerkit.model.entry import Entry, Kind
from layerkit.model.tree import Tree

CAPABILITY = struct.pack("<IIIIII", 0x03000001, 0x3000, 0, 0, 0, 0)
NOBODY = 0xFFFFFFFF
ACL = acl((1, 7, NOBODY), (2, 5, 1234), (4, 5, NOBODY), (0x10, 5, NOBODY), (0x20, 0, NOBODY))


EVERYTHING = [
    folder(b"", 0o755, uid=100000, gid=100000, mtime=1_700_000_000, mtime_ns=999_999_999),
    folder(b"d", 0o3751, uid=7, gid=8, mtime=-2, mtime_ns=500_000_000),
    file(b"d/f", b"hello", perm=0o640, uid=100001, gid=4294967294, mtime=1, mtime_ns=1),
    file(b"d/\xff\nx", b"hello", perm=0o000, mtime=-1, mtime_ns=999_999_999),
    file(b"d/empty", b"", perm=0o444, uid=5),
    file(b"d/setuid", b"s", perm=0o6755, uid=9, gid=9, xattrs=((b"security.capability", CAPABILITY),)),
    file(b"d/xattrs", b"s", xattrs=((b"trusted.t", b"\0\1"), (b"user.empty", b""), (b"user.u", b"x" * 300))),
    Entry(b"d/link", Kind.SYMLINK, 0o777, uid=3, gid=4, mtime=9, mtime_ns=9, link=b"../" * 30 + b"nowhere"),
    Entry(b"d/odd", Kind.SYMLINK, 0o777, link=b"\xfe/x"),
    file(b"d/binary", b"s", xattrs=((b"user.binary", bytes(range(256))), (b"user.long", b"x" * 900))),
    file("d/naïve".encode(), b"hello", perm=0o000, mtime=1 << 33),
    Entry(b"z/" + b"long" * 40 + b"/\xff", Kind.HARDLINK, link=b"d/odd"),
    file(b"z/" + b"long" * 40 + b"/" + b"name" * 60, b"hello"),
    Entry(b"dev/ids", Kind.BLOCK, 0o660, uid=1 << 21, gid=(1 << 21) - 1, major=259, minor=70000),
    Entry(b"d/trusted", Kind.SYMLINK, 0o777, link=b"f", xattrs=((b"trusted.on.link", b"1"),)),
    Entry(b"a-link", Kind.HARDLINK, link=b"d/f"),
    Entry(b"z/far/link", Kind.HARDLINK, link=b"d/f"),
    Entry(b"z/far/again", Kind.HARDLINK, link=b"d/trusted"),
    Entry(b"dev/null", Kind.CHAR, 0o666, gid=5, major=1, minor=3, mtime=5),
    Entry(b"dev/disk", Kind.BLOCK, 0o660, uid=5, major=259, minor=70000, xattrs=((b"trusted.d", b"v"),)),
    Entry(b"dev/fifo", Kind.FIFO, 0o1622, uid=1),
    folder(b"acl", 0o750, xattrs=((b"system.posix_acl_access", ACL), (b"system.posix_acl_default", ACL))),
    file(b"acl/plain", b"p", perm=0o604),
    folder(b"acl/plainer", 0o700),
    file(b"acl/own", b"p", perm=0o750, xattrs=((b"system.posix_acl_access", ACL),)),
    Entry(b"huge", Kind.REG, size=(1 << 42) + 1, sha256=bytes(range(32))),
]


def shown(root: Path) -> dict[bytes, dict[str, object]]:
    """Return what lstat and listxattr say, in the form of :func:`wanted`; data is not read."""
    found: dict[bytes, dict[str, object]] = {}
    first: dict[int, bytes] = {}
    stack = [b""]
    while stack:
        path = stack.pop()
        full = os.path.join(os.fsencode(root), path)
        st = os.lstat(full)
        if stat.S_ISDIR(st.st_mode):
            stack += [os.path.join(path, name) for name in os.listdir(full)]
        found[path] = {
            "mode": st.st_mode, "uid": st.st_uid, "gid": st.st_gid, "mtime": st.st_mtime_ns,
            "size": 0 if stat.S_ISDIR(st.st_mode) else st.st_size, "ino": st.st_ino,
            "dev": (os.major(st.st_rdev), os.minor(st.st_rdev)), "xattrs": xattrs(full),
            "target": os.readlink(full) if stat.S_ISLNK(st.st_mode) else b"",
        }  # fmt: skip
    for path in sorted(found):
        found[path]["ino"] = first.setdefault(int(str(found[path]["ino"])), path)
    return found


def wanted(
    tree: Tree, namespace: Namespace = Namespace.TRUSTED, *, metacopy: bytes = b""
) -> dict[bytes, dict[str, object]]:
    """Return what a rendering of ``tree`` must show. Hard links are told by the least path of the inode.

    ``metacopy`` is the value of the stubs' xattr: empty where nothing has to bring it through an archive.
    """
    want: dict[bytes, dict[str, object]] = {}
    first: dict[int, bytes] = {}
    for node in sorted(tree.nodes(), key=lambda n: n.path):
        pairs = dict(node.xattrs)
        if stat.S_ISREG(node.mode) and node.size:
            pairs[namespace.prefix + b"redirect"] = b"/" + data_path(node.sha256)
            pairs[namespace.prefix + b"metacopy"] = metacopy
        if b"security.capability" in pairs:
            pairs[b"security.capability"] = struct.pack("<I", 0x02000001) + CAPABILITY[4:20]
        want[node.path] = {
            "mode": node.mode, "uid": node.uid, "gid": node.gid, "mtime": node.mtime * 10**9 + node.mtime_ns,
            "size": node.size, "ino": first.setdefault(node.inode, node.path), "dev": (node.major, node.minor),
            "xattrs": tuple(sorted(pairs.items())), "target": node.target,
        }  # fmt: skip
    return want
