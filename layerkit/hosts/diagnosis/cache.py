"""What of mounts is in the page cache, and how much of it several of them share.

Residency is asked of the kernel file by file, through each mount, so it is what that mount's processes find in
memory. Whether two mounts mean the same memory is told by what lies below: the same place in a layer's tar, the
same object, the same file of a folder. A mount that somebody else made is looked through by its overlay options.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerkit.hosts.adopted.mount import LABEL as UNPACKED
from layerkit.hosts.mounts import mount as mounter
from layerkit.hosts.mounts.records import SOURCE_PREFIX, Record
from layerkit.linux import mounts, pagecache
from layerkit.linux import syscalls as sc
from layerkit.model.entry import Kind
from layerkit.model.errors import NotFound, UsageError, show_path
from layerkit.model.ports import Progress
from layerkit.store.layout import DataBackend
from layerkit.store.local import LocalStore

Key = tuple[object, ...]
"""What stands for one file's pages; equal keys are one memory."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
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
class CacheReport:
    """What several mounts have in the page cache.

    Attributes:
        mounts: each of them.
        seen: sum of what each mount finds there.
        memory: what that takes: every shared page once.
        by_sharers: (number of mounts, bytes of memory that so many read), rising.
        top: the files that take most, largest first.
        warnings: what could not be looked at, or not be trusted.
    """

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

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self) | {"saved": self.saved}


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
        ask = pagecache.cached_of if plain else pagecache.resident_of
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
        warnings.append("only a file's owner and root are told the truth by the kernel; run this as root")
    return _sums(found, pages, top, warnings)


def _sums(
    found: list[tuple[Path, str, str, list[Key]]], pages: dict[Key, _Page], top: int, warnings: list[str]
) -> CacheReport:
    rows = []
    for root, image, mapping, keys in found:
        own = [pages[key] for key in keys]
        rows.append(
            MountCache(
                target=str(root),
                image=image,
                map=mapping,
                files=len(own),
                size=sum(page.size for page in own),
                resident=sum(page.resident for page in own),
                shared=sum(page.resident for page in own if len(page.mounts) > 1),
            )
        )
    sharers: dict[int, int] = {}
    for page in pages.values():
        if page.resident:
            sharers[len(page.mounts)] = sharers.get(len(page.mounts), 0) + page.resident
    largest = sorted(pages.values(), key=lambda page: (-page.resident * len(page.mounts), page.path))
    return CacheReport(
        mounts=tuple(rows),
        seen=sum(row.resident for row in rows),
        memory=sum(page.resident for page in pages.values()),
        by_sharers=tuple(sorted(sharers.items())),
        top=tuple(
            CachedFile(page.path, page.layer, page.size, page.resident, len(page.mounts))
            for page in largest[:top]
            if page.resident
        ),
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _files(root: Path, warnings: list[str]) -> Iterator[tuple[bytes, os.stat_result, int]]:
    """Yield (path, stat, descriptor) for every regular file with data below ``root``, on its mount alone."""
    top = os.open(root, _FOLDER)
    device = os.fstat(top).st_dev
    waiting = [(b"", top)]
    while waiting:
        path, folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = os.fsencode(entry.name)
                    below = path + b"/" + name if path else name
                    try:
                        if entry.is_dir(follow_symlinks=False):
                            fd = os.open(name, _FOLDER, dir_fd=folder)
                            if os.fstat(fd).st_dev == device and len(waiting) < 512:
                                waiting.append((below, fd))
                            else:
                                os.close(fd)
                        elif entry.is_file(follow_symlinks=False):
                            st = entry.stat(follow_symlinks=False)
                            if st.st_size:
                                fd = _opened(name, folder)
                                try:
                                    yield below, st, fd
                                finally:
                                    os.close(fd)
                    except OSError as error:
                        warnings.append(f"{root / os.fsdecode(below)}: {error.strerror}: left out")
        finally:
            os.close(folder)


def _opened(name: bytes, folder: int) -> int:
    try:
        return os.open(name, _FILE | os.O_NOATIME, dir_fd=folder)
    except PermissionError:
        return os.open(name, _FILE, dir_fd=folder)


def _look_through(
    target: Path, store: Path, warnings: list[str]
) -> tuple[Path, str, str, Callable[[bytes, os.stat_result], tuple[Key, str]]]:
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
    if mount.source.startswith(SOURCE_PREFIX):
        run = mounter.default_run(store)
        record = next((r for r in mounter.active(run) if r.source == mount.source), None)
        if record is not None and str(root) == record.target:
            return root, record.label.get("image", ""), record.label.get("map", ""), _of_record(record, store)
        warnings.append(f"{root}: a mount over another store (or a folder in one); its sharing is not known")
    return root, "", mount.fstype, _of_overlay(root, mount)


def _of_record(record: Record, store: Path) -> Callable[[bytes, os.stat_result], tuple[Key, str]]:
    from layerkit.hosts.diagnosis.which import layers_of
    from layerkit.model.trees.merge import merge

    with LocalStore.open(store, create=False) as held:
        layers = layers_of(record, held)
        tree = merge([index for _, index in layers.layers], limits=held.limits)
    rows = dict(zip(tree.paths(), tree.inode.tolist(), strict=True))
    at, offset, sha256 = tree.layer.tolist(), tree.offset.tolist(), tree.sha256
    regular = (tree.kind == Kind.REG).tolist()
    names = [str(diff_id) for diff_id, _ in layers.layers]
    shown = [name or internal for name, internal in zip(layers.diff_ids, names, strict=True)]
    backend = record.label.get("backend")
    folders = record.label.get("folders", "").split("\n") if backend == UNPACKED else []
    first = tree.first_name().tolist()

    def key_of(path: bytes, st: os.stat_result) -> tuple[Key, str]:
        if record.upper is not None and (own := _in_upper(record, path)) is not None:
            return own, "upper"
        inode = rows.get(path, -1)
        if inode < 0 or not regular[inode]:
            return ("mount", record.id, st.st_ino), ""
        layer = at[inode]
        if backend == UNPACKED:
            below = os.path.join(os.fsencode(folders[layer]), tree.path(first[inode]))
            real = os.lstat(below)
            return ("file", real.st_dev, real.st_ino), shown[layer]
        if backend == DataBackend.OBJECTS:
            return ("object", sha256[inode].tobytes()), shown[layer]
        return ("tar", names[layer], offset[inode]), shown[layer]

    return key_of


def _in_upper(record: Record, path: bytes) -> Key | None:
    try:
        full = os.path.join(os.fsencode(record.upper or ""), path)
        st = os.lstat(full)
        if stat.S_ISREG(st.st_mode) and f"{record.namespace}.overlay.metacopy" not in os.listxattr(full):
            return ("file", st.st_dev, st.st_ino)
    except OSError:
        pass
    return None


def _of_overlay(root: Path, mount: mounts.Mount) -> Callable[[bytes, os.stat_result], tuple[Key, str]]:
    """Return the same for somebody else's overlay, by looking for the path in its layers, top first."""
    upper, lower = overlay_layers(mount.super_options)
    layers = [os.fsencode(path) for path in ([upper] if upper else []) + lower]
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


def overlay_layers(options: str) -> tuple[str, list[str]]:
    """Return (upper or "", lower folders top first) of an overlay's options as mountinfo shows them."""
    upper, lower = "", list[str]()
    for option in re.split(r"(?<!\\),", options):
        key, _, value = option.partition("=")
        value = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), value)
        if key == "upperdir":
            upper = re.sub(r"\\(.)", r"\1", value)
        elif key in ("lowerdir", "lowerdir+", "datadir+"):
            lower += [re.sub(r"\\(.)", r"\1", part) for part in re.split(r"(?<!\\):+", value) if part]
    return upper, lower


__all__ = ["CacheReport", "CachedFile", "MountCache", "cache_report", "overlay_layers"]
