"""The index artifact: the indexes of an image's layers, attached to it, so that a remap need not read the layers.

An OCI 1.1 manifest whose ``subject`` is the image's manifest, with one blob for each distinct layer. A blob depends
on its layer, so images that share a layer share its index, and a registry mounts it from one to the other.

Most of an index are the digests of its files, which no compressor makes smaller. A layer that repeats files of the
layers below it (a chown, a chmod) has them already: then its blob is compressed against their digests, and says so.
Only a layer above the same others shares such a blob; there is hardly another one for which it would matter.

An index that came this way is a claim: only reading the layer and computing its ``diff_id`` proves it. It is marked
as such (``formats.index.check``), and everything in it is checked before it is used, as in a layer from a stranger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import zstandard

from layerkit.formats.index import file as index_file
from layerkit.formats.index.check import check_index, is_unproven, mark_unproven, unmarked
from layerkit.formats.oci import documents as oci
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.entry import Kind
from layerkit.model.errors import InvalidImage
from layerkit.model.image import Image
from layerkit.model.index import Index
from layerkit.model.limits import DEFAULT, Limits

ARTIFACT_TYPE = "application/vnd.layerkit.index.v1"
SHARED_TYPE = "application/vnd.layerkit.shared-index.v1"
"""Of a manifest with the index of one layer and no subject, found by the layer's ``diff_id``."""
BLOB_TYPE = "application/vnd.layerkit.layer-index.v1+zstd"

_PREFIX = "io.layerkit.index."
VERSION_KEY = _PREFIX + "version"
DIFF_ID_KEY = _PREFIX + "diff-id"
SIZE_KEY = _PREFIX + "uncompressed-size"
_VERSION = {VERSION_KEY: str(index_file.VERSION)}
BELOW_KEY = _PREFIX + "contents-of"
"""The diff_ids, bottom first, of the layers against whose digests a blob is compressed."""

# Columns of ids and sizes compress well, digests do not at all: a high level costs time and gains a few per cent.
_LEVEL = 9
_BELOW_BYTES = 64 << 20
_FLOOR_BYTES, _RATIO = 64 << 20, 200
_WORTH = 0.7
"""A blob is compressed against other layers if that makes it at most this part as large."""


@dataclass(frozen=True, slots=True)
class IndexArtifact:
    """What an index artifact's manifest says: its subject, and the blob of each layer's index by diff_id."""

    subject: Descriptor
    blobs: dict[Digest, Descriptor]


def encode(index: Index, below: Sequence[Index] = (), *, vouched: bool = False) -> tuple[Descriptor, bytes]:
    """Return the blob of a layer's index, and its descriptor.

    Args:
        index: of the layer.
        below: those of the layers below it in the image, bottom first.
        vouched: unproven ones may go out as well: they came from others of the same fleet, which have read the
            layers, and the blob is the one that these would have made.

    Raises:
        ValueError: an index is unproven and not ``vouched`` for; what is published must have been read from the
            layer.
    """
    if not vouched and any(map(is_unproven, (index, *below))):
        raise ValueError("an unproven index is not to be published")
    index = unmarked(index)
    plain = b"".join(index_file.encode(index))
    data = zstandard.ZstdCompressor(level=_LEVEL).compress(plain)
    annotations = {DIFF_ID_KEY: str(index.diff_id), SIZE_KEY: str(len(plain))}
    contents = _contents(below)
    if contents is not None:
        parameters = zstandard.ZstdCompressionParameters.from_level(
            _LEVEL, source_size=len(plain), dict_size=len(contents.as_bytes()), write_content_size=True
        )
        smaller = zstandard.ZstdCompressor(compression_params=parameters, dict_data=contents).compress(plain)
        if len(smaller) <= _WORTH * len(data):
            data = smaller
            annotations[BELOW_KEY] = ",".join(str(each.diff_id) for each in below)
    return Descriptor.of(BLOB_TYPE, data, annotations=annotations), data


def needs(blob: Descriptor, what: str) -> list[Digest]:
    """Return the layers whose indexes must be known before ``blob`` can be decoded.

    Raises:
        InvalidImage: the annotation is malformed.
    """
    texts = blob.annotations.get(BELOW_KEY, "")
    return list(oci.digests(texts.split(",") if texts else (), what, f"annotations[{BELOW_KEY!r}]"))


def _contents(below: Sequence[Index]) -> zstandard.ZstdCompressionDict | None:
    """Return the digests of the files in ``below``, each once, for the compressor to refer to."""
    distinct = {index.diff_id: index for index in below}.values()
    columns = [index.sha256[index.kind == Kind.REG] for index in distinct]
    if not 0 < sum(column.nbytes for column in columns) <= _BELOW_BYTES:
        return None
    once = dict.fromkeys(bytes(row) for column in columns for row in column)
    return zstandard.ZstdCompressionDict(b"".join(once), dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def decode(
    data: bytes, diff_id: Digest, what: str, *, origin: str, below: Sequence[Index] = (), limits: Limits = DEFAULT
) -> Index:
    """Return the index in a blob (whose digest was verified), checked and marked as unproven.

    Args:
        data: the blob.
        diff_id: the layer that it must be of.
        what: names the blob in errors.
        below: the indexes of the layers that :func:`needs` names.
        origin: where it came from, for the mark.
        limits: bounds.

    Raises:
        InvalidImage: malformed, of another layer, or with entries that no layer may have.
    """
    try:
        said = zstandard.frame_content_size(data)
        limits.check("metadata_bytes_per_layer", max(said, 0), f"{what}: bytes of the index")
        # Indexes shrink by 10 to 30; one that claims far more is a bomb, and one that claims nothing may be.
        if not 0 <= said <= max(_FLOOR_BYTES, _RATIO * len(data)):
            raise InvalidImage(f"{what}: {len(data)} bytes that claim to be an index of {said}; publish it again")
        contents = _contents(below)
        reader = zstandard.ZstdDecompressor(dict_data=contents, max_window_size=1 << 27)
        plain = reader.decompress(data, max_output_size=said)
    except zstandard.ZstdError as error:
        raise InvalidImage(f"{what}: damaged zstd data ({error})") from None
    index = index_file.decode(plain, what)
    if index.diff_id != diff_id:
        raise InvalidImage(f"{what}: the index of layer {index.diff_id}, announced as that of {diff_id}")
    check_index(index, what, limits)
    return mark_unproven(index, origin)


def build(image: Image, blobs: Sequence[Descriptor]) -> tuple[bytes, Descriptor]:
    """Return the manifest that attaches ``blobs`` (of :func:`encode`, bottom first) to ``image``, described."""
    distinct = list({blob.digest: blob for blob in blobs}.values())
    return oci.artifact(ARTIFACT_TYPE, distinct, _VERSION, image.descriptor)


def shared_tag(diff_id: Digest) -> str:
    """Return the tag under which the index of the layer ``diff_id`` stands in a repository of indexes."""
    return f"{diff_id.algorithm[:32]}-{diff_id.hex[:64]}.index-{index_file.VERSION}"


def build_shared(blob: Descriptor) -> tuple[bytes, Descriptor]:
    """Return the manifest that holds ``blob`` (of :func:`encode`, without layers below), described; no subject."""
    return oci.artifact(SHARED_TYPE, [blob], _VERSION)


def parse_shared(data: bytes, diff_id: Digest, what: str, *, limits: Limits = DEFAULT) -> Descriptor:
    """Return the blob with the index of the layer ``diff_id`` from its manifest ``data``.

    Raises:
        InvalidImage: no such manifest, one of another version, or one of another layer.
    """
    manifest = oci.parse_manifest(data, what, limits=limits)
    if manifest.artifact_type != SHARED_TYPE or manifest.annotations.get(VERSION_KEY) != str(index_file.VERSION):
        raise InvalidImage(f"{what}: want artifactType {SHARED_TYPE} and version {index_file.VERSION}")
    if len(manifest.layers) != 1 or manifest.layers[0].media_type != BLOB_TYPE:
        raise InvalidImage(f"{what}: want one blob of type {BLOB_TYPE}")
    blob = manifest.layers[0]
    if blob.annotations.get(DIFF_ID_KEY) != str(diff_id) or BELOW_KEY in blob.annotations:
        raise InvalidImage(f"{what}: not the index of layer {diff_id} alone")
    return blob


def parse(data: bytes, what: str, *, limits: Limits = DEFAULT) -> IndexArtifact | None:
    """Return the index artifact whose manifest is ``data``, None for one of another version.

    Raises:
        InvalidImage: no index artifact, or a malformed one.
    """
    manifest = oci.parse_manifest(data, what, limits=limits)
    if manifest.artifact_type != ARTIFACT_TYPE or manifest.subject is None:
        raise InvalidImage(f"{what}: want artifactType {ARTIFACT_TYPE} and a subject")
    if manifest.annotations.get(VERSION_KEY) != str(index_file.VERSION):
        return None
    blobs: dict[Digest, Descriptor] = {}
    for place, blob in enumerate(manifest.layers):
        if blob.media_type != BLOB_TYPE:
            raise InvalidImage(f"{what}: layers[{place}]: want {BLOB_TYPE}, found {blob.media_type!r}")
        blobs[Digest.parse(blob.annotations.get(DIFF_ID_KEY, ""))] = blob
    return IndexArtifact(manifest.subject, blobs)
