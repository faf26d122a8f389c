"""What a writable mount has copied up into its upper, whether that cost bytes, and whether it was for anything.

overlayfs copies a file up when it is opened for writing, before a byte is written. Copying keeps the time of
modification, and every later write changes it, also one through a mapping: a file in the upper that has the time
of the layer's was never written to since. :func:`watch` tells the same as it happens, and by whom.
"""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from layerkit.formats.overlay_options import OverlayOptions
from layerkit.hosts.diagnosis.mounted import is_stub, layers_of, record_of
from layerkit.linux import fanotify, mounts
from layerkit.linux.folders.walk import walk, xattr_path
from layerkit.linux.syscalls import blocks_of
from layerkit.metaonly import ORIGIN, Namespace
from layerkit.model.entry import Kind
from layerkit.model.errors import NotFound, UsageError, show_path
from layerkit.model.reports import Report
from layerkit.store.local import LocalStore

METADATA, DATA, MADE = "metadata", "data", "made"


@dataclass(frozen=True, slots=True)
class CopyUp:
    """A regular file in the upper.

    Attributes:
        path: in the mount.
        kind: ``metadata`` copied up without data, ``data`` with it, ``made`` in the mount.
        size: logical bytes. allocated: bytes of its blocks; shared: those that it shares with other files, which
            is what a clone has; -1 where the filesystem does not tell.
        written: whether it was written to since it was copied up; True for what was made.
    """

    path: str
    kind: str
    size: int
    allocated: int
    shared: int
    written: bool

    @property
    def copied(self) -> int:
        """Return the bytes that copying it up took on disk."""
        return self.allocated - max(self.shared, 0) if self.kind == DATA else 0


@dataclass(frozen=True, slots=True)
class Opened:
    """A file that was opened for writing while it was watched.

    Attributes:
        path: in the mount. opens: times that it was closed after an open for writing.
        written: whether a write was seen, or its time of modification changed (a write through a mapping).
        copied_up: whether it came into the upper with data while it was watched; size: its bytes then.
        programs: names of the processes.
    """

    path: str
    opens: int
    written: bool
    copied_up: bool
    size: int
    programs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CopyUpReport(Report):
    """The upper of a mount.

    Attributes:
        mount, upper: where. filesystem: of the upper.
        files: regular files in it, the largest first.
        opened: what was watched, None if nothing was.
        warnings: what the answer does not cover.
    """

    FOUND_OUT = ("copied_bytes", "cloned_bytes", "needless_bytes")

    mount: str
    upper: str
    filesystem: str
    files: tuple[CopyUp, ...]
    opened: tuple[Opened, ...] | None = None
    warnings: tuple[str, ...] = ()

    def count(self, kind: str) -> int:
        """Return how many files of a kind there are."""
        return sum(file.kind == kind for file in self.files)

    @property
    def copied_bytes(self) -> int:
        """Return what copying up took on disk: bytes that are not shared."""
        return sum(file.copied for file in self.files)

    @property
    def cloned_bytes(self) -> int:
        """Return what copying up did not take, because blocks are shared."""
        return sum(max(file.shared, 0) for file in self.files if file.kind == DATA)

    @property
    def needless_bytes(self) -> int:
        """Return what of :attr:`copied_bytes` a copy at the first write would have saved."""
        return sum(file.copied for file in self.files if not file.written)


class Below(NamedTuple):
    """What the layers have at a path: bytes and time of modification in ns."""

    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class _Writable:
    target: Path
    upper: Path
    namespace: Namespace
    below: Callable[[bytes], Below | None]


def look(target: Path, store: Path) -> CopyUpReport:
    """Return what lies in the upper of the overlay at ``target``, ours or anybody's.

    Args:
        target: the mount point.
        store: whose mounts are known; it need not exist.

    Raises:
        UsageError: no overlay, or one without an upper.
        NotFound: nothing there.
    """
    return _report(_writable(target, store))


def watch(
    target: Path, store: Path, seconds: float | None, *, stop: Callable[[], bool] | None = None
) -> CopyUpReport:
    """Watch the mount at ``target`` for opens for writing and writes, then return what :func:`look` does.

    Args:
        target: the mount point.
        store: whose mounts are known.
        seconds: for how long; None until ``stop`` says so, or KeyboardInterrupt.
        stop: asked after each event.

    Raises:
        UnsupportedHost: fanotify is for root of the host.
        UsageError: as :func:`look`.
    """
    found = _writable(target, store)
    before = {file.path: file.kind for file in _report(found).files}
    opens: dict[bytes, int] = defaultdict(int)
    programs: dict[bytes, set[str]] = defaultdict(set)
    written: set[bytes] = set()
    warnings = []
    try:
        with fanotify.Watch(found.target, fanotify.FAN_CLOSE_WRITE | fanotify.FAN_MODIFY) as watching:
            try:
                for event in watching.events(seconds):
                    path = _inside(event.path, found.target)
                    if event.mask & fanotify.FAN_MODIFY:
                        written.add(path)
                    if event.mask & fanotify.FAN_CLOSE_WRITE:
                        opens[path] += 1
                        programs[path].add(_program(event.pid))
                    if stop is not None and stop():
                        break
            finally:
                if watching.overflowed:
                    warnings.append("the kernel's queue ran over: some events are missing")
    except KeyboardInterrupt:
        pass
    report = _report(found)
    after = {file.path: file for file in report.files}
    opened = []
    for path, times in sorted(opens.items()):
        name = show_path(path)
        file = after.get(name)
        came = file is not None and file.kind == DATA and before.get(name) != DATA
        was_written = path in written or (file is not None and file.written and file.kind == DATA and came)
        opened.append(
            Opened(name, times, was_written, came, file.size if file else 0, tuple(sorted(programs[path] - {""})))
        )
    return replace(report, opened=tuple(opened), warnings=(*report.warnings, *warnings))


def _inside(path: bytes, target: Path) -> bytes:
    """Return a path in the mount: below our mount point, or from the root as another namespace has it."""
    top = os.fsencode(target) + b"/"
    return path[len(top) :] if path.startswith(top) else path.lstrip(b"/")


def _program(pid: int) -> str:
    try:
        return (Path("/proc") / str(pid) / "comm").read_text().strip()
    except OSError:
        return ""


def _writable(target: Path, store: Path) -> _Writable:
    try:
        root = target.resolve(strict=True)
    except OSError:
        raise NotFound(f"{target}: not there; name the mount point of a writable overlay") from None
    mount = mounts.mount_of(root)
    if mount is None or mount.fstype != "overlay":
        what = f"lies on {mount.fstype}" if mount else "is not in the mount table"
        raise UsageError(f"{target}: {what}; name the mount point of an overlay")
    record = record_of(mount, store)
    if record is not None:
        if record.upper is None:
            raise UsageError(f"{target}: mounted read-only, so nothing was ever copied up")
        with LocalStore.open(store, create=False) as held:
            layers = layers_of(record, held)
        tree = layers.tree

        def in_tree(path: bytes) -> Below | None:
            row = layers.rows.get(path, -1)
            inode = tree.inode[row]
            if row < 0 or tree.mode[inode] >> 12 != Kind.REG:
                return None
            return Below(int(tree.size[inode]), int(tree.mtime[inode]) * 1_000_000_000 + int(tree.mtime_ns[inode]))

        return _Writable(Path(mount.point), Path(record.upper), Namespace(record.namespace), in_tree)
    shown = OverlayOptions.shown(mount.super_options)
    if not shown.upper:
        raise UsageError(f"{target}: an overlay without an upper, so nothing was ever copied up")

    def in_folders(path: bytes) -> Below | None:
        for layer in map(os.fsencode, shown.lower + shown.data):
            try:
                st = os.lstat(os.path.join(layer, path))
            except OSError:
                continue
            return Below(st.st_size, st.st_mtime_ns) if stat.S_ISREG(st.st_mode) else None
        return None

    namespace = Namespace.USER if ("userxattr", None) in shown.more else Namespace.TRUSTED
    return _Writable(Path(mount.point), Path(shown.upper), namespace, in_folders)


def _report(found: _Writable) -> CopyUpReport:
    files = []
    warnings = []
    upper = (
        (folder.below(name), xattr_path(folder.fd, name), st)
        for folder in walk(found.upper)
        for name, st in folder.names
    )
    for path, full, st in upper:
        if not stat.S_ISREG(st.st_mode):
            continue
        if is_stub(full, found.namespace):
            files.append(CopyUp(show_path(path), METADATA, st.st_size, st.st_blocks * 512, 0, False))
            continue
        below = found.below(path)
        moved = os.fsdecode(found.namespace.xattr(ORIGIN)) in os.listxattr(full, follow_symlinks=False)
        kind = DATA if below is not None or moved else MADE
        written = kind == MADE or below is None or (st.st_size, st.st_mtime_ns) != below
        told = blocks_of(full) if st.st_size and kind == DATA else None
        shared = -1 if told is None and kind == DATA and st.st_size else (told.shared if told else 0)
        files.append(CopyUp(show_path(path), kind, st.st_size, st.st_blocks * 512, shared, written))
        if kind == DATA and below is None:
            warnings.append(f"{show_path(path)}: moved since it was copied up: whether it was written is not known")
    mount = mounts.mount_of(found.upper)
    return CopyUpReport(
        mount=str(found.target),
        upper=str(found.upper),
        filesystem=mount.fstype if mount else "unknown",
        files=tuple(sorted(files, key=lambda file: (-file.allocated, file.path))),
        warnings=tuple(warnings),
    )
