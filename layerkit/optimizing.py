"""The Python API for smaller images, a part of :mod:`layerkit.api` in a module of its own for its length."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from layerkit import api
from layerkit import limits as bounds
from layerkit.errors import UsageError

if TYPE_CHECKING:
    from layerkit.model.image import Image
    from layerkit.pack import Packing
    from layerkit.ports import ImageSource, Progress
    from layerkit.rewrites import OpenSink, Work
    from layerkit.shrink import OptimizeReport


def optimize(
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
    from layerkit import rewrites

    chosen = settings or api.Settings()
    work = optimization(
        keep_base=keep_base, metadata_only=metadata_only, stock_media_type=stock_media_type, settings=chosen,
        pack=rewrites.packing(compression, level, jobs), created=created, plan_only=dst is None, progress=progress,
    )  # fmt: skip
    with api.open_image(src, platform=platform, settings=chosen) as opened:
        open_sink, name = rewrites.sink_to(dst or "-", chosen, opened.source)
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
    """Return what :func:`optimize` does to one image."""
    from layerkit import flattening, rewrites, shrink
    from layerkit.indexes import read_indexes

    if stock_media_type and not metadata_only:
        raise UsageError("--stock-media-type means something only with --metadata-only")
    limits = settings.limits or bounds.from_environment()
    time = flattening.creation_time(created, os.environ.get("SOURCE_DATE_EPOCH"))

    def work(source: ImageSource, image: Image, open_sink: OpenSink, name: str) -> OptimizeReport:
        with rewrites.kept(settings.store_path) as (load, open_tar):
            base = 0 if keep_base is None else rewrites.base_count(image, keep_base, settings)
            indexes, _ = read_indexes(source, image, load, limits=limits, progress=progress)
            return shrink.optimize(
                source, image, indexes, None if plan_only else open_sink, dst_name=name or image.name,
                limits=limits, keep_base=base, metadata_only=metadata_only, stock_media_type=stock_media_type,
                packing=pack, created=time, open_tar=open_tar, progress=progress,
            )  # fmt: skip

    return work


__all__ = ["optimization", "optimize"]
