"""A read-only FUSE server of metadata: the low-level protocol of /dev/fuse, spoken directly.

It answers what overlayfs asks of a lower layer and what a walk through it asks: names, attributes, links and
xattrs. There is no data behind it: a stub's bytes are in a data-only layer, and a READ that arrives all the same
is an error and never zeros. Nothing changes while it is mounted, so every answer may be kept for good; node
numbers are rows of the tree, so a server has no state, several processes can serve one mount, and one that died
can be replaced (``FUSE_NOTIFY_RESEND``). Structures and numbers: ``include/uapi/linux/fuse.h``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from layerkit.formats.meta.fuse_tree import NONE, FuseTree, Inode
from layerkit.metaonly import METACOPY, METACOPY_VALUE, REDIRECT, Namespace
from layerkit.model.acl_caps import ACL_NAMES
from layerkit.model.entry import XattrSet

DEVICE = "/dev/fuse"
_CLONE = 0x8004E500  # FUSE_DEV_IOC_CLONE
_REQUEST_BYTES = 1 << 14
"""More than any request that is answered has; for 128 KiB malloc would map pages at every read."""
_MAJOR, _MINOR, _OLDEST_MINOR = 7, 40, 31
_FOREVER_SECONDS = 1 << 31
_BLOCK = 4096
_OPEN_FILES = 16
_EAGER_NS = 50_000
"""How long after an answer the next request is looked for before the processor is given away. Whoever walks asks
again within that time, and to be woken up on another processor costs several times what an answer does."""
_ROOT_NODE, _FIRST_NODE = 1, 2
TREE_NAME = b"m"
"""The tree's root is one folder down. The kernel makes the root of a mount before INIT tells it that there are
ACLs, and then asks for those of the root at every path that anybody walks."""

_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_ENTRY = struct.Struct("<QQQQII")
_ATTR_HEAD = struct.Struct("<QII")
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_DIRENT = struct.Struct("<QQII")
_INIT_OUT = struct.Struct("<IIIIHHIIHHIIH22x")
_STATFS = struct.Struct("<QQQQQIIII24x")
_NOTIFY_RESEND = 7

# Flags of INIT that are asked for where the kernel offers them.
_ASYNC_READ, _NO_OPEN, _DO_READDIRPLUS, _PARALLEL_DIROPS = 1 << 0, 1 << 17, 1 << 13, 1 << 18
_POSIX_ACL, _CACHE_SYMLINKS, _NO_OPENDIR, _INIT_EXT = 1 << 20, 1 << 23, 1 << 24, 1 << 30
_HAS_RESEND = 1 << 39
_WANTED = (
    _ASYNC_READ | _NO_OPEN | _DO_READDIRPLUS | _PARALLEL_DIROPS | _POSIX_ACL | _CACHE_SYMLINKS | _NO_OPENDIR
    | _INIT_EXT | _HAS_RESEND
)  # fmt: skip

LOOKUP, FORGET, GETATTR, READLINK, READ, STATFS, GETXATTR, LISTXATTR = 1, 2, 3, 5, 15, 17, 22, 23
INIT, READDIR, INTERRUPT, DESTROY, BATCH_FORGET, READDIRPLUS = 26, 28, 36, 38, 42, 44
_SILENT = frozenset((FORGET, INTERRUPT, BATCH_FORGET))
# Statements of intent, in which a read-only tree has no part.
_CHANGES = frozenset((4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35, 43, 45, 47, 51))


class Answers:
    """What is said to each request about one tree under one map."""

    def __init__(
        self,
        tree: FuseTree,
        uids: Mapping[int, int],
        gids: Mapping[int, int],
        xattr_sets: Sequence[XattrSet],
        data: int | None = None,
    ) -> None:
        """Serve ``tree``.

        Args:
            tree: what there is.
            uids: the id to show for each user in the tree, in the user namespace of the mount.
            gids: the same for groups.
            xattr_sets: the tree's sets with the ids in them mapped.
            data: None: a file that is not empty is a stub. Else the descriptor of a folder that holds the bytes of
                such a file under the path that its redirect would be.
        """
        self._tree, self._uids, self._gids = tree, uids, gids
        self._sets = [dict(pairs) for pairs in xattr_sets]
        xattr = Namespace(tree.facts.namespace).xattr
        self._redirect_name, self._metacopy_name = xattr(REDIRECT), xattr(METACOPY)
        self._data, self._open = data, dict[int, int]()
        # For a tree without ACLs nobody need ask for them.
        acls = any(name in ACL_NAMES for pairs in self._sets for name in pairs)
        self._wanted = _WANTED if acls else _WANTED & ~_POSIX_ACL
        self._calls: dict[int, Callable[[int, bytes], bytes]] = {
            LOOKUP: self._lookup, GETATTR: self._getattr, READLINK: self._readlink, STATFS: self._statfs,
            GETXATTR: self._getxattr, LISTXATTR: self._listxattr, INIT: self._init, READ: self._read,
            READDIR: partial(self._entries, plus=False), READDIRPLUS: partial(self._entries, plus=True),
            DESTROY: lambda row, body: b"",
        }  # fmt: skip

    def answer(self, opcode: int, node: int, body: bytes) -> bytes:
        """Return the body of the answer.

        Raises:
            OSError: the errno to answer with.
        """
        call = self._calls.get(opcode)
        if call is None:
            # To ENOSYS (of OPEN, OPENDIR, ACCESS) the kernel answers by never asking again.
            raise OSError(errno.EROFS if opcode in _CHANGES else errno.ENOSYS, "")
        try:
            if node == _ROOT_NODE and opcode != INIT:
                return self._of_root(opcode, body)
            return call(node - _FIRST_NODE, body)
        except (IndexError, struct.error, KeyError) as error:
            raise OSError(errno.EIO, f"damaged tree: {error!r}") from error

    def _of_root(self, opcode: int, body: bytes) -> bytes:
        """Answer for the folder above the tree, which holds it under the name :data:`TREE_NAME`."""
        if opcode == GETATTR:
            return _ATTR_HEAD.pack(_FOREVER_SECONDS, 0, 0) + self._attributes(-1, self._tree.inode(0))
        if opcode == LOOKUP and body == TREE_NAME + b"\0":
            return self._entry(0)
        if opcode == STATFS:
            return self._statfs(0, body)
        raise OSError(errno.ENODATA if opcode == GETXATTR else errno.ENOENT, "")

    def _init(self, row: int, body: bytes) -> bytes:
        major, minor, readahead, flags = struct.unpack_from("<IIII", body)
        if (major, minor) < (_MAJOR, _OLDEST_MINOR):
            raise OSError(errno.EPROTO, "")
        if flags & _INIT_EXT and len(body) >= 20:
            flags |= struct.unpack_from("<I", body, 16)[0] << 32
        flags &= self._wanted
        return _INIT_OUT.pack(
            _MAJOR, _MINOR, readahead, flags & 0xFFFF_FFFF, 64, 48, _BLOCK, 1, 0, 0, flags >> 32, 0, 0
        )

    def _attributes(self, row: int, inode: Inode) -> bytes:
        mode, size, seconds, fraction = inode.mode, inode.size, inode.mtime & (1 << 64) - 1, inode.mtime_ns
        if stat.S_ISDIR(mode):
            size = _BLOCK
        return _ATTR.pack(
            row + _FIRST_NODE, size, (size + 511) // 512, seconds, seconds, seconds, fraction, fraction, fraction,
            mode, inode.nlink, self._uids[inode.uid], self._gids[inode.gid], inode.rdev, _BLOCK, 0,
        )  # fmt: skip

    def _entry(self, row: int) -> bytes:
        head = _ENTRY.pack(row + _FIRST_NODE, 0, _FOREVER_SECONDS, _FOREVER_SECONDS, 0, 0)
        return head + self._attributes(row, self._tree.inode(row))

    def _lookup(self, row: int, body: bytes) -> bytes:
        tree = self._tree
        found = tree.find(tree.inode(row), body[: body.index(b"\0")])
        if found < 0:
            # Node 0 with a lifetime: that there is no such name may be kept too.
            return _ENTRY.pack(0, 0, _FOREVER_SECONDS, 0, 0, 0) + bytes(_ATTR.size)
        return self._entry(found)

    def _getattr(self, row: int, body: bytes) -> bytes:
        return _ATTR_HEAD.pack(_FOREVER_SECONDS, 0, 0) + self._attributes(row, self._tree.inode(row))

    def _readlink(self, row: int, body: bytes) -> bytes:
        inode = self._tree.inode(row)
        if not stat.S_ISLNK(inode.mode):
            raise OSError(errno.EINVAL, "")
        return self._tree.string(inode.link)

    def _statfs(self, row: int, body: bytes) -> bytes:
        return _STATFS.pack(0, 0, 0, self._tree.inodes, 0, _BLOCK, 255, _BLOCK, 0)

    def _read(self, row: int, body: bytes) -> bytes:
        inode = self._tree.inode(row)
        # An empty file has no data; a stub is read here only by what ignores its xattrs.
        if self._is_stub(inode):
            raise OSError(errno.EIO, "the data of a stub is in another layer")
        if self._data is None or not inode.size:
            return b""
        _, offset, size = struct.unpack_from("<QQI", body)
        fd = self._open.get(row)
        if fd is None:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            path = self._redirect(inode)[1:]
            fd = self._open[row] = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._data)
        return os.pread(fd, size, offset)

    def _redirect(self, inode: Inode) -> bytes:
        return self._tree.path(inode) if inode.link == NONE else self._tree.string(inode.link)

    def _is_stub(self, inode: Inode) -> bool:
        return self._data is None and stat.S_ISREG(inode.mode) and inode.size > 0

    def _getxattr(self, row: int, body: bytes) -> bytes:
        (size,) = struct.unpack_from("<I", body)
        name = body[8 : body.index(b"\0", 8)]
        inode = self._tree.inode(row)
        value = self._sets[inode.xattr].get(name)
        if value is None and self._is_stub(inode):
            if name == self._redirect_name:
                value = self._redirect(inode)
            elif name == self._metacopy_name:
                # Never empty: what reads xattrs in two steps takes an empty value for none.
                value = METACOPY_VALUE
        if value is None:
            raise OSError(errno.ENODATA, "")
        return self._sized(value, size)

    def _listxattr(self, row: int, body: bytes) -> bytes:
        (size,) = struct.unpack_from("<I", body)
        inode = self._tree.inode(row)
        names = [*self._sets[inode.xattr]]
        if self._is_stub(inode):
            names += [self._redirect_name, self._metacopy_name]
        return self._sized(b"".join(name + b"\0" for name in names), size)

    @staticmethod
    def _sized(value: bytes, size: int) -> bytes:
        """Return a value, or how long it is where ``size`` is 0."""
        if size == 0:
            return struct.pack("<II", len(value), 0)
        if len(value) > size:
            raise OSError(errno.ERANGE, "")
        return value

    def _entries(self, row: int, body: bytes, *, plus: bool) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        tree = self._tree
        directory = tree.inode(row)
        _, _, above = tree.name(directory.first)
        out, used = [], 0
        for place in range(offset, directory.entries + 2):
            if place < 2:
                name, inode = (b".", row) if place == 0 else (b"..", above)
            else:
                name, inode, _ = tree.name(directory.begin + place - 2)
            kind = tree.inode(inode).mode >> 12
            item = _DIRENT.pack(inode + _FIRST_NODE, place + 1, len(name), kind) + name
            item += bytes(-len(item) % 8)
            if plus:
                # An entry with node 0 counts as no lookup, as it must not for these two.
                item = (bytes(_ENTRY.size + _ATTR.size) if place < 2 else self._entry(inode)) + item
            used += len(item)
            if used > size:
                break
            out.append(item)
        return b"".join(out)


def serve(device: int, answers: Answers) -> None:
    """Answer requests from ``device`` until the filesystem is unmounted.

    Raises:
        OSError: the device fails in another way than by the end of the mount.
    """
    os.set_blocking(device, False)
    requests = select.poll()
    requests.register(device, select.POLLIN)
    eager_until = 0
    while True:
        try:
            request = os.read(device, _REQUEST_BYTES)
        except BlockingIOError:
            if time.perf_counter_ns() < eager_until:
                os.sched_yield()
            else:
                requests.poll()
            continue
        except OSError as error:
            if error.errno in (errno.EINTR, errno.ENOENT):
                continue
            if error.errno == errno.ENODEV:
                return
            raise
        length, opcode, unique, node, *_ = _IN.unpack_from(request)
        if opcode in _SILENT:
            continue
        try:
            body = answers.answer(opcode, node, request[_IN.size : length])
            out = _OUT.pack(_OUT.size + len(body), 0, unique) + body
        except OSError as error:
            out = _OUT.pack(_OUT.size, -(error.errno or errno.EIO), unique)
        try:
            os.write(device, out)
        except OSError as error:
            # ENOENT: whoever asked was interrupted, or another process has answered after a resend.
            if error.errno not in (errno.ENOENT, errno.EINTR):
                if error.errno == errno.ENODEV:
                    return
                raise
        eager_until = time.perf_counter_ns() + _EAGER_NS


def open_device() -> int:
    """Return /dev/fuse, for :func:`options` and :func:`serve`.

    Raises:
        OSError: ``ENOENT``, ``ENODEV``, ``EACCES``: no FUSE for this user.
    """
    return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)


def clone_device(device: int, queue: int) -> None:
    """Make ``queue``, of :func:`open_device`, another way to the mount that ``device`` serves.

    Raises:
        OSError: the mount is gone, or is not made yet.
    """
    fcntl.ioctl(queue, _CLONE, struct.pack("=I", device))


def resend(device: int) -> bool:
    """Have the kernel send again what a server took and did not answer (Linux 6.9); return whether it does."""
    try:
        os.write(device, _OUT.pack(_OUT.size, _NOTIFY_RESEND, 0))
    except OSError:
        return False
    return True


def mount(device: int) -> int:
    """Return a detached, read-only mount whose requests come out of ``device``; the tree is at ``TREE_NAME`` in it.

    Raises:
        UnsupportedHost: no FUSE, or none for this user.
        OSError: as the kernel says.
    """
    from layerkit.linux.mounts import LAYER_ATTRIBUTES, Context

    with Context("fuse") as context:
        said = {"source": "layerkit", "fd": str(device), "rootmode": "40000", "user_id": "0", "group_id": "0"}
        for key, value in said.items():
            context.text(key, value)
        context.flag("allow_other")
        context.flag("ro")
        return context.mount(LAYER_ATTRIBUTES)


def open_tree_root(mount_fd: int) -> int:
    """Return a descriptor of the tree's root in a mount of :func:`mount` that is served."""
    return os.open(TREE_NAME, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount_fd)
