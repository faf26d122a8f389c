"""Use case: images into sinks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from layerkit.model.descriptor import Descriptor
from layerkit.model.image import Image

if TYPE_CHECKING:
    from layerkit.ports import ImageSink, ImageSource, Progress

_CHUNK_BYTES = 1 << 20


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
    for layer in image.layers:
        if not sink.has_blob(layer.descriptor.digest):
            sink.put_blob(layer.descriptor, blob_chunks(source, layer.descriptor, progress))
    if not sink.has_blob(image.config_descriptor.digest):
        sink.put_blob(image.config_descriptor, [image.config])
    sink.put_manifest(image.descriptor, image.manifest, name)


def blob_chunks(
    source: ImageSource, descriptor: Descriptor, progress: Progress | None = None
) -> Iterator[memoryview]:
    """Yield a blob's bytes, NOT verified; each piece is valid until the next is asked for."""
    reader, done = source.open_blob(descriptor), 0
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, max(descriptor.size, 1))))
    what = f"copying {str(descriptor.digest)[:19]}"
    try:
        while got := reader.readinto(buffer):
            done += got
            if progress is not None:
                progress(what, done, descriptor.size)
            yield buffer[:got]
    finally:
        reader.close()


__all__ = ["blob_chunks", "copy_image"]
