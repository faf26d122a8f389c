"""A read-only FUSE filesystem over a folder that counts the requests it gets, spoken over /dev/fuse itself.

It answers what an overlay asks of a lower layer and no more (linux/fuse.h, protocol 7.31). Nothing is cached:
each lookup that the kernel needs from this layer is one LOOKUP request.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_REQUEST_BYTES = 1 << 17
_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_DIRENT = struct.Struct("<QQII")
_MNT_DETACH = 2
_NAMES = {
    1: "LOOKUP", 2: "FORGET", 3: "GETATTR", 14: "OPEN", 15: "READ", 17: "STATFS", 18: "RELEASE", 22: "GETXATTR",
    23: "LISTXATTR", 25: "FLUSH", 26: "INIT", 27: "OPENDIR", 28: "READDIR", 29: "RELEASEDIR", 34: "ACCESS",
    36: "INTERRUPT", 38: "DESTROY", 42: "BATCH_FORGET",
}  # fmt: skip
_SILENT = ("FORGET", "BATCH_FORGET", "INTERRUPT")


class Server:
    """Serves ``folder``; ``requests`` counts by the name of the request."""

    def __init__(self, folder: Path, device: int) -> None:
        self.requests: Counter[str] = Counter()
        self._device = device
        self._paths = {1: os.fsencode(folder)}
        self._ids = {self._paths[1]: 1}
        self._files: dict[int, int] = {}

    def run(self) -> None:
        """Answer requests until the filesystem is unmounted."""
        while True:
            try:
                request = os.read(self._device, _REQUEST_BYTES)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                return
            length, opcode, unique, node, *_ = _IN.unpack_from(request)
            name = _NAMES.get(opcode, str(opcode))
            self.requests[name] += 1
            if name in _SILENT:
                continue
            try:
                answer = self._answer(name, node, request[_IN.size : length])
                head = _OUT.pack(_OUT.size + len(answer), 0, unique)
            except OSError as error:
                answer = b""
                head = _OUT.pack(_OUT.size, -(error.errno or errno.EIO), unique)
            try:
                os.write(self._device, head + answer)
            except OSError:
                continue  # the asker was interrupted

    def _answer(self, name: str, node: int, body: bytes) -> bytes:
        path = self._paths.get(node, b"")
        if name == "INIT":
            return struct.pack("<IIIIHHIIHHI28x", 7, 31, 65536, 0, 16, 12, 65536, 1, 0, 0, 0)
        if name == "LOOKUP":
            child = path + b"/" + body.rstrip(b"\0")
            attributes = self._attributes(child)
            return struct.pack("<QQQQII", self._id(child), 0, 0, 0, 0, 0) + attributes
        if name == "GETATTR":
            return struct.pack("<QII", 0, 0, 0) + self._attributes(path)
        if name in ("OPEN", "OPENDIR"):
            flags = os.O_RDONLY | (os.O_DIRECTORY if name == "OPENDIR" else 0)
            fd = os.open(path, flags)
            self._files[fd] = fd
            return struct.pack("<QIi", fd, 0, 0)
        if name == "READ":
            handle, offset, size = struct.unpack_from("<QQI", body)
            return os.pread(handle, size, offset)
        if name == "READDIR":
            handle, offset, size = struct.unpack_from("<QQI", body)
            return self._entries(path, offset, size)
        if name in ("RELEASE", "RELEASEDIR"):
            os.close(self._files.pop(struct.unpack_from("<Q", body)[0]))
            return b""
        if name == "STATFS":
            return struct.pack("<QQQQQIIII24x", 1 << 20, 1 << 19, 1 << 19, 1 << 20, 1 << 19, 4096, 255, 4096, 0)
        if name in ("FLUSH", "ACCESS"):
            return b""
        raise OSError(errno.ENOSYS, name)

    def _id(self, path: bytes) -> int:
        if path not in self._ids:
            self._ids[path] = len(self._ids) + 1
            self._paths[self._ids[path]] = path
        return self._ids[path]

    def _attributes(self, path: bytes) -> bytes:
        st = os.lstat(path)
        seconds = (int(st.st_atime), int(st.st_mtime), int(st.st_ctime))
        return _ATTR.pack(
            self._id(path), st.st_size, st.st_blocks, *seconds, 0, 0, 0, st.st_mode, st.st_nlink, st.st_uid,
            st.st_gid, 0, 4096, 0,
        )  # fmt: skip

    def _entries(self, path: bytes, offset: int, size: int) -> bytes:
        out = b""
        for place, name in enumerate(sorted(os.listdir(path))[offset:], offset + 1):
            kind = stat.S_IFMT(os.lstat(path + b"/" + name).st_mode) >> 12
            item = _DIRENT.pack(self._id(path + b"/" + name), place, len(name), kind) + name
            item += bytes(-len(item) % 8)
            if len(out) + len(item) > size:
                break
            out += item
        return out


@contextmanager
def counting_mount(folder: Path, target: Path) -> Iterator[Server]:
    """Mount ``folder`` read-only at ``target`` through a :class:`Server` in a thread of this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if libc.mount(b"counter", os.fsencode(target), b"fuse", 1, options) != 0:
        os.close(device)
        raise OSError(ctypes.get_errno(), "mount of fuse")
    server = Server(folder, device)
    thread = threading.Thread(target=server.run, name="fuse", daemon=True)
    thread.start()
    try:
        yield server
    finally:
        libc.umount2(os.fsencode(target), _MNT_DETACH)
        thread.join(5)
        os.close(device)
