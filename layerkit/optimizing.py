"""The Python API for smaller images, a part of :mod:`layerkit.api` in a module of its own for its length."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from layerkit import api
from layerkit import limits as bounds
from layerkit.errors import UsageError

if TYPE_CHECKING:
    from layerkit.ports import Progress
    from layerkit.shrink import OptimizeReport


def optimize(
    src: str,
    dst: str | None,
    *,
    keep_base: str | int | None = None,
    platform: str | None = None,
    settings: api.Settings | None = None,
    compression: str = "gzip",
    level: int | None = None,
    created: str | None = None,
    progress: Progress | None = None,
) -> OptimizeReport:
    """Write the image ``src`` to ``dst`` without the bytes that its layers hold twice or hide.

    Args:
        src: reference of the image.
        dst: reference of the result; None makes the plan and writes nothing.
        keep_base: reference of an image whose layers are not touched (or their number).
        platform: ``os/arch[/variant]``; None takes this host's.
        settings: store and limits.
        compression: of new layers: ``gzip``, ``zstd`` or ``none``.
        level: of the compression.
        created: time of a changed result, RFC 3339 or seconds since 1970; None takes ``SOURCE_DATE_EPOCH``,
            and without that the time of the image stays.
        progress: told of bytes read and written; what it raises ends the work.

    Raises:
        UsageError: a base that is not the image's, a compression that does not exist.
        InvalidImage: a damaged image.
    """
    from layerkit import flattening, rewrites, shrink
    from layerkit.indexes import read_indexes
    from layerkit.stores import reference

    chosen = settings or api.Settings()
    limits = chosen.limits or bounds.from_environment()
    packing = rewrites.packing(compression, level)
    time = flattening.creation_time(created, os.environ.get("SOURCE_DATE_EPOCH"))
    parsed = reference.parse(dst) if dst is not None else None
    with (
        api.open_image(src, platform=platform, settings=chosen) as opened,
        rewrites.kept(chosen.store_path) as (load, open_tar),
    ):
        image = opened.image
        base = _base_count(opened, keep_base, chosen)
        indexes, _ = read_indexes(opened.source, image, load, limits=limits, progress=progress)
        return shrink.optimize(
            opened.source, image, indexes,
            None if parsed is None else lambda: reference.open_sink(
                parsed, limits=limits, registry=chosen.registry, near=opened.source
            ),
            dst_name=(parsed.name if parsed else "") or image.name,
            limits=limits, keep_base=base, packing=packing, created=time, open_tar=open_tar, progress=progress,
        )  # fmt: skip


def _base_count(opened: api.OpenImage, keep_base: str | int | None, settings: api.Settings) -> int:
    from layerkit import flattening

    if keep_base is None:
        return 0
    text = str(keep_base)
    if text.lstrip("-").isdigit() and text.isascii() and not Path(text).exists():
        if not 0 <= int(text) <= len(opened.image.layers):
            raise UsageError(f"--keep-base {text}: the image has {len(opened.image.layers)} layers")
        return int(text)
    with api.open_image(text, platform=str(opened.image.platform), settings=settings) as base:
        return flattening.base_layers(opened.image, base.image, text)


__all__ = ["optimize"]
