"""What of mounts is in the page cache, and how much of it several of them share.

Residency is asked of the kernel file by file, through each mount, so it is what that mount's processes find in
memory. Whether two mounts mean the same memory is told by what lies below: the same place in a layer's tar, the
same object, the same file of a folder. A mount that somebody else made is looked through by its overlay options.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerkit.formats.overlay_options import OverlayOptions
from layerkit.hosts.diagnosis.mounted import in_upper, layers_of, record_of
from layerkit.hosts.mounts.records import UNPACKED, Record
from layerkit.linux import mounts
from layerkit.linux import syscalls as sc
from layerkit.linux.folders.walk import FILE, walk
from layerkit.model.entry import Kind
from layerkit.model.errors import NotFound, UsageError, show_path
from layerkit.model.ports import Progress
from layerkit.model.reports import Report
from layerkit.store.layout import DataBackend
from layerkit.store.local import LocalStore

Key = tuple[object, ...]
"""What stands for one file's pages; equal keys are one memory."""
KeyOf = Callable[[bytes, os.stat_result], tuple[Key, str]]
"""From a path below a root, and what stat says of it, to the key of its pages and the layer that has them."""

_FILES_PER_REPORT = 4096
_PLAIN = (0xEF53, 0x58465342, 0x9123683E, 0x01021994, 0xE0F5E1E2)
"""ext4, xfs, btrfs, tmpfs and EROFS keep a file's pages at its own inode."""


@dataclass(frozen=True, slots=True)
class MountCache:
    """One mount.

    Attributes:
        target: the mount point. image, map: as layerkit knows them, else "" and the filesystem's type.
        files: regular files with data, hard links counted once. size: their bytes.
        resident: bytes of them in the page cache.
        shared: bytes of those that another mount of the same report reads from the same memory.
    """

    target: str
    image: str
    map: str
    files: int
    size: int
    resident: int
    shared: int


@dataclass(frozen=True, slots=True)
class CachedFile:
    """A file in the page cache: its path in the first mount that has it, and how many mounts read it."""

    path: str
    layer: str
    size: int
    resident: int
    mounts: int


@dataclass(frozen=True, slots=True)
class CacheReport(Report):
    """What several mounts have in the page cache.

    Attributes:
        mounts: each of them.
        seen: sum of what each mount finds there.
        memory: what that takes: every shared page once.
        by_sharers: (number of mounts, bytes of memory that so many read), rising.
        top: the files that take most, largest first.
        warnings: what could not be looked at, or not be trusted.
    """

    FOUND_OUT = ("saved",)

    mounts: tuple[MountCache, ...]
    seen: int
    memory: int
    by_sharers: tuple[tuple[int, int], ...]
    top: tuple[CachedFile, ...]
    warnings: tuple[str, ...]

    @property
    def saved(self) -> int:
        """Return the bytes that copies for each mount would take more."""
        return self.seen - self.memory


@dataclass(slots=True)
class _Page:
    size: int
    resident: int
    path: str
    layer: str
    mounts: set[int]


def cache_report(
    targets: Sequence[Path], store: Path, *, top: int = 20, progress: Progress | None = None
) -> CacheReport:
    """Look at the page cache through ``targets``; nothing is brought into it.

    Args:
        targets: mount points, or folders, each looked at without what is mounted below it.
        store: whose mounts are known; it need not exist.
        top: how many files to name.
        progress: told of files.

    Raises:
        NotFound: a target is not there.
        UsageError: a target twice, or no folder.
    """
    if len({os.path.realpath(target) for target in targets}) < len(targets):
        raise UsageError("a mount is named twice; name each once")
    pages: dict[Key, _Page] = {}
    warnings: list[str] = []
    found: list[tuple[Path, str, str, list[Key]]] = []
    done = 0
    for number, target in enumerate(targets):
        root, image, mapping, key_of = _look_through(target, store, warnings)
        # An overlay's own descriptor has no pages for cachestat(2); a mapping of it shows those of the file below.
        plain = sc.filesystem_magic(root) in _PLAIN
        ask = sc.cached_of if plain else sc.resident_of
        mine: list[Key] = []
        seen: set[tuple[int, int]] = set()
        for path, st, fd in _files(root, warnings):
            if (st.st_dev, st.st_ino) in seen:
                continue
            seen.add((st.st_dev, st.st_ino))
            try:
                resident = ask(fd, st.st_size)
            except OSError as error:
                warnings.append(f"{root / os.fsdecode(path)}: {error.strerror}: left out")
                continue
            key, layer = key_of(path, st)
            page = pages.setdefault(key, _Page(st.st_size, 0, show_path(path), layer, set()))
            page.resident = max(page.resident, resident)
            page.mounts.add(number)
            mine.append(key)
            done += 1
            if progress is not None and done % _FILES_PER_REPORT == 0:
                progress("looking at the page cache", done, 0)
        found.append((root, image, mapping, mine))
    if os.geteuid() != 0:
        warnings.append("the kernel tells the truth only to root and a file's owner; run this as root")
    return _sums(found, pages, top, warnings)


def _sums(
    found: list[tuple[Path, str, str, list[Key]]], pages: dict[Key, _Page], top: int, warnings: list[str]
) -> CacheReport:
    rows = []
    for root, image, mapping, keys in found:
        own = [pages[key] for key in keys]
        shared = sum(page.resident for page in own if len(page.mounts) > 1)
        size, resident = sum(page.size for page in own), sum(page.resident for page in own)
        rows.append(MountCache(str(root), image, mapping, len(own), size, resident, shared))
    sharers = Counter[int]()
    for page in pages.values():
        sharers[len(page.mounts)] += page.resident
    largest = sorted(pages.values(), key=lambda page: (-page.resident * len(page.mounts), page.path))
    return CacheReport(
        mounts=tuple(rows),
        seen=sum(row.resident for row in rows),
        memory=sum(page.resident for page in pages.values()),
        by_sharers=tuple(sorted(each for each in sharers.items() if each[1])),
        top=tuple(
            CachedFile(page.path, page.layer, page.size, page.resident, len(page.mounts))
            for page in largest[:top]
            if page.resident
        ),
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _files(root: Path, warnings: list[str]) -> Iterator[tuple[bytes, os.stat_result, int]]:
    """Yield (path, stat, descriptor) for every regular file with data below ``root``, on its mount alone."""

    def left_out(path: bytes, error: OSError) -> None:
        warnings.append(f"{root / os.fsdecode(path)}: {error.strerror}: left out")

    for folder in walk(root, one_filesystem=True, on_error=left_out):
        for name, st in folder.names:
            if stat.S_ISREG(st.st_mode) and st.st_size:
                try:
                    try:
                        fd = os.open(name, FILE | os.O_NOATIME, dir_fd=folder.fd)
                    except PermissionError:
                        fd = os.open(name, FILE, dir_fd=folder.fd)
                except OSError as error:
                    left_out(folder.below(name), error)
                    continue
                with sc.closing(fd):
                    yield folder.below(name), st, fd


def _look_through(target: Path, store: Path, warnings: list[str]) -> tuple[Path, str, str, KeyOf]:
    """Return (root, image, map, function from a path to what its pages belong to)."""
    try:
        root = target.resolve(strict=True)
    except OSError:
        raise NotFound(f"{target}: not there; name a mount point, `layerkit mounts` lists ours") from None
    if not root.is_dir():
        raise UsageError(f"{target}: not a folder; name a mount point")
    mount = mounts.mount_of(root)
    if mount is None or mount.fstype != "overlay":
        return root, "", mount.fstype if mount else "", lambda path, st: (("file", st.st_dev, st.st_ino), "")
    ours = True
    with contextlib.suppress(NotFound):
        record = record_of(mount, store)
        ours = record is not None
        if record is not None and str(root) == record.target:
            return root, record.image, record.map, _of_record(record, store)
    if ours:
        warnings.append(f"{root}: a mount over another store (or a folder in one); its sharing is not known")
    return root, "", mount.fstype, _of_overlay(root, mount)


def _of_record(record: Record, store: Path) -> KeyOf:
    with LocalStore.open(store, create=False) as held:
        layers = layers_of(record, held)
    tree = layers.tree
    at, inodes, offset, first = (
        column.tolist() for column in (tree.layer, tree.inode, tree.offset, tree.first_name())
    )
    regular = (tree.kind == Kind.REG).tolist()
    names = [str(index.diff_id) for index in layers.indexes]
    shown = [name or internal for name, internal in zip(layers.diff_ids, names, strict=True)]

    def key_of(path: bytes, st: os.stat_result) -> tuple[Key, str]:
        own = in_upper(record, path)
        if own is not None and stat.S_ISREG(own[0].st_mode) and not own[1]:
            return ("file", own[0].st_dev, own[0].st_ino), "upper"
        row = layers.rows.get(path, -1)
        if row < 0 or not regular[inodes[row]]:
            return ("mount", record.id, st.st_ino), ""
        inode = inodes[row]
        layer = at[inode]
        if record.backend == UNPACKED:
            real = os.lstat(os.path.join(os.fsencode(record.folders[layer]), tree.path(first[inode])))
            return ("file", real.st_dev, real.st_ino), shown[layer]
        if record.backend == DataBackend.OBJECTS:
            return ("object", tree.sha256[inode].tobytes()), shown[layer]
        return ("tar", names[layer], offset[inode]), shown[layer]

    return key_of


def _of_overlay(root: Path, mount: mounts.Mount) -> KeyOf:
    """Return the same for somebody else's overlay, by looking for the path in its layers, top first."""
    shown = OverlayOptions.shown(mount.super_options)
    layers = [os.fsencode(path) for path in (shown.upper, *shown.lower, *shown.data) if path]
    inside = os.path.relpath(root, mount.point)
    prefix = b"" if inside == "." else os.fsencode(inside)

    def key_of(path: bytes, st: os.stat_result) -> tuple[Key, str]:
        for layer in layers:
            try:
                real = os.lstat(os.path.join(layer, prefix, path))
            except OSError:
                continue
            if stat.S_ISREG(real.st_mode) and real.st_size == st.st_size and real.st_blocks:
                return ("file", real.st_dev, real.st_ino), os.fsdecode(layer)
        return ("mount", mount.mount_id, st.st_ino), ""

    return key_of
