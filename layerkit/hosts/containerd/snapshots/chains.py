"""Chains of layers that lie in layerkit's own store, so that nobody needs to unpack them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from layerkit.hosts.mounts.spec import MountLayer, MountOptions, choose, data_layers, meta_layer
from layerkit.idmap import Mapping
from layerkit.model.digest import Digest
from layerkit.model.errors import NotFound, SnapshotError, StoreError, UnsupportedHost
from layerkit.model.image import chain_ids
from layerkit.model.limits import Limits
from layerkit.store.layout import DataBackend
from layerkit.store.local import LocalStore
from layerkit.store.preparation import Preparation, Rendering

_log = logging.getLogger("layerkit.snapshotter")


@dataclass(frozen=True, slots=True)
class Chain:
    """The lowest layers of a stored image.

    Attributes:
        image: manifest digest of the image.
        diff_ids: of the layers, bottom first.
        below: chain_id of all but the top one, "" if there is no other.
    """

    image: str
    diff_ids: tuple[Digest, ...]
    below: str


class StoreChains:
    """Chains by chain_id, in a store that other processes may fill and empty at any time.

    An image that is in use is kept by a name in the store, ``snapshotter-OWNER/DIGEST``, which
    ``layerkit store ls`` shows: gc takes nothing of an image that has a name.
    """

    def __init__(self, root: Path, owner: str, limits: Limits) -> None:
        """Look at the store at ``root``; there may be none yet. ``owner`` tells several snapshotters apart."""
        self._root, self._owner, self._limits = root, owner, limits
        self._lock = threading.RLock()
        self._store: LocalStore | None = None
        self._seen: tuple[object, ...] = ()
        self._chains: dict[str, Chain] = {}

    def close(self) -> None:
        """Close the store."""
        with self._lock:
            if self._store is not None:
                self._store.close()
                self._store = None

    @property
    def store(self) -> LocalStore:
        """Return the open store.

        Raises:
            NotFound: there is none.
        """
        with self._lock:
            if self._store is None:
                self._store = LocalStore.open(self._root, create=False, limits=self._limits)
            return self._store

    def find(self, chain_id: str) -> Chain | None:
        """Return the chain if every layer of it lies whole in the store.

        A store that cannot be read has none: containerd then downloads and unpacks, as without it.
        """
        with self._lock:
            try:
                self._refresh()
                chain = self._chains.get(chain_id)
                return None if chain is None or self._backend(chain.diff_ids) is None else chain
            except (StoreError, OSError) as error:
                _log.warning("%s: not asked for layers: %s", self._root, error)
                return None

    def _refresh(self) -> None:
        seen = tuple(_stamp(self._root / name) for name in ("catalog.db", "catalog.db-wal"))
        if seen == self._seen and self._store is not None:
            return
        self._chains.clear()
        try:
            images = self.store.images()
        except NotFound:
            return
        for stored in images:
            diff_ids = stored.image.diff_ids
            below = ""
            for count, chain_id in enumerate(chain_ids(diff_ids), 1):
                self._chains[chain_id] = Chain(str(stored.image.descriptor.digest), tuple(diff_ids[:count]), below)
                below = chain_id
        self._seen = seen

    def _backend(self, diff_ids: Sequence[Digest]) -> DataBackend | None:
        """Return in which form all these layers lie in the store."""
        backends = (DataBackend.TAR, DataBackend.OBJECTS)
        whole = (each for each in backends if all(self.store.has_layer(diff_id, each) for diff_id in diff_ids))
        return next(whole, None)

    def _pin_name(self, image: str) -> str:
        return f"snapshotter-{self._owner}/{image.rpartition(':')[2][:16]}"

    def pin(self, image: str) -> None:
        """Keep an image, whatever becomes of its other names."""
        found = self.store.stored_image(image)
        name = self._pin_name(image)
        if name not in found.names:
            self.store.add_image(found.image, [name])

    def keep_only(self, images: set[str]) -> list[str]:
        """Let go of every image that is not among ``images``; return the names that went."""
        wanted = {self._pin_name(image) for image in images}
        prefix = f"snapshotter-{self._owner}/"
        try:
            names = [name for stored in self.store.images() for name in stored.names]
        except NotFound:
            return []
        gone = [name for name in names if name.startswith(prefix) and name not in wanted]
        for name in gone:
            self.store.remove_image(name)
        return gone

    def check(self, image: str, diff_ids: Sequence[Digest], mapping: Mapping) -> None:
        """Refuse a map that leaves an owner of a chain out.

        Raises:
            UnmappedId: the first such owner.
        """
        kept = self.store.stored_image(image).image.diff_ids[: len(diff_ids)]
        Preparation(self.store, kept, limits=self._limits).check(mapping)

    def layers(
        self, image: str, diff_ids: Sequence[Digest], mapping: Mapping | None
    ) -> tuple[MountLayer, tuple[MountLayer, ...]]:
        """Return META and the data of a chain, META made for ``mapping`` if it is not kept.

        ``image`` is the manifest digest of the image that keeps the chain.

        Raises:
            UnmappedId: the map leaves an owner out.
            SnapshotError: failed_precondition, the store lost a layer.
            UnsupportedHost: the rendering that is configured has to be served.
        """
        store = self.store
        with store.hold():
            backend = self._backend(diff_ids)
            if backend is None:
                raise SnapshotError(
                    "failed_precondition",
                    f"layers of {image} are no longer in the store {self._root}: bring the image back "
                    f"(`layerkit remap REF`), or remove its snapshots",
                )
            work = Preparation(store, diff_ids, limits=self._limits)
            ways = choose(self._root, mapping, MountOptions(data=backend, own_meta=True))
            if ways.rendering is Rendering.FUSE:
                raise UnsupportedHost(
                    "rendering fuse for containerd, which mounts files", "set another `rendering`, or none"
                )
            entry = work.meta(mapping, ways.rendering, ways.namespace)
            store.add_image(store.stored_image(image).image, [self._pin_name(image)], metas=[entry.key])
            return meta_layer(entry), data_layers(store, backend, work.facts())


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size
