"""Rows and content to layers, and layers to an image's config and manifest, all of it into a sink.

The result is an OCI image also where the input was a docker one: the two differ in media types alone, and
one manifest must not mix them.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from layerkit.formats.compression.compress import LEVELS, ZSTD_LEVEL, all_cores, compress, compressor
from layerkit.formats.compression.decompress import Compression
from layerkit.formats.compression.zstd_chunked import CHUNK_BYTES, ZstdChunked
from layerkit.formats.oci import documents as oci
from layerkit.formats.strict_json import JsonObject, dumps
from layerkit.formats.tar.writer import Content, Part, layer_parts, layer_tar
from layerkit.images.oci.blobs import FileRange, file_chunks
from layerkit.images.transfer import Chunks
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import InvalidImage, UsageError
from layerkit.model.image import Image, Layer
from layerkit.model.index import Index
from layerkit.model.limits import DEFAULT, Limits
from layerkit.model.ports import ImageSink, Progress
from layerkit.model.tree import Tree
from layerkit.unpack import index_layer

COMPRESSOR_KEY = "io.layerkit.compressor"
"""Annotation of a layer that was made here: what packed it. With the same one the same tar gives the same blob."""

_KINDS = {
    "gzip": Compression.GZIP, "zstd": Compression.ZSTD, "zstd:chunked": Compression.ZSTD, "none": Compression.NONE,
}  # fmt: skip
_DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
_OCI_LAYERS = {
    _DOCKER_LAYER: oci.LAYER_TAR, _DOCKER_LAYER + ".gzip": oci.LAYER_GZIP, _DOCKER_LAYER + ".zstd": oci.LAYER_ZSTD,
}  # fmt: skip
_BASE = ("org.opencontainers.image.base.digest", "org.opencontainers.image.base.name")


@dataclass(frozen=True, slots=True)
class Packing:
    """How the layers that are made here are compressed.

    Attributes:
        compression: of the blobs.
        level: as :func:`~layerkit.formats.compression.compress.compress` takes it; None is its default.
        jobs: threads that compress; None is one for each core. The bytes do not depend on it.
        chunked: with zstd: a frame for each file and a table of contents, see ``zstd_chunked``.
    """

    compression: Compression = Compression.GZIP
    level: int | None = None
    jobs: int | None = None
    chunked: bool = False

    @classmethod
    def parse(cls, compression: str = "gzip", level: int | None = None, jobs: int | None = None) -> Packing:
        """Return how new layers are compressed.

        Args:
            compression: ``gzip``, ``zstd``, ``zstd:chunked`` or ``none``.
            level: gzip 1 to 9, zstd 1 to 22; None is the default.
            jobs: threads that compress; None is one for each core.

        Raises:
            UsageError: another compression, or a level that it does not have.
        """
        if compression not in _KINDS:
            raise UsageError(f"--compression {compression!r}: want gzip, zstd, zstd:chunked or none")
        allowed = LEVELS[_KINDS[compression]]
        if level is not None and level not in allowed:
            want = f"want {allowed[0]} to {allowed[-1]}" if allowed else "it has no levels"
            raise UsageError(f"--compression-level {level} for {compression}: {want}")
        return cls(_KINDS[compression], level, jobs, chunked=compression == "zstd:chunked")

    @property
    def media_type(self) -> str:
        """Return the OCI media type of such a layer."""
        return oci.LAYER_TAR + self.suffix

    @property
    def suffix(self) -> str:
        """Return what the media type of anything that is packed so ends with."""
        return f"+{self.compression.value}" if self.compression.value else ""

    @property
    def compressor(self) -> str:
        """Return the name, version and settings of the compressor, "" for none."""
        if self.chunked:
            return f"{compressor(self.compression, self.level)} chunked {CHUNK_BYTES}"
        return compressor(self.compression, self.level)


@dataclass(frozen=True, slots=True)
class Writing:
    """How one layer is written.

    Attributes:
        packing: compression of the blob.
        media_type: of the descriptor; "" is the OCI one that goes with the compression.
        limits: bounds for the reading back.
        progress: told of the bytes of tar written; may raise ``Cancelled``.
        label: what ``progress`` is told.
    """

    packing: Packing = Packing()
    media_type: str = ""
    limits: Limits = DEFAULT
    progress: Progress | None = None
    label: str = "writing a layer"


def write_layer(
    index: Index,
    content: Content,
    sink: ImageSink,
    how: Writing = Writing(),
    check: Callable[[Index], None] | None = None,
) -> tuple[Descriptor, Digest]:
    """Write the layer that has the rows of ``index`` and put its blob into ``sink``; return it and its diff_id.

    Everything streams: the compressed blob goes through a temporary file, because its digest has to be known
    before it is put. The same arguments give the same bytes.

    Args:
        index: rows in canonical order; whiteouts and opaque markers are written as such.
        content: gives the stored bytes of a regular file's row (the runs of a sparse file one after the other).
        sink: where the blob goes; a blob that it has already is not put again.
        how: compression and the like.
        check: called with the index that the finished blob, read back, has, before it is put.

    Raises:
        LossyResult: something that a tar cannot hold.
        InvalidImage: content that is not as long as the index says, or what is read back is not right.
    """
    packing, progress = how.packing, how.progress
    tar_hash, blob_hash = hashlib.sha256(), hashlib.sha256()
    size = done = 0

    def passed(data: bytes | bytearray | memoryview, *, told: bool) -> None:
        nonlocal done
        tar_hash.update(data)
        done += len(data)
        if progress is not None and told:
            progress(how.label, done, 0)

    def hashed() -> Iterator[bytes | bytearray | memoryview]:
        for piece in layer_tar(index, content):
            passed(piece, told=True)
            yield piece

    def seen(parts: Iterator[Part]) -> Iterator[Part]:
        for part in parts:
            passed(part.data, told=part.is_content)
            yield part

    annotations = {COMPRESSOR_KEY: packing.compressor} if packing.compressor else {}

    def packed() -> Iterator[bytes]:
        if not packing.chunked:
            yield from compress(hashed(), packing.compression, packing.level, jobs=packing.jobs)
            return
        writer = ZstdChunked(index, packing.level or ZSTD_LEVEL, jobs=packing.jobs or all_cores())
        yield from writer.blob(seen(layer_parts(index, content)))
        annotations.update(writer.annotations)

    with tempfile.TemporaryFile(prefix="layerkit-") as spool:
        for out in packed():
            blob_hash.update(out)
            size += spool.write(out)
        spool.flush()
        digest, media_type = Digest("sha256", blob_hash.hexdigest()), how.media_type or packing.media_type
        descriptor = Descriptor(media_type, digest, size, annotations=annotations)
        diff_id = Digest("sha256", tar_hash.hexdigest())
        if check is not None:
            with contextlib.closing(FileRange(spool.fileno(), 0, size)) as blob:
                check(index_layer(blob, descriptor, diff_id, limits=how.limits))
        if not sink.has_blob(descriptor.digest):
            sink.put_blob(descriptor, Chunks(lambda: file_chunks(spool.fileno(), size)))
    return descriptor, diff_id


@dataclass(frozen=True, slots=True)
class NewLayer:
    """A layer that was made for an image.

    Attributes:
        descriptor: of its blob.
        diff_id: of its tar.
        history: what made it, for the history's ``created_by``; "" keeps the entry of the one layer it
            replaces.
        replaces: places (from 0, bottom first) in the old image of the layers whose stead it takes.
    """

    descriptor: Descriptor
    diff_id: Digest
    history: str = ""
    replaces: tuple[int, ...] = ()


def rewrite_image(
    image: Image, layers: Sequence[Layer | NewLayer], *, created: str | None = None, limits: Limits = DEFAULT
) -> Image:
    """Return ``image`` with other layers: a new config and manifest, everything else in them untouched.

    Args:
        image: where config, annotations and history come from. The history of layers that are gone stays, as
            steps that made no layer.
        layers: of the result, bottom first: layers of ``image`` that stay, in their order, and new ones.
        created: RFC 3339 time of the result; None keeps that of ``image``, so nothing depends on the clock.
        limits: bounds.
    """
    old = oci.parse_manifest(
        image.manifest, f"{image.name or 'image'}: manifest", media_type=image.descriptor.media_type, limits=limits
    )
    document = oci.parse_config(image.config, f"{image.name or 'image'}: config", limits=limits).document
    places = _places(image, layers)
    config = _config(document, image, layers, places, created)
    config_descriptor = Descriptor(
        oci.CONFIG, Digest.of(config), len(config), annotations=image.config_descriptor.annotations
    )
    blobs = [layer.descriptor for layer in layers]
    kept = [replace(blob, media_type=_OCI_LAYERS.get(blob.media_type, blob.media_type)) for blob in blobs]
    annotations = dict(old.annotations)
    if len(layers) == 0 or places[0] != [0] or not isinstance(layers[0], Layer):
        # What it says of the image below is no longer so.
        annotations = {key: value for key, value in annotations.items() if key not in _BASE}
    manifest = oci.manifest_json(
        config_descriptor, kept, artifact_type=old.artifact_type, subject=old.subject, annotations=annotations
    )
    descriptor = Descriptor.of(oci.MANIFEST, manifest, platform=image.descriptor.platform)
    pairs = tuple(Layer(blob, layer.diff_id) for blob, layer in zip(kept, layers, strict=True))
    return Image(image.name, manifest, descriptor, config, config_descriptor, pairs, image.platform)


def _places(image: Image, layers: Sequence[Layer | NewLayer]) -> list[list[int]]:
    """Return for each of ``layers`` the old layers it stands for; kept ones are found in their order."""
    out: list[list[int]] = []
    at = 0
    for layer in layers:
        if isinstance(layer, NewLayer):
            out.append(sorted(layer.replaces))
            at = max([at, *(place + 1 for place in layer.replaces)])
            continue
        while at < len(image.layers) and image.layers[at].diff_id != layer.diff_id:
            at += 1
        if at == len(image.layers):
            raise ValueError(f"{layer.diff_id} is not a layer of the image, or not in the image's order")
        out.append([at])
        at += 1
    return out


def _config(
    document: JsonObject,
    image: Image,
    layers: Sequence[Layer | NewLayer],
    places: list[list[int]],
    created: str | None,
) -> bytes:
    document = dict(document)
    if created is not None:
        document["created"] = created
    rootfs = document["rootfs"]
    assert isinstance(rootfs, dict)
    document["rootfs"] = {**rootfs, "diff_ids": [str(layer.diff_id) for layer in layers]}
    if "history" in document:
        document["history"] = _history(document, image, layers, places)
        if document["history"] is None:
            del document["history"]
    return dumps(document)


def _history(
    document: JsonObject, image: Image, layers: Sequence[Layer | NewLayer], places: list[list[int]]
) -> list[JsonObject] | None:
    """Return the new history, None where the old one does not say which step made which layer."""
    steps, created = document["history"], document.get("created")
    old = [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    made = [at for at, step in enumerate(old) if step.get("empty_layer") is not True]
    if len(made) != len(image.layers):
        return None
    out: list[JsonObject] = []
    done = 0  # steps of the old history that were taken over
    for layer, stands_for in zip(layers, places, strict=True):
        text = (layer.history or "layerkit") if isinstance(layer, NewLayer) else ""
        last = made[stands_for[-1]] if stands_for else done - 1
        same_step = not text or (isinstance(layer, NewLayer) and len(stands_for) == 1 and not layer.history)
        for at in range(done, last + 1):
            out.append(old[at] if at == last and same_step else {**old[at], "empty_layer": True})
        done = max(done, last + 1)
        if not same_step:
            step: JsonObject = {"created": created} if created is not None else {}
            out.append({**step, "created_by": text})
    return out + [{**step, "empty_layer": True} for step in old[done:]]


def check_tree(want: Digest, got: Tree) -> None:
    """Raise unless ``got`` is the root filesystem whose digest is ``want``.

    Raises:
        InvalidImage: it is another one.
    """
    found = got.digest()
    if found != want:
        raise InvalidImage(
            f"the root filesystem of the result is {found} and that of the source {want}, so nothing was written; "
            "please report this with the image"
        )


def creation_time(text: str | None, epoch: str | None) -> str | None:
    """Return the RFC 3339 time for ``--created``, else that of ``SOURCE_DATE_EPOCH``, else None.

    Raises:
        UsageError: neither seconds since 1970 nor an RFC 3339 time.
    """
    source = "--created" if text is not None else "SOURCE_DATE_EPOCH"
    value = text if text is not None else epoch
    if not value:
        return None
    try:
        if value.isascii() and value.isdigit():
            moment = datetime.datetime.fromtimestamp(int(value), datetime.UTC)
        else:
            moment = datetime.datetime.fromisoformat(value)
            if moment.tzinfo is None:
                raise ValueError("no time zone")
    except (ValueError, OverflowError, OSError) as error:
        raise UsageError(
            f"{source} {json.dumps(value)}: want seconds since 1970 or a time like 2026-01-31T12:00:00Z ({error})"
        ) from None
    return moment.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
