"""A folder on disk as an index: a layer that a runtime has unpacked, or a root filesystem, read as it is.

One pass over the names (getdents, stat, xattrs), and nothing is written. Of a *layer* no file's bytes are read:
the index has attributes, and no content digests. What overlayfs acts on becomes the rows that a layer's tar would
have had (Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories"): a character device 0:0 and
an empty file with ``overlay.whiteout`` are WHITEOUT rows, a folder with ``overlay.opaque=y`` an OPAQUE one, in the
``trusted.`` namespace or in ``user.`` (layers that an ordinary user unpacked). containers-storage with a mount
program writes ``.wh.NAME`` files instead. The overlay's other private xattrs are not content and are left out;
``overlay.overlay.X`` is content, and is shown as ``overlay.X``. In a *root filesystem* nothing stands for
something else, and files are read for their digests.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import stat
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from layerkit.idmap import Mapping
from layerkit.idmap import apply as apply_map
from layerkit.linux.folders.walk import FILE, open_below, walk, xattr_names, xattr_path
from layerkit.linux.syscalls import CLONE_FS, closing, opened
from layerkit.metaonly import METACOPY, OPAQUE, REDIRECT, WHITEOUT, YES, is_whiteout, own_mark, unescaped
from layerkit.model.digest import Digest
from layerkit.model.entry import OPAQUE_NAME, WHITEOUT_PREFIX, Entry, Extent, Kind, XattrSet
from layerkit.model.errors import InvalidImage, LossyResult, show_path
from layerkit.model.index import Index, path_key
from layerkit.model.limits import DEFAULT, Limits
from layerkit.model.ports import Progress
from layerkit.model.sparse import SparseMaps
from layerkit.model.strings import Strings
from layerkit.model.tree import Tree
from layerkit.model.trees.as_kept import as_kept
from layerkit.model.trees.merge import merge

_SECOND = 1_000_000_000
_PIECE_BYTES = 1 << 20
_KEPT = (b"user.", b"trusted.", b"security.", b"system.posix_acl_")
_OF_THE_HOST = (b"security.selinux", b"security.ima", b"security.evm", b"security.apparmor", b"trusted.SGI_")
"""Labels that the host gives by its own rules, and the second names under which xfs shows ACLs."""

_OF_FUSE_OVERLAYFS = (b"user.fuseoverlayfs.", b"user.containers.override_stat")
_SOCKET = stat.S_IFSOCK >> 12
_STAT_FIELDS = 7  # mode, ino, dev, nlink, uid, gid, size: the head of a stat_result

_Found = tuple[bytes, tuple[Extent, ...] | None]
"""The sha256 and the runs of data of a file, None for one without holes."""
_Content = Callable[[bytes, os.stat_result, int, bytes], _Found]
"""Called as (path, stat, descriptor of its folder, name)."""


class Marks(StrEnum):
    """How the runtime that unpacked a layer wrote what the layer removes."""

    OVERLAY = "overlay"
    """Devices 0:0 and xattrs, as the kernel does."""
    AUFS = "aufs"
    """``.wh.NAME`` files besides: containers-storage with a mount program, and what is unpacked plainly."""
    NONE = "none"
    """No layer but a root filesystem: every name and xattr stands for itself."""


@dataclass(frozen=True, slots=True)
class LayerFolder:
    """A folder that a runtime unpacked a layer into.

    Attributes:
        path: the folder whose entries are the layer's.
        marks: how deletions are written in it.
        name: what the runtime calls the layer, for messages.
    """

    path: Path
    marks: Marks = Marks.OVERLAY
    name: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class FolderLayer:
    """A layer folder that was read.

    Attributes:
        index: its rows. ``sha256`` is all zeros and ``offset`` 0 for a file that is not empty: the bytes lie in
            the folder under the row's path. ``diff_id`` stands for the folder in the state that was read.
        state: digest of the folders in it (inode, times of change): see :func:`read_state`.
        metacopy: path of a file of the runtime's own metadata-only copy, None where there is none. Its data
            lies in another layer, so the folder is no place to read data from.
    """

    index: Index
    state: bytes
    metacopy: bytes | None


@dataclass(frozen=True, slots=True)
class Rootfs:
    """A root filesystem that was read.

    Attributes:
        tree: with the ids that the disk has. Content references mean nothing: bytes are read by path.
        hashed_bytes: how much was read to find digests.
        warnings: what was left out.
    """

    tree: Tree
    hashed_bytes: int
    warnings: tuple[str, ...]


def index_layer_folder(
    folder: Path | int, *, marks: Marks = Marks.OVERLAY, limits: Limits = DEFAULT, progress: Progress | None = None
) -> FolderLayer:
    """Return the index of an unpacked layer.

    Args:
        folder: its path or a descriptor.
        marks: how deletions are written.
        limits: bounds on entries.
        progress: called as ("reading the folder", entries, 0).

    Raises:
        LossyResult: another filesystem is mounted in it.
        InvalidImage: it holds directories that overlayfs has moved (``overlay.redirect``), which only the
            runtime's own mount can resolve.
        OSError: it cannot be read.
    """
    rows = _Rows(marks, limits, progress)
    # A thread of its own may have its own working folder, so that names are looked up in one step.
    with ThreadPoolExecutor(1, "layerkit-read") as pool:
        pool.submit(rows.read, folder, own_thread=True).result()
    index, state = rows.index()
    return FolderLayer(index, state, rows.metacopy)


def read_rootfs(
    root: int, base: Tree, *, checksum: bool, limits: Limits, progress: Progress | None = None
) -> Rootfs:
    """Return what the root filesystem that ``root`` is a descriptor of holds.

    A file whose size and time are those of the same path in ``base`` is taken to have its content too, as
    rsync does, unless ``checksum`` asks for all to be read.

    Raises:
        LossyResult: another filesystem is mounted in it.
        InvalidImage: a file changed while it was read.
    """
    contents = _Contents(base, checksum)
    rows = _Rows(Marks.NONE, limits, progress, contents.find)
    rows.read(root)
    tree = merge([rows.index()[0]], limits=limits)
    return Rootfs(tree, contents.hashed_bytes, tuple(rows.warnings))


class _Rows:
    """What one pass over a folder found, row by row in the order of the disk."""

    def __init__(
        self, marks: Marks, limits: Limits, progress: Progress | None, content: _Content | None = None
    ) -> None:
        self.marks, self.limits, self.progress, self.content = marks, limits, progress, content
        self.paths: list[bytes] = []
        self.stats, self.mtimes = array("Q"), array("q")
        self.xattrs: dict[int, XattrSet] = {}
        self.links: dict[int, bytes] = {}
        self.devices: dict[int, int] = {}
        self.contents: dict[int, _Found] = {}
        self.folders: dict[bytes, tuple[int, int, int, int]] = {}  # row, inode, times of modification and change
        self.whiteouts: dict[bytes, int] = {}
        self.opaque: set[int] = set()
        self.hidden: list[int] = []
        self.warnings: list[str] = []
        self.metacopy: bytes | None = None

    def read(self, top: Path | int, *, own_thread: bool = False) -> None:
        private = own_thread and ctypes.CDLL(None).unshare(CLONE_FS) == 0  # some containers forbid it
        paths, stats, mtimes, content = self.paths, self.stats, self.mtimes, self.content
        aufs, device = self.marks is Marks.AUFS, -1
        for number, folder in enumerate(walk(top)):
            if private:
                os.fchdir(folder.fd)
            prefix = b"" if private else xattr_path(folder.fd, b"")
            above, names = folder.below(b""), folder.names
            if not number:
                top_stat = os.fstat(folder.fd)
                device, names = top_stat.st_dev, chain([(b"", top_stat)], names)
            for name, st in names:
                row, path, kind = len(paths), above + name, st.st_mode >> 12
                paths.append(path)
                stats.extend(st[:_STAT_FIELDS])  # type: ignore[arg-type]  # whole numbers all
                mtimes.append(st.st_mtime_ns)
                if st.st_dev != device:
                    raise LossyResult(path, "another filesystem is mounted here; unmount it first")
                at = prefix + (name or b".")
                if kind == Kind.DIR:
                    self.folders[path] = row, st.st_ino, st.st_mtime_ns, st.st_ctime_ns
                elif kind != Kind.REG:
                    self._take_special(row, st, at)
                elif content is not None:
                    self.contents[row] = content(path, st, folder.fd, name)
                if found := xattr_names(at):
                    self._take_xattrs(row, found, at)
                if aufs and name.startswith(WHITEOUT_PREFIX):
                    self._take_aufs(row, folder.path, name)
            if self.progress is not None and number % 64 == 0:
                self.progress("reading the folder", len(paths), 0)
        self.limits.check("entries_per_layer", len(paths), "layer folder")

    def _take_special(self, row: int, st: os.stat_result, at: bytes) -> None:
        kind = st.st_mode >> 12
        if kind == Kind.SYMLINK:
            self.links[row] = os.readlink(at)
        elif is_whiteout(st.st_mode, st.st_rdev) and self.marks is not Marks.NONE:
            self._take_whiteout(row)
        elif kind in (Kind.CHAR, Kind.BLOCK):
            self.devices[row] = st.st_rdev
        elif kind == _SOCKET:
            self.hidden.append(row)
            self.warnings.append(f"{show_path(self.paths[row])}: a socket, which no layer can hold: left out")

    def _take_whiteout(self, row: int) -> None:
        if self.whiteouts.setdefault(self.paths[row], row) != row:
            self.hidden.append(row)

    def _take_xattrs(self, row: int, found: list[str], at: bytes) -> None:
        pairs, is_layer = [], self.marks is not Marks.NONE
        for text in found:
            key = os.fsencode(text)
            if is_layer:
                mark = own_mark(key)
                if mark is not None:
                    self._take_mark(row, mark, at, text)
                    continue
                if key.startswith(_OF_FUSE_OVERLAYFS):
                    self._take_fuse(row, key)
                    continue
            if belongs_to_image(key):
                value = os.getxattr(at, text, follow_symlinks=False)
                pairs.append((unescaped(key) if is_layer else key, value))
        if pairs:
            self.xattrs[row] = tuple(sorted(pairs))

    def _take_mark(self, row: int, mark: bytes, at: bytes, text: str) -> None:
        kind, size = self.stats[row * _STAT_FIELDS] >> 12, self.stats[row * _STAT_FIELDS + 6]
        if mark == OPAQUE and kind == Kind.DIR:
            if os.getxattr(at, text, follow_symlinks=False) == YES:
                self.opaque.add(row)
        elif mark == WHITEOUT and kind == Kind.REG and size == 0:
            self._take_whiteout(row)
        elif mark == REDIRECT and kind == Kind.DIR:
            raise InvalidImage(
                f"{show_path(self.paths[row])}: overlayfs moved this folder (overlay.redirect): what it shows lies "
                "elsewhere; unmount, and have the runtime unpack the image anew without redirect_dir=on"
            )
        elif mark == METACOPY and kind == Kind.REG and self.metacopy is None:
            self.metacopy = self.paths[row]

    def _take_fuse(self, row: int, key: bytes) -> None:
        if key.endswith(b".opaque"):
            self.opaque.add(row)
        elif key.endswith(b".override_stat"):
            raise InvalidImage(
                f"{show_path(self.paths[row])}: its owner and mode are in the xattr {show_path(key)} (force_mask "
                "of containers-storage), not in the file; such a store cannot be adopted"
            )

    def _take_aufs(self, row: int, folder: bytes, name: bytes) -> None:
        bare = name[len(WHITEOUT_PREFIX) :]
        if name == OPAQUE_NAME:
            self.opaque.add(self.folders[folder][0])
            self.hidden.append(row)
            return
        if bare in (b"", b".", b".."):
            raise InvalidImage(f"{show_path(name)}: a deletion of nothing; no layer has one")
        # Its row belongs where the name without the prefix stands.
        self.paths[row] = folder + b"/" + bare if folder else bare
        self._take_whiteout(row)

    def index(self) -> tuple[Index, bytes]:
        """Return the rows in canonical order, and the state of the folders among them."""
        count = len(self.paths)
        stats = np.frombuffer(self.stats, np.uint64).reshape(count, _STAT_FIELDS)
        kinds = (stats[:, 0] >> np.uint64(12)).astype(np.uint8)
        whiteouts, opaque = list(self.whiteouts.values()), list(self.opaque)
        kinds[whiteouts] = Kind.WHITEOUT
        # A row more for each folder that is opaque. The order of equal paths is that of a stable sort.
        source = np.r_[np.arange(count), np.array(opaque, np.int64)]
        left = np.ones(count, np.bool_)
        left[[*self.hidden, *whiteouts]] = False
        rows = [*range(count, len(source)), *whiteouts, *np.flatnonzero(left).tolist()]
        keys = [path_key(path) for path in self.paths]
        keys += [keys[row] for row in opaque]
        rows.sort(key=keys.__getitem__)
        self._find_hard_links(stats, kinds, rows)
        kinds = np.r_[kinds, np.full(len(opaque), Kind.OPAQUE, np.uint8)][rows]
        state = state_digest([(path, *self.folders[path][1:]) for path in sorted(self.folders, key=path_key)])
        return self._columns(stats, kinds, source[rows], Digest.of(b"layerkit.folder\0" + state)), state

    def _find_hard_links(self, stats: NDArray[np.uint64], kinds: NDArray[np.uint8], rows: list[int]) -> None:
        """Make every further name of an inode a link to the path of its first one."""
        # Whiteouts share one inode on some filesystems; they are no links.
        several = (stats[:, 3] > 1) & (kinds != Kind.DIR) & (kinds != Kind.WHITEOUT)
        first: dict[int, bytes] = {}
        wanted = set(np.flatnonzero(several).tolist())
        for row in rows if wanted else ():
            if row in wanted:
                path = first.setdefault(int(stats[row, 1]), self.paths[row])
                if path is not self.paths[row]:
                    kinds[row] = Kind.HARDLINK
                    self.links[row] = path

    def _columns(
        self, stats: NDArray[np.uint64], kind: NDArray[np.uint8], source: NDArray[np.int64], diff_id: Digest
    ) -> Index:
        rows, stats = source.tolist(), stats[source]
        real = kind <= Kind.HARDLINK
        texts: dict[bytes, int] = {}
        link = np.full(len(rows), -1, np.int32)
        for at in np.flatnonzero((kind == Kind.SYMLINK) | (kind == Kind.HARDLINK)).tolist():
            link[at] = texts.setdefault(self.links[rows[at]], len(texts))
        sets: dict[XattrSet, int] = {(): 0}
        xattr = np.zeros(len(rows), np.int32)
        for at, row in enumerate(rows) if self.xattrs else ():
            if row in self.xattrs and real[at]:
                xattr[at] = sets.setdefault(self.xattrs[row], len(sets))
        devices = np.zeros((len(rows), 2), np.uint32)
        for at in np.flatnonzero((kind == Kind.CHAR) | (kind == Kind.BLOCK)).tolist():
            number = self.devices[rows[at]]
            devices[at] = os.major(number), os.minor(number)
        sha256 = np.zeros((len(rows), 32), np.uint8)
        sparse, maps = np.full(len(rows), -1, np.int32), list[tuple[Extent, ...]]()
        for at in np.flatnonzero(kind == Kind.REG).tolist() if self.contents else ():
            digest, runs = self.contents[rows[at]]
            sha256[at] = np.frombuffer(digest, np.uint8)
            if runs is not None:
                sparse[at] = len(maps)
                maps.append(runs)
        size = np.where(kind == Kind.REG, stats[:, 6].astype(np.int64), 0)
        mtime = np.frombuffer(self.mtimes, np.int64)[source]
        seconds, fraction = np.divmod(np.where(real, mtime, 0), _SECOND)
        return Index(
            diff_id=diff_id,
            tar_size=0,
            path=Strings.of([self.paths[row] for row in rows]),
            kind=kind,
            perm=np.where(real, stats[:, 0] & np.uint64(0o7777), 0).astype(np.uint16),
            uid=np.where(real, stats[:, 4], 0).astype(np.uint32),
            gid=np.where(real, stats[:, 5], 0).astype(np.uint32),
            mtime=seconds,
            mtime_ns=fraction.astype(np.uint32),
            size=size,
            major=devices[:, 0],
            minor=devices[:, 1],
            link=link,
            links=Strings.of(texts),
            xattr=xattr,
            xattr_sets=tuple(sets),
            offset=np.where(size > 0, 0, -1).astype(np.int64),
            sha256=sha256,
            sparse=sparse,
            sparse_maps=SparseMaps.of(maps),
            warnings=tuple(self.warnings[: self.limits.warnings_kept_per_layer]),
        )


def state_digest(folders: list[tuple[bytes, int, int, int]]) -> bytes:
    """Return the sha256 of (path, inode, time of modification, time of change) of folders in order."""
    numbers = np.array([facts[1:] for facts in folders], np.int64)
    paths = b"\0".join(facts[0] for facts in folders)
    return Digest.of(paths + b"\0" + numbers.astype("<i8").tobytes()).hex.encode()


def read_state(root: int, index: Index) -> bytes | None:
    """Return the digest of the state that the folders of ``index`` are in now, None if one is gone.

    A name that comes, goes or is renamed changes the times of its folder, so this sees every such change
    with one system call for each folder. It does not see a file that was written to in place, which no runtime
    does to a layer: :func:`read_state` costs some 3 µs a folder, and looking at every file as much as a new index.

    Args:
        root: descriptor of the layer's folder.
        index: made from it earlier by :func:`index_layer_folder`.
    """
    facts = []
    for path in index.path.take(np.flatnonzero(index.kind == Kind.DIR)).tolist():
        try:
            st = os.stat(path or b".", dir_fd=root, follow_symlinks=False)
        except OSError:
            return None
        facts.append((path, st.st_ino, st.st_mtime_ns, st.st_ctime_ns))
    return state_digest(facts)


class _Contents:
    """Finds what files hold: by their size and time if a tree has them, else by reading them."""

    def __init__(self, base: Tree, checksum: bool) -> None:
        self._base, self.hashed_bytes = base, 0
        self._linked: dict[int, _Found] = {}
        self._known = {} if checksum else {path: row for row, path in enumerate(base.paths())}

    def find(self, path: bytes, st: os.stat_result, folder: int, name: bytes) -> _Found:
        if st.st_nlink == 1:
            return self._look(path, st, folder, name)
        if st.st_ino not in self._linked:
            self._linked[st.st_ino] = self._look(path, st, folder, name)
        return self._linked[st.st_ino]

    def _look(self, path: bytes, st: os.stat_result, folder: int, name: bytes) -> _Found:
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
        with opened(name, FILE, folder) as fd:
            sparse = _runs(fd, st.st_size) if holes else None
            if known:
                return base.sha256[i].tobytes(), sparse
            os.lseek(fd, 0, os.SEEK_SET)
            with open(fd, "rb", closefd=False) as file:
                digest = hashlib.file_digest(file, "sha256").digest()
            now = os.fstat(fd)
            if (now.st_size, now.st_mtime_ns, now.st_ino) != (st.st_size, st.st_mtime_ns, st.st_ino):
                raise _changed(path)
            self.hashed_bytes += st.st_size
            return digest, sparse


def _changed(path: bytes) -> InvalidImage:
    return InvalidImage(
        f"{show_path(path)}: its content changed while it was read, or without its size and time; "
        "stop what writes to the folder, and use --checksum"
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


def read_runs(root: int, entry: Entry) -> Iterator[memoryview]:
    """Yield the stored bytes of a regular file below ``root``, run after run.

    Raises:
        InvalidImage: they are not what ``entry`` says.
    """
    try:
        fd = open_below(root, entry.path, FILE)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
            raise _changed(entry.path) from error
        raise
    with closing(fd):
        digest = hashlib.sha256()
        for start, length in ((0, entry.size),) if entry.sparse is None else entry.sparse:
            while length:
                piece = os.pread(fd, min(length, _PIECE_BYTES), start)
                if not piece:
                    raise _changed(entry.path)
                digest.update(piece)
                start, length = start + len(piece), length - len(piece)
                yield memoryview(piece)
        # The digest of a sparse file is that of its holes too.
        if entry.sparse is None and digest.digest() != entry.sha256:
            raise _changed(entry.path)


def belongs_to_image(key: bytes) -> bool:
    """Return whether an xattr is part of what an image holds, and not the host's own."""
    return key.startswith(_KEPT) and not key.startswith(_OF_THE_HOST)


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
    sets = (tuple(pair for pair in pairs if belongs_to_image(pair[0])) for pairs in tree.xattr_sets)
    return replace(tree, xattr_sets=tuple(sets))
