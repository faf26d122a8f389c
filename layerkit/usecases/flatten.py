"""Use case: layers of an image merged into one standard layer."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

from layerkit.formats.tar.layer_writer import stored_bytes
from layerkit.model.entry import Kind
from layerkit.model.errors import NotFound, UsageError
from layerkit.model.image import Image, Layer
from layerkit.model.index import Index
from layerkit.model.limits import Limits
from layerkit.model.ports import ImageSink, ImageSource, Progress
from layerkit.model.reports import Report
from layerkit.model.tree import Tree
from layerkit.model.trees.merge import merge
from layerkit.model.trees.squash import Squashed, squash
from layerkit.pack import NewLayer, Packing, check_tree, put_image, rewrite_image, write_layer
from layerkit.unpack import Contents, LoadIndex, OpenTar
from layerkit.usecases.copy import left_behind

_DIGEST_PREFIX_CHARS = 6


@dataclass(frozen=True, slots=True)
class FlattenReport(Report):
    """What a flatten made.

    Attributes:
        name: of the image in the output.
        manifest: digest of the new manifest.
        source: digest of the manifest it was made from.
        layers_before, layers_after: of the image.
        merged: places of the layers that were merged, from 1, bottom first.
        layer: digest of the new layer, "" where nothing was left to write.
        layer_bytes: of its blob.
        bytes_before, bytes_after: of all blobs of layers.
        entries: rows in the new layer.
        whiteouts: of these, names taken away from the layers below.
        tree_digest: of the root filesystem, the same before and after.
        compressor: of the layer: name, version and settings; "" for none.
        seconds: wall time.
        warnings: what the user must know of the result.
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


def flatten(
    source: ImageSource,
    image: Image,
    sink: ImageSink,
    *,
    dst_name: str,
    limits: Limits,
    first: int = 0,
    last: int | None = None,
    packing: Packing | None = None,
    created: str | None = None,
    load: LoadIndex = lambda _: None,
    open_tar: OpenTar = lambda _: None,
    tmp: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> FlattenReport:
    """Merge the layers ``first`` to ``last`` of ``image`` into one; the sink is committed.

    Before that the new layer is read back, and the root filesystem of the result must have the digest of the
    input's.

    Args:
        source: where the blobs are.
        image: what to flatten.
        sink: where the result goes; on an error it is aborted and nothing of it is visible.
        dst_name: name of the image there.
        limits: bounds on input.
        first: place of the lowest layer that is merged, from 0.
        last: place of the topmost one; None is the top.
        packing: compression of the new layer.
        created: RFC 3339 time of the result; None keeps that of the image.
        load: gives kept indexes.
        open_tar: gives kept tars.
        tmp: folder of temporary files.
        progress: told of the bytes read and written.

    Raises:
        UsageError: no such range of layers.
        InvalidImage: a layer is malformed, or the result has another root filesystem (nothing is written then).
        LossyResult: something that a layer cannot hold.
    """
    start, packing = time.monotonic(), packing or Packing()
    try:
        count = len(image.layers)
        last = count - 1 if last is None else last
        if not 0 <= first <= last < count:
            raise UsageError(f"layers {first + 1} to {last + 1}: the image has the layers 1 to {count}")
        places = range(first, last + 1)
        with contextlib.ExitStack() as stack:
            contents = stack.enter_context(
                Contents(
                    source, image, limits=limits, load=load, open_tar=open_tar, need=places, tmp=tmp,
                    progress=progress,
                )
            )  # fmt: skip
            indexes = contents.indexes
            below, above = indexes[:first], indexes[last + 1 :]
            base, top = merge(below, limits=limits), merge(indexes[: last + 1], limits=limits)
            made = squash(base, top, root=any(map(_has_root, indexes[: last + 1])))
            whole = top if not above else merge(indexes, limits=limits)
            want = whole.digest()
            tars = dict.fromkeys(places, contents)
            if lower := _layers_of_data(made, top) - tars.keys():
                # A file of the base with one more name above it: all its names are in the new layer, and its data.
                known = {index.diff_id: index for index in indexes}
                base_tars = stack.enter_context(
                    Contents(source, image, limits=limits, load=known.get, open_tar=open_tar, need=lower, tmp=tmp)
                )
                tars |= dict.fromkeys(lower, base_tars)
            new: list[Layer | NewLayer] = []
            got = list[Index]()
            # An image without any layer is one that many tools refuse.
            if len(made.index) or count == len(places):

                def content(row: int) -> Iterator[memoryview]:
                    inode = int(made.inode[row])
                    layer = int(top.layer[inode])
                    return tars[layer].stored(layer, int(top.offset[inode]), stored_bytes(made.index, row))

                descriptor, diff_id = write_layer(
                    made.index, content, sink, packing=packing,
                    check=got.append, limits=limits, progress=progress, tmp=tmp,
                )  # fmt: skip
                text = f"layerkit flatten: layers {first + 1} to {last + 1} of {image.descriptor.digest}"
                new.append(NewLayer(descriptor, diff_id, text, tuple(places)))
            # The new index stands in for the layers it replaces: what it says was read from the finished blob.
            check_tree(want, merge([*below, *got, *above], limits=limits))
        result = rewrite_image(
            image, [*image.layers[:first], *new, *image.layers[last + 1 :]], created=created, limits=limits
        )
        put_image(source, sink, result, dst_name, progress=progress)
        sink.commit()
    except BaseException:
        sink.abort()
        raise
    return FlattenReport(
        name=dst_name,
        manifest=str(result.descriptor.digest),
        source=str(image.descriptor.digest),
        layers_before=count,
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
        warnings=left_behind(source, image, limits),
    )


def _layers_of_data(made: Squashed, top: Tree) -> set[int]:
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


def base_layers(image: Image, base: Image, ref: str) -> int:
    """Return how many layers of ``image`` are those of ``base``.

    Raises:
        UsageError: ``image`` does not begin with the layers of ``base``.
    """
    count = len(base.layers)
    if image.diff_ids[:count] != base.diff_ids:
        same = 0
        while same < min(count, len(image.layers)) and image.diff_ids[same] == base.diff_ids[same]:
            same += 1
        raise UsageError(
            f"--keep-base {ref}: only {same} of its {count} layers are the lowest ones of the image; "
            "it was built on another version of it"
        )
    return count


def _has_root(index: Index) -> bool:
    return any(not index.path[row] and index.kind[row] == Kind.DIR for row in range(min(3, len(index))))


__all__ = ["FlattenReport", "base_layers", "check_tree", "flatten", "place_of"]
