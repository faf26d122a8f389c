"""Use case: read an image whole, and check what is published of it: a META is what layerkit makes of the image."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from layerkit.formats.compression.decompress import Decompressor
from layerkit.formats.oci import documents as oci
from layerkit.formats.oci import intoto
from layerkit.formats.oci import remap_artifact as artifact
from layerkit.idmap import Mapping
from layerkit.model.descriptor import Descriptor
from layerkit.model.errors import DigestMismatch, InvalidImage, LayerkitError
from layerkit.model.reports import VerifyReport
from layerkit.model.tree import Tree
from layerkit.model.trees.merge import merge
from layerkit.model.work import NOTHING_KEPT, Work
from layerkit.unpack import VerifiedBlob, find_indexes
from layerkit.usecases.attach import UNCOMPRESSED_KEY, plain_digest

_META_BYTES, _META_BYTES_PER_NAME = 64 << 20, 16 << 10
"""More than any META has: xattrs are in there too, but not those that an image does not have."""


def verify(work: Work) -> VerifyReport:
    """Read every blob, check that the layers merge, and that every attached remap artifact agrees with the image.

    Raises:
        InvalidImage: something is not what it promises to be; an artifact not what layerkit makes of this image.
    """
    image = work.image
    indexes = find_indexes(replace(work, kept=NOTHING_KEPT)).indexes
    tree = merge(indexes, limits=work.limits)
    agreed = []
    for descriptor, data in work.source.referrers(image.descriptor.digest, artifact.ARTIFACT_TYPE):
        check_artifact(work, tree, descriptor, data)
        agreed.append(str(descriptor.digest))
    return VerifyReport(
        name=work.name,
        manifest=str(image.descriptor.digest),
        layers=len(image.layers),
        entries=len(tree),
        tree_digest=str(tree.digest()),
        artifacts=tuple(agreed),
    )


class Published(NamedTuple):
    """What is published of an image for a map.

    Attributes:
        digest: of the remap artifact that was found and is right, "" if there is none.
        refused: why artifacts that claim to be for this image and map are not used.
        signed: whether there is a statement about it that the given key has signed.
    """

    digest: str = ""
    refused: tuple[str, ...] = ()
    signed: bool = False


def find_published(work: Work, mapping: Mapping, key: Path | None) -> Published:
    """Return the remap artifact for ``mapping`` that is attached to the image and right, byte for byte.

    Indexes that are kept were read from its layers. With a public ``key`` only artifacts count that have a
    statement which it has signed.
    """
    verifier = None
    if key is not None:
        from layerkit.images import signing_keys

        verifier = signing_keys.verifier(key)
    refused = list[str]()
    tree = None
    try:
        attached = work.source.referrers(work.image.descriptor.digest, artifact.ARTIFACT_TYPE)
    except LayerkitError as error:
        return Published(refused=(str(error),))
    for entry, data in attached:
        try:
            found = artifact.parse(data, f"artifact {entry.digest}", limits=work.limits)
            if found.mapping != mapping.canonical():
                continue
            tree = tree if tree is not None else merge(find_indexes(work).indexes, limits=work.limits)
            check_artifact(work, tree, entry, data)
            if verifier is not None:
                _check_signed(work, entry, found, verifier)
            return Published(str(entry.digest), tuple(refused), verifier is not None)
        except LayerkitError as error:
            refused.append(str(error))
    return Published(refused=tuple(refused))


def check_artifact(work: Work, tree: Tree, descriptor: Descriptor, data: bytes) -> artifact.RemapArtifact:
    """Raise unless a remap artifact, whose manifest is ``data``, is byte for byte what layerkit makes of the image.

    ``tree`` is of the image, from indexes that were read from its layers.

    Raises:
        InvalidImage: it is about another image, or its META is not the right one.
    """
    what, image = f"artifact {descriptor.digest}", work.image
    found = artifact.parse(data, what, limits=work.limits)
    if found.subject.digest != image.descriptor.digest:
        raise InvalidImage(f"{what}: belongs to {found.subject.digest}, not to {image.descriptor.digest}")
    if found.diff_ids != image.diff_ids:
        raise InvalidImage(f"{what}: points at other layers than its image has; remap the image again")
    if len(found.blobs) != 1:
        raise InvalidImage(f"{what}: want one blob, found {len(found.blobs)}")
    got = _read_meta(work, found.blobs[0], what, _META_BYTES + _META_BYTES_PER_NAME * len(tree))
    want = plain_digest(tree, found)
    if got != str(want):
        raise DigestMismatch(f"{what}: metadata for the map {found.mapping}", got, str(want))
    return found


def _read_meta(work: Work, blob: Descriptor, what: str, most: int) -> str:
    """Return the digest of a META's uncompressed bytes, at most ``most`` of them, its blob verified."""
    if blob.size > most:
        raise InvalidImage(f"{what}: {blob.size} bytes of metadata, the image has no need for more than {most}")
    h = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    reader = work.source.open_blob(blob)
    try:
        verified = VerifiedBlob(reader, blob, work.limits)
        plain = Decompressor(verified, limits=work.limits, where=what)
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


def _check_signed(work: Work, entry: Descriptor, found: artifact.RemapArtifact, verifier: intoto.Verifier) -> None:
    """Raise unless a statement about the artifact ``entry`` is signed by the key that ``verifier`` stands for."""
    why, limits, source = "nobody has signed a statement about it", work.limits, work.source
    for signed, data in source.referrers(entry.digest, intoto.BUNDLE):
        what = f"statement {signed.digest}"
        try:
            blob = oci.parse_manifest(data, what, limits=limits).layers[:1]
            bundle = source.fetch(blob[0], limits.manifest_bytes) if blob else b""
            if blob:
                oci.verify(bundle, blob[0], what)
            payload = intoto.open_bundle(bundle, verifier, what, limits=limits)
            intoto.check_statement(payload, work.image, entry.digest, found, what)
            return
        except InvalidImage as error:
            why = str(error)
    raise InvalidImage(f"artifact {entry.digest}: {why}")
