"""The Python API for making other images out of one: flatten, portable remap, META as a layer, copy.

::

    import layerkit

    report = layerkit.flatten("oci:images:app", "oci-archive:flat.tar")

A part of :mod:`layerkit.api`, in a module of its own for its length.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from layerkit import api
from layerkit import limits as bounds
from layerkit.errors import NotFound, UsageError

if TYPE_CHECKING:
    from layerkit.copying import CopyReport
    from layerkit.flattening import FlattenReport
    from layerkit.idmap import Mapping
    from layerkit.model.digest import Digest
    from layerkit.model.index import Index
    from layerkit.model.reports import RemapReport
    from layerkit.pack import Packing
    from layerkit.ports import ImageSink, ImageSource, Progress


def packing(compression: str = "gzip", level: int | None = None, jobs: int | None = None) -> Packing:
    """Return how new layers are compressed.

    Args:
        compression: ``gzip``, ``zstd`` or ``none``.
        level: gzip 1 to 9, zstd 1 to 22; None is the default.
        jobs: threads that compress; None is one for each core.

    Raises:
        UsageError: another compression, or a level that it does not have.
    """
    from layerkit.formats.compress import Compression
    from layerkit.formats.compressor import LEVELS
    from layerkit.pack import Packing

    kinds = {"gzip": Compression.GZIP, "zstd": Compression.ZSTD, "none": Compression.NONE}
    if compression not in kinds:
        raise UsageError(f"--compression {compression!r}: want gzip, zstd or none")
    allowed = LEVELS[kinds[compression]]
    if level is not None and level not in allowed:
        want = f"want {allowed[0]} to {allowed[-1]}" if allowed else "it has no levels"
        raise UsageError(f"--compression-level {level} for {compression}: {want}")
    return Packing(kinds[compression], level, jobs)


@contextlib.contextmanager
def kept(path: Path) -> Iterator[tuple[Callable[[Digest], Index | None], Callable[[Digest], BinaryIO | None]]]:
    """Give what loads indexes and opens tars that the store at ``path`` has; a store that is not there has none."""
    if not (path / "version.json").exists():
        yield (lambda _: None), (lambda _: None)
        return
    with api.open_store(path) as store:

        def open_tar(diff_id: Digest) -> BinaryIO | None:
            try:
                return open(store.tar_path(diff_id), "rb", buffering=0)  # noqa: PTH123
            except (NotFound, FileNotFoundError):
                return None

        with store.hold():
            yield store.load_index, open_tar


def _sink(dst: str, settings: api.Settings, near: ImageSource) -> tuple[ImageSink, str]:
    from layerkit.stores import reference

    parsed = reference.parse(dst)
    limits = settings.limits or bounds.from_environment()
    return reference.open_sink(parsed, limits=limits, registry=settings.registry, near=near), parsed.name


def flatten(
    src: str,
    dst: str,
    *,
    from_layer: str | None = None,
    to_layer: str | None = None,
    keep_base: str | None = None,
    platform: str | None = None,
    settings: api.Settings | None = None,
    compression: str = "gzip",
    level: int | None = None,
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
        compression: of the new layer: ``gzip``, ``zstd`` or ``none``.
        level: of the compression.
        created: time of the result, RFC 3339 or seconds since 1970; None takes ``SOURCE_DATE_EPOCH``, and
            without that the time of the image stays.
        progress: told of bytes read and written; what it raises ends the work.

    Raises:
        UsageError: layers that are not there, or a base that is not the image's.
        InvalidImage: a damaged image.
    """
    from layerkit import flattening as work

    chosen = settings or api.Settings()
    if keep_base is not None and from_layer is not None:
        raise UsageError("--keep-base and --from both say where to begin; give one of them")
    pack, time = packing(compression, level), work.creation_time(created, os.environ.get("SOURCE_DATE_EPOCH"))
    with api.open_image(src, platform=platform, settings=chosen) as opened, kept(chosen.store_path) as (load, tar):
        image = opened.image
        first = 0 if from_layer is None else work.place_of(image, from_layer)
        if keep_base is not None:
            first = _base_count(opened, keep_base, chosen)
        last = None if to_layer is None else work.place_of(image, to_layer)
        if first == len(image.layers):
            raise UsageError(f"{src}: nothing to flatten above the base, whose {first} layers are all there are")
        sink, name = _sink(dst, chosen, opened.source)
        return work.flatten(
            opened.source, image, sink, dst_name=name or image.name,
            limits=chosen.limits or bounds.from_environment(), first=first, last=last, packing=pack,
            created=time, load=load, open_tar=tar, progress=progress,
        )  # fmt: skip


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
        created: time of the result.
        progress: told of bytes read and written; what it raises ends the work.

    Raises:
        UnmappedId: an owner outside the map.
        UsageError: no such form.
    """
    from layerkit import portable as work
    from layerkit.flattening import creation_time

    if form not in ("portable", "layer"):
        raise UsageError(f"--form {form!r}: want artifact, layer or portable")
    if stock_media_type and form != "layer":
        raise UsageError("--stock-media-type means something only with --form layer")
    chosen = settings or api.Settings()
    limits = chosen.limits or bounds.from_environment()
    pack, time = packing(compression, level), creation_time(created, os.environ.get("SOURCE_DATE_EPOCH"))
    with api.open_image(src, platform=platform, settings=chosen) as opened, kept(chosen.store_path) as (load, tar):
        image = opened.image
        sink, name = _sink(dst, chosen, opened.source)
        if form == "portable":
            return work.portable(
                opened.source, image, sink, mapping, dst_name=name or image.name, limits=limits, packing=pack,
                created=time, load=load, open_tar=tar, progress=progress,
            )  # fmt: skip
        return work.append_meta(
            opened.source, image, sink, mapping, dst_name=name or image.name, limits=limits, packing=pack,
            stock_media_type=stock_media_type, created=time, load=load, progress=progress,
        )  # fmt: skip


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
    from layerkit import copying
    from layerkit.stores import reference

    chosen = settings or api.Settings()
    limits = chosen.limits or bounds.from_environment()
    if all_platforms and platform is not None:
        raise UsageError("--all-platforms and --platform exclude each other; give one of them")
    if all_platforms and reference.parse(src).transport != "store":
        with tempfile.TemporaryDirectory(prefix="layerkit-") as tmp:
            source = reference.open_source(src, limits=limits, tmp=tmp, registry=chosen.registry)
            try:
                # A docker archive has no index: there is one image to copy.
                image = None if isinstance(source, copying.LayoutLike) else source.image()
                sink, name = _sink(dst, chosen, source)
                return copying.copy(source, sink, image, dst_name=name, limits=limits, progress=progress)
            finally:
                source.close()
    with api.open_image(src, platform=platform, settings=chosen) as opened:
        sink, name = _sink(dst, chosen, opened.source)
        return copying.copy(opened.source, sink, opened.image, dst_name=name, limits=limits, progress=progress)


def _base_count(opened: api.OpenImage, keep_base: str, settings: api.Settings) -> int:
    from layerkit import flattening as work

    if keep_base.isascii() and keep_base.isdigit() and not Path(keep_base).exists():
        count = int(keep_base)
        if not 0 <= count <= len(opened.image.layers):
            raise UsageError(f"--keep-base {keep_base}: the image has {len(opened.image.layers)} layers")
        return count
    with api.open_image(keep_base, platform=str(opened.image.platform), settings=settings) as base:
        return work.base_layers(opened.image, base.image, keep_base)


__all__ = ["copy", "flatten", "kept", "packing", "remap"]
