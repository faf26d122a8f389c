"""Bringing the layers of an image into the store: each is read once, and committed while the next is read.

To decompress takes the longest. So the next layer's is begun as soon as this one's is done, while the rest of
the work on this one goes on, and one processor always has it to do.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

from layerkit.model.image import Layer
from layerkit.model.ports import Progress
from layerkit.model.work import Work
from layerkit.store.layout import DataBackend
from layerkit.store.local import LocalStore

if TYPE_CHECKING:
    import threading
    from collections.abc import Mapping
    from concurrent.futures import Future

    from layerkit.model.digest import Digest
    from layerkit.model.index import Index
    from layerkit.store.layers import LayerWriter
    from layerkit.unpack import LayerReading


def import_layers(work: Work, store: LocalStore, backend: DataBackend) -> int:
    """Bring every layer of the image into ``store``; return how many blobs were read for it.

    Args:
        work: the image. Its progress is told of the bytes of each blob, with ``jobs`` 1 in the caller's thread.
        store: gets them; the caller holds it (``store.hold()``) until the image is added.
        backend: how their data is kept.

    Raises:
        InvalidImage: a layer is malformed, unsafe, or not what its digests promise; layers that were
            whole before stay in the store, of this one nothing does.
    """
    image = work.image
    work.limits.check("layers_per_image", len(image.layers), image.name or "image")
    missing = [
        (place, layer)
        for place, layer in {layer.diff_id: (i, layer) for i, layer in enumerate(image.layers)}.values()
        if not store.has_layer(layer.diff_id, backend)
    ]

    if not missing:
        return 0
    from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

    from layerkit.unpack import labelled

    steps = {layer.diff_id: labelled(work.progress, place, len(image.layers)) for place, layer in missing}
    with _Importer(work, store, backend, steps) as importer:
        if work.jobs <= 1 or len(missing) <= 1:
            return importer.bring_in_turn(*(layer for _, layer in missing))
        with ThreadPoolExecutor(work.jobs) as pool:
            futures = [pool.submit(importer.bring_in_turn, layer) for _, layer in missing]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                for future in futures:
                    future.cancel()
            return sum(future.result() for future in futures if not future.cancelled())


class _Importer:
    """Reads layers in the threads that call :meth:`bring_in_turn` and commits them in one of its own.

    A commit mostly waits for the disk. Its layer's lock passes to it; it takes no other layer's, so it always
    ends, whatever the readers of this and other processes wait for.
    """

    def __init__(
        self, work: Work, store: LocalStore, backend: DataBackend, steps: Mapping[Digest, Progress | None]
    ) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._work, self._store, self._backend, self._steps = work, store, backend, steps
        self._thread = ThreadPoolExecutor(1, "layerkit-commit")
        self._commits: list[Future[None]] = []

    def __enter__(self) -> _Importer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self._wait_for_commits()

    def _wait_for_commits(self) -> None:
        for commit in list(self._commits):
            commit.result()

    def bring_in_turn(self, *layers: Layer) -> int:
        """Read those of ``layers`` that the store lacks; return how many blobs that took. Commits follow."""
        from concurrent.futures import ThreadPoolExecutor

        count = 0
        begun: _Begun | None = None
        with ThreadPoolExecutor(1, "layerkit-ahead") as ahead, contextlib.ExitStack() as dropped:
            for layer in [*layers, None]:
                after = begun.reading.read if begun is not None else None
                begin = ahead.submit(self._begin, layer, after) if layer is not None else None
                if begin is not None:
                    dropped.callback(_drop, begin, begun)
                if begun is not None:
                    self._finish(begun)
                    count += 1
                begun = begin.result() if begin is not None else None
        return count

    def _begin(self, layer: Layer, after: threading.Event | None) -> _Begun | None:
        """Begin to read ``layer``, once ``after`` is set; return None if the store has it."""
        if after is not None:
            after.wait()
        store, backend = self._store, self._backend
        with contextlib.ExitStack() as kept, contextlib.ExitStack() as opened:
            kept.enter_context(store.layer_lock(layer.diff_id))
            # Another process may have brought it while this one waited, or the other backend has its bytes.
            if store.has_layer(layer.diff_id, backend) or store.convert_layer(layer.diff_id, backend):
                return None
            from layerkit.unpack import LayerReading

            reader = opened.enter_context(contextlib.closing(self._work.source.open_blob(layer.descriptor)))
            writer = kept.enter_context(store.begin_layer(backend))
            limits = self._work.limits
            reading = LayerReading(reader, layer.descriptor, layer.diff_id, limits=limits, data=writer)
            opened.callback(reading.abort)
            reading.start()
            return _Begun(self._steps[layer.diff_id], reading, writer, opened.pop_all(), kept.pop_all())

    def _finish(self, begun: _Begun) -> None:
        with begun.kept:
            with begun.opened:
                index = begun.reading.finish(begun.progress)
            self._wait_for_commits()  # so that one layer waits at most, and an error of one ends the run
            self._commits.append(self._thread.submit(_commit, begun.kept.pop_all(), begun.writer, index))


class _Begun(NamedTuple):
    """A layer that is being read."""

    progress: Progress | None
    reading: LayerReading
    writer: LayerWriter
    opened: contextlib.ExitStack
    """Ends the reading and closes the blob."""
    kept: contextlib.ExitStack
    """Aborts the writer and releases the layer's lock; passes to the commit."""


def _drop(begin: Future[_Begun | None], before: _Begun | None) -> None:
    """Let go what was begun ahead, if an error or an interrupt kept it from being finished.

    It begins when the layer ``before`` is read, which may wait for somebody who never came to take its bytes.
    """
    if before is not None:
        before.reading.abort()
    with contextlib.suppress(Exception):
        if (begun := begin.result()) is not None:
            with begun.kept, begun.opened:
                pass


def _commit(held: contextlib.ExitStack, writer: LayerWriter, index: Index) -> None:
    with held:
        writer.commit(index)
