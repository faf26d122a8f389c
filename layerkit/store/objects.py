"""The object store: one file per content, written in batches."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from layerkit import metaonly
from layerkit.linux.durable import rename_new
from layerkit.linux.syscalls import Run, copy_run, opened
from layerkit.model.entry import Kind
from layerkit.model.errors import StoreError
from layerkit.model.index import Index
from layerkit.store.catalog import Catalog, ObjectRow, short_name
from layerkit.store.layout import FILE_MODE, FOLDER_MODE, Layout
from layerkit.store.spool import Spool

_WRITERS = min(4, os.cpu_count() or 1)


def object_path(layout: Layout, sha256: bytes) -> Path:
    """Return where the object of a content lies."""
    return layout.objects / os.fsdecode(metaonly.data_path(sha256))


def contents(index: Index) -> NDArray[np.int64]:
    """Return int64 (k,): for each distinct content of ``index`` that has bytes, one row that has it.

    In the order of the tar, so that reading them in turn reads the tar once.
    """
    rows = np.flatnonzero((index.kind == Kind.REG) & (index.size > 0))
    if not len(rows):
        return rows
    digests = np.ascontiguousarray(index.sha256[rows]).view("V32").ravel()
    first = np.unique(digests, return_index=True)[1]
    chosen = rows[first]
    return chosen[np.argsort(index.offset[chosen], kind="stable")]


def object_rows(index: Index, rows: NDArray[np.int64]) -> list[ObjectRow]:
    """Return the catalog's rows of the contents at ``rows`` of ``index``."""
    digests = index.sha256[rows].tobytes()
    sizes = index.size[rows].tolist()
    whole = (digests[i : i + 32] for i in range(0, len(digests), 32))
    return [ObjectRow(short_name(sha256), sha256, size) for sha256, size in zip(whole, sizes, strict=True)]


class ObjectBatch:
    """The objects of one layer: written aside, then all moved into place inside one transaction."""

    def __init__(self, spool: Spool, catalog: Catalog) -> None:
        """Write into a new folder of ``spool``."""
        self._layout, self._catalog = catalog.layout, catalog
        self.folder = spool.folder("objects")
        self._rows: list[ObjectRow] = []
        self._written: list[tuple[ObjectRow, bytes, bytes]] = []
        self._wrong: set[bytes] = set()
        self._new: list[bytes] = []
        self._version = -1
        self._known: set[bytes] = set()

    def write(self, tar: int, index: Index, *, only: frozenset[bytes] | None = None) -> None:
        """Copy the contents of ``index`` that the store lacks out of the raw ``tar`` (a descriptor).

        The hashes were checked when the index was made. Nothing is on disk for sure before a sync.

        Args:
            tar: a file descriptor of the uncompressed layer.
            index: of that layer.
            only: write these (by sha256), whatever the store has; for repairs.
        """
        rows = contents(index)
        objects = object_rows(index, rows)
        self._version = self._catalog.version()
        self._known = known = self._catalog.known_objects(objects)
        names = metaonly.redirects(index.sha256[rows])[:, 1:].tobytes()
        width = metaonly.REDIRECT_BYTES - 1
        jobs: list[tuple[int, ObjectRow, bytes]] = []
        with opened(self._layout.objects, os.O_DIRECTORY) as root:
            for i, (row, obj) in enumerate(zip(rows.tolist(), objects, strict=True)):
                target = names[i * width : (i + 1) * width]
                if only is not None:
                    if obj.sha256 not in only:
                        continue
                    self._wrong.add(obj.short)
                elif obj.short in known:
                    with contextlib.suppress(FileNotFoundError):
                        if os.stat(target, dir_fd=root, follow_symlinks=False).st_size == obj.size:
                            continue
                    self._wrong.add(obj.short)
                jobs.append((row, obj, target))
        self._rows.extend(objects if only is None else [obj for _, obj, _ in jobs])
        self._write_all(tar, index, jobs)

    def _write_all(self, tar: int, index: Index, jobs: list[tuple[int, ObjectRow, bytes]]) -> None:
        if not jobs:
            return
        # A folder for each writer: making files in one folder is serialised by its lock.
        parts = min(_WRITERS, -(-len(jobs) // 256))
        step = -(-len(jobs) // parts)
        slices = [jobs[i : i + step] for i in range(0, len(jobs), step)]
        folders = [f"{i}-{len(self._written)}" for i in range(len(slices))]
        with ThreadPoolExecutor(parts, "objects") as pool:
            done = [
                pool.submit(_write_slice, self.folder / folder, tar, index, part)
                for folder, part in zip(folders, slices, strict=True)
            ]
            for future in done:
                future.result()
        for folder, part in zip(folders, slices, strict=True):
            prefix = folder.encode() + b"/"
            self._written.extend((obj, prefix + target[3:], target) for _, obj, target in part)

    def publish(self, db: sqlite3.Connection) -> None:
        """Move what was written into place and add it to the catalog, inside the transaction of ``db``.

        Give :meth:`undo` to ``Catalog.write``.
        """
        known = self._known
        if self._catalog.version() != self._version:
            known = self._catalog.known_objects(self._rows)
        flags = os.O_DIRECTORY
        with opened(self.folder, flags) as source, opened(self._layout.objects, flags) as target:
            present = set(os.listdir(target))
            for obj, aside, name in self._written:
                top = name[:2].decode()
                if top not in present:
                    os.mkdir(top, FOLDER_MODE, dir_fd=target)
                    os.chmod(top, FOLDER_MODE, dir_fd=target)
                    present.add(top)
                if rename_new(aside, name, source, target):
                    if obj.short not in known:
                        self._new.append(name)
                elif obj.short not in known or obj.short in self._wrong:
                    # Without a row it is what a killed run left; its content was never vouched for.
                    os.rename(aside, name, src_dir_fd=source, dst_dir_fd=target)
        Catalog.put_objects(db, [row for row in self._rows if row.short not in known])

    def undo(self) -> None:
        """Take back what :meth:`publish` newly moved into place."""
        for name in self._new:
            with contextlib.suppress(OSError):
                (self._layout.objects / os.fsdecode(name)).unlink()
        self._new.clear()


def _write_slice(folder: Path, tar: int, index: Index, jobs: list[tuple[int, ObjectRow, bytes]]) -> None:
    folder.mkdir()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    offsets, maps = index.offset, index.sparse
    fix_mode = True
    with opened(folder, os.O_DIRECTORY) as at:
        for row, obj, name in jobs:
            fd = os.open(name[3:], flags, FILE_MODE, dir_fd=at)
            try:
                hole_map = int(maps[row])
                if hole_map < 0:
                    copy_whole(Run(tar, int(offsets[row]), 0, obj.size), fd)
                else:
                    place = int(offsets[row])
                    for start, length in index.sparse_maps.extents(hole_map):
                        copy_whole(Run(tar, place, start, length), fd)
                        place += length
                    os.ftruncate(fd, obj.size)
                if fix_mode:
                    # The umask may have taken read bits away; one look per batch spares a call per file.
                    fix_mode = os.fstat(fd).st_mode & 0o777 != FILE_MODE
                    if fix_mode:
                        os.fchmod(fd, FILE_MODE)
            finally:
                os.close(fd)


def copy_whole(run: Run, target: int, *, in_kernel: bool = True) -> None:
    """Do :func:`~layerkit.linux.syscalls.copy_run`.

    Raises:
        StoreError: the source is shorter than that.
    """
    done = copy_run(run, target, in_kernel=in_kernel)
    if done < run.length:
        raise StoreError(
            f"the store's data ends at byte {run.offset + done}, {run.length - done} bytes before the end of a "
            "file in it"
        )


def stored_objects(layout: Layout) -> Iterator[tuple[bytes, os.stat_result]]:
    """Yield every file in the object folder as (``:x/NAME``, its lstat), strays included."""
    with os.scandir(os.fsencode(layout.objects)) as tops:
        folders = sorted(entry.name for entry in tops)
    for top in folders:
        path = os.path.join(os.fsencode(layout.objects), top)
        if not os.path.isdir(path) or os.path.islink(path):
            yield top, os.lstat(path)
            continue
        with os.scandir(path) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    yield top + b"/" + entry.name, entry.stat(follow_symlinks=False)


def needed(index: Index) -> Iterator[bytes]:
    """Yield the sha256 of every content that ``index`` needs as an object."""
    digests = index.sha256[contents(index)].tobytes()
    return (digests[i : i + 32] for i in range(0, len(digests), 32))


def find_content(index: Index, sha256: bytes) -> list[bytes]:
    """Return the paths in a layer that hold a content."""
    same = (index.sha256 == np.frombuffer(sha256, np.uint8)).all(axis=1) & (index.kind == Kind.REG)
    return [index.path[row] for row in np.flatnonzero(same).tolist()]
