"""METAs in the store: metadata layers by what they are made of."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from layerkit.linux.durable import disk_errors, remove, sync_filesystem, sync_path
from layerkit.linux.folders.listing import Listing, list_folder
from layerkit.model.digest import Digest
from layerkit.model.errors import StoreError
from layerkit.store.catalog import Catalog, Publication
from layerkit.store.layout import FILE_MODE, REPAIR
from layerkit.store.spool import Spool

IMAGE_FILE = "meta.erofs"
FIXUPS_FILE = "fixups"
ROOT_FOLDER = "root"
INFO_FILE = "info.json"
REQUIRED_INFO = ("tree", "map", "rendering", "namespace", "names")
FORMAT_VERSION = 2
"""Of METAs: raised when the same tree and map would give other bytes."""


class Stacking(StrEnum):
    """How a META lies over the folders into which another runtime unpacked layers."""

    DATA_ONLY = "data-only"
    CLASSIC = "classic"

    def form(self, rendering: str) -> str:
        """Return the rendering of such a META, as its key has it."""
        return f"{rendering} over folders, {self}, "


def meta_key(tree: Digest, mapping: str, rendering: str, namespace: str, format_version: int) -> str:
    """Return the key of a META: equal exactly if all that decides its bytes is equal.

    Args:
        tree: digest of the tree before mapping.
        mapping: the map's canonical text, "" for none.
        rendering: ``erofs``, ``directory``.
        namespace: ``trusted`` or ``user``.
        format_version: of the rendering's writer; raise it when the same input gives other bytes.
    """
    parts = ("layerkit.meta", str(tree), mapping, str(rendering), str(namespace), str(format_version))
    # As JSON, since the parts could run into each other if they were only strung together.
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def names_data_by_path(key: str, info: Mapping[str, Any]) -> bool:
    """Return whether a META's stubs lead into folders of another runtime by path, and not to data by content."""
    tree, parts = Digest.parse(info["tree"]), (info["namespace"], FORMAT_VERSION)
    forms = [way.form(info["rendering"]) for way in Stacking]
    return "folders" in info or key in [meta_key(tree, info["map"], form, *parts) for form in forms]


def chain_key(diff_ids: Sequence[Digest]) -> str:
    """Return a name for layers in this order; unlike a chain_id it is that of the whole list at once."""
    return hashlib.sha256("\n".join(map(str, diff_ids)).encode()).hexdigest()


class _MetaFiles:
    """The names of what lies in a META's folder, ``path``."""

    __slots__ = ()
    path: Path

    @property
    def image_file(self) -> Path:
        """Return the EROFS image (of the erofs rendering)."""
        return self.path / IMAGE_FILE

    @property
    def fixups_file(self) -> Path:
        """Return the file of places that an id map changes (of the erofs rendering)."""
        return self.path / FIXUPS_FILE

    @property
    def root(self) -> Path:
        """Return the root folder (of the directory rendering); a writer's is not made yet."""
        return self.path / ROOT_FOLDER


@dataclass(frozen=True, slots=True)
class MetaEntry(_MetaFiles):
    """A META in the store.

    Attributes:
        key: see :func:`meta_key`.
        path: its folder.
        info: what its maker said of it, at least ``tree`` (digest before mapping), ``map`` (canonical text),
            ``rendering``, ``namespace`` and ``names`` (entries); and what the store adds: ``files`` (name to
            [sha256, bytes]), ``listing`` (digest of ``root/``, "" without one), ``allocated_bytes``.
    """

    key: str
    path: Path
    info: Mapping[str, Any]

    @property
    def allocated_bytes(self) -> int:
        """Return what it takes on disk, its info aside."""
        return int(self.info["allocated_bytes"])


class MetaWriter(_MetaFiles):
    """A folder to render a META into: ``meta.erofs`` and ``fixups``, or a folder ``root``.

    End it with :meth:`commit` or :meth:`abort`, or use it in ``with``, which aborts what is not committed
    and turns what the disk refuses into :class:`StoreError`.
    """

    def __init__(self, spool: Spool, catalog: Catalog, key: str, done: Callable[[], None]) -> None:
        """Begin a META that will be kept under ``key``; ``done`` is called once when the writer ends."""
        self._layout, self._spool, self._catalog, self.key = catalog.layout, spool, catalog, key
        self._done: Callable[[], None] | None = done
        with disk_errors("writing a META", self._layout.root):
            # Open before anything is written: sync_filesystem tells what failed since.
            self._root = os.open(self._layout.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self.path = spool.folder("meta")
            except BaseException:
                os.close(self._root)
                raise

    def __enter__(self) -> MetaWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.abort()
        if isinstance(error, OSError):
            # Whoever renders writes with plain calls; a full disk is told in the same words everywhere.
            with disk_errors("writing a META", self._layout.root):
                raise error

    def commit(self, info: Mapping[str, Any], image: Digest | None = None) -> MetaEntry:
        """Make the META appear, on disk for sure; if another run was quicker, its equal one stands.

        Args:
            info: see :class:`MetaEntry`; JSON-able.
            image: the manifest's digest of an image in the catalog that it belongs to.

        Raises:
            StoreError: the disk refuses it.
        """
        if self._done is None:
            raise StoreError("this META was committed or aborted before")
        absent = [name for name in REQUIRED_INFO if name not in info]
        if absent:
            raise StoreError(f"META {self.key}: its info lacks {', '.join(absent)}")
        try:
            with disk_errors("storing a META", self._layout.root):
                text = self._publish(self._seal(info), image)
            return MetaEntry(self.key, self._layout.meta(self.key), parse_info(text, f"META {self.key}"))
        finally:
            self.abort()

    def _seal(self, info: Mapping[str, Any]) -> str:
        files: dict[str, tuple[str, int]] = {}
        listing, allocated = "", 0
        for path in sorted(self.path.iterdir()):
            if path.name == ROOT_FOLDER:
                found = self._list_and_sync(path)
                listing = found.digest
                allocated += found.allocated_bytes
                continue
            with path.open("rb") as file:
                os.fchmod(file.fileno(), FILE_MODE)
                os.fsync(file.fileno())
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                facts = os.fstat(file.fileno())
            files[path.name] = (sha256, facts.st_size)
            allocated += facts.st_blocks * 512
        text = json.dumps(
            {**info, "files": files, "listing": listing, "allocated_bytes": allocated}, sort_keys=True
        )
        with (self.path / INFO_FILE).open("x") as note:
            note.write(text)
            note.flush()
            os.fchmod(note.fileno(), FILE_MODE)
            os.fsync(note.fileno())
        sync_path(self.path)
        return text

    def _list_and_sync(self, root: Path) -> Listing:
        """Return what is below ``root``, all of it on disk: while the disk writes, nothing else has to wait."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(1, "layerkit-sync") as pool:
            synced = pool.submit(sync_filesystem, self._root)
            found = list_folder(root)
            synced.result()
        return found

    def _publish(self, text: str, image: Digest | None) -> str:
        target = self._layout.meta(self.key)
        out = Publication()
        with self._catalog.write(out.undo) as db:
            row = self._catalog.meta(self.key)
            if row is not None and (target / INFO_FILE).exists():
                # Its checksums describe what lies in place; all else in the two is the same.
                text = row
            else:
                if target.exists():
                    # Left by a killed run; nothing counts without its row.
                    target.rename(self._spool.path("stray"))
                out.place(self.path, target, keep=True)
                out.sync()
                Catalog.put_meta(db, self.key, text)
            if image is not None:
                Catalog.link_meta(db, str(image), self.key)
        return text

    def abort(self) -> None:
        """Drop what is not committed; harmless after :meth:`commit` and when called again."""
        if self._done is None:
            return
        done, self._done = self._done, None
        try:
            os.close(self._root)
            remove(self.path)
        finally:
            done()


def parse_info(text: str | bytes, where: str) -> dict[str, Any]:
    """Return the info that ``text`` spells.

    Raises:
        StoreError: it is not one; the message begins with ``where``.
    """
    try:
        info: dict[str, Any] = json.loads(text)
        for name in (*REQUIRED_INFO, "listing"):
            info[name]
        int(info["allocated_bytes"])
        for sha256, size in info["files"].values():
            bytes.fromhex(sha256), int(size)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreError(f"{where}: its info is damaged ({error!r}); {REPAIR}") from error
    return info
