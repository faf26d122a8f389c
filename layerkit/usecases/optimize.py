"""Use case: an image without the bytes that its layers hold twice or hide, its layers kept apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from layerkit.formats.oci import remap_artifact as artifact
from layerkit.images.transfer import copy_image
from layerkit.model.errors import UsageError
from layerkit.model.image import Image, Layer
from layerkit.model.index import Index
from layerkit.model.reports import Report
from layerkit.model.trees.merge import merge
from layerkit.model.work import Destination, Work
from layerkit.pack import NewLayer, Writing, check_tree, rewrite_image, write_layer
from layerkit.unpack import Contents, Indexed, find_indexes
from layerkit.usecases.copy import left_behind
from layerkit.usecases.settings import KeptBase, RewriteOptions
from layerkit.usecases.stub_layers import STOCK_WARNINGS, VENDOR_WARNINGS, filled, plan_stubs
from layerkit.usecases.waste import Action, Plan, PlannedLayer, plan


@dataclass(frozen=True, slots=True)
class OptimizedLayer(Report):
    """What became, or would become, of one layer.

    Attributes:
        number: of the layer, from 1, the lowest.
        action: ``keep``, ``rewrite``, ``drop``, or ``stubs``: rewritten with stubs for doubled files.
        digest_before: of the blob. digest_after: "" for a dropped layer, and before anything is written.
        blob_bytes_before, blob_bytes_after: 0 where it is gone, None where it is not known yet.
        file_bytes_before, file_bytes_after: stored bytes of regular files, uncompressed.
        entries_before, entries_after: rows.
    """

    number: int
    action: str
    digest_before: str
    digest_after: str
    blob_bytes_before: int
    blob_bytes_after: int | None
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
        layers: one for each layer of the source, bottom first.
        layers_before, layers_after: of the image.
        bytes_before, bytes_after: of all layer blobs; ``bytes_after`` is None for a dry run.
        compared: what ``saved_percent`` compares: ``blobs``, where all of them are compressed alike before and
            after; else, and for a dry run, ``files``, uncompressed.
        saved_percent: what is gone of that.
        file_bytes_before, file_bytes_after: stored bytes of all regular files, uncompressed.
        kept_base: layers from the bottom that were not to be touched.
        base_cost_bytes: file bytes that could go besides if the base were touched.
    """

    name: str
    manifest: str
    source: str
    layers: tuple[OptimizedLayer, ...]
    layers_before: int
    layers_after: int
    bytes_before: int
    bytes_after: int | None
    compared: str
    saved_percent: float
    file_bytes_before: int
    file_bytes_after: int
    kept_base: int
    base_cost_bytes: int
    tree_digest: str
    compressor: str
    seconds: float
    warnings: tuple[str, ...] = ()


def _compressed_alike(before: Image, after: Image | None) -> bool:
    """Return whether all layers of both are compressed in one way, by what their media types say."""
    types = [layer.descriptor.media_type for image in (before, after) if image for layer in image.layers]
    return len({next((kind for kind in ("gzip", "zstd") if kind in each), "") for each in types}) <= 1


@dataclass(frozen=True, slots=True)
class OptimizeOptions:
    """What may go, and how.

    Attributes:
        rewrite: how the result is written.
        keep_base: gives the number of layers from the bottom that must not be touched, of an image.
        metadata_only: make stubs of doubled files, for hosts with ``metacopy=on``, and touch nothing else.
        stock_media_type: give layers with stubs the standard media type, dangerous on most runtimes.
    """

    rewrite: RewriteOptions
    keep_base: KeptBase | None = None
    metadata_only: bool = False
    stock_media_type: bool = False

    def __post_init__(self) -> None:
        """Refuse a media type for layers that are not made."""
        if self.stock_media_type and not self.metadata_only:
            raise UsageError("--stock-media-type needs --metadata-only")


@dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """What an optimize would do to an image.

    Attributes:
        indexes: of the layers as they are, bottom first.
        plan: what would become of them.
        base_cost_bytes: of files that could go besides if the base were touched.
    """

    indexes: Sequence[Index]
    plan: Plan
    base_cost_bytes: int


def plan_optimize(work: Work, options: OptimizeOptions) -> Planned:
    """Return what :func:`optimize` would do; the layers are read for it.

    Raises:
        UsageError: fewer layers than the base has.
        UnsafeEntry: ``metadata_only``, and a layer brings overlay xattrs of its own.
        InvalidImage: a layer is malformed.
    """
    base = 0 if options.keep_base is None else options.keep_base(work.image)
    indexes = find_indexes(work).indexes
    planner = plan_stubs if options.metadata_only else plan
    made = planner(indexes, base, limits=work.limits)
    cost = made.bytes_after - planner(indexes, limits=work.limits).bytes_after if base else 0
    return Planned(indexes, made, cost)


def optimize(
    work: Work, dst: Destination, options: OptimizeOptions, planned: Planned | None = None
) -> OptimizeReport:
    """Write the image without doubled and hidden bytes to ``dst``; a dry run tells the plan.

    Before it becomes visible every new layer is read back, and the root filesystem must have the digest of the
    input's. Layers that need no change, and the whole image where none needs one, keep their digests. At most one
    rewritten layer at a time lies uncompressed in a temporary file.

    Raises:
        UsageError: fewer layers than the base has.
        InvalidImage: a layer is malformed, or the result has another root filesystem (nothing is written then).
        LossyResult: something that a layer cannot hold.
    """
    start = time.monotonic()
    planned = planned or plan_optimize(work, options)
    told = _Told(work, planned, options, start)
    name = dst.name or work.image.name
    if dst.open is None:
        return told.report(None, {}, name)
    image, made, limits, packing = work.image, planned.plan, work.limits, options.rewrite.packing
    new: dict[int, NewLayer | Layer] = {}
    got: list[Index] = []
    stub_type = "" if options.stock_media_type else artifact.META_TAR + packing.suffix
    known = replace(work, kept=Indexed(planned.indexes, work.kept))
    with dst.sink() as sink:
        for layer in _steps(made):
            if layer.action is Action.KEEP:
                new[layer.place] = image.layers[layer.place]
                got.append(layer.index)
                continue
            stubs = layer.action is Action.STUBS
            # One layer's tar at a time, and only of those whose content is read.
            with Contents(known, [layer.place] if (layer.content >= 0).any() else []) as contents:
                descriptor, diff_id = write_layer(
                    layer.index, _moved(contents, layer), sink,
                    Writing(packing, stub_type if stubs else "", limits, work.progress,
                            f"writing layer {layer.place + 1}/{len(image.layers)}"),
                    got.append,
                )  # fmt: skip
            if stubs:
                got[-1] = filled(got[-1], merge(got[:-1], limits=limits))
            new[layer.place] = NewLayer(descriptor, diff_id, replaces=(layer.place,))
        # What was read back from the finished blobs stands in for the layers that they replace.
        check_tree(made.tree, merge(got, limits=limits))
        result, created = image, options.rewrite.created
        if made.changes or created is not None:
            result = rewrite_image(image, [new[place] for place in sorted(new)], created=created, limits=limits)
        copy_image(work.source, sink, result, name, progress=work.progress)
    return told.report(result, dict(zip(sorted(new), result.layers, strict=True)), name)


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


@dataclass(frozen=True, slots=True)
class _Told:
    """What the report on an optimize is made of."""

    work: Work
    planned: Planned
    options: OptimizeOptions
    start: float

    def report(self, result: Image | None, written: Mapping[int, Layer], name: str) -> OptimizeReport:
        """Return the report; ``written`` has the layers of ``result``, by the places of those they come from."""
        image, made = self.work.image, self.planned.plan
        rows = []
        for place, (old, index, layer) in enumerate(
            zip(image.layers, self.planned.indexes, made.layers, strict=True)
        ):
            new = old if layer.action is Action.KEEP else written.get(place)
            rows.append(OptimizedLayer(
                number=place + 1,
                action=layer.action.value,
                digest_before=str(old.descriptor.digest),
                digest_after=str(new.descriptor.digest) if new else "",
                blob_bytes_before=old.descriptor.size,
                blob_bytes_after=new.descriptor.size if new else 0 if result else None,
                file_bytes_before=layer.bytes_before,
                file_bytes_after=layer.bytes_after,
                entries_before=len(index),
                entries_after=len(layer.index),
            ))  # fmt: skip
        before = sum(layer.descriptor.size for layer in image.layers)
        after = sum(layer.descriptor.size for layer in result.layers) if result else None
        alike = after is not None and _compressed_alike(image, result)
        old_bytes, new_bytes = (before, after or 0) if alike else (made.bytes_before, made.bytes_after)
        return OptimizeReport(
            name=name,
            manifest=str(result.descriptor.digest) if result else "",
            source=str(image.descriptor.digest),
            layers=tuple(rows),
            layers_before=len(image.layers),
            layers_after=len(_steps(made)),
            bytes_before=before,
            bytes_after=after,
            compared="blobs" if alike else "files",
            saved_percent=round(100 * (old_bytes - new_bytes) / old_bytes, 2) if old_bytes else 0.0,
            file_bytes_before=made.bytes_before,
            file_bytes_after=made.bytes_after,
            kept_base=made.keep_base,
            base_cost_bytes=self.planned.base_cost_bytes,
            tree_digest=str(made.tree),
            compressor=self.options.rewrite.packing.compressor,
            seconds=time.monotonic() - self.start,
            warnings=self._warnings(result),
        )

    def _warnings(self, result: Image | None) -> tuple[str, ...]:
        warnings: tuple[str, ...] = ()
        if self.options.metadata_only and self.planned.plan.changes:
            warnings = STOCK_WARNINGS if self.options.stock_media_type else VENDOR_WARNINGS
        if result is None or result is self.work.image:
            return warnings
        return (*warnings, *left_behind(self.work.source, self.work.image, self.work.limits))
