"""Use case: an image without the bytes that its layers hold twice or hide, its layers kept apart."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from layerkit.formats.oci import remap_artifact as artifact
from layerkit.model.image import Image, Layer
from layerkit.model.index import Index
from layerkit.model.limits import Limits
from layerkit.model.ports import ImageSink, ImageSource, Progress
from layerkit.model.reports import Report
from layerkit.model.trees.merge import merge
from layerkit.pack import NewLayer, Packing, check_tree, put_image, rewrite_image, write_layer
from layerkit.unpack import Contents, OpenTar
from layerkit.usecases.copy import left_behind
from layerkit.usecases.stub_layers import STOCK_WARNINGS, VENDOR_WARNINGS, filled, plan_stubs
from layerkit.usecases.waste import Action, Plan, PlannedLayer, plan


@dataclass(frozen=True, slots=True)
class OptimizedLayer(Report):
    """What became, or would become, of one layer.

    Attributes:
        action: ``keep``, ``rewrite``, ``drop``, or ``stubs``: rewritten with stubs for doubled files.
        digest_before: of the blob. digest_after: "" for a dropped layer, and before anything is written.
        blob_bytes_before, blob_bytes_after: 0 where it is not known or gone.
        file_bytes_before, file_bytes_after: stored bytes of regular files, uncompressed.
        entries_before, entries_after: rows.
    """

    action: str
    digest_before: str
    digest_after: str
    blob_bytes_before: int
    blob_bytes_after: int
    file_bytes_before: int
    file_bytes_after: int
    entries_before: int
    entries_after: int


@dataclass(frozen=True, slots=True)
class OptimizeReport(Report):
    """What an optimize made, or would make.

    Attributes:
        name: of the image in the output.
        manifest: digest of the new manifest, "" for a dry run.
        source: digest of the manifest it was made from.
        layers: one for each layer of the source, bottom first.
        layers_before, layers_after: of the image.
        bytes_before, bytes_after: of all layer blobs; ``bytes_after`` is 0 for a dry run.
        saved_percent: of ``bytes_before``; 0 for a dry run.
        file_bytes_before, file_bytes_after: stored bytes of all regular files, uncompressed.
        kept_base: layers from the bottom that were not to be touched.
        base_cost_bytes: file bytes that could go besides if the base were touched.
        tree_digest: of the root filesystem, the same before and after.
        compressor: of the layers that were written: name, version and settings; "" for none.
        seconds: wall time.
        warnings: what the user must know of the result.
    """

    name: str
    manifest: str
    source: str
    layers: tuple[OptimizedLayer, ...]
    layers_before: int
    layers_after: int
    bytes_before: int
    bytes_after: int
    saved_percent: float
    file_bytes_before: int
    file_bytes_after: int
    kept_base: int
    base_cost_bytes: int
    tree_digest: str
    compressor: str
    seconds: float
    warnings: tuple[str, ...] = ()


class Planned(NamedTuple):
    """A plan, and the file bytes that could go besides if the base were touched."""

    plan: Plan
    base_cost_bytes: int


def make_plan(indexes: Sequence[Index], *, keep_base: int, metadata_only: bool, limits: Limits) -> Planned:
    """Return what :func:`optimize` would do to layers with these indexes; see there for the arguments.

    Raises:
        UsageError: fewer layers than ``keep_base``.
    """
    planner = plan_stubs if metadata_only else plan
    made = planner(indexes, keep_base, limits=limits)
    cost = made.bytes_after - planner(indexes, limits=limits).bytes_after if keep_base else 0
    return Planned(made, cost)


def optimize(
    source: ImageSource,
    image: Image,
    indexes: Sequence[Index],
    open_sink: Callable[[], ImageSink] | None,
    *,
    dst_name: str,
    limits: Limits,
    keep_base: int = 0,
    metadata_only: bool = False,
    stock_media_type: bool = False,
    planned: Planned | None = None,
    packing: Packing | None = None,
    created: str | None = None,
    open_tar: OpenTar = lambda _: None,
    tmp: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> OptimizeReport:
    """Write ``image`` without doubled and hidden bytes; the sink is committed.

    Before that every new layer is read back, and the root filesystem must have the digest of the input's.
    Layers that need no change, and the whole image where none needs one, keep their digests.

    Args:
        source: where the blobs are.
        image: what to optimize.
        indexes: of its layers, bottom first.
        open_sink: opens the place where the result goes; on an error nothing of it is visible. None plans only.
        dst_name: name of the image there.
        limits: bounds on input.
        keep_base: layers from the bottom that must not be touched.
        metadata_only: make stubs of doubled files, for hosts with ``metacopy=on``, and touch nothing else.
        stock_media_type: give layers with stubs the standard media type, dangerous on most runtimes.
        planned: what :func:`make_plan` returned for the same indexes and arguments; None plans here.
        packing: compression of new layers.
        created: RFC 3339 time of a changed image; None keeps that of the image.
        open_tar: gives kept tars.
        tmp: folder of temporary files; the largest rewritten layer has to fit, uncompressed.
        progress: told of the bytes read and written.

    Raises:
        UsageError: fewer layers than ``keep_base``.
        InvalidImage: a layer is malformed, or the result has another root filesystem (nothing is written then).
        LossyResult: something that a layer cannot hold.
    """
    start, packing = time.monotonic(), packing or Packing()
    made, cost = planned or make_plan(indexes, keep_base=keep_base, metadata_only=metadata_only, limits=limits)
    warnings = (STOCK_WARNINGS if stock_media_type else VENDOR_WARNINGS) if metadata_only and made.changes else ()

    def report(
        written: tuple[Image, dict[int, Layer]] | None, warnings: tuple[str, ...] = warnings
    ) -> OptimizeReport:
        return _report(image, indexes, made, written, cost, dst_name, start, packing.compressor, warnings)

    if open_sink is None:
        return report(None)
    sink = open_sink()
    try:
        new: dict[int, NewLayer | Layer] = {}
        got: list[Index] = []
        known = {index.diff_id: index for index in indexes}
        stub_type = "" if stock_media_type else artifact.META_TAR + packing.suffix
        steps = _steps(made)
        for layer in steps:
            if layer.action is Action.KEEP:
                new[layer.place] = image.layers[layer.place]
                got.append(layer.index)
                continue
            # One layer's tar at a time, and only of those whose content is read.
            need = [layer.place] if (layer.content >= 0).any() else []
            with Contents(
                source,
                image,
                limits=limits,
                load=known.get,
                open_tar=open_tar,
                need=need,
                tmp=tmp,
                progress=progress,
            ) as contents:
                descriptor, diff_id = write_layer(
                    layer.index, _moved(contents, layer), sink,
                    packing=packing, media_type=stub_type if layer.action is Action.STUBS else "",
                    check=got.append, limits=limits, progress=progress, tmp=tmp,
                    label=f"writing layer {layer.place + 1}/{len(image.layers)}",
                )  # fmt: skip
            if layer.action is Action.STUBS:
                got[-1] = filled(got[-1], merge(got[:-1], limits=limits))
            new[layer.place] = NewLayer(descriptor, diff_id, replaces=(layer.place,))
        # What was read back from the finished blobs stands in for the layers that they replace.
        check_tree(made.tree, merge(got, limits=limits))
        result = image
        if made.changes or created is not None:
            result = rewrite_image(image, [new[place] for place in sorted(new)], created=created, limits=limits)
        put_image(source, sink, result, dst_name, progress=progress)
        sink.commit()
    except BaseException:
        sink.abort()
        raise
    after = dict(zip(sorted(new), result.layers, strict=True))
    left = left_behind(source, image, limits) if result is not image else ()
    return report((result, after), (*warnings, *left))


def _steps(made: Plan) -> list[PlannedLayer]:
    """Return the layers to be written; of an image from which everything goes the top one stays, empty."""
    left = [layer for layer in made.layers if layer.action is not Action.DROP]
    # Many tools refuse an image without any layer.
    return left or list(made.layers[-1:])


def _moved(contents: Contents, layer: PlannedLayer) -> Callable[[int], Iterator[memoryview]]:
    """Return what gives the stored bytes of a planned row: those of the old row that it takes them from."""
    content = contents.of_layer(layer.place)

    def read(row: int) -> Iterator[memoryview]:
        yield from content(int(layer.content[row]))

    return read


def _report(
    image: Image,
    indexes: Sequence[Index],
    made: Plan,
    written: tuple[Image, dict[int, Layer]] | None,
    cost: int,
    dst_name: str,
    start: float,
    compressor: str,
    warnings: tuple[str, ...],
) -> OptimizeReport:
    rows = []
    for place, (old, index, layer) in enumerate(zip(image.layers, indexes, made.layers, strict=True)):
        new = old if layer.action is Action.KEEP else written[1].get(place) if written else None
        rows.append(OptimizedLayer(
            action=layer.action.value,
            digest_before=str(old.descriptor.digest),
            digest_after=str(new.descriptor.digest) if new else "",
            blob_bytes_before=old.descriptor.size,
            blob_bytes_after=new.descriptor.size if new else 0,
            file_bytes_before=layer.bytes_before,
            file_bytes_after=layer.bytes_after,
            entries_before=len(index),
            entries_after=len(layer.index),
        ))  # fmt: skip
    before = sum(layer.descriptor.size for layer in image.layers)
    after = sum(layer.descriptor.size for layer in written[0].layers) if written else 0
    return OptimizeReport(
        name=dst_name,
        manifest=str(written[0].descriptor.digest) if written else "",
        source=str(image.descriptor.digest),
        layers=tuple(rows),
        layers_before=len(image.layers),
        layers_after=len(_steps(made)),
        bytes_before=before,
        bytes_after=after,
        saved_percent=round(100 * (before - after) / before, 2) if written and before else 0.0,
        file_bytes_before=made.bytes_before,
        file_bytes_after=made.bytes_after,
        kept_base=made.keep_base,
        base_cost_bytes=cost,
        tree_digest=str(made.tree),
        compressor=compressor,
        seconds=time.monotonic() - start,
        warnings=warnings,
    )


__all__ = ["OptimizeReport", "OptimizedLayer", "optimize"]
