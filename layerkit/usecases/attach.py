"""Use case: copy an image as it is, with the META for a map attached to it as an OCI artifact."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from layerkit.formats.compression.compress import compress
from layerkit.formats.compression.decompress import Compression
from layerkit.formats.oci import documents as oci
from layerkit.formats.oci import remap_artifact as artifact
from layerkit.formats.oci.intoto import Attestation
from layerkit.idmap import Mapping
from layerkit.idmap import apply as apply_map
from layerkit.metaonly import MetadataLayer, Namespace, metadata_layer
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.image import Image
from layerkit.model.limits import Limits
from layerkit.model.ports import ImageSink, ImageSource, Progress
from layerkit.model.reports import RemapReport
from layerkit.model.tree import Tree
from layerkit.pack import copy_image

if TYPE_CHECKING:
    from layerkit.formats.oci.intoto import Attestation, Signer
    from layerkit.images.registry.client import Repository
    from layerkit.model.descriptor import Descriptor
    from layerkit.model.image import Image
    from layerkit.model.limits import Limits

UNCOMPRESSED_KEY = "io.layerkit.remap.uncompressed-digest"
"""Annotation of the META's descriptor: the digest of its bytes before compression."""

_CHUNK_BYTES = 1 << 20

Render = Callable[[MetadataLayer, BinaryIO], object]
"""Writes a rendering of a metadata layer to a file."""

Attest = Callable[[Descriptor, bytes], Attestation]
"""Makes a statement about the artifact with this descriptor and manifest."""


def attach(
    image: Image,
    tree: Tree,
    mapping: Mapping,
    source: ImageSource,
    sink: ImageSink,
    *,
    name: str,
    dst_name: str,
    render: Render,
    rendering: str,
    namespace: Namespace,
    strict: bool,
    layers_read: int,
    limits: Limits,
    attest: Attest | None = None,
    progress: Progress | None = None,
) -> RemapReport:
    """Copy ``image`` from ``source`` to ``sink`` and attach META for ``mapping``; the sink is committed.

    Args:
        image: what to copy; its manifest keeps its digest.
        tree: of the image, with container ids.
        mapping: the id map.
        source: where the blobs are.
        sink: where it all goes; on an error it is aborted and nothing of it is visible.
        name: of the image, for the report.
        dst_name: name of the image in the sink.
        render: writes META in the form ``rendering``.
        rendering: ``erofs`` or ``tar``.
        namespace: of the stubs' xattrs.
        strict: refuse overlay xattrs of the image.
        layers_read: for the report.
        limits: bounds on input.
        attest: makes a statement about the artifact, which is attached to it.
        progress: told about the bytes copied.
    """
    start = time.monotonic()
    with made(
        image, tree, mapping, render=render, rendering=rendering, namespace=namespace, strict=strict
    ) as artifact_made:
        blob, descriptor = artifact_made.blob, artifact_made.descriptor
        try:
            copy_image(source, sink, image, dst_name, progress=progress)
            if not sink.has_blob(oci.EMPTY_DESCRIPTOR.digest):
                sink.put_blob(oci.EMPTY_DESCRIPTOR, [oci.EMPTY_JSON])
            if not sink.has_blob(blob.digest):
                sink.put_blob(blob, artifact_made.chunks())
            sink.put_manifest(descriptor, artifact_made.manifest)
            if attest is not None:
                said = attest(descriptor, artifact_made.manifest)
                sink.put_blob(said.blob, [said.data])
                sink.put_manifest(said.descriptor, said.manifest)
            sink.commit()
        except BaseException:
            sink.abort()
            raise
    return RemapReport(
        name=name,
        manifest=str(image.descriptor.digest),
        map_text=mapping.canonical(),
        map_flags=mapping.flags(),
        next_ref=dst_name,
        entries=len(tree),
        layers=len(image.layers),
        layers_read=layers_read,
        data_bytes=tree.data_bytes,
        data_backend="",
        rendering=rendering,
        how=f"artifact with {namespace.value}.overlay xattrs",
        meta_bytes=blob.size,
        shared_meta_bytes=0,
        seconds=time.monotonic() - start,
        warnings=tree.warnings,
        artifact=str(descriptor.digest),
    )


@dataclass(frozen=True, slots=True)
class Made:
    """An artifact that was made and is nowhere yet.

    Attributes:
        blob: of the compressed META.
        manifest: the artifact's, which also needs the blob :data:`oci.EMPTY_JSON`.
        descriptor: of ``manifest``.
    """

    blob: Descriptor
    manifest: bytes
    descriptor: Descriptor
    _packed: BinaryIO

    def chunks(self) -> Iterator[bytes]:
        """Yield the blob's bytes; may be called again."""
        return _chunks(self._packed)


@contextlib.contextmanager
def made(
    image: Image,
    tree: Tree,
    mapping: Mapping,
    *,
    render: Render,
    rendering: str,
    namespace: Namespace,
    strict: bool,
) -> Iterator[Made]:
    """Make the remap artifact of ``image`` for ``mapping``, kept in temporary files while the block runs.

    See :func:`attach` for the arguments. The same arguments give the same bytes.

    Raises:
        UnmappedId: the map does not cover an owner.
    """
    layer = metadata_layer(apply_map(tree, mapping), namespace, strict=strict)
    with tempfile.TemporaryFile() as plain, tempfile.TemporaryFile() as packed:
        render(layer, plain)
        blob = _compress(plain, packed, rendering)
        manifest, descriptor = artifact.build(
            image, blobs=[blob], mapping_text=mapping.canonical(), namespace=namespace.value, rendering=rendering
        )
        yield Made(blob, manifest, descriptor, packed)


def _compress(plain: BinaryIO, packed: BinaryIO, rendering: str) -> Descriptor:
    """Compress ``plain`` into ``packed``, and return the blob's descriptor."""
    media_type = artifact.META_EROFS if rendering == "erofs" else artifact.META_TAR
    whole, compressed, size = hashlib.sha256(), hashlib.sha256(), 0

    def hashed() -> Iterator[bytes]:
        for chunk in _chunks(plain):
            whole.update(chunk)
            yield chunk

    for piece in compress(hashed(), Compression.ZSTD):
        compressed.update(piece)
        size += packed.write(piece)
    return Descriptor(
        media_type + "+zstd",
        Digest("sha256", compressed.hexdigest()),
        size,
        annotations={UNCOMPRESSED_KEY: f"sha256:{whole.hexdigest()}"},
    )


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    file.seek(0)
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk


def plain_digest(tree: Tree, found: artifact.RemapArtifact, render: Render, *, strict: bool = False) -> Digest:
    """Return the digest of the META that ``found`` should hold, made anew from the image's ``tree``."""
    mapping = Mapping.parse_canonical(found.mapping)
    layer = metadata_layer(apply_map(tree, mapping), Namespace(found.namespace), strict=strict)
    h = hashlib.sha256()
    with tempfile.TemporaryFile() as plain:
        render(layer, plain)
        for chunk in _chunks(plain):
            h.update(chunk)
    return Digest("sha256", h.hexdigest())


__all__: Sequence[str] = ["Made", "Render", "attach", "made", "plain_digest"]


# ---- from layerkit/attaching.py
def attester(image: Image, where: str, sign_key: Path | None, limits: Limits) -> Attest:
    """Return what makes the statement about an artifact; a key that cannot be read is found out now.

    Args:
        image: what the artifact is attached to.
        where: where that image was read from.
        sign_key: a private key, None for an unsigned statement.
        limits: bounds on the artifact's manifest.
    """
    from importlib.metadata import version

    from layerkit.formats.oci import intoto
    from layerkit.formats.oci import remap_artifact as artifact

    signer = None
    if sign_key is not None:
        from layerkit.images.signing_keys import FileSigner

        signer = FileSigner(sign_key)

    def attest(made: Descriptor, manifest: bytes) -> Attestation:
        found = artifact.parse(manifest, f"artifact {made.digest}", limits=limits)
        payload = intoto.statement(image, where, made, found, version("layerkit"))
        return intoto.attestation(payload, made, signer)

    return attest


def renderer(form: str) -> Render:
    """Return what writes META in the form ``erofs`` or ``tar``."""
    if form == "tar":
        from layerkit.formats.meta.tar import write_tar

        return write_tar
    from layerkit.formats.meta.erofs import build_meta

    return build_meta


def _publish(result: Made, sink: Repository, near: Sequence[str], said: Attestation | None) -> None:
    """Bring an artifact into a repository: blobs first, the manifest last, so that what is visible is whole."""
    if sink.blob_size(oci.EMPTY_DESCRIPTOR.digest) is None:
        sink.put_blob(oci.EMPTY_DESCRIPTOR, [oci.EMPTY_JSON], mount_from=near)
    if sink.blob_size(result.blob.digest) is None:
        sink.put_blob(result.blob, _Chunks(result), mount_from=near)
    # A statement may come before what it is about (distribution-spec, "Pushing Manifests with Subject"): then
    # nobody sees the artifact without it.
    if said is not None and not sink.referrers(result.descriptor.digest, said.descriptor.artifact_type):
        sink.put_blob(said.blob, [said.data])
        sink.put_manifest(said.manifest, said.descriptor.media_type)
    sink.put_manifest(result.manifest, result.descriptor.media_type)


@cache
def signer_of(key: Path) -> Signer:
    """Return what signs with the private key in the file ``key``; read once in each process.

    Raises:
        UsageError: no key that can be used.
    """
    from layerkit.images.signing_keys import FileSigner

    return FileSigner(key)


class _Chunks:
    """The bytes of an artifact's blob, as often as an upload begins again."""

    def __init__(self, result: Made) -> None:
        self._result = result

    def __iter__(self) -> Iterator[bytes]:
        return self._result.chunks()
