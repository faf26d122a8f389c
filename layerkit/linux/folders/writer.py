"""A tree as a folder: a few system calls per entry, on file descriptors only.

What a regular file holds is up to a :class:`Filler`: stubs of a metadata layer, or the bytes themselves.
No path is ever built from the image's names: every call names one component below the descriptor of its
folder, and folders are opened with ``O_NOFOLLOW``. The work goes in four passes, so that threads can share
it and a parent's times are not disturbed by its children: folders, first names, further names (hard
links), then the folders' own attributes. Of one entry the owner goes first (chown clears setuid and
``security.capability``), then the mode, the xattrs (an ACL would be rewritten by chmod), the times.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from layerkit.linux.folders.walk import xattr_path
from layerkit.linux.syscalls import CLONE_FS, FOLDER, opened
from layerkit.metaonly import METACOPY, METACOPY_EMPTY, REDIRECT, MetadataLayer
from layerkit.model.entry import Kind, XattrSet
from layerkit.model.errors import InvalidImage, LayerkitError, LossyResult, StoreError, UnsupportedHost, show_path
from layerkit.model.ports import Progress
from layerkit.model.tree import Tree

_ROWS_AT_ONCE = 1024
_OPEN_FOLDERS = 64
_THREADS_AT_MOST = 4
_SECOND = 1_000_000_000
# Longer symlink targets do not lie in an ext4 or xfs inode and take a block.
_FAST_SYMLINK_BYTES = 59
_ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Written(NamedTuple):
    """What was written.

    Attributes:
        entries: names, the root included.
        allocated: bytes of blocks, as ``du`` counts them; the inodes themselves are not in it.
    """

    entries: int
    allocated: int


class Advice(NamedTuple):
    """The words in which an error speaks of what is written.

    Attributes:
        what: the name of the work, for progress.
        whole: what the folder becomes, as ``a metadata layer``.
        elsewhere: what to do where the filesystem cannot hold an entry.
        room: what to do where it is full.
    """

    what: str
    whole: str
    elsewhere: str
    room: str


class StepFailed(Exception):
    """What a :class:`Filler` raises for an error of the kernel: the verb phrase of the step, and the error."""

    def __init__(self, step: str, error: OSError) -> None:
        """``step`` is as ``set the size of``."""
        super().__init__(step, error)
        self.step, self.error = step, error


class Filler(Protocol):
    """Puts into new, empty regular files what they are to hold; used by several threads at once.

    Attributes:
        alike: all files without xattrs of their own take the same blocks, whatever their size.
    """

    alike: bool

    def begin(self, inodes: NDArray[np.integer]) -> Callable[[int, int, int], None]:
        """Return a function that is called as (descriptor, inode, size) for each of ``inodes`` in order.

        They are the regular files of some rows that are not empty. It raises :class:`StepFailed`, or an error
        of ours.
        """
        ...


def check_names(tree: Tree) -> None:
    """Refuse names that are more or less than one path component, whoever made the tree."""
    split = b"/" in tree.name.blob or b"\0" in tree.name.blob
    short = np.flatnonzero(tree.name.lengths[1:] <= 2) + 1
    for row in range(1, len(tree)) if split else short.tolist():
        name = tree.name[row]
        if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
            raise InvalidImage(f"tree: row {row} has the name {name!r}, which is no path component")


def _pieces(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        yield rows[start : start + _ROWS_AT_ONCE]


def _by_parent(tree: Tree, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ``rows`` with all names of one folder side by side, folders in canonical order."""
    return rows[np.argsort(tree.parent[rows], kind="stable")]


class _Folders(contextlib.AbstractContextManager["_Folders"]):
    """Descriptors of the folders in use, by row; a bounded number, however deep the tree is."""

    def __init__(self, tree: Tree, root: int) -> None:
        self._tree, self._root = tree, root
        self._open: dict[int, int] = {}

    def __getitem__(self, row: int) -> int:
        missing = []
        while row and row not in self._open:
            missing.append(row)
            row = int(self._tree.parent[row])
        fd = self._root
        if row:
            # Moved to the end: the first one is then the one that was not used for longest.
            fd = self._open[row] = self._open.pop(row)
        for row in reversed(missing):
            fd = self._open[row] = os.open(self._tree.name[row], FOLDER, dir_fd=fd)
            if len(self._open) > _OPEN_FOLDERS:
                os.close(self._open.pop(next(iter(self._open))))
        return fd

    def __exit__(self, *_: object) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()


class FolderWriter:
    """One run: the tree, the root's descriptor, and what all passes share."""

    def __init__(
        self, tree: Tree, root: int, filler: Filler, advice: Advice, progress: Progress | None = None
    ) -> None:
        """Write ``tree`` into the empty folder that ``root`` is a descriptor of.

        Args:
            tree: its ids are those that this process passes to chown.
            root: becomes the root directory.
            filler: makes the content of regular files.
            advice: what errors tell people to do.
            progress: called as (advice.what, entries done, entries in all).

        Raises:
            InvalidImage: a name that is no path component.
        """
        check_names(tree)
        self.tree, self.root, self.filler, self.advice, self.progress = tree, root, filler, advice, progress
        # A user without privileges cannot set user xattrs on a file that it may not write: the mode goes last.
        self.owner_bits = 0o200 if os.geteuid() else 0
        # Blocks of a file without xattrs of its own, by whether it is empty: of files that are alike one is asked.
        self.bytes_of_plain: dict[bool, int] = {}
        self.done = 0
        self.here = threading.local()

    def write(self, threads: int | None = None) -> Written:
        """Write everything; what is there on an error stays there.

        Args:
            threads: how many to use; by default one per processor, at most four.

        Raises:
            LossyResult: the filesystem, or a process without privileges, cannot hold an entry exactly.
            StoreError: the folder is not empty, or the disk is full.
        """
        tree = self.tree
        self._prepare_root()
        self._check_times()
        is_folder = tree.kind[tree.inode] == Kind.DIR
        first_name = tree.first_name()
        is_first = np.zeros(len(tree), np.bool_)
        is_first[first_name] = True
        folders = np.flatnonzero(is_folder)
        self._make_folders(folders[1:])
        allocated = self._make_files(_by_parent(tree, np.flatnonzero(is_first & ~is_folder)), threads)
        self._make_links(_by_parent(tree, np.flatnonzero(~is_first)), first_name)
        # Children first: a user without privileges may be shut out of a folder once it has its mode.
        allocated += self._finish_folders(folders[::-1])
        return Written(len(tree), allocated)

    def _explain(self, error: OSError, step: str, row: int) -> LayerkitError:
        """Return what the kernel's refusal to ``step`` (a verb phrase, as ``chown``) the name ``row`` means."""
        code = error.errno
        tree, advice = self.tree, self.advice
        inode, path = int(tree.inode[row]), tree.path(row)
        is_xattr = step.startswith("set the xattr ")
        said = f"cannot {step} it: {os.strerror(code or 0)}"
        # ext4 says "no space" where an inode's xattrs are more than one block, however empty the disk is.
        full = code == errno.EDQUOT or (
            code == errno.ENOSPC and not (is_xattr and os.fstatvfs(self.root).f_bavail > 256)
        )
        if full:
            return StoreError(f"{show_path(path) or '/'}: {said}; {advice.room}")
        if code == errno.EPERM and step == "create" and tree.mode[inode] >> 12 in (Kind.CHAR, Kind.BLOCK):
            return LossyResult(path, "a process without privileges cannot make device nodes; run as root")
        if code in (errno.EPERM, errno.EINVAL) and step == "chown":
            owner = f"{tree.uid[inode]}:{tree.gid[inode]}"
            return LossyResult(
                path, f"this process may not give files to {owner}; take a map to ids that its user namespace holds"
            )
        if is_xattr and code in (errno.EPERM, errno.EACCES):
            return LossyResult(path, f"{said}; only a privileged process may set it: run as root")
        if is_xattr and code in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSPC, errno.E2BIG, errno.ERANGE):
            return LossyResult(path, f"{said}; {advice.elsewhere}")
        if code in (errno.EFBIG, errno.EMLINK, errno.ENAMETOOLONG, errno.EILSEQ, errno.EOVERFLOW):
            return LossyResult(path, f"{said}; {advice.elsewhere}")
        return StoreError(f"{show_path(path) or '/'}: {said}")

    def _report(self, rows: int) -> None:
        self.done += rows
        if self.progress is not None:
            self.progress(self.advice.what, self.done, len(self.tree))

    def _prepare_root(self) -> None:
        if os.listdir(self.root):
            raise StoreError(f"the folder for {self.advice.whole} is not empty; give a new one")
        os.fchmod(self.root, 0o700)
        for name in _ACLS:  # a default ACL would be inherited by every entry
            with contextlib.suppress(OSError):
                os.removexattr(self.root, name)

    def _check_times(self) -> None:
        """Refuse times that the filesystem would cut off: it does so in silence."""
        tree = self.tree
        inodes = [int(np.argmin(tree.mtime)), int(np.argmax(tree.mtime))]
        fractions, at = np.unique(tree.mtime_ns, return_index=True)
        # One odd nanosecond that survives says that all do.
        odd = at[fractions % 2 != 0]
        inodes += [int(odd[0])] if len(odd) else at.tolist()
        for inode in inodes:
            want = int(tree.mtime[inode]) * _SECOND + int(tree.mtime_ns[inode])
            kept = None
            with contextlib.suppress(OSError, OverflowError):
                os.utime(self.root, ns=(want, want))
                kept = os.fstat(self.root).st_mtime_ns
            if kept != want:
                raise LossyResult(
                    tree.inode_path(inode),
                    f"this filesystem cannot hold its modification time, {want} ns from 1970; "
                    f"{self.advice.elsewhere}",
                )

    def _make_folders(self, rows: NDArray[np.int64]) -> None:
        tree = self.tree
        with _Folders(tree, self.root) as folders:
            for piece in _pieces(rows):
                parents, names = tree.parent[piece].tolist(), tree.name.take(piece).tolist()
                for row, parent, name in zip(piece.tolist(), parents, names, strict=True):
                    try:
                        os.mkdir(name, 0o700, dir_fd=folders[parent])
                    except OSError as error:
                        raise self._explain(error, "create", row) from error

    def _make_files(self, rows: NDArray[np.int64], threads: int | None) -> int:
        threads, allocated = threads or min(_THREADS_AT_MOST, len(os.sched_getaffinity(0))), 0
        pieces = list(_pieces(rows))
        # Threads even if one is enough: a thread can have a umask of its own, a process must not change it.
        with ThreadPoolExecutor(threads, "layerkit-write", self._start_thread) as pool:
            try:
                for piece, used in zip(pieces, pool.map(self._make_piece, pieces), strict=True):
                    allocated += used
                    self._report(len(piece))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return allocated

    def _start_thread(self) -> None:
        # Some containers forbid unshare; then every mode is set by chmod.
        self.here.exact_modes = ctypes.CDLL(None).unshare(CLONE_FS) == 0
        if self.here.exact_modes:
            os.umask(0)

    def _make_piece(self, rows: NDArray[np.int64]) -> int:
        """Make the first names ``rows`` of what is no folder; return the bytes allocated."""
        tree, root, exact = self.tree, self.root, self.here.exact_modes
        owner_bits, sets, alike = self.owner_bits, tree.xattr_sets, self.filler.alike
        inodes = tree.inode[rows]
        fill = self.filler.begin(inodes[(tree.kind[inodes] == Kind.REG) & (tree.size[inodes] > 0)])
        # Lists, not arrays: Python reads their items several times faster.
        columns = (tree.parent[rows], inodes, *(
            c[inodes] for c in (tree.mode, tree.uid, tree.gid, tree.size, tree.mtime, tree.mtime_ns, tree.xattr)
        ))  # fmt: skip
        below, folder, allocated = -1, -1, 0
        row, step = int(rows[0]), ""
        try:
            with _Folders(tree, root) as folders:
                for row, name, parent, inode, mode, uid, gid, size, sec, ns, xattr in zip(
                    rows.tolist(), tree.name.take(rows).tolist(), *(c.tolist() for c in columns), strict=True
                ):
                    step = "open the folder of"
                    if parent != below:
                        below, folder = parent, folders[parent]
                    when = sec * _SECOND + ns
                    if mode >> 12 != Kind.REG:
                        allocated += self._make_special(row, folder, name, when)
                        continue
                    perm = mode & 0o7777
                    step = "create"
                    fd = os.open(name, _NEW_FILE, perm & 0o777 | owner_bits, dir_fd=folder)
                    try:
                        if size:
                            fill(fd, inode, size)
                        step = "chown"
                        os.fchown(fd, uid, gid)
                        if xattr or not exact or perm & 0o7000 or perm | owner_bits != perm:
                            self._set_mode_and_xattrs(fd, row, perm, sets[xattr])
                        step = "set the times of"
                        os.utime(fd, ns=(when, when))
                        if xattr or not alike:
                            allocated += _blocks(fd)
                        else:
                            kind = size > 0
                            if kind not in self.bytes_of_plain:
                                self.bytes_of_plain[kind] = _blocks(fd)
                            allocated += self.bytes_of_plain[kind]
                    finally:
                        os.close(fd)
        except StepFailed as failed:
            raise self._explain(failed.error, failed.step, row) from failed.error
        except OSError as error:
            raise self._explain(error, step, row) from error
        return allocated

    def _set_mode_and_xattrs(self, fd: int, row: int, perm: int, pairs: XattrSet) -> None:
        step = "chmod"
        try:
            if not self.owner_bits:
                os.fchmod(fd, perm)
            for key, value in pairs:
                step = "set the xattr " + show_path(key) + " of"
                os.setxattr(fd, key, value)
            if self.owner_bits:
                step = "chmod"
                os.fchmod(fd, perm)
        except OSError as error:
            raise self._explain(error, step, row) from error

    def _make_special(self, row: int, folder: int, name: bytes, when: int) -> int:
        """Make a symlink, fifo or device; return the bytes allocated."""
        tree = self.tree
        inode = int(tree.inode[row])
        mode = int(tree.mode[inode])
        step, perm = "create", mode & 0o7777
        try:
            if mode >> 12 == Kind.SYMLINK:
                os.symlink(tree.targets[int(tree.target[inode])], name, dir_fd=folder)
            else:
                device = os.makedev(int(tree.major[inode]), int(tree.minor[inode]))
                os.mknod(name, mode & ~0o7777 | 0o600, device, dir_fd=folder)
            step = "chown"
            os.chown(name, int(tree.uid[inode]), int(tree.gid[inode]), dir_fd=folder, follow_symlinks=False)
            if mode >> 12 != Kind.SYMLINK:
                step = "chmod"
                os.chmod(name, perm, dir_fd=folder)
            for key, value in tree.xattr_sets[int(tree.xattr[inode])]:
                # There is no setxattrat before Linux 6.13; the folder's descriptor has a path all the same.
                step = "set the xattr " + show_path(key) + " of"
                os.setxattr(xattr_path(folder, name), key, value, follow_symlinks=False)
            step = "set the times of"
            os.utime(name, ns=(when, when), dir_fd=folder, follow_symlinks=False)
            if not tree.xattr[inode] and int(tree.size[inode]) <= _FAST_SYMLINK_BYTES:
                return 0
            return os.stat(name, dir_fd=folder, follow_symlinks=False).st_blocks * 512
        except OSError as error:
            raise self._explain(error, step, row) from error

    def _make_links(self, rows: NDArray[np.int64], first_name: NDArray[np.int64]) -> None:
        tree = self.tree
        with _Folders(tree, self.root) as old, _Folders(tree, self.root) as new:
            for piece in _pieces(rows):
                for row, source in zip(piece.tolist(), first_name[tree.inode[piece]].tolist(), strict=True):
                    try:
                        there, here = old[int(tree.parent[source])], new[int(tree.parent[row])]
                        names = tree.name[source], tree.name[row]
                        os.link(*names, src_dir_fd=there, dst_dir_fd=here, follow_symlinks=False)
                    except OSError as error:
                        raise self._explain(error, "make a hard link of", row) from error
                self._report(len(piece))

    def _finish_folders(self, rows: NDArray[np.int64]) -> int:
        tree, allocated = self.tree, 0
        with _Folders(tree, self.root) as folders:
            for piece in _pieces(rows):
                inodes = tree.inode[piece]
                columns = (tree.mode, tree.uid, tree.gid, tree.mtime, tree.mtime_ns, tree.xattr)
                for row, mode, uid, gid, sec, ns, xattr in zip(
                    piece.tolist(), *(c[inodes].tolist() for c in columns), strict=True
                ):
                    step, when = "open", sec * _SECOND + ns
                    try:
                        fd = folders[row]
                        step = "chown"
                        os.fchown(fd, uid, gid)
                        self._set_mode_and_xattrs(fd, row, mode & 0o7777, tree.xattr_sets[xattr])
                        step = "set the times of"
                        os.utime(fd, ns=(when, when))
                        allocated += _blocks(fd)
                    except OSError as error:
                        raise self._explain(error, step, row) from error
                self._report(len(piece))
        return allocated


def _blocks(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


# A metadata layer as a folder: stubs with xattrs that point at the data

_STUB_ADVICE = Advice(
    what="directory",
    whole="a metadata layer",
    elsewhere="use the EROFS rendering, or a store on another filesystem",
    room="make room, or put the store on a larger filesystem",
)
_NO_XATTRS = (errno.EOPNOTSUPP, errno.EPERM, errno.EACCES)


def write_directory(
    meta: MetadataLayer, root: Path | int, *, progress: Progress | None = None, threads: int | None = None
) -> Written:
    """Write ``meta`` into the empty folder ``root``, which becomes the layer's root directory.

    Nothing is flushed to the disk, and a folder partly written is left where it is on an error: the caller
    knows whether to keep either.

    Args:
        meta: what to write; its ids are those that this process passes to chown.
        root: a folder or a descriptor of one; a path that does not exist is made.
        progress: called as ("directory", entries done, entries in all).
        threads: how many to use; by default one per processor, at most four.

    Raises:
        LossyResult: the folder's filesystem, or a process without privileges, cannot hold an entry exactly.
        StoreError: ``root`` is not empty, or the disk is full.
        UnsupportedHost: the filesystem, or the process, has no xattrs of the layer's namespace.
        InvalidImage: a name that is no path component.
    """
    check_names(meta.tree)
    if not isinstance(root, int):
        root.mkdir(mode=0o700, exist_ok=True)
        with opened(root, FOLDER) as fd:
            return write_directory(meta, fd, progress=progress, threads=threads)
    return FolderWriter(meta.tree, root, _Stubs(meta), _STUB_ADVICE, progress).write(threads)


class _Stubs:
    """Fills a file with nothing but its size and the xattrs of a stub."""

    alike = True

    def __init__(self, meta: MetadataLayer) -> None:
        self._meta = meta

    def begin(self, inodes: NDArray[np.integer]) -> Callable[[int, int, int], None]:
        places = iter(self._meta.redirect_list(inodes))
        redirect, metacopy = map(self._meta.namespace.xattr, (REDIRECT, METACOPY))

        def fill(fd: int, inode: int, size: int) -> None:
            place = next(places)
            step = "set the size of"
            try:
                os.ftruncate(fd, size)
                step = "set the redirect of"
                if place:
                    os.setxattr(fd, redirect, place)
                os.setxattr(fd, metacopy, METACOPY_EMPTY)
            except OSError as error:
                if step == "set the redirect of" and error.errno in _NO_XATTRS:
                    raise UnsupportedHost(
                        f"{self._meta.namespace.value} xattrs to this process on the filesystem of the store",
                        "trusted xattrs need CAP_SYS_ADMIN outside of user namespaces: without it, take the "
                        "user namespace",
                    ) from error
                raise StepFailed(step, error) from error

        return fill
