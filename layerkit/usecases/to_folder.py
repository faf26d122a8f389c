"""A plain root filesystem out of the layers in a store: whole under its name, or not there at all."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from layerkit.idmap import Mapping
from layerkit.idmap import apply as apply_map
from layerkit.linux.durable import check_target, whole_folder
from layerkit.linux.folders.writer import Advice, FolderWriter, StepFailed
from layerkit.linux.syscalls import FOLDER, Run, clone_file, opened
from layerkit.metaonly import data_path
from layerkit.model.entry import Extent
from layerkit.model.errors import StoreError, UnsupportedHost, UsageError
from layerkit.model.image import Image
from layerkit.model.reports import Report
from layerkit.model.tree import Tree
from layerkit.model.work import Work
from layerkit.store.import_layers import import_layers
from layerkit.store.layout import DataBackend
from layerkit.store.local import LocalStore
from layerkit.store.objects import copy_whole
from layerkit.store.preparation import Preparation

_FICLONERANGE = 0x4020940D
_CLONE_RANGE = struct.Struct("=qQQQ")
_NO_CLONE = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EPERM)
_ADVICE = Advice(
    what="files",
    whole="a root filesystem",
    elsewhere="unpack to another filesystem, or use `layerkit mount`",
    room="make room, or unpack to a larger filesystem",
)


class Copy(StrEnum):
    """How a file gets its bytes.

    AUTO shares blocks where the filesystem can, and copies inside the kernel where not; REFLINK takes nothing
    but shared blocks; BYTES shares none, so that the folder stands for itself.
    """

    AUTO = "auto"
    REFLINK = "reflink"
    BYTES = "bytes"


@dataclass(frozen=True, slots=True)
class UnpackReport(Report):
    """What an unpacking made.

    Attributes:
        target: the folder.
        entries: names in the root filesystem.
        shared_bytes: of ``data_bytes``, bytes whose blocks are the store's.
        copied_bytes: bytes that were written.
    """

    name: str
    manifest: str
    target: str
    map_text: str
    entries: int
    layers: int
    layers_read: int
    data_bytes: int
    shared_bytes: int
    copied_bytes: int
    data_backend: str
    seconds: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class UnpackOptions:
    """What the folder is to be like.

    Attributes:
        mapping: the id map; None keeps the owners.
        copy: see :class:`Copy`.
        data: ``auto``, ``tar`` or ``objects``: where the layers are kept meanwhile.
    """

    mapping: Mapping | None = None
    copy: str = "auto"
    data: str = "auto"

    def __post_init__(self) -> None:
        """Refuse a word that is none of the choices."""
        if self.copy not in tuple(Copy):
            raise UsageError(f"--copy {self.copy!r}: want auto, reflink or bytes")


def unpack(work: Work, store: LocalStore, target: Path, options: UnpackOptions) -> UnpackReport:
    """Bring the layers of the image into ``store`` and write its root filesystem to the new folder ``target``.

    The layers stay in the store until its next gc, unless an image with a name needs them. ``target`` is new or
    empty; it appears whole or not at all.

    Raises:
        UsageError: ``target`` or a word is not to be had.
        UnmappedId: the map does not cover an owner.
        LossyResult: the filesystem, or a process without privileges, cannot hold an entry exactly.
        UnsupportedHost: ``copy`` is ``reflink``, and blocks cannot be shared.
    """
    start, image, mapping, copy = time.monotonic(), work.image, options.mapping, Copy(options.copy)
    # Not resolve(): that would follow a link at the end.
    target = Path(os.path.abspath(target))
    check_target(target)
    with store.hold():
        backend = choose_backend(store, image, target.parent, copy, options.data)
        read = import_layers(work, store, backend)
        tree = Preparation(store, image.diff_ids, limits=work.limits).tree()
        if mapping is not None:
            tree = apply_map(tree, mapping)
        with whole_folder(target) as root, Contents(store, tree, backend, copy) as contents:
            FolderWriter(tree, root, contents, _ADVICE, work.progress).write()
    return UnpackReport(
        name=work.name,
        manifest=str(image.descriptor.digest),
        target=str(target),
        map_text=mapping.canonical() if mapping else "",
        entries=len(tree),
        layers=len(image.layers),
        layers_read=read,
        data_bytes=tree.data_bytes,
        shared_bytes=contents.shared_bytes,
        copied_bytes=contents.copied_bytes,
        data_backend=backend.value,
        seconds=time.monotonic() - start,
        warnings=tree.warnings,
    )


def choose_backend(store: LocalStore, image: Image, target: Path, copy: Copy, wanted: str) -> DataBackend:
    """Return the form of the data to unpack from: what the store has already, else what fits ``copy``.

    Objects can be shared whole; of a file in a tar only those that happen to lie on a block's start.

    ``target`` is a folder on the filesystem that is written; ``wanted`` is ``auto``, or the backend by name.

    Raises:
        UsageError: ``wanted`` is no backend, or cannot give what ``copy`` asks for.
        UnsupportedHost: REFLINK, and blocks cannot be shared between the store and ``target``.
    """
    if wanted not in ("auto", *DataBackend):
        raise UsageError(f"--data {wanted!r}: want auto, tar or objects")
    shares = copy is not Copy.BYTES and can_share(store.root, target)
    if copy is Copy.REFLINK:
        if not shares:
            raise UnsupportedHost(
                f"shared blocks between {store.root} and {target} (--copy reflink)",
                "put both on one xfs or btrfs filesystem (--store DIR), or use --copy auto",
            )
        if wanted == DataBackend.TAR:
            raise UsageError("--copy reflink needs whole files to share: use it without --data tar")
        return DataBackend.OBJECTS
    if wanted != "auto":
        return DataBackend(wanted)
    order = (DataBackend.OBJECTS, DataBackend.TAR) if shares else (DataBackend.TAR, DataBackend.OBJECTS)
    for backend in order:
        if all(store.has_layer(diff_id, backend) for diff_id in image.diff_ids):
            return backend
    return order[0]


def can_share(store: Path, target: Path) -> bool:
    """Return whether files in ``target`` can share blocks with files in ``store``, found by doing it."""
    try:
        with tempfile.TemporaryFile(dir=store) as old, tempfile.TemporaryFile(dir=target) as new:
            old.write(bytes(4096))
            old.flush()
            clone_file(old.fileno(), new.fileno())
    except OSError:
        return False
    return True


class Contents:
    """Fills files with the data of a store; a context manager, for the descriptors that it holds."""

    alike = False

    def __init__(self, store: LocalStore, tree: Tree, backend: DataBackend, copy: Copy) -> None:
        """Give the data of ``tree``, whose layers are whole in ``backend``."""
        self._tree, self._copy, self._store = tree, copy, store
        self._objects, self._block = backend is DataBackend.OBJECTS, 0
        self._clones = copy is not Copy.BYTES
        self._lock = threading.Lock()
        self._fds: dict[int, int] = {}
        self.shared_bytes = self.copied_bytes = 0

    def __enter__(self) -> Contents:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def begin(self, inodes: NDArray[np.integer]) -> Callable[[int, int, int], None]:
        """See :class:`~layerkit.linux.folders.writer.Filler`."""
        return self._fill_from_object if self._objects else self._fill_from_tar

    def _source(self, layer: int) -> int:
        """Return a descriptor of a layer's tar, or (-1) of the folder of objects."""
        with self._lock:
            if layer not in self._fds:
                if layer < 0:
                    self._fds[layer] = os.open(self._store.objects_root, FOLDER)
                else:
                    path = self._store.tar_path(self._tree.layers[layer])
                    self._fds[layer] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._fds[layer]

    def _runs(self, inode: int, size: int) -> tuple[Extent, ...]:
        hole_map = int(self._tree.sparse[inode])
        return ((0, size),) if hole_map < 0 else self._tree.sparse_maps.extents(hole_map)

    def _fill_from_object(self, fd: int, inode: int, size: int) -> None:
        sha256 = self._tree.sha256[inode].tobytes()
        try:
            with opened(data_path(sha256), os.O_RDONLY | os.O_NOFOLLOW, self._source(-1)) as source:
                if os.fstat(source).st_size != size:
                    raise StoreError(
                        f"the data sha256:{sha256.hex()} is cut off; run `layerkit store verify --repair`"
                    )
                if self._clones and self._try(lambda: clone_file(source, fd)):
                    self._count(size, 0)
                else:
                    # In an object the runs lie where they lie in the file.
                    runs = [Run(source, start, start, length) for start, length in self._runs(inode, size)]
                    self._copy_runs(fd, size, runs)
        except FileNotFoundError:
            raise StoreError(
                f"the store lacks the data sha256:{sha256.hex()}; run `layerkit store verify --repair`"
            ) from None

    def _fill_from_tar(self, fd: int, inode: int, size: int) -> None:
        place, runs = int(self._tree.offset[inode]), []
        source = self._source(int(self._tree.layer[inode]))
        for start, length in self._runs(inode, size):
            runs.append(Run(source, place, start, length))
            place += length
        self._copy_runs(fd, size, runs)

    def _copy_runs(self, fd: int, size: int, runs: list[Run]) -> None:
        """Fill a file with ``runs``, and give it its size."""
        try:
            for source, offset, at, length in runs:
                shared = self._share(Run(source, offset, at, length), fd) if self._clones else 0
                left = Run(source, offset + shared, at + shared, length - shared)
                # The kernel's copy shares blocks by itself on some filesystems.
                copy_whole(left, fd, in_kernel=self._copy is not Copy.BYTES)
                self._count(shared, length - shared)
            if not runs or runs[-1].at + runs[-1].length != size:
                os.ftruncate(fd, size)
        except OSError as error:
            raise StepFailed("write", error) from error

    def _share(self, run: Run, fd: int) -> int:
        """Share the whole blocks at the start of a run; return how many bytes these are."""
        if not self._block:
            self._block = os.fstatvfs(fd).f_bsize
        whole = run.length - run.length % self._block
        if not whole or run.offset % self._block or run.at % self._block:
            return 0
        order = _CLONE_RANGE.pack(run.source, run.offset, whole, run.at)
        return whole if self._try(lambda: fcntl.ioctl(fd, _FICLONERANGE, order)) else 0

    def _try(self, share: Callable[[], object]) -> bool:
        try:
            share()
        except OSError as error:
            if error.errno not in _NO_CLONE or self._copy is Copy.REFLINK:
                raise StepFailed("share the blocks of", error) from error
            self._clones = False
            return False
        return True

    def _count(self, shared: int, copied: int) -> None:
        with self._lock:
            self.shared_bytes += shared
            self.copied_bytes += copied
