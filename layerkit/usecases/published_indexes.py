"""Use case: the indexes of an image's layers published beside it, and found again without reading a layer.

Where an index comes from, best first: the local store (proven: it was read from the layer); the artifact that
``layerkit index push`` attaches to an image; the table of contents that eStargz and zstd:chunked layers carry; the
layer itself. What comes from the two in the middle is marked as unproven, and never kept in the store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerkit.formats.index import toc
from layerkit.formats.oci import documents as oci
from layerkit.formats.oci import index_artifact
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import (
    InvalidImage,
    LayerkitError,
    NotFound,
    RegistryError,
)
from layerkit.model.image import Image, Layer
from layerkit.model.index import Index
from layerkit.model.limits import Limits
from layerkit.model.ports import ImageSink, ImageSource, Progress
from layerkit.model.reports import Report
from layerkit.unpack import VerifiedBlob, index_layer, labelled

if TYPE_CHECKING:
    from layerkit.images.registry.client import Repository
    from layerkit.model.index import Index

_BLOB_BYTES = 1 << 30
_CHUNK_BYTES = 1 << 20

Load = Callable[[Digest], Index | None]
"""Gives the kept index of a layer, or None."""


@dataclass(frozen=True, slots=True)
class Found:
    """The indexes of an image and where they came from.

    Attributes:
        indexes: bottom first; those that nothing has proven carry a warning that says so.
        origins: for each, ``store``, ``cache``, ``artifact``, ``toc`` or ``layer``.
        notes: why a better way was not gone, as text.
    """

    indexes: tuple[Index, ...]
    origins: tuple[str, ...]
    notes: tuple[str, ...]

    def warnings(self, others: Sequence[str]) -> tuple[str, ...]:
        """Return the warnings for a report: ``others`` with one in place of many about unproven layers."""
        doubtful = sum(index_artifact.is_unproven(index) for index in self.indexes)
        kept = tuple(text for text in others if not text.startswith(index_artifact.UNPROVEN))
        if not doubtful:
            return kept
        said = (
            f"{index_artifact.UNPROVEN}{doubtful} of {len(self.indexes)} layers are known only from what is "
            "published of them; `layerkit verify` reads the layers and proves it"
        )
        return (said, *self.notes, *kept)

    @property
    def layers_read(self) -> int:
        """Return how many layer blobs were read whole."""
        return self.origins.count("layer")


def find_indexes(
    source: ImageSource,
    image: Image,
    load: Load,
    *,
    limits: Limits,
    published: bool = True,
    layers: bool = True,
    load_unproven: Load = lambda _: None,
    progress: Progress | None = None,
) -> Found:
    """Return the index of every layer of ``image`` with as few bytes read as can be.

    Args:
        source: where the image is.
        image: whose layers are meant.
        load: gives the kept index of a layer, or None.
        limits: bounds on input.
        published: take indexes from artifacts and tables of contents too.
        layers: read layers where there is nothing else; if not, that is an error.
        load_unproven: gives an index that was published and kept since, or None; asked where ``published``.
        progress: told of the bytes of each layer that is read.

    Raises:
        NotFound: not ``layers``, and a layer that nothing is published of.
        InvalidImage: a layer is malformed, unsafe, or not what its digests promise.
    """
    limits.check("layers_per_image", len(image.layers), image.name or "image")
    notes: list[str] = []
    attached: _Attached | None = None
    indexes: list[Index] = []
    origins: list[str] = []
    known: dict[Digest, tuple[Index, str]] = {}
    for place, layer in enumerate(image.layers):
        got = known.get(layer.diff_id)
        if got is None and (kept := load(layer.diff_id)) is not None:
            got = kept, "store"
        if got is None and published and (cached := load_unproven(layer.diff_id)) is not None:
            got = cached, "cache"
        if got is None and published:
            if attached is None:
                attached = _Attached(source, image, limits, notes)
            found = attached.index(layer.diff_id, {d: i for d, (i, _) in known.items()})
            got = None if found is None else (found, "artifact")
            if got is None:
                found = _from_toc(source, layer, limits, notes)
                got = None if found is None else (found, "toc")
        if got is None:
            if not layers:
                raise NotFound(f"{image.name}: no index is published of layer {layer.descriptor.digest}")
            reader = source.open_blob(layer.descriptor)
            try:
                step = labelled(progress, place, len(image.layers))
                index = index_layer(reader, layer.descriptor, layer.diff_id, limits=limits, progress=step)
            finally:
                reader.close()
            got = index, "layer"
        known[layer.diff_id] = got
        indexes.append(got[0])
        origins.append(got[1])
    return Found(tuple(indexes), tuple(origins), tuple(notes))


class _Attached:
    """The index artifacts that are attached to an image; looked up once, blobs read when they are asked for."""

    def __init__(self, source: ImageSource, image: Image, limits: Limits, notes: list[str]) -> None:
        self._source, self._limits, self._notes = source, limits, notes
        self._blobs: dict[Digest, list[Descriptor]] = {}
        try:
            found = source.referrers(image.descriptor.digest, index_artifact.ARTIFACT_TYPE)
        except (InvalidImage, RegistryError) as error:
            notes.append(f"published indexes are not to be had: {error}")
            return
        for entry, data in found:
            try:
                parsed = index_artifact.parse(data, f"artifact {entry.digest}", limits=limits)
            except InvalidImage as error:
                notes.append(str(error))
                continue
            for diff_id, blob in parsed.blobs.items() if parsed else ():
                self._blobs.setdefault(diff_id, []).append(blob)

    def index(self, diff_id: Digest, known: dict[Digest, Index]) -> Index | None:
        for blob in self._blobs.get(diff_id, ()):
            what = f"index {blob.digest}"
            try:
                below = [known[each] for each in index_artifact.needs(blob, what)]
                data = self._read(blob, what)
                return index_artifact.decode(
                    data, diff_id, what, origin="a published index", below=below, limits=self._limits
                )
            except KeyError:
                self._notes.append(f"{what}: is compressed against layers that are not below it here")
            except LayerkitError as error:
                # Whoever may push can attach nonsense; the layer itself says what is right.
                self._notes.append(f"{what} is not used: {error}")
        return None

    def _read(self, blob: Descriptor, what: str) -> bytes:
        if blob.size > _BLOB_BYTES:
            raise InvalidImage(f"{what}: {blob.size} bytes")
        reader = self._source.open_blob(blob)
        out, buffer = bytearray(), memoryview(bytearray(_CHUNK_BYTES))
        try:
            verified = VerifiedBlob(reader, blob, self._limits)
            while got := verified.readinto(buffer):
                out += buffer[:got]
            verified.finish()
        finally:
            reader.close()
        return bytes(out)


def _from_toc(source: ImageSource, layer: Layer, limits: Limits, notes: list[str]) -> Index | None:
    place = toc.locate(layer.descriptor)
    ranges = source.ranges(layer.descriptor)
    if place is None or ranges is None:
        return None
    try:
        return toc.read(ranges, place, layer.descriptor, layer.diff_id, limits=limits)
    except (LayerkitError, NotFound) as error:
        notes.append(f"the table of contents of layer {layer.descriptor.digest} is not used: {error}")
        return None


@dataclass(frozen=True, slots=True)
class PublishReport(Report):
    """What was published.

    Attributes:
        name: of the image.
        manifest: of the image.
        artifact: digest of the index artifact.
        layers: of the image.
        layers_read: blobs that were read because no index was kept.
        blobs: indexes that were sent or mounted; those that were there already are not.
        bytes: of all indexes of the image.
        image_bytes: of its layers' blobs, for comparison.
    """

    name: str
    manifest: str
    artifact: str
    layers: int
    layers_read: int
    blobs: int
    bytes: int
    image_bytes: int


def publish_indexes(
    image: Image, indexes: Sequence[Index], sink: ImageSink, *, name: str, layers_read: int
) -> PublishReport:
    """Attach the indexes of ``image`` to it in ``sink``, which has the image and is committed.

    Args:
        image: whose manifest the artifact refers to.
        indexes: of its layers, bottom first, all proven.
        sink: where it goes; on an error it is aborted.
        name: of the image, for the report.
        layers_read: for the report.
    """
    try:
        blobs, sent = [], 0
        for place, index in enumerate(indexes):
            blob, data = index_artifact.encode(index, indexes[:place])
            blobs.append(blob)
            if not sink.has_blob(blob.digest):
                sink.put_blob(blob, [data])
                sent += 1
        manifest, descriptor = index_artifact.build(image, blobs)
        if not sink.has_blob(oci.EMPTY_DESCRIPTOR.digest):
            sink.put_blob(oci.EMPTY_DESCRIPTOR, [oci.EMPTY_JSON])
        sink.put_manifest(descriptor, manifest)
        sink.commit()
    except BaseException:
        sink.abort()
        raise
    return PublishReport(
        name=name,
        manifest=str(image.descriptor.digest),
        artifact=str(descriptor.digest),
        layers=len(image.layers),
        layers_read=layers_read,
        blobs=sent,
        bytes=sum({blob.digest: blob.size for blob in blobs}.values()),
        image_bytes=sum({x.descriptor.digest: x.descriptor.size for x in image.layers}.values()),
    )


__all__ = ["Found", "PublishReport", "find_indexes", "publish_indexes"]


def _publish_indexes(image: Image, indexes: Sequence[Index], sink: Repository, near: Sequence[str]) -> None:
    """Attach the indexes of an image's layers to it, so that others need not read them either.

    Those that came from others of this fleet are vouched for by the repository it keeps them in.
    """
    from layerkit.formats.oci import index_artifact

    if sink.referrers(image.descriptor.digest, index_artifact.ARTIFACT_TYPE):
        return
    blobs = []
    for place, index in enumerate(indexes):
        blob, data = index_artifact.encode(index, indexes[:place], vouched=True)
        blobs.append(blob)
        if sink.blob_size(blob.digest) is None:
            sink.put_blob(blob, [data], mount_from=near)
    manifest, descriptor = index_artifact.build(image, blobs)
    sink.put_manifest(manifest, descriptor.media_type)
