"""Use case: blobs and images copied as they are. Light: nothing here needs what reads or writes layers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from layerkit.images.oci.blobs import chunks
from layerkit.model.errors import Cancelled

if TYPE_CHECKING:
    from layerkit.model.descriptor import Descriptor
    from layerkit.model.image import Image
    from layerkit.model.ports import ImageSink, ImageSource, Progress


def copy_image(
    source: ImageSource, sink: ImageSink, image: Image, name: str = "", *, progress: Progress | None = None
) -> None:
    """Put ``image`` into ``sink`` byte for byte: layers, config and manifest keep their digests.

    Nothing is visible before the caller commits the sink. Blobs that the sink has are not read.

    Args:
        source: where ``image`` was read from.
        sink: where it goes; it verifies digest and size of every blob.
        image: one that ``source.image()`` returned.
        name: what it is to be called there, "" for no name.
        progress: told of each blob; may raise ``Cancelled``.

    Raises:
        InvalidImage: a blob is missing or not what its descriptor promises.
    """
    put_blobs(source, sink, [layer.descriptor for layer in image.layers], progress)
    if not sink.has_blob(image.config_descriptor.digest):
        sink.put_blob(image.config_descriptor, [image.config])
    sink.put_manifest(image.descriptor, image.manifest, name)


def put_blobs(
    source: ImageSource, sink: ImageSink, blobs: Sequence[Descriptor], progress: Progress | None = None
) -> None:
    """Copy those of ``blobs`` that ``sink`` has not, several at once where it says that it takes them so.

    Raises:
        InvalidImage: a blob is missing or not what its descriptor promises; the others are given up.
    """
    missing = [blob for blob in {blob.digest: blob for blob in blobs}.values() if not sink.has_blob(blob.digest)]
    workers = min(sink.parallel, len(missing))
    if workers <= 1:
        for blob in missing:
            sink.put_blob(blob, blob_chunks(source, blob, progress))
        return
    stop = threading.Event()

    def step(what: str, done: int, total: int) -> None:
        if stop.is_set():
            raise Cancelled("another blob could not be copied")
        if progress is not None:
            progress(what, done, total)

    with ThreadPoolExecutor(workers, thread_name_prefix="layerkit-copy") as pool:
        futures = [pool.submit(sink.put_blob, blob, blob_chunks(source, blob, step)) for blob in missing]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            if any(future.done() and future.exception() for future in futures) or not all(
                f.done() for f in futures
            ):
                stop.set()
            for future in futures:
                future.cancel()
        errors = [error for f in futures if f.done() and not f.cancelled() and (error := f.exception()) is not None]
        # The others end with Cancelled because of the first.
        for error in sorted(errors, key=lambda error: isinstance(error, Cancelled)):
            raise error


class Chunks:
    """Pieces that can be gone through again: a sink may begin anew after a fault that may pass."""

    def __init__(self, make: Callable[[], Iterator[memoryview]]) -> None:
        """``make`` begins from the start each time it is called."""
        self._make = make

    def __iter__(self) -> Iterator[memoryview]:
        return self._make()


def blob_chunks(source: ImageSource, descriptor: Descriptor, progress: Progress | None = None) -> Chunks:
    """Return a blob's bytes, NOT verified; each piece is valid until the next is asked for."""
    what = f"copying {str(descriptor.digest)[:19]}"

    def pieces() -> Iterator[memoryview]:
        done = 0
        with contextlib.closing(source.open_blob(descriptor)) as reader:
            for piece in chunks(reader.readinto, descriptor.size):
                done += len(piece)
                if progress is not None:
                    progress(what, done, descriptor.size)
                yield piece

    return Chunks(pieces)
