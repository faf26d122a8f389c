"""The indexes of layers, among all who work on the same registry: each layer is read once by one of them.

Who can find each other: by the store's lock where they have one store, by one task of the cluster where they are
workers of one, and by a repository of indexes in the registry across all of these.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerkit.formats.index import file as index_file
from layerkit.formats.index.check import check_index, mark_unproven
from layerkit.formats.oci import documents as oci
from layerkit.formats.oci import index_artifact
from layerkit.hook.work.access import Place
from layerkit.hook.work.executors import run_once
from layerkit.images.registry.client import Repository
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import LayerkitError, NotFound, RegistryError
from layerkit.model.image import Layer
from layerkit.model.limits import Limits
from layerkit.model.work import Others
from layerkit.store.unproven import UnprovenIndexes
from layerkit.unpack import read_in_turn
from layerkit.usecases.settings import Settings

if TYPE_CHECKING:
    from layerkit.model.index import Index
    from layerkit.store.local import LocalStore

_log = logging.getLogger("layerkit.hook.layers")
_BLOB_BYTES = 1 << 30
_refused: set[str] = set()


class SharedIndexes:
    """The indexes of layers in a repository of their own.

    A tag for each layer, made of its ``diff_id`` and the format's version, leads to a manifest with one blob. What
    is found is checked like a layer from a stranger, and marked as unproven: a claim of whoever may write to that
    repository (docs/adr/0014, 0015). Nothing here may stop the work: without it a layer is read again.
    """

    def __init__(self, repository: Repository, limits: Limits) -> None:
        """Nothing is asked yet."""
        self.repository, self.limits = repository, limits

    def has(self, diff_id: Digest) -> bool:
        """Return whether there is an index of this layer; no if the registry does not say."""
        try:
            return self.repository.has_manifest(index_artifact.shared_tag(diff_id))
        except RegistryError as error:
            _log.debug("%s: %s", self.repository, error)
            return False

    def load(self, diff_id: Digest) -> Index | None:
        """Return the index of this layer, marked as unproven; None if there is none that can be used."""
        tag = index_artifact.shared_tag(diff_id)
        what = f"{self.repository}:{tag}"
        try:
            _, data = self.repository.manifest(tag)
            blob = index_artifact.parse_shared(data, diff_id, what, limits=self.limits)
            return index_artifact.decode(
                self.repository.blob(blob, _BLOB_BYTES), diff_id, what, origin=str(self.repository),
                limits=self.limits,
            )  # fmt: skip
        except NotFound:
            return None
        except LayerkitError as error:
            # Damaged, or not ours: the layer itself says what is right.
            _log.warning("a shared index is not used", extra={"error": str(error)})
            return None

    def save(self, index: Index) -> bool:
        """Publish the index of a layer that was read; return whether others will find it."""
        if str(self.repository) in _refused:
            return False
        blob, data = index_artifact.encode(index)
        try:
            self.put_blob(oci.EMPTY_DESCRIPTOR, oci.EMPTY_JSON)
            self.put_blob(blob, data)
            manifest, entry = index_artifact.build_shared(blob)
            self.repository.put_manifest(manifest, entry.media_type, index_artifact.shared_tag(index.diff_id))
        except RegistryError as error:
            _log.warning("indexes are not shared", extra={"error": str(error)})
            if not error.temporary:  # that will not change: it is not asked again
                _refused.add(str(self.repository))
            return False
        return True

    def put_blob(self, blob: Descriptor, data: bytes) -> None:
        """Store a blob if it is not there."""
        if self.repository.blob_size(blob.digest) is None:
            self.repository.put_blob(blob, [data])


@dataclass(frozen=True, slots=True)
class Fleet:
    """Where a worker finds the indexes that others of its fleet have made, and leaves its own.

    Attributes:
        settings: the local store of whoever works, and bounds.
        place: a repository that has the layers' blobs.
        shared: repository of the same registry in which indexes are shared, None for none.
    """

    settings: Settings
    place: Place
    shared: Place | None = None

    def shared_indexes(self) -> SharedIndexes | None:
        """Return where indexes are shared, None for nowhere."""
        limits = self.settings.bounds
        return SharedIndexes(self.shared.open(limits), limits) if self.shared else None

    @contextlib.contextmanager
    def open(self) -> Iterator[FleetIndexes]:
        """Open the local store, and hold it while the block runs."""
        with self.settings.open_store() as store, store.hold():
            yield FleetIndexes(self, store)


class FleetIndexes(Others):
    """The indexes that a store, a cluster and a registry have among them: see the module."""

    def __init__(self, fleet: Fleet, store: LocalStore) -> None:
        """Nothing is asked yet."""
        self.store, self.shared, self.limits = store, fleet.shared_indexes(), fleet.settings.bounds
        self._fleet, self._claims = fleet, UnprovenIndexes(fleet.settings.store_path, limits=self.limits)

    def index(self, layer: Layer, below: Mapping[Digest, Index]) -> tuple[Index, str] | None:
        """See the port; ``shared`` is what others have read."""
        return self._known(layer) or self._from_cluster(layer)

    @contextlib.contextmanager
    def turn(self, layer: Layer) -> Iterator[tuple[Index, str] | None]:
        """See the port."""
        with self.store.layer_lock(layer.diff_id):
            yield self._known(layer)

    def take(self, index: Index) -> None:
        """See the port."""
        self.store.save_index(index)
        if self.shared is not None:
            self.shared.save(index)

    def read(self, layer: Layer) -> tuple[Index, str]:
        """Return the index of a layer and where it came from, without the cluster: see :func:`read_in_turn`."""
        return read_in_turn(layer, self._fleet.place.open(self.limits).open_blob, self, self.limits)

    def _known(self, layer: Layer) -> tuple[Index, str] | None:
        """Return what is known of a layer without anybody reading it."""
        if (kept := self.store.load_index(layer.diff_id)) is not None:
            return kept, "store"
        if (copied := self._claims.load(layer.diff_id)) is not None:
            return copied, "shared"
        if self.shared is None or (found := self.shared.load(layer.diff_id)) is None:
            return None
        self._claims.save(found)
        return found, "shared"

    def _from_cluster(self, layer: Layer) -> tuple[Index, str] | None:
        """Return what one task of the cluster that this runs on has made of a layer, for all who ask."""
        asked = LayerTask(self._fleet, layer, uuid.uuid4().hex)
        key = f"layerkit-index-{index_file.VERSION}-{self._fleet.place.host}-{layer.diff_id}"
        got = run_once(key, fetch, asked)
        if got is None:
            return None
        if got.data:
            known = self.store.load_index(layer.diff_id)
            known = self._sent(layer, got.data) if known is None else known
        else:
            known, _ = self._known(layer) or (None, "")
        # Of several who asked for the same, it was read for the one whose task was taken.
        origin = "layer" if got.origin == "layer" and got.asker == asked.asker else "shared"
        return None if known is None else (known, origin)

    def _sent(self, layer: Layer, data: bytes) -> Index | None:
        """Return an index as another worker sent it, held to what one from the registry is held to."""
        try:
            index = index_file.decode(data, f"index of layer {layer.diff_id} from another worker")
            check_index(index, "an index from another worker", self.limits)
        except LayerkitError:
            return None
        if index.diff_id != layer.diff_id:
            return None
        index = mark_unproven(index, "another worker")
        self._claims.save(index)
        return index


@dataclass(frozen=True, slots=True)
class LayerTask:
    """A layer whose index is wanted; ``asker`` tells one who asks for it from others."""

    fleet: Fleet
    layer: Layer
    asker: str = ""


@dataclass(frozen=True, slots=True)
class Got:
    """What :func:`fetch` gives: where an index came from, for whom, and its bytes if it is not published."""

    data: bytes
    origin: str
    asker: str


def fetch(task: LayerTask) -> Got | None:
    """Have a layer's index in the store and with the shared ones; None if that fails.

    Whoever gets None asks by itself, and then learns why: errors do not survive the way from another machine.
    """
    try:
        with task.fleet.open() as fleet:
            index, origin = fleet.read(task.layer)
            # What is in the registry is smaller there than on the way through the cluster.
            published = fleet.shared is not None and fleet.shared.has(task.layer.diff_id)
            return Got(b"" if published else b"".join(index_file.encode(index)), origin, task.asker)
    except LayerkitError:
        return None


def publish(task: LayerTask) -> bool:
    """Have a layer's index where others find it, reading the layer if nobody has; return whether it is there."""
    try:
        with task.fleet.open() as fleet:
            if fleet.shared is None:
                return False
            # One that this store has kept from before has perhaps never been published.
            index, origin = fleet.index(task.layer, {}) or fleet.read(task.layer)
            return origin == "shared" or fleet.shared.has(task.layer.diff_id) or fleet.shared.save(index)
    except LayerkitError:
        return False
