"""Use case: the indexes of an image's layers published beside it, and found again without reading a layer.

Where an index comes from, best first: the local store (proven: it was read from the layer); the artifact that
``layerkit index push`` attaches to an image; the table of contents that eStargz and zstd:chunked layers carry; the
layer itself. What comes from the two in the middle is marked as unproven, and never kept in the store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from layerkit.formats.index import toc
from layerkit.formats.oci import documents as oci
from layerkit.formats.oci import index_artifact
from layerkit.images.oci.blobs import read_all
from layerkit.images.transfer import copy_image
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import InvalidImage, LayerkitError, RegistryError
from layerkit.model.image import Image, Layer
from layerkit.model.index import Index
from layerkit.model.ports import ImageSink
from layerkit.model.reports import Report
from layerkit.model.work import Destination, Others, Work
from layerkit.store.unproven import UnprovenIndexes
from layerkit.unpack import find_indexes

_BLOB_BYTES = 1 << 30


class PublishedIndexes(Others):
    """What is published of an image's layers; artifacts are looked up once, blobs read when they are asked for."""

    def __init__(self, work: Work) -> None:
        """Nothing is asked yet; what was fetched earlier is asked before the network."""
        self._source, self._limits = work.source, work.limits
        self._image, self._load = work.image, UnprovenIndexes(limits=work.limits).load
        self._attached: dict[Digest, list[Descriptor]] | None = None
        self.notes: list[str] = []

    def index(self, layer: Layer, below: Mapping[Digest, Index]) -> tuple[Index, str] | None:
        """See the port; ``cache`` is what was fetched earlier, ``toc`` the layer's own table of contents."""
        if (index := self._load(layer.diff_id)) is not None:
            return index, "cache"
        if (index := self._from_artifact(layer.diff_id, below)) is not None:
            return index, "artifact"
        if (index := self._from_toc(layer)) is not None:
            return index, "toc"
        return None

    def _blobs(self) -> dict[Digest, list[Descriptor]]:
        out: dict[Digest, list[Descriptor]] = {}
        try:
            found = self._source.referrers(self._image.descriptor.digest, index_artifact.ARTIFACT_TYPE)
        except (InvalidImage, RegistryError) as error:
            self.notes.append(f"published indexes cannot be read: {error}")
            return out
        for entry, data in found:
            try:
                parsed = index_artifact.parse(data, f"artifact {entry.digest}", limits=self._limits)
            except InvalidImage as error:
                self.notes.append(str(error))
                continue
            for diff_id, blob in parsed.blobs.items() if parsed else ():
                out.setdefault(diff_id, []).append(blob)
        return out

    def _from_artifact(self, diff_id: Digest, known: Mapping[Digest, Index]) -> Index | None:
        if self._attached is None:
            self._attached = self._blobs()
        for blob in self._attached.get(diff_id, ()):
            what = f"index {blob.digest}"
            try:
                below = [known[each] for each in index_artifact.needs(blob, what)]
                data = self._read(blob, what)
                return index_artifact.decode(
                    data, diff_id, what, origin="a published index", below=below, limits=self._limits
                )
            except KeyError:
                self.notes.append(f"{what}: is compressed against layers that are not below it here")
            except LayerkitError as error:
                # Whoever may push can attach nonsense; the layer itself says what is right.
                self.notes.append(f"{what} is not used: {error}")
        return None

    def _read(self, blob: Descriptor, what: str) -> bytes:
        if blob.size > _BLOB_BYTES:
            raise InvalidImage(f"{what}: {blob.size} bytes")
        self._limits.check("layer_blob_bytes", blob.size, f"{what}: bytes of the blob")
        data = read_all(self._source.open_blob(blob), blob.size, what, "layer_blob_bytes")
        return oci.verify(data, blob, what)

    def _from_toc(self, layer: Layer) -> Index | None:
        place, ranges = toc.locate(layer.descriptor), self._source.ranges(layer.descriptor)
        if place is None or ranges is None:
            return None
        try:
            return toc.read(ranges, place, layer.descriptor, layer.diff_id, limits=self._limits)
        except LayerkitError as error:
            self.notes.append(f"the table of contents of layer {layer.descriptor.digest} is not used: {error}")
            return None


@dataclass(frozen=True, slots=True)
class PublishReport(Report):
    """What was published.

    Attributes:
        artifact: digest of the index artifact.
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


def push_indexes(work: Work, dst: Destination) -> PublishReport:
    """Attach the indexes of the image's layers to it in ``dst``; the image comes along where it is not there.

    Layers whose index is kept are not read.

    Raises:
        InvalidImage: a layer is damaged.
    """
    image = work.image
    found = find_indexes(work)
    with dst.sink() as sink:
        if not dst.has_image:
            copy_image(work.source, sink, image, dst.name or image.name, progress=work.progress)
        sent = put_indexes(image, found.indexes, sink)
    return PublishReport(
        name=work.name,
        manifest=str(image.descriptor.digest),
        artifact=str(sent.artifact.digest),
        layers=len(image.layers),
        layers_read=found.layers_read,
        blobs=sent.blobs,
        bytes=sent.bytes,
        image_bytes=_blob_bytes(image),
    )


class Sent(NamedTuple):
    """The index artifact of an image, how many of its blobs were sent, and the bytes of all of them."""

    artifact: Descriptor
    blobs: int
    bytes: int


def put_indexes(image: Image, indexes: Sequence[Index], sink: ImageSink, *, vouched: bool = False) -> Sent:
    """Put the artifact of an image's indexes into ``sink``, which has the image, or gets it, and is not committed.

    ``vouched``: some of them came from others, and whoever keeps them in a place of its own vouches for them.
    """
    blobs, sent = [], 0
    for place, index in enumerate(indexes):
        blob, data = index_artifact.encode(index, indexes[:place], vouched=vouched)
        blobs.append(blob)
        if not sink.has_blob(blob.digest):
            sink.put_blob(blob, [data])
            sent += 1
    manifest, descriptor = index_artifact.build(image, blobs)
    if not sink.has_blob(oci.EMPTY_DESCRIPTOR.digest):
        sink.put_blob(oci.EMPTY_DESCRIPTOR, [oci.EMPTY_JSON])
    sink.put_manifest(descriptor, manifest)
    return Sent(descriptor, sent, sum({blob.digest: blob.size for blob in blobs}.values()))


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


def pull_indexes(work: Work) -> IndexPullReport:
    """Fetch what is published of the indexes of the image's layers, and keep it for later remaps.

    No layer is read. What comes is unproven, and kept apart from the store, so nothing of it is ever mounted.

    Raises:
        NotFound: nothing is published of a layer, neither an index nor a table of contents.
    """
    cache = UnprovenIndexes(limits=work.limits)
    found = find_indexes(work, PublishedIndexes(work), layers=False)
    for index, origin in zip(found.indexes, found.origins, strict=True):
        if origin in ("artifact", "toc"):
            cache.save(index)
    return IndexPullReport(
        name=work.name,
        manifest=str(work.image.descriptor.digest),
        layers=tuple(
            PulledLayer(str(layer.descriptor.digest), str(layer.diff_id), len(index), origin)
            for layer, index, origin in zip(work.image.layers, found.indexes, found.origins, strict=True)
        ),
        bytes=work.source.bytes_read(),
        image_bytes=_blob_bytes(work.image),
        notes=found.notes,
    )


def _blob_bytes(image: Image) -> int:
    return sum({layer.descriptor.digest: layer.descriptor.size for layer in image.layers}.values())
