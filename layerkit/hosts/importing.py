"""Bringing the layers of an image into the store: each is read once, and committed while the next is read."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from layerkit.limits import Limits
from layerkit.model.image import Image, Layer
from layerkit.ports import ImageSource, Progress
from layerkit.stores.layout import DataBackend
from layerkit.stores.local import LocalStore

if TYPE_CHECKING:
    from concurrent.futures import Future

    from layerkit.model.index import Index
    from layerkit.stores.layers import LayerWriter


def import_layers(
    source: ImageSource,
    image: Image,
    store: LocalStore,
    backend: DataBackend,
    *,
    limits: Limits,
    jobs: int = 1,
    progress: Progress | None = None,
) -> int:
    """Bring every layer of ``image`` into ``store``; return how many blobs were read for it.

    Args:
        source: where the blobs are.
        image: whose layers are meant.
        store: gets them; the caller holds it (``store.hold()``) until the image is added.
        backend: how their data is kept.
        limits: bounds on input.
        jobs: layers read at the same time.
        progress: told of the bytes of each blob, with ``jobs`` 1 in the caller's thread.

    Raises:
        InvalidImage: a layer is malformed, unsafe, or not what its digests promise; layers that were
            whole before stay in the store, of this one nothing does.
    """
    limits.check("layers_per_image", len(image.layers), image.name or "image")
    missing = [
        (place, layer)
        for place, layer in {layer.diff_id: (i, layer) for i, layer in enumerate(image.layers)}.values()
        if not store.has_layer(layer.diff_id, backend)
    ]

    if not missing:
        return 0
    from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

    from layerkit.indexes import labelled

    with _Importer(source, store, backend, limits) as importer:

        def bring(place: int, layer: Layer) -> int:
            return importer.bring(layer, labelled(progress, place, len(image.layers)))

        if jobs <= 1 or len(missing) <= 1:
            return sum(bring(place, layer) for place, layer in missing)
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(bring, place, layer) for place, layer in missing]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                for future in futures:
                    future.cancel()
            return sum(future.result() for future in futures if not future.cancelled())


class _Importer:
    """Reads layers in the threads that call :meth:`bring` and commits them in one of its own.

    A commit mostly waits for the disk. Its layer's lock passes to it; it takes no other layer's, so it always
    ends, whatever the readers of this and other processes wait for.
    """

    def __init__(self, source: ImageSource, store: LocalStore, backend: DataBackend, limits: Limits) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._source, self._store, self._backend, self._limits = source, store, backend, limits
        self._thread = ThreadPoolExecutor(1, "layerkit-commit")
        self._commits: list[Future[None]] = []

    def __enter__(self) -> _Importer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self._finish()

    def _finish(self) -> None:
        for commit in list(self._commits):
            commit.result()

    def bring(self, layer: Layer, progress: Progress | None) -> int:
        """Read one layer, unless the store has it; return how many blobs that took. The commit follows."""
        store, backend = self._store, self._backend
        with contextlib.ExitStack() as held:
            held.enter_context(store.layer_lock(layer.diff_id))
            # Another process may have brought it while this one waited, or the other backend has its bytes.
            if store.has_layer(layer.diff_id, backend) or store.convert_layer(layer.diff_id, backend):
                return 0
            from layerkit.unpack import index_layer

            with contextlib.closing(self._source.open_blob(layer.descriptor)) as reader:
                writer = held.enter_context(store.begin_layer(backend))
                index = index_layer(
                    reader, layer.descriptor, layer.diff_id, limits=self._limits, data=writer, progress=progress
                )
            self._finish()  # so that one layer waits at most, and an error of one ends the run
            self._commits.append(self._thread.submit(_commit, held.pop_all(), writer, index))
        return 1


def _commit(held: contextlib.ExitStack, writer: LayerWriter, index: Index) -> None:
    with held:
        writer.commit(index)
