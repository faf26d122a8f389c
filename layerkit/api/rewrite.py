"""The Python API for making other images out of one: flatten, portable remap, META as a layer, copy.

::

    import layerkit

    report = layerkit.flatten("oci:images:app", "oci-archive:flat.tar")
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from layerkit.api import open as api
from layerkit.model import limits as bounds
from layerkit.model.errors import UsageError
from layerkit.pack import creation_time, packing
from layerkit.usecases.each_platform import OpenSink, PlatformsReport, Work, every_platform, sink_to
from layerkit.usecases.settings import kept

if TYPE_CHECKING:
    from layerkit.idmap import Mapping
    from layerkit.model.image import Image
    from layerkit.model.ports import ImageSource, Progress
    from layerkit.model.reports import RemapReport
    from layerkit.pack import Packing
    from layerkit.usecases.copy import CopyReport
    from layerkit.usecases.flatten import FlattenReport


def flatten(
    src: str,
    dst: str,
    *,
    from_layer: str | None = None,
    to_layer: str | None = None,
    keep_base: str | int | None = None,
    platform: str | None = None,
    settings: api.Settings | None = None,
    compression: str = "gzip",
    level: int | None = None,
    jobs: int | None = None,
    created: str | None = None,
    progress: Progress | None = None,
) -> FlattenReport:
    """Merge layers of the image ``src`` into one, and write the image to ``dst``.

    Args:
        src: reference of the image.
        dst: reference of the result.
        from_layer: lowest layer to merge, a number from 1 or a digest; None is the lowest of all.
        to_layer: topmost one; None is the top.
        keep_base: reference of an image whose layers stay as they are (or their number).
        platform: ``os/arch[/variant]``; None takes this host's.
        settings: store and limits.
        compression: of the new layer: ``gzip``, ``zstd``, ``zstd:chunked`` or ``none``.
        level: of the compression.
        jobs: threads that compress; None is one for each core. The result does not depend on it.
        created: time of the result, RFC 3339 or seconds since 1970; None takes ``SOURCE_DATE_EPOCH``, and
            without that the time of the image stays.
        progress: told of bytes read and written; what it raises ends the work.

    Raises:
        UsageError: layers that are not there, or a base that is not the image's.
        InvalidImage: a damaged image.
    """
    chosen = settings or api.Settings()
    work = flattening(
        src, from_layer=from_layer, to_layer=to_layer, keep_base=keep_base, settings=chosen,
        pack=packing(compression, level, jobs), created=created, progress=progress,
    )  # fmt: skip
    with api.open_image(src, platform=platform, settings=chosen) as opened:
        return work(opened.source, opened.image, *sink_to(dst, chosen, opened.source))


def flattening(
    src: str,
    *,
    from_layer: str | None,
    to_layer: str | None,
    keep_base: str | int | None,
    settings: api.Settings,
    pack: Packing,
    created: str | None,
    progress: Progress | None,
) -> Work[FlattenReport]:
    """Return what :func:`flatten` does to one image."""
    from layerkit.usecases import flatten as use_case

    if keep_base is not None and from_layer is not None:
        raise UsageError("--keep-base and --from both say where to begin; give one of them")
    time = creation_time(created, os.environ.get("SOURCE_DATE_EPOCH"))

    def work(source: ImageSource, image: Image, open_sink: OpenSink, name: str) -> FlattenReport:
        first = 0 if from_layer is None else use_case.place_of(image, from_layer)
        if keep_base is not None:
            first = base_count(image, keep_base, settings)
        last = None if to_layer is None else use_case.place_of(image, to_layer)
        if not image.layers:
            raise UsageError(f"{src}: nothing to flatten: the image has no layers")
        if first == len(image.layers):
            raise UsageError(f"{src}: nothing to flatten above the base, whose {first} layers are all there are")
        with kept(settings.store_path) as (load, tar):
            return use_case.flatten(
                source, image, open_sink(), dst_name=name or image.name,
                limits=settings.limits or bounds.from_environment(), first=first, last=last, packing=pack,
                created=time, load=load, open_tar=tar, progress=progress,
            )  # fmt: skip

    return work


def remap(
    src: str,
    dst: str,
    mapping: Mapping,
    *,
    form: str = "portable",
    stock_media_type: bool = False,
    platform: str | None = None,
    settings: api.Settings | None = None,
    compression: str = "gzip",
    level: int | None = None,
    jobs: int | None = None,
    created: str | None = None,
    progress: Progress | None = None,
) -> RemapReport:
    """Write the image ``src`` under ``mapping`` to ``dst`` in a form that needs no layerkit to run.

    The form ``artifact`` is :meth:`OpenImage.attach`. Arguments that are not here are those of :func:`flatten`.

    Args:
        src: reference of the image.
        dst: reference of the result.
        mapping: the id map.
        form: ``portable`` (every layer written anew) or ``layer`` (META as one more layer).
        stock_media_type: for the form ``layer``: its standard media type, dangerous on most runtimes.
        platform: ``os/arch[/variant]``; None takes this host's.
        settings: store and limits.
        compression: of new layers.
        level: of the compression.
        jobs: threads that compress.
        created: time of the result.
        progress: told of bytes read and written; what it raises ends the work.

    Raises:
        UnmappedId: an owner outside the map.
        UsageError: no such form.
    """
    chosen = settings or api.Settings()
    work = remapping(
        mapping, form=form, stock_media_type=stock_media_type, settings=chosen,
        pack=packing(compression, level, jobs), created=created, progress=progress,
    )  # fmt: skip
    with api.open_image(src, platform=platform, settings=chosen) as opened:
        return work(opened.source, opened.image, *sink_to(dst, chosen, opened.source))


def remapping(
    mapping: Mapping,
    *,
    form: str,
    stock_media_type: bool,
    settings: api.Settings,
    pack: Packing,
    created: str | None,
    progress: Progress | None,
) -> Work[RemapReport]:
    """Return what :func:`remap` does to one image."""
    from layerkit.usecases import portable as use_case

    if form not in ("portable", "layer"):
        raise UsageError(f"--form {form!r}: want artifact, layer or portable")
    if stock_media_type and form != "layer":
        raise UsageError("--stock-media-type means something only with --form layer")
    limits = settings.limits or bounds.from_environment()
    time = creation_time(created, os.environ.get("SOURCE_DATE_EPOCH"))

    def work(source: ImageSource, image: Image, open_sink: OpenSink, name: str) -> RemapReport:
        with kept(settings.store_path) as (load, tar):
            if form == "portable":
                return use_case.portable(
                    source, image, open_sink(), mapping, dst_name=name or image.name, limits=limits, packing=pack,
                    strict=settings.strict, created=time, load=load, open_tar=tar, progress=progress,
                )  # fmt: skip
            return use_case.append_meta(
                source, image, open_sink(), mapping, dst_name=name or image.name, limits=limits, packing=pack,
                stock_media_type=stock_media_type, strict=settings.strict, created=time, load=load,
                progress=progress,
            )  # fmt: skip

    return work


def copy(
    src: str,
    dst: str,
    *,
    all_platforms: bool = False,
    platform: str | None = None,
    settings: api.Settings | None = None,
    progress: Progress | None = None,
) -> CopyReport:
    """Copy the image ``src`` to ``dst`` byte for byte, with the artifacts that are attached to it.

    Args:
        src: reference of the image.
        dst: reference of the copy.
        all_platforms: copy the whole index where ``src`` names one, and what is attached to any part of it.
        platform: ``os/arch[/variant]``; None takes this host's.
        settings: store and limits.
        progress: told of each blob; what it raises ends the work.

    Raises:
        NotFound: no such image, or none for the platform.
        InvalidImage: a blob is missing or damaged.
    """
    from layerkit.images import reference
    from layerkit.usecases import copy as copying

    chosen = settings or api.Settings()
    limits = chosen.limits or bounds.from_environment()
    if all_platforms and platform is not None:
        raise UsageError("--all-platforms and --platform exclude each other; give one of them")
    if all_platforms and reference.parse(src).transport != "store":
        source = reference.open_source(src, limits=limits, registry=chosen.registry)
        try:
            # A docker archive has no index: there is one image to copy.
            image = None if source.chosen() else source.image()
            open_sink, name = sink_to(dst, chosen, source)
            return copying.copy(source, open_sink(), image, dst_name=name, limits=limits, progress=progress)
        finally:
            source.close()
    with api.open_image(src, platform=platform, settings=chosen) as opened:
        open_sink, name = sink_to(dst, chosen, opened.source)
        return copying.copy(
            opened.source, open_sink(), opened.image, dst_name=name, limits=limits, progress=progress
        )


def base_count(image: Image, keep_base: str | int, settings: api.Settings) -> int:
    """Return how many layers of ``image`` the base has that ``keep_base`` names, or is the number of.

    Raises:
        UsageError: more layers than there are, or an image that ``image`` was not built on.
    """
    from layerkit.usecases import flatten as use_case

    text = str(keep_base)
    if text.isascii() and text.lstrip("-").isdigit() and not Path(text).exists():
        if not 0 <= int(text) <= len(image.layers):
            raise UsageError(f"--keep-base {text}: the image has {len(image.layers)} layers")
        return int(text)
    with api.open_image(text, platform=str(image.platform), settings=settings) as base:
        return use_case.base_layers(image, base.image, text)


def flatten_every_platform(
    src: str,
    dst: str,
    *,
    from_layer: str | None = None,
    to_layer: str | None = None,
    keep_base: str | int | None = None,
    settings: api.Settings | None = None,
    compression: str = "gzip",
    level: int | None = None,
    jobs: int | None = None,
    created: str | None = None,
    progress: Progress | None = None,
) -> PlatformsReport:
    """Do to the images of all platforms what :func:`flatten` does; ``images`` are the reports."""
    chosen = settings or api.Settings()
    work = flattening(
        src, from_layer=from_layer, to_layer=to_layer, keep_base=keep_base, settings=chosen,
        pack=packing(compression, level, jobs), created=created, progress=progress,
    )  # fmt: skip
    return every_platform(src, dst, work, chosen)


def remap_every_platform(
    src: str,
    dst: str,
    mapping: Mapping,
    *,
    form: str = "portable",
    stock_media_type: bool = False,
    settings: api.Settings | None = None,
    compression: str = "gzip",
    level: int | None = None,
    jobs: int | None = None,
    created: str | None = None,
    progress: Progress | None = None,
) -> PlatformsReport:
    """Do to the images of all platforms what :func:`remap` does; ``images`` are the reports."""
    chosen = settings or api.Settings()
    work = remapping(
        mapping, form=form, stock_media_type=stock_media_type, settings=chosen,
        pack=packing(compression, level, jobs), created=created, progress=progress,
    )  # fmt: skip
    return every_platform(src, dst, work, chosen)


__all__ = [
    "base_count",
    "copy",
    "flatten",
    "flatten_every_platform",
    "flattening",
    "remap",
    "remap_every_platform",
    "remapping",
]
