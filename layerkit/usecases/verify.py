"""TODO."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

from layerkit.formats.compression.decompress import Decompressor
from layerkit.formats.oci import remap_artifact as artifact
from layerkit.model.descriptor import Descriptor
from layerkit.model.errors import DigestMismatch, InvalidImage
from layerkit.model.image import Image
from layerkit.model.index import Index
from layerkit.model.limits import Limits
from layerkit.model.ports import ImageSource
from layerkit.model.reports import VerifyReport
from layerkit.model.tree import Tree
from layerkit.model.trees.merge import merge
from layerkit.unpack import VerifiedBlob
from layerkit.usecases.attach import UNCOMPRESSED_KEY, Render, plain_digest

_META_BYTES, _META_BYTES_PER_NAME = 64 << 20, 16 << 10
"""More than any META has: xattrs are in there too, but not those that an image does not have."""


def verify(
    name: str,
    image: Image,
    indexes: Sequence[Index],
    source: ImageSource,
    attached: Iterable[tuple[Descriptor, bytes]],
    render: Callable[[str], Render],
    limits: Limits,
) -> VerifyReport:
    """Check that the layers merge and that every remap artifact in ``attached`` agrees with the image.

    Args:
        name: of the image, for the report.
        image: whose manifest and config were verified when it was opened.
        indexes: of its layers, just read from the blobs, which verified their digests.
        source: where the artifacts' blobs are.
        attached: manifests of remap artifacts whose subject is the image.
        render: gives the renderer for a form.
        limits: bounds on input.

    Raises:
        InvalidImage: an artifact is not what layerkit makes of this image and map.
    """
    tree = merge(indexes, limits=limits)
    agreed = []
    for descriptor, data in attached:
        check_artifact(image, tree, source, descriptor, data, render, limits)
        agreed.append(str(descriptor.digest))
    return VerifyReport(
        name=name,
        manifest=str(image.descriptor.digest),
        layers=len(image.layers),
        entries=len(tree),
        tree_digest=str(tree.digest()),
        artifacts=tuple(agreed),
    )


def check_artifact(
    image: Image,
    tree: Tree,
    source: ImageSource,
    descriptor: Descriptor,
    data: bytes,
    render: Callable[[str], Render],
    limits: Limits,
) -> artifact.RemapArtifact:
    """Raise unless a remap artifact is, byte for byte, what layerkit makes of ``image`` and its map.

    Args:
        image: that the artifact is attached to.
        tree: of the image, from indexes that were read from its layers.
        source: where the artifact's blob is.
        descriptor: of the artifact.
        data: its manifest.
        render: gives the renderer for a form.
        limits: bounds on input.

    Raises:
        InvalidImage: it is about another image, or its META is not the right one.
    """
    what = f"artifact {descriptor.digest}"
    found = artifact.parse(data, what, limits=limits)
    if found.subject.digest != image.descriptor.digest:
        raise InvalidImage(f"{what}: belongs to {found.subject.digest}, not to {image.descriptor.digest}")
    if found.diff_ids != image.diff_ids:
        raise InvalidImage(f"{what}: points at other layers than its image has; remap the image again")
    if len(found.blobs) != 1:
        raise InvalidImage(f"{what}: want one blob, found {len(found.blobs)}")
    most = _META_BYTES + _META_BYTES_PER_NAME * len(tree)
    got = _read_meta(source, found.blobs[0], what, limits, most)
    want = plain_digest(tree, found, render(found.rendering))
    if got != str(want):
        raise DigestMismatch(f"{what}: metadata for the map {found.mapping}", got, str(want))
    return found


def _read_meta(source: ImageSource, blob: Descriptor, what: str, limits: Limits, most: int) -> str:
    """Return the digest of a META's uncompressed bytes, at most ``most`` of them, its blob verified."""
    if blob.size > most:
        raise InvalidImage(f"{what}: {blob.size} bytes of metadata, the image has no need for more than {most}")
    h = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    reader = source.open_blob(blob)
    try:
        verified = VerifiedBlob(reader, blob, limits)
        plain = Decompressor(verified, limits=limits, where=what)
        while got := plain.readinto(buffer):
            if plain.tar_bytes > most:
                raise InvalidImage(f"{what}: metadata of more than {most} bytes")
            h.update(buffer[:got])
        verified.finish()
    finally:
        reader.close()
    digest = f"sha256:{h.hexdigest()}"
    said = blob.annotations.get(UNCOMPRESSED_KEY, digest)
    if said != digest:
        raise DigestMismatch(f"{what}: uncompressed metadata", digest, said)
    return digest
