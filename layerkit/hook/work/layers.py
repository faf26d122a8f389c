"""The index of a layer: from the store, from others that work on the same registry, or read from the layer itself.

A layer is read once among all who can find each other: by the store's lock where they have one store, by one task
of the cluster where they are workers of one, and by the repository of indexes (``shared``) across all of these.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from layerkit.formats.index import file as index_file
from layerkit.hook.work.access import Access, client_of
from layerkit.hook.work.executors import run_once
from layerkit.hook.work.shared import SharedIndexes
from layerkit.linux import configuration
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import LayerkitError
from layerkit.model.image import Image
from layerkit.model.limits import Limits

if TYPE_CHECKING:
    from layerkit.model.index import Index
    from layerkit.store.local import LocalStore


@dataclass(frozen=True, slots=True)
class LayerTask:
    """A layer whose index is wanted.

    Attributes:
        access: of the registry that has it.
        repository: one that has its blob.
        blob: of the layer.
        diff_id: of the layer.
        store: folder of the local store of whoever reads it.
        shared: repository of the same registry in which indexes are shared, "" for none.
        asker: tells one who asks for it from others.
    """

    access: Access
    repository: str
    blob: Descriptor
    diff_id: Digest
    store: Path
    shared: str = ""
    asker: str = ""

    def shared_indexes(self, limits: Limits) -> SharedIndexes | None:
        """Return where indexes are shared, None for nowhere."""
        return shared_at(self.access, self.shared, limits)


@dataclass(frozen=True, slots=True)
class Got:
    """What :func:`fetch` gives: where an index came from, for whom, and its bytes if it is not published."""

    data: bytes
    origin: str
    asker: str


def shared_at(access: Access, repository: str, limits: Limits) -> SharedIndexes | None:
    """Return the shared indexes in ``repository`` of a registry, None if it is ""."""
    if not repository:
        return None
    return SharedIndexes(client_of(access, limits).repository(f"{access.host}/{repository}"), limits)


def layer_tasks(image: Image, access: Access, repository: str, store: Path, shared: str) -> list[LayerTask]:
    """Return a task for each layer of ``image``, bottom first."""
    return [LayerTask(access, repository, layer.descriptor, layer.diff_id, store, shared) for layer in image.layers]


def fetch(task: LayerTask) -> Got | None:
    """Have a layer's index in the store and with the shared ones; None if that fails.

    Whoever gets None asks by itself, and then learns why: errors do not survive the way from another machine.
    """
    limits = configuration.limits()
    try:
        with _opened(task.store, limits) as store:
            index, origin = _local(task, store, limits)
            shared = task.shared_indexes(limits)
            # What is in the registry is smaller there than on the way through the cluster.
            published = shared is not None and shared.has(task.diff_id)
            return Got(b"" if published else b"".join(index_file.encode(index)), origin, task.asker)
    except LayerkitError:
        return None


def publish(task: LayerTask) -> bool:
    """Have a layer's index where others find it, reading the layer if nobody has; return whether it is there."""
    limits = configuration.limits()
    shared = task.shared_indexes(limits)
    if shared is None:
        return False
    try:
        with _opened(task.store, limits) as store:
            # One that this store has kept from before has perhaps never been published.
            index, origin = index_of(task, store, limits)
            return origin == "shared" or shared.has(task.diff_id) or shared.save(index)
    except LayerkitError:
        return False


def index_of(task: LayerTask, store: LocalStore, limits: Limits) -> tuple[Index, str]:
    """Return the index of a layer and where it came from: ``store``, ``shared`` or ``layer``.

    Raises:
        LayerkitError: the layer is malformed or unsafe, or cannot be read.
    """
    return _known(task, store, limits) or _from_cluster(task, store, limits) or _local(task, store, limits)


def _known(task: LayerTask, store: LocalStore, limits: Limits) -> tuple[Index, str] | None:
    """Return what is known of a layer without reading it."""
    from layerkit.store.unproven import UnprovenIndexes

    if (kept := store.load_index(task.diff_id)) is not None:
        return kept, "store"
    claims = UnprovenIndexes(task.store, limits=limits)
    if (copied := claims.load(task.diff_id)) is not None:
        return copied, "shared"
    shared = task.shared_indexes(limits)
    if shared is None or (found := shared.load(task.diff_id)) is None:
        return None
    claims.save(found)
    return found, "shared"


def _from_cluster(task: LayerTask, store: LocalStore, limits: Limits) -> tuple[Index, str] | None:
    """Return what one task of the cluster that this runs on has made of a layer, for all who ask."""
    asked = replace(task, asker=uuid.uuid4().hex)
    key = f"layerkit-index-{index_file.VERSION}-{task.access.host}-{task.diff_id}"
    got = run_once(key, fetch, asked)
    if got is None:
        return None
    # Of several who asked for the same, it was read for the one whose task was taken.
    origin = "layer" if got.origin == "layer" and got.asker == asked.asker else "shared"
    if got.data:
        index = store.load_index(task.diff_id)
        if index is None:
            index = _from_worker(got, task, limits)
        return None if index is None else (index, origin)
    found = _known(task, store, limits)
    return None if found is None else (found[0], origin)


def _local(task: LayerTask, store: LocalStore, limits: Limits) -> tuple[Index, str]:
    """Return the index of a layer, read by one worker of this store only, and published where that is wanted."""
    from layerkit.unpack import index_layer

    with store.layer_lock(task.diff_id):
        # Another worker may have it while this one waited.
        if (found := _known(task, store, limits)) is not None:
            return found
        source = client_of(task.access, limits).repository(f"{task.access.host}/{task.repository}")
        reader = source.open_blob(task.blob)
        try:
            index = index_layer(reader, task.blob, task.diff_id, limits=limits)
        finally:
            reader.close()
        store.save_index(index)
        shared = task.shared_indexes(limits)
        if shared is not None:
            shared.save(index)
        return index, "layer"


def _from_worker(got: Got, task: LayerTask, limits: Limits) -> Index | None:
    """Return an index as another worker sent it, held to what one from the registry is held to."""
    from layerkit.formats.index.check import check_index, mark_unproven
    from layerkit.store.unproven import UnprovenIndexes

    try:
        index = index_file.decode(got.data, f"index of layer {task.diff_id} from another worker")
        check_index(index, "an index from another worker", limits)
    except LayerkitError:
        return None
    if index.diff_id != task.diff_id:
        return None
    index = mark_unproven(index, "another worker")
    UnprovenIndexes(task.store, limits=limits).save(index)
    return index


@contextmanager
def _opened(folder: Path, limits: Limits) -> Iterator[LocalStore]:
    from layerkit.store.local import LocalStore

    with LocalStore.open(folder, create=True, limits=limits) as store, store.hold():
        yield store


__all__ = ["Got", "LayerTask", "fetch", "index_of", "layer_tasks", "publish", "shared_at"]
