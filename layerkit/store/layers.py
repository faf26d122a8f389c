"""Writing a layer into the store: spooled while it is read, visible as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from layerkit.formats.erofs import data as erofs_data
from layerkit.formats.index import file as index_file
from layerkit.linux.durable import NewFile, disk_errors, remove, sync_filesystem
from layerkit.linux.syscalls import opened
from layerkit.model.errors import DigestMismatch, StoreError
from layerkit.model.index import Index
from layerkit.store.catalog import Catalog, LayerRow, Publication
from layerkit.store.layout import FILE_MODE, DataBackend
from layerkit.store.objects import ObjectBatch
from layerkit.store.spool import Spool


class LayerWriter:
    """Takes the raw tar of a layer, then its index; a :class:`~layerkit.model.ports.DataSink`.

    End it with :meth:`commit` or :meth:`abort`, or use it in ``with``, which aborts what is not committed.
    One thread writes at a time. The tar must be the one the index was made from, its digest checked there.
    """

    def __init__(
        self, spool: Spool, catalog: Catalog, backend: DataBackend | None, done: Callable[[], None]
    ) -> None:
        """Begin; ``done`` is called once when the writer ends. ``backend`` None keeps the index only."""
        self._layout, self._spool, self._catalog, self.backend = catalog.layout, spool, catalog, backend
        self._done: Callable[[], None] | None = done
        self._temporary: list[Path] = []
        self._tar: NewFile | None = None
        if backend is not None:
            with disk_errors("writing a layer", self._layout.root):
                # The objects backend drops this file again, so it had better never reach the disk.
                self._tar = NewFile(self._new("tar"), direct=backend is DataBackend.TAR)

    def __enter__(self) -> LayerWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def _new(self, kind: str) -> Path:
        path = self._spool.path(kind)
        self._temporary.append(path)
        return path

    def write(self, chunk: memoryview, /) -> int:
        """Take the next bytes of the uncompressed tar.

        Raises:
            StoreError: the disk is full or refuses the bytes.
        """
        if self._tar is None:
            raise StoreError("this layer is kept without its data, or has ended")
        with disk_errors("writing a layer", self._layout.root):
            return self._tar.write(chunk)

    def commit(self, index: Index) -> None:
        """Make the layer appear, on disk for sure. Another process may have done the same: both are right.

        Raises:
            DigestMismatch: the bytes written are not as many as the index tells.
            StoreError: the disk refuses them, or two contents have one short name; nothing is kept.
        """
        if self._done is None:
            raise StoreError("this layer was committed or aborted before")
        try:
            if self._tar is not None and self._tar.size != index.tar_size:
                raise DigestMismatch(
                    f"layer {index.diff_id}", f"{self._tar.size} bytes of tar", f"{index.tar_size} bytes"
                )
            with disk_errors(f"storing layer {index.diff_id}", self._layout.root):
                encoded = self._new("index")
                write_index(index, encoded)
                if self._tar is None:
                    put_layer(self._catalog, index, LayerFiles(encoded))
                elif self.backend is DataBackend.OBJECTS:
                    batch = ObjectBatch(self._spool, self._catalog)
                    self._temporary.append(batch.folder)
                    batch.write(self._tar.fd, index)
                    self._drop_tar()
                    put_layer(self._catalog, index, LayerFiles(encoded, batch=batch))
                else:
                    tar, data = self._temporary[0], self._new("data")
                    os.fchmod(self._tar.fd, FILE_MODE)
                    self._tar.sync()
                    build_data(index, tar, data)
                    put_layer(self._catalog, index, LayerFiles(encoded, tar, data))
        finally:
            self.abort()

    def _drop_tar(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None
            self._temporary[0].unlink(missing_ok=True)

    def abort(self) -> None:
        """Drop what is not committed; harmless after :meth:`commit` and when called again."""
        if self._done is None:
            return
        done, self._done = self._done, None
        try:
            self._drop_tar()
            for path in self._temporary:
                remove(path)
        finally:
            done()


@dataclass(frozen=True, slots=True)
class LayerFiles:
    """What a layer consists of, all on disk already but for the objects.

    Attributes:
        encoded: its index file, None where the store has it.
        tar: the raw tar.
        data: its DATA image, with ``tar`` or alone as a replacement.
        batch: the objects.
        whole: whether ``batch`` makes the layer whole in that backend.
    """

    encoded: Path | None = None
    tar: Path | None = None
    data: Path | None = None
    batch: ObjectBatch | None = None
    whole: bool = True


def put_layer(catalog: Catalog, index: Index, files: LayerFiles) -> None:
    """Publish a layer's files and its row, in one transaction."""
    layout, tar, batch = catalog.layout, files.tar, files.batch
    diff_id = index.diff_id
    with opened(layout.root, os.O_DIRECTORY) as root:
        if batch is not None:
            sync_filesystem(root)
        out = Publication()

        def undo() -> None:
            out.undo()
            if batch is not None:
                batch.undo()

        with catalog.write(undo) as db:
            row = catalog.layer(diff_id)
            whole_tar = row is not None and row.tar and _size(layout.tar(diff_id)) == index.tar_size
            if tar is not None:
                # A file that a mount may use is not replaced: a second inode would share no page cache.
                out.place(tar, layout.tar(diff_id), keep=whole_tar)
            if files.data is not None:
                out.place(files.data, layout.data(diff_id), keep=whole_tar and tar is not None)
            if files.encoded is not None:
                out.place(files.encoded, layout.index(diff_id), keep=False)
            if batch is not None:
                batch.publish(db)
                sync_filesystem(root)
            out.sync()
            has_tar = tar is not None or bool(row and row.tar)
            has_objects = (batch is not None and files.whole) or bool(row and row.objects)
            catalog.put_layer(db, LayerRow(diff_id, index.tar_size, len(index), has_tar, has_objects))


def make_objects(spool: Spool, catalog: Catalog, index: Index, *, only: frozenset[bytes] | None = None) -> None:
    """Write the objects of a layer out of its stored tar; ``only`` those, by sha256, again in a repair."""
    batch = ObjectBatch(spool, catalog)
    try:
        with opened(catalog.layout.tar(index.diff_id)) as tar:
            batch.write(tar, index, only=only)
        put_layer(catalog, index, LayerFiles(batch=batch, whole=only is None))
    finally:
        remove(batch.folder)


def make_data(spool: Spool, catalog: Catalog, index: Index) -> None:
    """Write the DATA image of a layer anew out of its stored tar."""
    data = spool.path("data")
    try:
        build_data(index, catalog.layout.tar(index.diff_id), data)
        put_layer(catalog, index, LayerFiles(data=data))
    finally:
        remove(data)


def write_index(index: Index, path: Path) -> None:
    """Write an index to the new file ``path``, on disk for sure."""
    with path.open("xb") as file:
        for part in index_file.encode(index):
            file.write(part)
        _finish(file)


def build_data(index: Index, tar: Path, data: Path) -> None:
    """Write the DATA image of the raw ``tar`` to the new file ``data``, on disk for sure."""
    with tar.open("rb") as source, data.open("x+b") as file:
        erofs_data.build_data(index, source, file)
        _finish(file)


def _finish(file: BinaryIO) -> None:
    file.flush()
    os.fchmod(file.fileno(), FILE_MODE)
    os.fsync(file.fileno())


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return -1
