"""Use case: what is done to one image, done to that of every platform; the results are one index.

What is attached to the source (signatures, attestations) stays behind: it speaks for digests that the result does
not have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from layerkit.formats.oci import documents as oci
from layerkit.formats.oci import images as oci_images
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import NotFound, UsageError
from layerkit.model.image import Image
from layerkit.model.limits import Limits
from layerkit.model.ports import ImageSink, ImageSource
from layerkit.model.reports import Report
from layerkit.model.work import Destination


@dataclass(frozen=True, slots=True)
class PlatformsReport(Report):
    """What was made of a multi-platform image.

    Attributes:
        name: of the result.
        manifest: digest of the new index, "" where nothing was written.
        platforms: of the images, as ``os/arch[/variant]``.
        images: for each of them what was done to it.
    """

    name: str
    manifest: str
    platforms: tuple[str, ...]
    images: tuple[Any, ...]
    seconds: float


def each_platform(
    source: ImageSource, dst: Destination, do: Callable[[Image, Destination], object], limits: Limits
) -> PlatformsReport:
    """Do ``do`` to the image of every platform that ``source`` was opened for; one index of all goes to ``dst``.

    Raises:
        UsageError: no index, or a destination without room for one.
        NotFound: the index holds no image.
    """
    start = time.monotonic()
    if not source.chosen():
        raise UsageError(f"{source.where}: holds the image of one platform; leave out --all-platforms")
    name, images, annotations = _images(source, limits)
    if not images:
        raise NotFound(f"{source.where}: holds no image")
    platforms = tuple(str(image.platform) for image in images)
    if dst.open is None:
        reports = [do(image, dst) for image in images]
        return PlatformsReport(name, "", platforms, tuple(reports), time.monotonic() - start)
    if dst.one_image and len(images) > 1:
        raise UsageError(f"{dst.where}: can hold one platform only; choose it with --platform")
    with dst.sink() as sink:
        parts = _Parts(sink)
        reports = [do(image, Destination(lambda: parts, name)) for image in images]
        top = parts.put_index(annotations, dst.name or name)
    return PlatformsReport(dst.name or name, str(top.digest), platforms, tuple(reports), time.monotonic() - start)


def _images(source: ImageSource, limits: Limits) -> tuple[str, list[Image], dict[str, str]]:
    """Return the name, the images and the index's annotations of what the reference of ``source`` names."""
    entries = list(source.chosen())
    name = next((e.annotations[oci.REF_NAME] for e in entries if oci.REF_NAME in e.annotations), "")
    annotations: dict[str, str] = {}
    if len(entries) == 1 and entries[0].media_type in oci.INDEX_TYPES:
        data = oci_images.Reading(source.fetch, source.where, limits).manifest(entries[0])
        found = oci.parse_index(data, f"{source.where}: index {entries[0].digest}", limits=limits,
                                media_type=entries[0].media_type).document.get("annotations")  # fmt: skip
        if isinstance(found, dict):
            annotations = {str(key): str(value) for key, value in found.items()}
    return name, oci_images.Reading(source.fetch, source.where, limits).every(entries, name), annotations


class PassingSink(ImageSink):
    """A sink that hands on what comes to another one, which is committed or aborted by somebody else."""

    def __init__(self, sink: ImageSink) -> None:
        """Hand on to ``sink``."""
        self._sink = sink
        self.parallel, self.keeps_attached, self.mounted = sink.parallel, sink.keeps_attached, sink.mounted

    def has_blob(self, digest: Digest) -> bool:
        """See the port."""
        return self._sink.has_blob(digest)

    def put_blob(self, descriptor: Descriptor, chunks: Iterable[bytes | memoryview]) -> None:
        """See the port."""
        self._sink.put_blob(descriptor, chunks)

    def put_manifest(self, descriptor: Descriptor, data: bytes, name: str = "") -> None:
        """See the port."""
        self._sink.put_manifest(descriptor, data, name)

    def commit(self) -> None:
        """Do nothing."""

    def abort(self) -> None:
        """Do nothing."""


class _Parts(PassingSink):
    """The sink of one platform's image: its manifest waits for the index, so that all become visible at once."""

    def __init__(self, sink: ImageSink) -> None:
        super().__init__(sink)
        self._manifests: list[Descriptor] = []

    def put_manifest(self, descriptor: Descriptor, data: bytes, name: str = "") -> None:
        if not self.has_blob(descriptor.digest):
            self.put_blob(descriptor, [data])
        self._manifests.append(nameless(descriptor))

    def put_index(self, annotations: dict[str, str], name: str) -> Descriptor:
        """Put the index of all manifests under ``name`` and return its descriptor."""
        more: dict[str, Any] = {"annotations": dict(annotations)} if annotations else {}
        data = oci.index_json(self._manifests, {"schemaVersion": 2, "mediaType": oci.INDEX, **more})
        top = Descriptor.of(oci.INDEX, data)
        self._sink.put_manifest(top, data, name)
        return top


def nameless(entry: Descriptor) -> Descriptor:
    """Return an entry of an index without the names that only a top index gives."""
    names = (oci.REF_NAME, oci.CONTAINERD_NAME)
    return replace(entry, annotations={key: value for key, value in entry.annotations.items() if key not in names})
