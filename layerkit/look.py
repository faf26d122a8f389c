"""Use cases that only look: what an image holds, and whether it is what it promises to be."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from layerkit import idmap
from layerkit.attach import UNCOMPRESSED_KEY, Render, plain_digest
from layerkit.errors import DigestMismatch, InvalidImage, LayerkitError, show_path
from layerkit.formats import artifact
from layerkit.formats.compress import Decompressor
from layerkit.idmap import Mapping
from layerkit.limits import Limits
from layerkit.merge import merge
from layerkit.model.descriptor import Descriptor
from layerkit.model.entry import Kind
from layerkit.model.image import Image
from layerkit.model.index import Index
from layerkit.model.reports import IdRow, InspectReport, LayerRow, VerifyReport
from layerkit.model.tree import Tree
from layerkit.ports import ImageSource
from layerkit.unpack import VerifiedBlob

_KIND_NAMES = {
    Kind.REG: "files", Kind.DIR: "directories", Kind.SYMLINK: "symlinks", Kind.FIFO: "fifos",
    Kind.CHAR: "character devices", Kind.BLOCK: "block devices",
}  # fmt: skip

_META_BYTES, _META_BYTES_PER_NAME = 64 << 20, 16 << 10
"""More than any META has: xattrs are in there too, but not those that an image does not have."""


def inspect(
    name: str, image: Image, indexes: Sequence[Index], mapping: Mapping | None, limits: Limits
) -> InspectReport:
    """Return what ``image``, whose layers have ``indexes``, holds, and what ``mapping`` would do to it."""
    tree = merge(indexes, limits=limits)
    kinds = np.bincount(tree.kind, minlength=16)
    problems: list[str] = []
    if mapping is not None:
        try:
            idmap.check(tree, mapping)
        except LayerkitError as error:
            problems.append(str(error))
    return InspectReport(
        name=name,
        manifest=str(image.descriptor.digest),
        platform=str(image.platform),
        entries=len(tree),
        inodes=tree.inodes,
        data_bytes=tree.data_bytes,
        tree_digest=str(tree.digest()),
        layers=tuple(_layer_row(image, place, index) for place, index in enumerate(indexes)),
        kinds={text: int(kinds[kind]) for kind, text in _KIND_NAMES.items() if kinds[kind]},
        uids=_id_rows(tree.uid, mapping.uid if mapping else None, mapping),
        gids=_id_rows(tree.gid, mapping.gid if mapping else None, mapping),
        xattrs=_xattr_counts(tree),
        map_text=mapping.canonical() if mapping else "",
        problems=tuple(problems),
        warnings=tree.warnings,
    )


def _layer_row(image: Image, place: int, index: Index) -> LayerRow:
    descriptor = image.layers[place].descriptor
    return LayerRow(
        digest=str(descriptor.digest),
        diff_id=str(index.diff_id),
        media_type=descriptor.media_type,
        blob_bytes=descriptor.size,
        tar_bytes=index.tar_size,
        entries=len(index),
        whiteouts=int((index.kind >= Kind.WHITEOUT).sum()),
    )


def _id_rows(ids: NDArray[np.uint32], id_map: idmap.IdMap | None, mapping: Mapping | None) -> tuple[IdRow, ...]:
    values, counts = np.unique(ids, return_counts=True)
    becomes = [""] * len(values)
    if id_map is not None and mapping is not None:
        mapped, inside = id_map.lookup(values)
        other = "unmapped" if mapping.overflow is None else f"{mapping.overflow} (overflow)"
        becomes = [str(m) if ok else other for m, ok in zip(mapped.tolist(), inside.tolist(), strict=True)]
    return tuple(IdRow(*row) for row in zip(values.tolist(), counts.tolist(), becomes, strict=True))


def _xattr_counts(tree: Tree) -> dict[str, int]:
    uses = np.bincount(tree.xattr, minlength=len(tree.xattr_sets))
    counts: Counter[str] = Counter()
    for pairs, use in zip(tree.xattr_sets, uses.tolist(), strict=True):
        for xattr, _ in pairs:
            counts[show_path(xattr)] += use
    return dict(sorted(counts.items()))


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
