"""The Python API for what is published beside images: indexes, remap artifacts, statements about them.

::

    from layerkit import publishing

    publishing.push_indexes("docker://registry.example.com/team/app:v1")

A part of :mod:`layerkit.api`, in a module of its own for its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerkit import api
from layerkit import limits as bounds
from layerkit.errors import NotFound, UsageError
from layerkit.model.reports import Report

if TYPE_CHECKING:
    from layerkit.model.image import Image
    from layerkit.ports import ImageSink, ImageSource, Progress
    from layerkit.published import PublishReport


@dataclass(frozen=True, slots=True)
class PulledLayer(Report):
    """The index of one layer: its ``digest``, ``diff_id``, ``entries``, and the ``origin`` it came from."""

    digest: str
    diff_id: str
    entries: int
    origin: str


@dataclass(frozen=True, slots=True)
class IndexPullReport(Report):
    """What :func:`pull_indexes` found.

    Attributes:
        name: of the image.
        manifest: of the image.
        layers: bottom first; the origin is ``store``, ``cache``, ``artifact`` or ``toc``.
        bytes: that were read from the registry for it, manifests included.
        image_bytes: of the layers' blobs, for comparison.
        notes: why something that is published was not used.
    """

    name: str
    manifest: str
    layers: tuple[PulledLayer, ...]
    bytes: int
    image_bytes: int
    notes: tuple[str, ...]


def push_indexes(
    src: str,
    dst: str | None = None,
    *,
    platform: str | None = None,
    settings: api.Settings | None = None,
    mount_from: Sequence[str] = (),
    progress: Progress | None = None,
) -> PublishReport:
    """Attach the indexes of an image's layers to it as an OCI artifact.

    Layers whose index the local store keeps are not read.

    Args:
        src: reference of the image.
        dst: where image and artifact go; None attaches the artifact where the image is.
        platform: ``os/arch[/variant]``; None takes this host's.
        settings: store, limits, registry options.
        mount_from: repositories of the same registry that may have some of the indexes.
        progress: told of the bytes of layers that are read.

    Raises:
        UsageError: a place that nothing can be attached in.
        InvalidImage: a layer is damaged.
    """
    from layerkit.pack import copy_image
    from layerkit.published import find_indexes, publish_indexes

    chosen = settings or api.Settings()
    with api.open_image(src, platform=platform, settings=chosen) as opened:
        with opened.kept() as store:
            found = find_indexes(
                opened.source, opened.image, store.load_index if store else lambda _: None,
                limits=opened.limits, published=False, progress=progress,
            )  # fmt: skip
        sink, name = attach_sink(src, dst, opened.image, opened.source, chosen, mount_from)
        if dst is not None:
            try:
                copy_image(opened.source, sink, opened.image, name or opened.image.name, progress=progress)
            except BaseException:
                sink.abort()
                raise
        return publish_indexes(opened.image, found.indexes, sink, name=opened.name, layers_read=found.layers_read)


def pull_indexes(src: str, *, platform: str | None = None, settings: api.Settings | None = None) -> IndexPullReport:
    """Fetch what is published of the indexes of an image's layers, and keep it for later remaps.

    No layer is read. What comes is unproven, and kept apart from the store, so nothing of it is ever mounted.

    Args:
        src: reference of the image.
        platform: ``os/arch[/variant]``; None takes this host's.
        settings: store, limits, registry options.

    Raises:
        NotFound: nothing is published of a layer, neither an index nor a table of contents.
    """
    from layerkit.published import find_indexes
    from layerkit.stores.unproven import UnprovenIndexes

    chosen = settings or api.Settings()
    with api.open_image(src, platform=platform, settings=chosen) as opened:
        cache = UnprovenIndexes(limits=opened.limits)
        with opened.kept() as store:
            try:
                found = find_indexes(
                    opened.source, opened.image, store.load_index if store else lambda _: None,
                    limits=opened.limits, layers=False, load_unproven=cache.load,
                )  # fmt: skip
            except NotFound as error:
                raise NotFound(f"{error}; `layerkit index push {src}` publishes them") from None
        for index, origin in zip(found.indexes, found.origins, strict=True):
            if origin in ("artifact", "toc"):
                cache.save(index)
        layers = opened.image.layers
        return IndexPullReport(
            name=opened.name,
            manifest=str(opened.image.descriptor.digest),
            layers=tuple(
                PulledLayer(str(layer.descriptor.digest), str(layer.diff_id), len(index), origin)
                for layer, index, origin in zip(layers, found.indexes, found.origins, strict=True)
            ),
            bytes=_bytes_read(opened.source),
            image_bytes=sum({x.descriptor.digest: x.descriptor.size for x in layers}.values()),
            notes=found.notes,
        )


def attach_sink(
    src: str,
    dst: str | None,
    image: Image,
    source: ImageSource,
    settings: api.Settings,
    mount_from: Sequence[str] = (),
) -> tuple[ImageSink, str]:
    """Return where something attached to ``image`` goes, and the name for the image where it goes along.

    Raises:
        UsageError: a place that nothing can be attached in.
    """
    from layerkit.stores import reference

    limits = settings.limits or bounds.from_environment()
    parsed = reference.parse(dst if dst is not None else src)
    if parsed.transport in ("store", "docker-daemon", "docker-archive") or parsed.path == "-":
        raise UsageError(f"{parsed}: nothing can be attached to an image there; use docker:// or oci:")
    if parsed.transport == "docker":
        from layerkit.stores import registry as registries

        # Where the image is already, its tag stays as it is.
        tag, digest = (parsed.name, parsed.digest) if dst is not None else ("", image.descriptor.digest)
        sink = registries.open_sink(
            parsed.path, tag, digest, options=settings.registry, near=source, limits=limits, mount_from=mount_from
        )
        return sink, parsed.name
    return reference.open_sink(parsed, limits=limits), parsed.name


def _bytes_read(source: ImageSource) -> int:
    repository = getattr(source, "repository", None)
    return repository.traffic.bytes_read if repository is not None else 0


__all__ = ["IndexPullReport", "PulledLayer", "attach_sink", "pull_indexes", "push_indexes"]
