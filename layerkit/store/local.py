"""The local store: layers, objects, METAs and images, each whole or absent.

See ``layout`` for what lies where, ``locks`` for the order of locks, ``catalog`` for what counts as whole.
A command that finds all it needs in the store must start at once, so what reads layers, writes them or looks
after the store is imported where it is used.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import os
import weakref
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from layerkit.linux.durable import disk_errors
from layerkit.model.digest import Digest
from layerkit.model.errors import NotFound, UsageError
from layerkit.model.image import Image
from layerkit.model.limits import DEFAULT, Limits
from layerkit.store.catalog import Catalog, StoredImage
from layerkit.store.layout import DataBackend, Layout
from layerkit.store.locks import BIRTHS, Locks, file_lock
from layerkit.store.metas import MetaEntry, MetaWriter, parse_info
from layerkit.store.spool import Spool

if TYPE_CHECKING:
    from layerkit.model.index import Index
    from layerkit.store import fsck, usage
    from layerkit.store.gc import GcReport, InUse
    from layerkit.store.layers import LayerWriter

GC_WAIT_SECONDS = 30.0
_DIGEST_PREFIX_CHARS = 6
_Writer = TypeVar("_Writer", "LayerWriter", MetaWriter)


class LocalStore:
    """One store, open; use it from several threads, and open it anew after a fork.

    ``with store.hold():`` around everything between bringing something in and writing down who needs it
    (import a layer, make META, ``add_image``, mount): gc waits for holds, and for nothing else.
    """

    def __init__(self, layout: Layout, identity: str, limits: Limits) -> None:
        """Use :meth:`open`."""
        self._layout, self.identity, self.limits = layout, identity, limits
        self._locks = Locks(layout.locks)
        self._spool = Spool(layout)
        self._catalog = Catalog(layout)
        self._writers: weakref.WeakSet[LayerWriter | MetaWriter] = weakref.WeakSet()

    @classmethod
    def open(cls, root: Path, *, create: bool = True, limits: Limits = DEFAULT) -> LocalStore:
        """Open the store at ``root``.

        Args:
            root: its folder.
            create: make it if there is none.
            limits: bounds for what is read from it.

        Raises:
            NotFound: there is none, and ``create`` is false.
            StoreError: another folder, a newer layout, another user's, or a disk that refuses.
        """
        layout = Layout(root.absolute())
        with disk_errors("opening the store", layout.root):
            identity = layout.read_version()
            if identity is None:
                if not create:
                    raise NotFound(f"{root}: no layerkit store; `layerkit remap` or `mount` makes one")
                if layout.root.exists():
                    layout.check_owner()
                layout.create_folders()
                with file_lock(layout.locks / BIRTHS):
                    # Of several that start at once the first makes it.
                    identity = layout.read_version()
                    if identity is None:
                        Catalog(layout).close()
                        identity = layout.write_version()
            layout.check_owner()
            if os.statvfs(layout.root).f_flag & os.ST_RDONLY:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return cls(layout, identity, limits)

    def close(self) -> None:
        """Abort what was begun and not committed, and release everything."""
        for writer in list(self._writers):
            writer.abort()
        self._spool.close()
        self._catalog.close()

    def __enter__(self) -> LocalStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def root(self) -> Path:
        """Return the store's folder."""
        return self._layout.root

    @property
    def objects_root(self) -> Path:
        """Return the folder that serves as a data-only lower of the objects backend."""
        return self._layout.objects

    # Locks

    def hold(self) -> contextlib.AbstractContextManager[None]:
        """Keep gc out while the block runs; may be nested, and taken in several threads."""
        return self._locks.shared()

    def layer_lock(self, diff_id: Digest) -> contextlib.AbstractContextManager[None]:
        """Have a layer to oneself, so that of several that import it one does the work.

        Look whether the layer is there again once the lock is held. Take several in rising order.
        """
        return self._locks.named(f"layer-{diff_id.hex}")

    def meta_lock(self, key: str) -> contextlib.AbstractContextManager[None]:
        """Have a META to oneself; take it after layer locks, and that of a mapped META before its base's."""
        return self._locks.named(f"meta-{key}")

    # Layers

    def load_index(self, diff_id: Digest) -> Index | None:
        """Return the index of a layer, None if it is not kept; see :meth:`Layout.load_index`."""
        return self._layout.load_index(diff_id)

    def has_layer(self, diff_id: Digest, backend: DataBackend | str) -> bool:
        """Return whether a layer's index and its data in ``backend`` are whole."""
        row = self._catalog.layer(diff_id)
        if row is None or not self._layout.index(diff_id).exists():
            return False
        if DataBackend(backend) is DataBackend.OBJECTS:
            return row.objects
        return row.tar and self._layout.tar(diff_id).exists() and self._layout.data(diff_id).exists()

    def begin_layer(self, backend: DataBackend | str | None) -> LayerWriter:
        """Return where the raw tar of a layer goes while it is indexed; ``backend`` None keeps the index only."""
        from layerkit.store.layers import LayerWriter

        wanted = None if backend is None else DataBackend(backend)
        return self._begin(lambda done: LayerWriter(self._spool, self._catalog, wanted, done))

    def _begin(self, make: Callable[[Callable[[], None]], _Writer]) -> _Writer:
        """Return the writer that ``make`` makes; the store is held until it calls what it is given."""
        self._locks.acquire_shared()
        try:
            writer = make(self._locks.release_shared)
        except BaseException:
            self._locks.release_shared()
            raise
        self._writers.add(writer)
        return writer

    def save_index(self, index: Index) -> None:
        """Keep the index of a layer without its data."""
        with self.begin_layer(None) as writer:
            writer.commit(index)

    def convert_layer(self, diff_id: Digest, backend: DataBackend | str) -> bool:
        """Make a layer's data whole in ``backend`` out of what is kept; return whether that can be done.

        The tar gives objects and a DATA image. Objects do not give back the tar: then the blob is needed.
        """
        wanted = DataBackend(backend)
        if self.has_layer(diff_id, wanted):
            return True
        row = self._catalog.layer(diff_id)
        index = self.load_index(diff_id)
        if row is None or index is None or not row.tar or not self._layout.tar(diff_id).exists():
            return False
        from layerkit.store import layers

        with self.hold(), disk_errors(f"storing layer {diff_id}", self.root):
            if wanted is DataBackend.OBJECTS:
                layers.make_objects(self._spool, self._catalog, index)
            else:
                layers.make_data(self._spool, self._catalog, index)
        return True

    def tar_path(self, diff_id: Digest) -> Path:
        """Return the raw uncompressed tar of a layer.

        Raises:
            NotFound: the layer is not kept as a tar.
        """
        return self._existing(self._layout.tar(diff_id), diff_id)

    def open_tar(self, diff_id: Digest) -> BinaryIO | None:
        """Open the raw uncompressed tar of a layer, None where none is kept; see the port."""
        with contextlib.suppress(FileNotFoundError):
            return self._layout.tar(diff_id).open("rb", buffering=0)
        return None

    def data_image(self, diff_id: Digest) -> Path:
        """Return the EROFS image that maps the files of a layer's tar.

        Raises:
            NotFound: the layer is not kept as a tar.
        """
        return self._existing(self._layout.data(diff_id), diff_id)

    def _existing(self, path: Path, diff_id: Digest) -> Path:
        if not path.exists():
            raise NotFound(
                f"{path}: layer {diff_id} is not in the store as a tar; import its image with --data tar"
            )
        return path

    def object_file(self, sha256: bytes) -> Path:
        """Return the file of a content, by its whole sha256.

        Raises:
            NotFound: it is not an object of this store.
        """
        if not self._catalog.has_object(sha256):
            raise NotFound(f"{self.root}: no object sha256:{sha256.hex()}")
        from layerkit.store.objects import object_path

        return object_path(self._layout, sha256)

    def uses(self, sha256: bytes) -> list[tuple[Digest, bytes]]:
        """Return where a content occurs, as (diff_id, path in the layer); reads every index."""
        from layerkit.store.objects import find_content

        found = []
        for row in self._catalog.layers():
            index = self.load_index(row.diff_id)
            if index is not None:
                found += [(row.diff_id, path) for path in find_content(index, sha256)]
        return found

    # METAs

    def meta(self, key: str) -> MetaEntry | None:
        """Return a META, None if it is not kept."""
        row = self._catalog.meta(key)
        path = self._layout.meta(key)
        if row is None or not path.exists():
            return None
        return MetaEntry(key, path, parse_info(row, f"META {key}"))

    def metas(self) -> list[MetaEntry]:
        """Return all METAs, oldest first."""
        return [
            MetaEntry(key, self._layout.meta(key), parse_info(text, f"META {key}"))
            for key, text in self._catalog.metas()
        ]

    def begin_meta(self, key: str) -> MetaWriter:
        """Return a folder to render a META into."""
        return self._begin(lambda done: MetaWriter(self._spool, self._catalog, key, done))

    def tree_facts(self, chain: str) -> dict[str, object] | None:
        """Return what :meth:`put_tree_facts` kept for a chain of layers (see ``chain_key``)."""
        text = self._catalog.tree_facts(chain)
        if text is None:
            return None
        try:
            facts: dict[str, object] = json.loads(text)
        except ValueError:
            return None  # they can be found out again
        return facts

    def put_tree_facts(self, chain: str, facts: Mapping[str, object]) -> None:
        """Keep what is known about the tree of a chain of layers; JSON-able."""
        with disk_errors("keeping the facts of a tree", self.root):
            self._catalog.put_tree_facts(chain, json.dumps(facts))

    # Images

    def add_image(self, image: Image, names: Collection[str], *, metas: Collection[str] = ()) -> None:
        """Keep an image's manifest and config, let ``names`` mean it, and connect it with METAs.

        Without a name it goes by its digest. Of an image that has a name, gc takes nothing.
        """
        chosen = [name for name in names if name] or [str(image.descriptor.digest)]
        with self.hold(), disk_errors("keeping an image", self.root):
            self._catalog.put_image(image, chosen, metas)

    def image(self, name: str) -> Image:
        """Return the image called ``name``, or whose manifest's digest begins so.

        Raises:
            NotFound: none; the message lists names that are close.
            UsageError: several digests begin so.
        """
        return self.stored_image(name).image

    def stored_image(self, name: str) -> StoredImage:
        """Return :meth:`image` with its names."""
        names = dict(self._catalog.names())
        digest = names.get(name) or self._by_prefix(name)
        found = self._catalog.image(digest) if digest else None
        if found is None:
            near = difflib.get_close_matches(name, names, 3, 0.4) or sorted(names)[:3]
            hint = f"; did you mean {', '.join(near)}?" if near else "; it holds no images"
            raise NotFound(f"{self.root}: no image {name!r}{hint} `layerkit store ls` lists them")
        return found

    def _by_prefix(self, text: str) -> str | None:
        digests = self._catalog.digests()
        if text in digests:
            return text
        if len(text.rpartition(":")[2]) < _DIGEST_PREFIX_CHARS:
            return None
        found = [d for d in digests if d.startswith(text) or d.partition(":")[2].startswith(text)]
        if len(found) > 1:
            raise UsageError(f"{text}: {len(found)} images begin so; give more of the digest")
        return found[0] if found else None

    def images(self) -> list[StoredImage]:
        """Return all images, oldest first; those without a name go with the next gc."""
        return self._catalog.images()

    def remove_image(self, name: str) -> None:
        """Forget a name, or all names of the image whose digest begins so; gc then frees what it alone used.

        Raises:
            NotFound: there is none.
        """
        found = self.stored_image(name)
        with self.hold(), disk_errors("removing an image", self.root):
            for each in [name] if name in found.names else found.names:
                self._catalog.drop_name(each)

    # Upkeep

    def df(self) -> usage.DfReport:
        """Return what takes how much space."""
        from layerkit.store import usage

        return usage.df(self._catalog)

    def ls(self) -> list[usage.LsRow]:
        """Return the images with their names and maps."""
        from layerkit.store import usage

        return usage.ls(self._catalog)

    def verify(self, *, repair: bool = False, deep: bool = True) -> list[fsck.Finding]:
        """Check everything; an empty list, or one without damage, means that the store is whole.

        Args:
            repair: make anew what the store itself can, take out the rest so that an import brings it
                back, and remove leftovers. Needs the store alone.
            deep: read and hash all data; else sizes only.

        Raises:
            StoreError: ``repair``, and the store is in use.
        """
        from layerkit.store import fsck

        alone = self._locks.exclusive(GC_WAIT_SECONDS) if repair else self._locks.shared()
        with alone, disk_errors("checking the store", self.root):
            return fsck.Fsck(self._spool, self._catalog, self.limits, repair=repair, deep=deep).run()

    def gc(
        self,
        in_use: InUse = ((), ()),
        *,
        dry_run: bool = False,
        drop_metas: bool = False,
        wait_seconds: float = GC_WAIT_SECONDS,
    ) -> GcReport:
        """Remove what no image and no mount uses, and what killed runs left behind.

        Args:
            in_use: what mounts use: (diff_ids, META keys), or a function that is asked for them once no
                other run can use the store.
            dry_run: change nothing, only tell.
            drop_metas: remove also METAs of images that stay, but for those in use; they can be made again.
            wait_seconds: how long to wait for other runs.

        Raises:
            StoreError: other runs still use the store.
        """
        from layerkit.store.gc import Collector

        with self._locks.exclusive(wait_seconds), disk_errors("collecting garbage", self.root):
            collector = Collector(self._catalog, self._locks, dry_run=dry_run)
            return collector.run(in_use() if callable(in_use) else in_use, drop_metas=drop_metas)
