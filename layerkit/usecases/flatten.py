"""Use case: layers of an image merged into one standard layer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from layerkit.formats.tar.writer import stored_bytes
from layerkit.images.transfer import copy_image
from layerkit.model.entry import Kind
from layerkit.model.errors import NotFound, UsageError
from layerkit.model.image import Image, Layer
from layerkit.model.index import Index
from layerkit.model.reports import Report
from layerkit.model.tree import Tree
from layerkit.model.trees.diff import LayerDiff, diff
from layerkit.model.trees.merge import merge
from layerkit.model.work import Destination, Work
from layerkit.pack import NewLayer, Writing, check_tree, rewrite_image, write_layer
from layerkit.unpack import Contents
from layerkit.usecases.copy import left_behind
from layerkit.usecases.settings import KeptBase, RewriteOptions

_DIGEST_PREFIX_CHARS = 6


@dataclass(frozen=True, slots=True)
class FlattenReport(Report):
    """What a flatten made.

    Attributes:
        name: of the image in the output.
        layers_before, layers_after: of the image.
        merged: places of the layers that were merged, from 1, bottom first.
        layer: digest of the new layer, "" where nothing was left to write.
        layer_bytes: of its blob.
        bytes_before, bytes_after: of all blobs of layers.
        entries: rows in the new layer.
        whiteouts: of these, names taken away from the layers below.
    """

    name: str
    manifest: str
    source: str
    layers_before: int
    layers_after: int
    merged: tuple[int, ...]
    layer: str
    layer_bytes: int
    bytes_before: int
    bytes_after: int
    entries: int
    whiteouts: int
    tree_digest: str
    compressor: str
    seconds: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FlattenOptions:
    """Which layers become one.

    Attributes:
        rewrite: how the result is written.
        from_layer: the lowest, as :func:`place_of` takes it; None is the lowest of all.
        to_layer: the topmost; None is the top.
        keep_base: gives the number of layers from the bottom that stay, of an image.
    """

    rewrite: RewriteOptions
    from_layer: str | None = None
    to_layer: str | None = None
    keep_base: KeptBase | None = None

    def __post_init__(self) -> None:
        """Refuse two beginnings."""
        if self.keep_base is not None and self.from_layer is not None:
            raise UsageError("--keep-base and --from both say where to begin; give one of them")


def flatten(work: Work, dst: Destination, options: FlattenOptions) -> FlattenReport:
    """Merge layers of the image into one and write it to ``dst``.

    Before it becomes visible the new layer is read back, and the root filesystem of the result must have the
    digest of the input's.

    Raises:
        UsageError: no such range of layers.
        InvalidImage: a layer is malformed, or the result has another root filesystem (nothing is written then).
        LossyResult: something that a layer cannot hold.
    """
    start, image, packing, limits = time.monotonic(), work.image, options.rewrite.packing, work.limits
    places = _places(work, options)
    first, after = places.start, places.stop
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(dst.sink())
        contents = stack.enter_context(Contents(work, places))
        indexes = contents.indexes
        below, above = indexes[:first], indexes[after:]
        base, top = merge(below, limits=limits), merge(indexes[:after], limits=limits)
        made = diff(base, top, root=any(map(has_root, indexes[:after])))
        want = (top if not above else merge(indexes, limits=limits)).digest()
        tars = dict.fromkeys(places, contents)
        if lower := _layers_of_data(made, top) - tars.keys():
            # A file of the base with one more name above it: all its names are in the new layer, and its data.
            tars |= dict.fromkeys(lower, stack.enter_context(contents.more(lower)))
        new: list[Layer | NewLayer] = []
        got = list[Index]()
        # An image without any layer is one that many tools refuse.
        if len(made.index) or len(image.layers) == len(places):

            def content(row: int) -> Iterator[memoryview]:
                inode = int(made.inode[row])
                layer = int(top.layer[inode])
                return tars[layer].stored(layer, int(top.offset[inode]), stored_bytes(made.index, row))

            descriptor, diff_id = write_layer(
                made.index, content, sink, Writing(packing, limits=limits, progress=work.progress), got.append
            )
            text = f"layerkit flatten: layers {first + 1} to {after} of {image.descriptor.digest}"
            new.append(NewLayer(descriptor, diff_id, text, tuple(places)))
        # The new index stands in for the layers it replaces: what it says was read from the finished blob.
        check_tree(want, merge([*below, *got, *above], limits=limits))
        layers = [*image.layers[:first], *new, *image.layers[after:]]
        result = rewrite_image(image, layers, created=options.rewrite.created, limits=limits)
        copy_image(work.source, sink, result, dst.name or image.name, progress=work.progress)
    return FlattenReport(
        name=dst.name or image.name,
        manifest=str(result.descriptor.digest),
        source=str(image.descriptor.digest),
        layers_before=len(image.layers),
        layers_after=len(result.layers),
        merged=tuple(place + 1 for place in places),
        layer=str(descriptor.digest) if new else "",
        layer_bytes=descriptor.size if new else 0,
        bytes_before=sum(layer.descriptor.size for layer in image.layers),
        bytes_after=sum(layer.descriptor.size for layer in result.layers),
        entries=len(made.index),
        whiteouts=int((made.index.kind == Kind.WHITEOUT).sum()),
        tree_digest=str(want),
        compressor=packing.compressor,
        seconds=time.monotonic() - start,
        warnings=left_behind(work.source, image, limits),
    )


def _places(work: Work, options: FlattenOptions) -> range:
    """Return the places of the layers to merge, from 0; there are some."""
    image, count = work.image, len(work.image.layers)
    first = 0 if options.from_layer is None else place_of(image, options.from_layer)
    if options.keep_base is not None:
        first = options.keep_base(image)
    last = count - 1 if options.to_layer is None else place_of(image, options.to_layer)
    if not count:
        raise UsageError(f"{work.name}: nothing to flatten: the image has no layers")
    if first == count:
        raise UsageError(f"{work.name}: nothing to flatten above the base, whose {first} layers are all there are")
    if first > last:
        raise UsageError(f"layers {first + 1} to {last + 1}: the image has the layers 1 to {count}")
    return range(first, last + 1)


def _layers_of_data(made: LayerDiff, top: Tree) -> set[int]:
    """Return the places of the layers that the content of ``made`` comes from."""
    inodes = made.inode[made.index.offset >= 0]
    return set(top.layer[inodes].tolist())


def place_of(image: Image, text: str) -> int:
    """Return the place, from 0, of the layer that ``text`` means: a number from 1, or a digest's beginning.

    Raises:
        UsageError: no such number, or several layers.
        NotFound: no layer has such a digest.
    """
    count = len(image.layers)
    if text.isascii() and text.isdigit() and len(text) < _DIGEST_PREFIX_CHARS:
        if not 1 <= int(text) <= count:
            raise UsageError(f"layer {text}: the image has the layers 1 to {count}, 1 is the lowest")
        return int(text) - 1
    found = [
        place
        for place, layer in enumerate(image.layers)
        if len(text.rpartition(":")[2]) >= _DIGEST_PREFIX_CHARS
        and any(str(d).startswith(text) or d.hex.startswith(text) for d in (layer.descriptor.digest, layer.diff_id))
    ]
    if not found:
        raise NotFound(f"layer {text!r}: no layer has such a digest; give one, or a number from 1 to {count}")
    if len(found) > 1:
        raise UsageError(f"layer {text!r}: {len(found)} layers begin so; give a number from 1 to {count}")
    return found[0]


def has_root(index: Index) -> bool:
    """Return whether the layer has an entry of the root itself; only the root's markers come before it."""
    return any(not index.path[row] and index.kind[row] == Kind.DIR for row in range(min(3, len(index))))
