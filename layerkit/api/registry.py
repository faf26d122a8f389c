"""The Python API for what is published beside images: indexes, remap artifacts, statements about them.

::

    from layerkit.api import registry

    publishing.push_indexes("docker://registry.example.com/team/app:v1")

A part of :mod:`layerkit.api.open`, in a module of its own for its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from layerkit.api import open as api
from layerkit.model import limits as bounds
from layerkit.model.errors import InvalidImage, LayerkitError, NotFound, UsageError
from layerkit.model.reports import Report

if TYPE_CHECKING:
    from layerkit.formats.oci.intoto import Verifier
    from layerkit.formats.oci.remap_artifact import RemapArtifact
    from layerkit.idmap import Mapping
    from layerkit.model.descriptor import Descriptor
    from layerkit.model.image import Image
    from layerkit.model.limits import Limits
    from layerkit.model.ports import ImageSink, ImageSource, Progress
    from layerkit.model.reports import RemapReport
    from layerkit.usecases.published_indexes import PublishReport


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
    from layerkit.usecases.published_indexes import find_indexes, publish_indexes

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
    from layerkit.store.unproven import UnprovenIndexes
    from layerkit.usecases.published_indexes import find_indexes

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
            bytes=opened.source.bytes_read(),
            image_bytes=sum({x.descriptor.digest: x.descriptor.size for x in layers}.values()),
            notes=found.notes,
        )


@dataclass(frozen=True, slots=True)
class PullReport(Report):
    """What :func:`pull` brought.

    Attributes:
        remap: what the store has now; ``next_ref`` of it can be mounted.
        published: digest of the remap artifact that was found for this map and verified, "" if there is none.
        refused: why artifacts that claim to be for this image and map are not used.
        signed: whether ``published`` has a statement that the given key has signed.
    """

    remap: RemapReport
    published: str
    refused: tuple[str, ...]
    signed: bool


def pull(
    src: str,
    mapping: Mapping | None,
    *,
    key: Path | None = None,
    require_published: bool = False,
    own_meta: bool = False,
    platform: str | None = None,
    settings: api.Settings | None = None,
    progress: Progress | None = None,
) -> PullReport:
    """Bring an image into the store, ready to be mounted under ``mapping``, and check what is published of it.

    The layers are read and verified. A remap artifact that is attached to the image is compared byte for byte with
    what the layers make of the map, so a wrong one cannot get into the store; without one that is right, the remap
    is made here alone.

    Args:
        src: reference of the image.
        mapping: the id map; None keeps the owners.
        key: public key; only artifacts with a statement that it has signed count as published.
        require_published: raise where no published artifact verifies.
        own_meta: write META for this map even where an idmapped mount needs none.
        platform: ``os/arch[/variant]``; None takes this host's.
        settings: store, limits, registry options.
        progress: told about the bytes read.

    Raises:
        UnmappedId: an owner outside the map.
        InvalidImage: a layer is damaged; or ``require_published``, and no artifact is right.
    """
    chosen = settings or api.Settings()
    if mapping is None and (key is not None or require_published):
        raise UsageError("remaps are published for a map: give --uid-map C:H:N, or --subuid-name NAME")
    with api.open_image(src, platform=platform, settings=chosen) as opened:
        report = opened.remap(mapping, own_meta=own_meta, progress=progress)
        published, refused, signed = "", list[str](), False
        if mapping is not None:
            published, refused, signed = _check_published(opened, mapping, key)
        if require_published and not published:
            why = "; ".join(refused) or "nothing is attached to the image for it"
            raise InvalidImage(f"{src}: no published remap for this map: {why}")
        return PullReport(report, published, tuple(refused), signed)


def _check_published(opened: api.OpenImage, mapping: Mapping, key: Path | None) -> tuple[str, list[str], bool]:
    from layerkit.formats.oci import remap_artifact as artifact
    from layerkit.usecases.attach import renderer
    from layerkit.usecases.verify import check_artifact

    verify = None
    if key is not None:
        from layerkit.images.signing_keys import verifier

        verify = verifier(key)
    source, image, refused = opened.source, opened.image, list[str]()
    tree = None
    try:
        attached = source.referrers(image.descriptor.digest, artifact.ARTIFACT_TYPE)
    except LayerkitError as error:
        return "", [str(error)], False
    for entry, data in attached:
        try:
            found = artifact.parse(data, f"artifact {entry.digest}", limits=opened.limits)
            if found.mapping != mapping.canonical():
                continue
            tree = tree if tree is not None else opened.tree()
            check_artifact(image, tree, source, entry, data, renderer, opened.limits)
            if verify is not None:
                _check_signed(source, image, entry, found, verify, opened.limits)
            return str(entry.digest), refused, verify is not None
        except LayerkitError as error:
            refused.append(str(error))
    return "", refused, False


def _check_signed(
    source: ImageSource, image: Image, entry: Descriptor, found: RemapArtifact, verify: Verifier, limits: Limits
) -> None:
    """Raise unless a statement about the artifact ``entry`` is signed by the key that ``verify`` stands for."""
    from layerkit.formats.oci import documents as oci
    from layerkit.formats.oci import intoto

    why = "nobody has signed a statement about it"
    for signed, data in source.referrers(entry.digest, intoto.BUNDLE):
        what = f"statement {signed.digest}"
        try:
            blob = oci.parse_manifest(data, what, limits=limits).layers[:1]
            bundle = source.fetch(blob[0], limits.manifest_bytes) if blob else b""
            if blob:
                oci.verify(bundle, blob[0], what)
            payload = intoto.open_bundle(bundle, verify, what, limits=limits)
            intoto.check_statement(payload, image, entry.digest, found, what)
            return
        except InvalidImage as error:
            why = str(error)
    raise InvalidImage(f"artifact {entry.digest}: {why}")


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
    from layerkit.images import reference

    limits = settings.limits or bounds.from_environment()
    parsed = reference.parse(dst if dst is not None else src)
    if parsed.transport in ("store", "docker-daemon", "docker-archive") or parsed.path == "-":
        raise UsageError(f"{parsed}: nothing can be attached to an image there; use docker:// or oci:")
    if parsed.transport == "docker":
        from layerkit.images import registry as registries

        # Where the image is already, its tag stays as it is.
        tag, digest = (parsed.name, parsed.digest) if dst is not None else ("", image.descriptor.digest)
        sink = registries.open_sink(
            parsed.path,
            tag,
            digest,
            options=settings.registry,
            near=source,
            limits=limits,
            mount_from=mount_from,
            attach_only=dst is None,
        )
        return sink, parsed.name
    return reference.open_sink(parsed, limits=limits), parsed.name


__all__ = ["IndexPullReport", "PullReport", "PulledLayer", "attach_sink", "pull", "pull_indexes", "push_indexes"]
