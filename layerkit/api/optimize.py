"""The Python API for optimizing in two steps: look at the plan, then apply it to a place of your choice.

::

    with layerkit.open_image("oci:images:app") as image:
        plan = layerkit.optimize(image, keep_base="oci:images:base")
        if plan.saved_file_bytes > 50_000_000:
            plan.apply("oci:images:app-small")

What the layers hold is read once, for the plan.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from layerkit.api import open as api
from layerkit.api.rewrite import base_count
from layerkit.model import limits as bounds
from layerkit.model.errors import UsageError
from layerkit.pack import creation_time
from layerkit.pack import packing as packing_of
from layerkit.usecases.each_platform import PlatformsReport, every_platform, sink_to
from layerkit.usecases.settings import kept

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from layerkit.api.open import OpenImage
    from layerkit.model.image import Image
    from layerkit.model.index import Index
    from layerkit.model.ports import ImageSink, ImageSource, Progress
    from layerkit.pack import Packing
    from layerkit.usecases.each_platform import OpenSink, Work
    from layerkit.usecases.optimize import OptimizeReport, Planned


@dataclass(frozen=True, slots=True)
class Plan:
    """What an optimize would do to an image; nothing was written yet. Good while the image is open.

    Attributes:
        image: that was looked at.
        report: what would become of each layer; digests and sizes of blobs are known once it is applied.
    """

    image: OpenImage
    report: OptimizeReport
    _indexes: Sequence[Index] = field(repr=False)
    _planned: Planned = field(repr=False)
    _metadata_only: bool = field(repr=False)

    @property
    def saved_file_bytes(self) -> int:
        """Return the bytes of files, uncompressed, that the result would not hold any more."""
        return self.report.file_bytes_before - self.report.file_bytes_after

    @property
    def changes(self) -> bool:
        """Return whether the result would be another image at all."""
        return any(layer.action != "keep" for layer in self.report.layers)

    def apply(
        self,
        dst: str | ImageSink,
        *,
        name: str = "",
        stock_media_type: bool = False,
        compression: str = "gzip",
        level: int | None = None,
        jobs: int | None = None,
        created: str | None = None,
        progress: Progress | None = None,
    ) -> OptimizeReport:
        """Write the result; it is read back and compared before any of it becomes visible.

        Args:
            dst: a reference, or a sink of your own, which is committed (aborted on an error).
            name: of the image there; "" is what ``dst`` says, else the image's own.
            stock_media_type: give layers with stubs the standard media type, dangerous on most runtimes.
            compression: of new layers: ``gzip``, ``zstd``, ``zstd:chunked`` or ``none``.
            level: of the compression.
            jobs: threads that compress; None is one for each core. The result does not depend on it.
            created: time of a changed result, RFC 3339 or seconds since 1970; None takes
                ``SOURCE_DATE_EPOCH``, and without that the time of the image stays.
            progress: told of bytes read and written; raises :class:`layerkit.Cancelled` to stop.

        Raises:
            InvalidImage: a blob is damaged, or the result is not right; nothing is written then.
        """
        from layerkit.usecases import optimize as shrink

        if stock_media_type and not self._metadata_only:
            raise UsageError("stock_media_type means something only for a plan with metadata_only")
        settings = self.image.settings
        packing = packing_of(compression, level, jobs)
        time = creation_time(created, os.environ.get("SOURCE_DATE_EPOCH"))
        open_sink: Callable[[], ImageSink]
        if isinstance(dst, str):
            open_sink, said = sink_to(dst, settings, self.image.source)
            name = name or said
        else:
            sink = dst
            open_sink = lambda: sink  # noqa: E731
        with kept(settings.store_path) as (_, open_tar):
            return shrink.optimize(
                self.image.source, self.image.image, self._indexes, open_sink,
                dst_name=name or self.image.image.name, limits=self.image.limits, planned=self._planned,
                keep_base=self.report.kept_base, metadata_only=self._metadata_only,
                stock_media_type=stock_media_type, packing=packing, created=time,
                open_tar=open_tar, progress=progress,
            )  # fmt: skip


def optimize(
    image: OpenImage,
    *,
    keep_base: str | int | None = None,
    metadata_only: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Return how ``image`` would lose the bytes that its layers hold twice or hide; nothing is written.

    Args:
        image: from :func:`layerkit.open_image`; it must stay open until the plan was applied.
        keep_base: reference of an image whose layers are not touched (or their number, from the bottom).
        metadata_only: make stubs of the files that a layer repeats, for hosts that mount with ``metacopy=on``.
        progress: told of the bytes read; raises :class:`layerkit.Cancelled` to stop.

    Raises:
        UsageError: a base that is not the image's.
        InvalidImage: a damaged image.
    """
    from layerkit.usecases import optimize as shrink

    base = 0 if keep_base is None else base_count(image.image, keep_base, image.settings)
    indexes = image.indexes(progress=progress)
    planned = shrink.make_plan(indexes, keep_base=base, metadata_only=metadata_only, limits=image.limits)
    report = shrink.optimize(
        image.source, image.image, indexes, None, dst_name=image.image.name, limits=image.limits,
        planned=planned, keep_base=base, metadata_only=metadata_only,
    )  # fmt: skip
    return Plan(image, report, indexes, planned, metadata_only)


def optimize_to(
    src: str,
    dst: str | None,
    *,
    keep_base: str | int | None = None,
    metadata_only: bool = False,
    stock_media_type: bool = False,
    platform: str | None = None,
    settings: api.Settings | None = None,
    compression: str = "gzip",
    level: int | None = None,
    jobs: int | None = None,
    created: str | None = None,
    progress: Progress | None = None,
) -> OptimizeReport:
    """Write the image ``src`` to ``dst`` without the bytes that its layers hold twice or hide.

    Args:
        src: reference of the image.
        dst: reference of the result; None makes the plan and writes nothing.
        keep_base: reference of an image whose layers are not touched (or their number).
        metadata_only: make stubs of the files that a layer repeats, for hosts that mount with ``metacopy=on``.
        stock_media_type: give layers with stubs the standard media type, dangerous on most runtimes.
        platform: ``os/arch[/variant]``; None takes this host's.
        settings: store and limits.
        compression: of new layers: ``gzip``, ``zstd``, ``zstd:chunked`` or ``none``.
        level: of the compression.
        jobs: threads that compress; None is one for each core. The result does not depend on it.
        created: time of a changed result, RFC 3339 or seconds since 1970; None takes ``SOURCE_DATE_EPOCH``,
            and without that the time of the image stays.
        progress: told of bytes read and written; what it raises ends the work.

    Raises:
        UsageError: a base that is not the image's, a compression that does not exist.
        UnsafeEntry: ``metadata_only``, and a layer brings overlay xattrs of its own.
        InvalidImage: a damaged image.
    """
    chosen = settings or api.Settings()
    work = optimization(
        keep_base=keep_base, metadata_only=metadata_only, stock_media_type=stock_media_type, settings=chosen,
        pack=packing_of(compression, level, jobs), created=created, plan_only=dst is None, progress=progress,
    )  # fmt: skip
    with api.open_image(src, platform=platform, settings=chosen) as opened:
        open_sink, name = sink_to(dst or "-", chosen, opened.source)
        return work(opened.source, opened.image, open_sink, name)


def optimization(
    *,
    keep_base: str | int | None,
    metadata_only: bool,
    stock_media_type: bool,
    settings: api.Settings,
    pack: Packing,
    created: str | None,
    plan_only: bool,
    progress: Progress | None,
) -> Work[OptimizeReport]:
    """Return what :func:`optimize_to` does to one image."""
    from layerkit.unpack import read_indexes
    from layerkit.usecases import optimize as shrink

    if stock_media_type and not metadata_only:
        raise UsageError("--stock-media-type means something only with --metadata-only")
    limits = settings.limits or bounds.from_environment()
    time = creation_time(created, os.environ.get("SOURCE_DATE_EPOCH"))

    def work(source: ImageSource, image: Image, open_sink: OpenSink, name: str) -> OptimizeReport:
        with kept(settings.store_path) as (load, open_tar):
            base = 0 if keep_base is None else base_count(image, keep_base, settings)
            indexes, _ = read_indexes(source, image, load, limits=limits, progress=progress)
            return shrink.optimize(
                source, image, indexes, None if plan_only else open_sink, dst_name=name or image.name,
                limits=limits, keep_base=base, metadata_only=metadata_only, stock_media_type=stock_media_type,
                packing=pack, created=time, open_tar=open_tar, progress=progress,
            )  # fmt: skip

    return work


def optimize_every_platform(
    src: str,
    dst: str | None,
    *,
    keep_base: str | int | None = None,
    metadata_only: bool = False,
    stock_media_type: bool = False,
    settings: api.Settings | None = None,
    compression: str = "gzip",
    level: int | None = None,
    jobs: int | None = None,
    created: str | None = None,
    progress: Progress | None = None,
) -> PlatformsReport:
    """Do to every image what :func:`optimize_to` does; the report has theirs in ``images``."""
    chosen = settings or api.Settings()
    work = optimization(
        keep_base=keep_base, metadata_only=metadata_only, stock_media_type=stock_media_type, settings=chosen,
        pack=packing_of(compression, level, jobs), created=created, plan_only=dst is None, progress=progress,
    )  # fmt: skip
    return every_platform(src, dst, work, chosen)


__all__ = ["Plan", "optimization", "optimize", "optimize_every_platform", "optimize_to"]
