"""The Python API for what is published beside images: indexes, remap artifacts, statements about them.

::

    from layerkit.api import registry

    registry.push_indexes("docker://registry.example.com/team/app:v1")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from layerkit.api.open import OpenImage, open_image
from layerkit.model.errors import InvalidImage, NotFound, UsageError
from layerkit.model.reports import RemapReport, Report
from layerkit.model.work import Destination
from layerkit.usecases.settings import Settings

if TYPE_CHECKING:
    from layerkit.idmap import Mapping
    from layerkit.model.ports import ImageSink, Progress
    from layerkit.usecases.published_indexes import IndexPullReport, PublishReport


def push_indexes(
    src: str,
    dst: str | None = None,
    *,
    platform: str | None = None,
    settings: Settings | None = None,
    mount_from: Sequence[str] = (),
    progress: Progress | None = None,
) -> PublishReport:
    """Attach the indexes of an image's layers to it as an OCI artifact.

    Layers whose index the local store keeps are not read. Image and artifact go to ``dst``; without it the artifact
    is attached where the image is. ``mount_from`` are repositories of the same registry that may have some of the
    indexes. For ``src``, ``platform`` and ``settings`` see :func:`~layerkit.api.open.open_image`.

    Raises:
        UsageError: a place that nothing can be attached in.
        InvalidImage: a layer is damaged.
    """
    from layerkit.usecases import published_indexes as use_case

    with open_image(src, platform=platform, settings=settings) as opened:
        to = _beside(opened, src, dst, mount_from)
        with opened.kept(progress) as work:
            return use_case.push_indexes(work, to)


def _beside(opened: OpenImage, src: str, dst: str | None, mount_from: Sequence[str]) -> Destination:
    """Return where something attached to the image goes: to ``dst`` with the image, else where the image is."""
    from layerkit.images import reference

    parsed = reference.parse(src if dst is None else dst)
    if parsed.transport in ("store", "docker-daemon", "docker-archive") or parsed.path == "-":
        raise UsageError(f"{parsed}: nothing can be attached to an image there; use docker:// or oci:")
    if parsed.transport != "docker":
        return replace(opened.settings.destination(str(parsed), opened.source), has_image=dst is None)
    from layerkit.images.registry.client import RegistryClient
    from layerkit.images.registry.names import RegistryRef
    from layerkit.images.registry.sink import RegistrySink

    # Where the image is already, its tag stays as it is.
    tag, digest = ("", opened.image.descriptor.digest) if dst is None else (parsed.name, parsed.digest)
    ref = RegistryRef.of(parsed.path, tag, digest)

    def sink() -> ImageSink:
        repository = RegistryClient(opened.settings.registry, limits=opened.limits).repository(ref)
        neighbours = [*mount_from, opened.source.repository_at(ref.host)]
        return RegistrySink(repository, ref, mount_from=neighbours, attach_only=dst is None, owned=True)

    return Destination(sink, parsed.name, has_image=dst is None)


def pull_indexes(src: str, *, platform: str | None = None, settings: Settings | None = None) -> IndexPullReport:
    """Fetch the published indexes of an image's layers, and keep them for later remaps.

    No layer is read. What comes is unproven, and kept apart from the store, so nothing of it is ever mounted. For
    the arguments see :func:`~layerkit.api.open.open_image`.

    Raises:
        NotFound: nothing is published of a layer, neither an index nor a table of contents.
    """
    from layerkit.usecases import published_indexes as use_case

    with open_image(src, platform=platform, settings=settings) as opened, opened.kept() as work:
        try:
            return use_case.pull_indexes(work)
        except NotFound as error:
            raise NotFound(f"{error}; `layerkit index push {src}` publishes them") from None


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
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> PullReport:
    """Bring an image into the store, ready to mount under ``mapping``, and check its published remap.

    The layers are read and verified. A remap artifact that is attached to the image is compared byte for byte with
    what the layers make of the map, so a wrong one cannot get into the store; without one that is right, the remap
    is made here alone. With a public ``key`` only artifacts with a statement that it has signed count as published.
    ``own_meta`` is that of :class:`~layerkit.hosts.mounts.spec.MountOptions`; for ``src``, ``platform`` and
    ``settings`` see :func:`~layerkit.api.open.open_image`.

    Raises:
        UnmappedId: an owner outside the map.
        InvalidImage: a layer is damaged; or ``require_published``, and no artifact is right.
    """
    from layerkit.usecases.verify import Published, find_published

    if mapping is None and (key is not None or require_published):
        raise UsageError("a published remap belongs to a map: give --uid-map C:H:N or --subuid-name NAME")
    with open_image(src, platform=platform, settings=settings) as opened:
        report = opened.remap(mapping, own_meta=own_meta, progress=progress)
        published = Published()
        if mapping is not None:
            with opened.kept(progress) as work:
                published = find_published(work, mapping, key)
    if require_published and not published.digest:
        why = "; ".join(published.refused) or "nothing is attached to the image for it"
        raise InvalidImage(f"{src}: no published remap for this map: {why}")
    return PullReport(report, published.digest, published.refused, published.signed)
