"""One pass over a folder that a runtime unpacked a layer into: names, stats, xattrs, link targets.

Nothing is opened but folders, and nothing is followed out of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from array import array
from enum import StrEnum

from layerkit.linux import syscalls as sc
from layerkit.linux.folders.writer import FOLDER
from layerkit.metaonly import METACOPY, OPAQUE, REDIRECT, WHITEOUT, YES, is_whiteout, own_mark, unescaped
from layerkit.model.entry import OPAQUE_NAME, WHITEOUT_PREFIX, Kind, XattrSet
from layerkit.model.errors import InvalidImage, LossyResult, show_path
from layerkit.model.limits import Limits
from layerkit.model.ports import Progress

_CLONE_FS = 0x200
_KEPT = (b"user.", b"trusted.", b"security.", b"system.posix_acl_")
_OF_THE_HOST = (b"security.selinux", b"security.ima", b"security.evm", b"security.apparmor", b"trusted.SGI_")
"""Labels that the host gives by its own rules, and the second names under which xfs shows ACLs."""

_OF_FUSE_OVERLAYFS = (b"user.fuseoverlayfs.", b"user.containers.override_stat")
SOCKET = stat.S_IFSOCK >> 12
STAT_FIELDS = 7  # mode, ino, dev, nlink, uid, gid, size: the head of a stat_result


class Marks(StrEnum):
    """How the runtime that unpacked a layer wrote what the layer removes."""

    OVERLAY = "overlay"
    """Devices 0:0 and xattrs, as the kernel does."""
    AUFS = "aufs"
    """``.wh.NAME`` files besides: containers-storage with a mount program, and what is unpacked plainly."""


class Walk:
    """What one pass over a layer's folder found, in the order of the disk; :meth:`run` fills it."""

    def __init__(self, root: int, marks: Marks, limits: Limits, progress: Progress | None) -> None:
        """Prepare to read the folder that ``root`` is a descriptor of."""
        self.root, self.aufs, self.limits, self.progress = root, marks is Marks.AUFS, limits, progress
        self.device = os.fstat(root).st_dev
        # A row for each name, folder by folder; `_order` puts them into canonical order.
        self.names: list[bytes] = []
        self.stats = array("Q")
        self.mtimes = array("q")
        self.xattrs: dict[int, XattrSet] = {}
        self.targets: dict[int, bytes] = {}
        self.devices: dict[int, int] = {}
        self.folders: dict[int, tuple[bytes, int, int]] = {}  # row: (path, first row below, end)
        self.ctimes: dict[int, int] = {}
        self.whiteouts: set[int] = set()
        self.opaque: set[int] = set()
        self.warnings: list[str] = []
        self.metacopy: bytes | None = None

    def run(self) -> Walk:
        """Read it; in a thread of its own, whose working folder this changes."""
        private = ctypes.CDLL(None).unshare(_CLONE_FS) == 0  # some containers forbid it
        st = os.fstat(self.root)
        self._add(b"", st)
        self._take_xattrs(0, b"", _names(b"/proc/self/fd/%d/." % self.root), b"/proc/self/fd/%d/." % self.root)
        waiting = [(0, b"")]
        while waiting:
            row, path = waiting.pop()
            fd = self._open(path)
            try:
                if private:
                    os.fchdir(fd)
                self._read(row, path, b"" if private else b"/proc/self/fd/%d/" % fd, fd, waiting)
            finally:
                os.close(fd)
            if self.progress is not None and len(waiting) % 64 == 0:
                self.progress("reading a layer folder", len(self.names), 0)
        self.limits.check("entries_per_layer", len(self.names), "layer folder")
        return self

    def _open(self, path: bytes) -> int:
        if not path:
            return os.dup(self.root)
        # In one step where the kernel can (5.6): no link is followed on the way, nor is the folder left.
        fd = sc.open_beneath(self.root, path, FOLDER)
        if fd >= 0:
            return fd
        fd = os.dup(self.root)
        for part in path.split(b"/") if path else []:
            above = fd
            try:
                fd = os.open(part, FOLDER, dir_fd=above)
            finally:
                os.close(above)
        return fd

    def _read(self, row: int, path: bytes, prefix: bytes, fd: int, waiting: list[tuple[int, bytes]]) -> None:
        names, stats, mtimes, first = self.names, self.stats, self.mtimes, len(self.names)
        aufs = self.aufs
        with os.scandir(fd) as entries:
            for entry in entries:
                st = entry.stat(follow_symlinks=False)
                name = os.fsencode(entry.name)
                at = len(names)
                names.append(name)
                stats.extend(st[:STAT_FIELDS])  # type: ignore[arg-type]  # whole numbers all
                mtimes.append(st.st_mtime_ns)
                kind = st.st_mode >> 12
                try:
                    found = os.listxattr(prefix + name, follow_symlinks=False)
                except OSError as error:
                    if error.errno != errno.EOPNOTSUPP:
                        raise
                    found = []
                below = path + b"/" + name if path else name
                if kind == Kind.DIR:
                    if st.st_dev != self.device:
                        raise LossyResult(below, "another filesystem is mounted here; unmount it first")
                    self.ctimes[at] = st.st_ctime_ns
                    waiting.append((at, below))
                elif kind != Kind.REG:
                    self._take_special(at, st, prefix, below)
                if found:
                    self._take_xattrs(at, below, found, prefix + name)
                if aufs and name.startswith(WHITEOUT_PREFIX):
                    self._take_aufs(at, row, name)
        self.folders[row] = (path, first, len(names))

    def _add(self, name: bytes, st: os.stat_result) -> None:
        self.names.append(name)
        self.stats.extend(st[:STAT_FIELDS])  # type: ignore[arg-type]
        self.mtimes.append(st.st_mtime_ns)
        self.ctimes[0] = st.st_ctime_ns

    def _take_special(self, row: int, st: os.stat_result, prefix: bytes, path: bytes) -> None:
        kind = st.st_mode >> 12
        if kind == Kind.SYMLINK:
            self.targets[row] = os.readlink(prefix + self.names[row])
        elif is_whiteout(st.st_mode, st.st_rdev):
            self.whiteouts.add(row)
        elif kind in (Kind.CHAR, Kind.BLOCK):
            self.devices[row] = st.st_rdev
        elif kind == SOCKET:
            self.warnings.append(f"{show_path(path)}: a socket, which no layer can hold: left out")

    def _take_xattrs(self, row: int, path: bytes, found: list[str], full: bytes) -> None:
        pairs = []
        for text in found:
            key = os.fsencode(text)
            mark = own_mark(key)
            if mark is not None:
                self._take_private(row, path, mark, full, text)
                continue
            if key.startswith(_OF_FUSE_OVERLAYFS):
                self._take_fuse(row, path, key)
                continue
            if not key.startswith(_KEPT) or key.startswith(_OF_THE_HOST):
                continue
            pairs.append((unescaped(key), os.getxattr(full, text, follow_symlinks=False)))
        if pairs:
            self.xattrs[row] = tuple(sorted(pairs))

    def _take_private(self, row: int, path: bytes, what: bytes, full: bytes, text: str) -> None:
        kind = self.stats[row * STAT_FIELDS] >> 12
        if what == OPAQUE and kind == Kind.DIR:
            if os.getxattr(full, text, follow_symlinks=False) == YES:
                self.opaque.add(row)
        elif what == WHITEOUT and kind == Kind.REG and self.stats[row * STAT_FIELDS + 6] == 0:
            self.whiteouts.add(row)
        elif what == REDIRECT and kind == Kind.DIR:
            raise InvalidImage(
                f"{show_path(path)}: overlayfs moved this folder (overlay.redirect): what it shows lies "
                "elsewhere; unmount, and have the runtime unpack the image anew without redirect_dir=on"
            )
        elif what == METACOPY and kind == Kind.REG and self.metacopy is None:
            self.metacopy = path

    def _take_fuse(self, row: int, path: bytes, key: bytes) -> None:
        if key.endswith(b".opaque"):
            self.opaque.add(row)
        elif key.endswith(b".override_stat"):
            raise InvalidImage(
                f"{show_path(path)}: its owner and mode are in the xattr {show_path(key)} (force_mask of "
                "containers-storage), not in the file; such a store cannot be adopted"
            )

    def _take_aufs(self, row: int, parent: int, name: bytes) -> None:
        if name == OPAQUE_NAME:
            self.opaque.add(parent)
        elif name[len(WHITEOUT_PREFIX) :] in (b"", b".", b".."):
            raise InvalidImage(f"{show_path(name)}: a deletion of nothing; no layer has one")
        self.whiteouts.add(row)


def _names(path: bytes) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listxattr(path)
    return []
