"""The Python API for multi-platform images: what is done to one image, done to that of every platform.

The result is one index. What is attached to the source (signatures, attestations) stays behind: it speaks for
digests that the result does not have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from layerkit.model import limits as bounds
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import NotFound, UsageError
from layerkit.model.reports import Report
from layerkit.usecases.settings import Settings

if TYPE_CHECKING:
    from layerkit.model.digest import Digest
    from layerkit.model.image import Image
    from layerkit.model.ports import ImageSink, ImageSource


OpenSink = Callable[[], "ImageSink"]
"""Opens the sink of one result."""

_Report = TypeVar("_Report", covariant=True)


@dataclass(frozen=True, slots=True)
class PlatformsReport(Report):
    """What was made of a multi-platform image.

    Attributes:
        name: of the result.
        manifest: digest of the new index, "" where nothing was written.
        platforms: of the images, as ``os/arch[/variant]``.
        images: for each of them what was done to it.
        seconds: wall time.
    """

    name: str
    manifest: str
    platforms: tuple[str, ...]
    images: tuple[Any, ...]
    seconds: float


def every_platform(src: str, dst: str | None, work: Work[Any], settings: Settings) -> PlatformsReport:
    """Do ``work`` to the image of every platform in ``src``; one index of them goes to ``dst``, None for none."""
    from layerkit.images import reference

    start = time.monotonic()
    limits = settings.limits or bounds.from_environment()
    if reference.parse(src).transport == "store":
        raise UsageError(f"{src}: the store holds images of one platform; --all-platforms wants an index")
    source = reference.open_source(src, limits=limits, registry=settings.registry)
    try:
        if not source.chosen():
            raise UsageError(f"{src}: holds the image of one platform; leave out --all-platforms")
        name, images, annotations = _images(source, limits)
        if not images:
            raise NotFound(f"{src}: holds no image")
        if dst is None:
            reports = [work(source, image, _no_sink, name) for image in images]
            return _report(name, "", images, reports, start)
        open_sink, dst_name = sink_to(dst, settings, source)
        if reference.parse(dst).transport in ("docker-archive", "docker-daemon") and len(images) > 1:
            raise UsageError(f"{dst}: has room for one platform; choose it with --platform")
        sink = open_sink()
        try:
            parts = _Parts(sink)
            reports = [work(source, image, parts.open, name) for image in images]
            top = parts.put_index(annotations, dst_name or name)
            sink.commit()
        except BaseException:
            sink.abort()
            raise
        return _report(dst_name or name, str(top.digest), images, reports, start)
    finally:
        source.close()


def _no_sink() -> ImageSink:
    raise AssertionError("a plan needs no sink")


def _images(source: ImageSource, limits: bounds.Limits) -> tuple[str, list[Image], dict[str, str]]:
    """Return the name, the images and the index's annotations of what the reference of ``source`` names."""
    from layerkit.formats.oci import documents as oci
    from layerkit.formats.oci import images as oci_images

    entries = list(source.chosen())
    name = next((e.annotations[oci.REF_NAME] for e in entries if oci.REF_NAME in e.annotations), "")
    annotations: dict[str, str] = {}
    if len(entries) == 1 and entries[0].media_type in oci.INDEX_TYPES:
        data = oci_images.fetch_manifest(source.fetch, entries[0], source.where, limits)
        found = oci.parse_index(data, f"{source.where}: index {entries[0].digest}", limits=limits,
                                media_type=entries[0].media_type).document.get("annotations")  # fmt: skip
        if isinstance(found, dict):
            annotations = {str(key): str(value) for key, value in found.items()}
    return name, oci_images.every(source.fetch, entries, name, source.where, limits=limits), annotations


def _report(name: str, manifest: str, images: list[Image], reports: list[Any], start: float) -> PlatformsReport:
    platforms = tuple(str(image.platform) for image in images)
    return PlatformsReport(name, manifest, platforms, tuple(reports), time.monotonic() - start)


class _Parts:
    """The sink of one platform's image: its manifest waits for the index; the whole is committed elsewhere."""

    def __init__(self, sink: ImageSink) -> None:
        self._sink = sink
        self._manifests: list[Descriptor] = []
        self.has_blob = sink.has_blob
        self.parallel, self.keeps_attached, self.mounted = sink.parallel, sink.keeps_attached, sink.mounted

    def open(self) -> ImageSink:
        return self

    def put_blob(self, descriptor: Descriptor, chunks: Iterable[bytes | memoryview]) -> None:
        self._sink.put_blob(descriptor, chunks)

    def put_manifest(self, descriptor: Descriptor, data: bytes, name: str = "") -> None:
        from layerkit.formats.oci import documents as oci

        if not self._sink.has_blob(descriptor.digest):
            self._sink.put_blob(descriptor, [data])
        names = (oci.REF_NAME, oci.CONTAINERD_NAME)
        kept = {key: value for key, value in descriptor.annotations.items() if key not in names}
        self._manifests.append(replace(descriptor, annotations=kept))

    def put_index(self, annotations: dict[str, str], name: str) -> Descriptor:
        """Put the index of all manifests under ``name`` and return its descriptor."""
        from layerkit.formats.oci import documents as oci

        more: dict[str, Any] = {"annotations": dict(annotations)} if annotations else {}
        data = oci.index_json(self._manifests, {"schemaVersion": 2, "mediaType": oci.INDEX, **more})
        top = Descriptor(oci.INDEX, Digest.of(data), len(data))
        self._sink.put_manifest(top, data, name)
        return top

    def commit(self) -> None:
        """Do nothing: all platforms become visible at once."""

    def abort(self) -> None:
        """Do nothing: the whole is aborted with the error."""


class Work(Protocol[_Report]):
    """What is done to one image."""

    def __call__(self, source: ImageSource, image: Image, open_sink: OpenSink, name: str, /) -> _Report:
        """Write what becomes of ``image`` to a sink, which is committed, under ``name`` (or the image's own)."""
        ...


def sink_to(dst: str, settings: Settings, near: ImageSource) -> tuple[OpenSink, str]:
    """Return what opens the destination ``dst``, and the name that the image gets there, "" to keep its own."""
    from layerkit.images import reference

    parsed = reference.parse(dst)
    limits = settings.limits or bounds.from_environment()
    return lambda: reference.open_sink(parsed, limits=limits, registry=settings.registry, near=near), parsed.name


__all__ = ["OpenSink", "PlatformsReport", "Work", "every_platform", "sink_to"]
