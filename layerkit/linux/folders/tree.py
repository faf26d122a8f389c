"""A folder on disk as a tree: what lstat, xattrs and the files themselves say, by descriptors only."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace

from layerkit.idmap import Mapping
from layerkit.idmap import apply as apply_map
from layerkit.linux.folders.host_xattrs import _belongs_to_image
from layerkit.linux.folders.writer import FOLDER
from layerkit.model.digest import Digest
from layerkit.model.entry import Entry, Extent, Kind, XattrSet
from layerkit.model.errors import InvalidImage, LossyResult, show_path
from layerkit.model.index import Index
from layerkit.model.limits import Limits
from layerkit.model.ports import Progress
from layerkit.model.tree import Tree
from layerkit.model.trees.as_kept import as_kept
from layerkit.model.trees.merge import merge

_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_PIECE_BYTES = 1 << 20
_ROWS_PER_REPORT = 1024
_SECOND = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder that was read.

    Attributes:
        tree: with the ids that the disk has. Content references mean nothing: bytes are read by path.
        hashed_bytes: how much was read to find digests.
        warnings: what was left out.
    """

    tree: Tree
    hashed_bytes: int
    warnings: tuple[str, ...]


def read_folder(
    root: int, base: Tree, *, checksum: bool, limits: Limits, progress: Progress | None = None
) -> Folder:
    """Return what the folder that ``root`` is a descriptor of holds.

    A file whose size and time are those of the same path in ``base`` is taken to have its content too, as
    rsync does, unless ``checksum`` asks for all to be read.

    Raises:
        LossyResult: another filesystem is mounted in it.
        InvalidImage: a file changed while it was read.
    """
    return _Reader(root, base, checksum, limits, progress).run()


class _Reader:
    def __init__(self, root: int, base: Tree, checksum: bool, limits: Limits, progress: Progress | None) -> None:
        self._root, self._base, self._checksum, self._limits = root, base, checksum, limits
        self._progress = progress
        self._known = {} if checksum else {path: row for row, path in enumerate(base.paths())}
        self._device = os.fstat(root).st_dev
        self._first: dict[int, bytes] = {}
        self._warnings: list[str] = []
        self._hashed = 0

    def run(self) -> Folder:
        entries = [self._entry(b"", os.fstat(self._root), self._root, b".")]
        waiting = [b""]
        while waiting:
            path = waiting.pop()
            with opened(self._root, path, FOLDER) as folder:
                for name in sorted(map(os.fsencode, os.listdir(folder))):
                    st = os.stat(name, dir_fd=folder, follow_symlinks=False)
                    below = path + b"/" + name if path else name
                    if stat.S_ISSOCK(st.st_mode):
                        self._warnings.append(f"{show_path(below)}: a socket, which no layer can hold: left out")
                        continue
                    if st.st_dev != self._device:
                        raise LossyResult(below, "another filesystem is mounted here; unmount it first")
                    entries.append(self._entry(below, st, folder, name))
                    if stat.S_ISDIR(st.st_mode):
                        waiting.append(below)
                    if self._progress is not None and len(entries) % _ROWS_PER_REPORT == 0:
                        self._progress("reading the folder", len(entries), 0)
        tree = merge([Index.of(entries, Digest.of(b""))], limits=self._limits)
        return Folder(tree, self._hashed, tuple(self._warnings))

    def _entry(self, path: bytes, st: os.stat_result, folder: int, name: bytes) -> Entry:
        kind = Kind(st.st_mode >> 12)
        if kind is not Kind.DIR and st.st_nlink > 1:
            first = self._first.setdefault(st.st_ino, path)
            if first != path:
                return Entry(path, Kind.HARDLINK, link=first)
        device = kind in (Kind.CHAR, Kind.BLOCK)
        seconds, nanoseconds = divmod(st.st_mtime_ns, _SECOND)
        sha256, sparse = b"", None
        if kind is Kind.REG:
            sha256, sparse = self._content(path, st, folder, name)
        return Entry(
            path,
            kind,
            perm=st.st_mode & 0o7777,
            uid=st.st_uid,
            gid=st.st_gid,
            mtime=seconds,
            mtime_ns=nanoseconds,
            size=st.st_size if kind is Kind.REG else 0,
            major=os.major(st.st_rdev) if device else 0,
            minor=os.minor(st.st_rdev) if device else 0,
            link=os.readlink(name, dir_fd=folder) if kind is Kind.SYMLINK else b"",
            xattrs=_xattrs(folder, name),
            offset=0 if st.st_size and kind is Kind.REG else -1,
            sha256=sha256,
            sparse=sparse,
        )

    def _content(
        self, path: bytes, st: os.stat_result, folder: int, name: bytes
    ) -> tuple[bytes, tuple[Extent, ...] | None]:
        base, holes = self._base, st.st_blocks * 512 < st.st_size
        row = self._known.get(path, -1)
        i = int(base.inode[row]) if row >= 0 else 0
        known = (
            row >= 0
            and base.mode[i] >> 12 == Kind.REG
            and int(base.size[i]) == st.st_size
            and int(base.mtime[i]) * _SECOND + int(base.mtime_ns[i]) == st.st_mtime_ns
        )
        if known and not holes:
            return base.sha256[i].tobytes(), None
        fd = os.open(name, _FILE, dir_fd=folder)
        try:
            sparse = _runs(fd, st.st_size) if holes else None
            if known:
                return base.sha256[i].tobytes(), sparse
            os.lseek(fd, 0, os.SEEK_SET)
            with open(fd, "rb", closefd=False) as file:
                digest = hashlib.file_digest(file, "sha256").digest()
            now = os.fstat(fd)
            if (now.st_size, now.st_mtime_ns, now.st_ino) != (st.st_size, st.st_mtime_ns, st.st_ino):
                raise changed(path)
            self._hashed += st.st_size
            return digest, sparse
        finally:
            os.close(fd)


def changed(path: bytes) -> InvalidImage:
    """Return the error for a file whose content is not what it was taken for."""
    return InvalidImage(
        f"{show_path(path)}: its content changed while it was read, or without its size and time; "
        "stop what writes to the folder, and use --checksum"
    )


@contextlib.contextmanager
def opened(root: int, path: bytes, flags: int) -> Iterator[int]:
    """Give a descriptor of ``path`` below ``root``, opened one component at a time and through no link."""
    fd = os.dup(root)
    parts = path.split(b"/") if path else []
    try:
        for place, part in enumerate(parts, 1):
            above = fd
            try:
                fd = os.open(part, flags if place == len(parts) else FOLDER, dir_fd=above)
            finally:
                os.close(above)
    except OSError as error:
        # The loop has closed what it had; only a path without parts could not fail.
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
            raise changed(path) from error
        raise
    try:
        yield fd
    finally:
        os.close(fd)


def read_runs(root: int, entry: Entry) -> Iterator[memoryview]:
    """Yield the stored bytes of a regular file, run after run.

    Raises:
        InvalidImage: they are not what ``entry`` says.
    """
    with opened(root, entry.path, _FILE) as fd:
        digest = hashlib.sha256()
        for start, length in ((0, entry.size),) if entry.sparse is None else entry.sparse:
            while length:
                piece = os.pread(fd, min(length, _PIECE_BYTES), start)
                if not piece:
                    raise changed(entry.path)
                digest.update(piece)
                start, length = start + len(piece), length - len(piece)
                yield memoryview(piece)
        # The digest of a sparse file is that of its holes too.
        if entry.sparse is None and digest.digest() != entry.sha256:
            raise changed(entry.path)


def _xattrs(folder: int, name: bytes) -> XattrSet:
    # The calls on a descriptor would open devices and fifos; there is no llistxattrat before Linux 6.13.
    path = b"/proc/self/fd/%d/%b" % (folder, name)
    try:
        names = [os.fsencode(text) for text in os.listxattr(path, follow_symlinks=False)]
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return ()
        raise
    return tuple(
        sorted((key, os.getxattr(path, key, follow_symlinks=False)) for key in names if _belongs_to_image(key))
    )


def _runs(fd: int, size: int) -> tuple[Extent, ...] | None:
    """Return the runs of data of a file, None if it has no holes."""
    runs, end = list[Extent](), 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            raise
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        if start < size:
            runs.append((start, end - start))
    return None if runs == [(0, size)] else tuple(runs)


def as_on_disk(tree: Tree, mapping: Mapping | None) -> Tree:
    """Return ``tree`` (with container ids) as it reads back from a disk that it was unpacked to.

    The kernel keeps an ACL that says no more than the mode as the mode alone, and has one spelling for
    capabilities. Ids stay container ids; those that ``mapping`` would lose are refused.

    Raises:
        UnmappedId: ``mapping`` does not cover an owner.
        UsageError: ``mapping`` has no inverse.
        LossyResult: an ACL that the kernel refuses.
    """
    there = mapping or Mapping.identity()
    tree = apply_map(tree, there)
    tree = apply_map(tree, there.inverse())
    tree = as_kept(tree)
    sets = (tuple(pair for pair in pairs if _belongs_to_image(pair[0])) for pairs in tree.xattr_sets)
    return replace(tree, xattr_sets=tuple(sets))
