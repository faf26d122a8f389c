"""Use case: copy an image as it is, with the META for a map attached to it as an OCI artifact."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

from layerkit.formats.compression.compress import compress
from layerkit.formats.compression.decompress import Compression
from layerkit.formats.oci import documents as oci
from layerkit.formats.oci import index_artifact, intoto
from layerkit.formats.oci import remap_artifact as artifact
from layerkit.idmap import Mapping
from layerkit.idmap import apply as apply_map
from layerkit.images.transfer import Chunks, copy_image
from layerkit.metaonly import Namespace, metadata_layer
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import UsageError
from layerkit.model.image import Image
from layerkit.model.reports import RemapReport
from layerkit.model.tree import Tree
from layerkit.model.trees.merge import merge
from layerkit.model.work import Destination, Work
from layerkit.unpack import Found
from layerkit.usecases.published_indexes import put_indexes

UNCOMPRESSED_KEY = "io.layerkit.remap.uncompressed-digest"
"""Annotation of the META's descriptor: the digest of its bytes before compression."""

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class AttachOptions:
    """The artifact that is wanted.

    Attributes:
        mapping: the id map.
        rendering: ``erofs`` or ``tar``; ``auto`` is erofs.
        namespace: of the stubs' xattrs, ``trusted`` or ``user``; ``auto`` is trusted.
        strict: refuse overlay xattrs that the image brings, instead of escaping them.
        statement: attach an in-toto statement of what was done to the artifact.
        sign_key: a private key; the statement, made then in any case, is signed, in a sigstore bundle.
        indexes: also attach the indexes of its layers to an image that has none.
    """

    mapping: Mapping
    rendering: str = "auto"
    namespace: str = "auto"
    strict: bool = False
    statement: bool = False
    sign_key: Path | None = None
    indexes: bool = False

    def __post_init__(self) -> None:
        """Refuse words that are none of the choices, and a key that cannot be used."""
        if self.rendering not in ("auto", "erofs", "tar"):
            raise UsageError(f"--rendering {self.rendering!r}: an artifact can be erofs (the default) or tar")
        if self.namespace not in ("auto", *Namespace):
            raise UsageError(f"--namespace {self.namespace!r}: want auto, trusted or user")
        if self.sign_key is not None:
            signer_of(self.sign_key)

    @property
    def form(self) -> str:
        """Return the rendering that is meant."""
        return "erofs" if self.rendering == "auto" else self.rendering

    @property
    def xattrs(self) -> Namespace:
        """Return the namespace that is meant."""
        return Namespace.TRUSTED if self.namespace == "auto" else Namespace(self.namespace)


def attach(work: Work, places: Sequence[Destination], options: AttachOptions, found: Found) -> RemapReport:
    """Make META for the map once and attach it to the image in each of ``places``; the image keeps its digest.

    It is copied where it is not there yet. On an error nothing is visible in the place, and in those that follow.

    Raises:
        UnmappedId: the map does not cover an owner.
    """
    start, image, mapping = time.monotonic(), work.image, options.mapping
    tree = merge(found.indexes, limits=work.limits)
    name = places[0].name or image.name
    with made(image, tree, options) as result:
        for dst in places:
            with dst.sink() as sink:
                if not dst.has_image:
                    copy_image(work.source, sink, image, dst.name or image.name, progress=work.progress)
                if options.statement or options.sign_key is not None:
                    where = dst.where if dst.has_image else work.source.where
                    said = _statement(image, where, result, options.sign_key)
                    kind = said.descriptor.artifact_type
                    # It may come before what it is about (distribution-spec, "Pushing Manifests with Subject"):
                    # then nobody sees the artifact without it.
                    if not (dst.has_image and sink.has_attached(result.descriptor.digest, kind)):
                        sink.put_blob(said.blob, [said.data])
                        sink.put_manifest(said.descriptor, said.manifest)
                if not sink.has_blob(oci.EMPTY_DESCRIPTOR.digest):
                    sink.put_blob(oci.EMPTY_DESCRIPTOR, [oci.EMPTY_JSON])
                if not sink.has_blob(result.blob.digest):
                    sink.put_blob(result.blob, result.chunks)
                sink.put_manifest(result.descriptor, result.manifest)
                if options.indexes and not sink.has_attached(image.descriptor.digest, index_artifact.ARTIFACT_TYPE):
                    put_indexes(image, found.indexes, sink, vouched=True)
    return RemapReport(
        name=work.name,
        manifest=str(image.descriptor.digest),
        map_text=mapping.canonical(),
        map_flags=mapping.flags(),
        next_ref=name,
        entries=len(tree),
        layers=len(image.layers),
        layers_read=found.layers_read,
        data_bytes=tree.data_bytes,
        data_backend="",
        rendering=options.form,
        how=f"artifact with {options.xattrs.value}.overlay xattrs",
        meta_bytes=result.blob.size,
        shared_meta_bytes=0,
        seconds=time.monotonic() - start,
        warnings=found.warnings(tree.warnings),
        artifact=str(result.descriptor.digest),
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

    @property
    def chunks(self) -> Chunks:
        """Return the blob's bytes, as often as an upload begins again."""
        return Chunks(lambda: map(memoryview, _chunks(self._packed)))


@contextlib.contextmanager
def made(image: Image, tree: Tree, options: AttachOptions) -> Iterator[Made]:
    """Make the remap artifact of ``image``, whose tree is ``tree``, in temporary files while the block runs.

    The same arguments give the same bytes.

    Raises:
        UnmappedId: the map does not cover an owner.
    """
    form, space = options.form, options.xattrs.value
    with tempfile.TemporaryFile() as plain, tempfile.TemporaryFile() as packed:
        render(tree, options, plain)
        blob = _compress(plain, packed, form)
        text = options.mapping.canonical()
        found = artifact.RemapArtifact(image.descriptor, (blob,), text, space, form, image.diff_ids)
        manifest, descriptor = found.encode()
        yield Made(blob, manifest, descriptor, packed)


def _statement(image: Image, where: str, result: Made, sign_key: Path | None) -> intoto.Attestation:
    """Return what is said of an artifact of ``image``, which was read from ``where``."""
    from importlib.metadata import version

    found = artifact.parse(result.manifest, f"artifact {result.descriptor.digest}")
    payload = intoto.statement(image, where, result.descriptor, found, version("layerkit"))
    return intoto.attestation(payload, result.descriptor, signer_of(sign_key) if sign_key else None)


@cache
def signer_of(key: Path) -> intoto.Signer:
    """Return what signs with the private key in the file ``key``; read once in each process.

    Raises:
        UsageError: no key that can be used.
    """
    from layerkit.images.signing_keys import FileSigner

    return FileSigner(key)


def render(tree: Tree, options: AttachOptions, file: BinaryIO) -> None:
    """Write the META of ``tree`` for the map to ``file``."""
    layer = metadata_layer(apply_map(tree, options.mapping), options.xattrs, strict=options.strict)
    if options.form == "tar":
        from layerkit.formats.meta.tar import write_tar

        write_tar(layer, file)
    else:
        from layerkit.formats.erofs.meta import build_meta

        build_meta(layer, file)


def plain_digest(tree: Tree, found: artifact.RemapArtifact) -> Digest:
    """Return the digest of the META that ``found`` should hold, made anew from the image's ``tree``."""
    options = AttachOptions(Mapping.parse_canonical(found.mapping), found.rendering, found.namespace)
    h = hashlib.sha256()
    with tempfile.TemporaryFile() as plain:
        render(tree, options, plain)
        for chunk in _chunks(plain):
            h.update(chunk)
    return Digest("sha256", h.hexdigest())


def _compress(plain: BinaryIO, packed: BinaryIO, form: str) -> Descriptor:
    """Compress ``plain`` into ``packed``, and return the blob's descriptor."""
    media_type = artifact.META_EROFS if form == "erofs" else artifact.META_TAR
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
