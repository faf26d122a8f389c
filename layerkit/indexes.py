"""Use case: an image to the indexes of its layers; kept ones are loaded, blobs are read for the others."""

from __future__ import annotations

from collections.abc import Callable

from layerkit.limits import Limits
from layerkit.model.digest import Digest
from layerkit.model.image import Image
from layerkit.model.index import Index
from layerkit.ports import ImageSource, Progress
from layerkit.unpack import index_layer


def read_indexes(
    source: ImageSource,
    image: Image,
    load: Callable[[Digest], Index | None],
    *,
    limits: Limits,
    progress: Progress | None = None,
) -> tuple[list[Index], int]:
    """Return the index of every layer, bottom first, and how many blobs were read because none was kept.

    Args:
        source: where the blobs are.
        image: whose layers are meant.
        load: gives the kept index of a layer, or None.
        limits: bounds on input.
        progress: told of the bytes of each blob.

    Raises:
        InvalidImage: a layer is malformed, unsafe, or not what its digests promise.
    """
    limits.check("layers_per_image", len(image.layers), image.name or "image")
    indexes: list[Index] = []
    read = 0
    for place, layer in enumerate(image.layers):
        index = load(layer.diff_id)
        if index is None:
            reader = source.open_blob(layer.descriptor)
            try:
                index = index_layer(
                    reader, layer.descriptor, layer.diff_id, limits=limits,
                    progress=labelled(progress, place, len(image.layers)),
                )  # fmt: skip
            finally:
                reader.close()
            read += 1
        indexes.append(index)
    return indexes, read


def labelled(progress: Progress | None, place: int, count: int) -> Progress | None:
    """Return ``progress`` with each step called ``layer PLACE/COUNT``."""
    if progress is None:
        return None
    return lambda _what, done, total: progress(f"layer {place + 1}/{count}", done, total)
