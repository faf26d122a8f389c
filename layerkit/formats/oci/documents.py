"""OCI and docker schema 2 documents: bytes to checked values and back (image-spec v1.1).

The two families differ in media types alone. Every document is parsed strictly: names of the wrong case,
wrong types, negative sizes and unknown digest forms are refused, because another reader may take them for
something else and then one digest stands for two images. Fields that are not known here are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, TypeVar

import msgspec

from layerkit.formats.strict_json import JsonObject, dumps, load_object
from layerkit.model.descriptor import Descriptor, Platform
from layerkit.model.digest import Digest
from layerkit.model.errors import DigestMismatch, InvalidImage
from layerkit.model.limits import DEFAULT, Limits

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER_TAR = "application/vnd.oci.image.layer.v1.tar"
LAYER_GZIP = LAYER_TAR + "+gzip"
LAYER_ZSTD = LAYER_TAR + "+zstd"
EMPTY = "application/vnd.oci.empty.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_SCHEMA1 = frozenset(
    f"application/vnd.docker.distribution.manifest.v1+{end}" for end in ("json", "prettyjws")
)

MANIFEST_TYPES = frozenset((MANIFEST, DOCKER_MANIFEST))
INDEX_TYPES = frozenset((INDEX, DOCKER_LIST))

REF_NAME = "org.opencontainers.image.ref.name"
CONTAINERD_NAME = "io.containerd.image.name"

LAYOUT_FILE = b'{"imageLayoutVersion":"1.0.0"}'
"""The exact content of a layout's ``oci-layout`` as layerkit writes it."""

EMPTY_JSON = b"{}"
EMPTY_DESCRIPTOR = Descriptor.of(EMPTY, EMPTY_JSON)

_Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Text = str | None


class _PlatformShape(msgspec.Struct):
    architecture: _Text = None
    os: _Text = None
    variant: _Text = None


class _DescriptorShape(msgspec.Struct):
    mediaType: str
    digest: str
    size: _Size
    annotations: dict[str, str] | None = None
    platform: _PlatformShape | None = None
    artifactType: _Text = None
    urls: list[str] | None = None


class _IndexShape(msgspec.Struct):
    schemaVersion: int
    mediaType: _Text = None
    artifactType: _Text = None
    annotations: dict[str, str] | None = None


class _RootfsShape(msgspec.Struct):
    type: str
    diff_ids: list[str] | None = None


class _ConfigShape(msgspec.Struct):
    rootfs: _RootfsShape
    architecture: _Text = None
    os: _Text = None
    variant: _Text = None


class _LayoutShape(msgspec.Struct):
    imageLayoutVersion: str


_T = TypeVar("_T")


def _shape(value: object, kind: type[_T], what: str, where: str = "") -> _T:
    """Return ``value`` checked against ``kind``; no member may be a known name in another case."""
    if isinstance(value, dict):
        known = {name.casefold(): name for name in kind.__annotations__}
        for name in value:
            # Go's encoding/json, which most runtimes read with, takes "Layers" for "layers".
            meant = known.get(name.casefold(), name)
            if meant != name:
                raise InvalidImage(f"{what}: {where or 'top level'}: the name {name!r} can be taken for {meant!r}")
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$")
        raise InvalidImage(f"{what}: {(where + path.rstrip('`')).lstrip('.') or 'top level'}: {reason}") from None


def digests(texts: Iterable[str], what: str, where: str) -> tuple[Digest, ...]:
    """Return the digests that ``texts`` spell, at ``where`` in ``what``; ``{}`` stands for their place.

    Raises:
        InvalidImage: one is none.
    """
    found = []
    for place, text in enumerate(texts):
        try:
            found.append(Digest.parse(text))
        except InvalidImage as error:
            raise InvalidImage(f"{what}: {where.format(place)}: {error}") from None
    return tuple(found)


def descriptor(value: object, what: str, where: str = "") -> Descriptor:
    """Return the descriptor that the decoded JSON ``value`` spells, at ``where`` in the document ``what``.

    Raises:
        InvalidImage: a member is missing, of a wrong type, or no digest.
    """
    found = _shape(value, _DescriptorShape, what, where)
    assert isinstance(value, dict)
    if found.platform is not None:
        _shape(value["platform"], _PlatformShape, what, f"{where}.platform")
    p = found.platform
    return Descriptor(
        media_type=found.mediaType,
        digest=digests([found.digest], what, f"{where}.digest")[0],
        size=found.size,
        annotations=found.annotations or {},
        platform=None if p is None else Platform(p.os or "", p.architecture or "", p.variant or ""),
        artifact_type=found.artifactType or "",
        extra={name: kept for name, kept in value.items() if name not in _WRITTEN}
        | ({"platform": value["platform"]} if p is not None else {}),
    )


_WRITTEN = frozenset(("mediaType", "digest", "size", "annotations", "platform", "artifactType"))


def descriptor_json(value: Descriptor) -> JsonObject:
    """Return ``value`` as a JSON object, members in a fixed order, unknown ones last and as they were."""
    out: JsonObject = {"mediaType": value.media_type, "digest": str(value.digest), "size": value.size}
    if value.artifact_type:
        out["artifactType"] = value.artifact_type
    if value.annotations:
        out["annotations"] = dict(value.annotations)
    if (p := value.platform) is not None and "platform" not in value.extra:
        variant = {"variant": p.variant} if p.variant else {}
        out["platform"] = {"architecture": p.architecture, "os": p.os, **variant}
    return out | dict(value.extra)


@dataclass(frozen=True, slots=True)
class Manifest:
    """An image manifest (or an artifact's, which has the same form).

    Attributes:
        media_type: from the document, else the OCI one.
        artifact_type: as written, else "".
        config: the config's descriptor.
        layers: bottom first.
        subject: the manifest that this one is attached to.
        annotations: as written.
    """

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    artifact_type: str = ""
    subject: Descriptor | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ImageIndex:
    """An image index or docker manifest list; ``document`` is the whole of it as decoded JSON."""

    media_type: str
    manifests: tuple[Descriptor, ...]
    document: JsonObject


@dataclass(frozen=True, slots=True)
class Config:
    """What layerkit needs of an image config; ``document`` is the whole of it as decoded JSON."""

    platform: Platform
    diff_ids: tuple[Digest, ...]
    document: JsonObject


def _open(
    data: bytes, what: str, limits: Limits, default: str, allowed: frozenset[str]
) -> tuple[JsonObject, str, _IndexShape]:
    limits.check("manifest_bytes", len(data), what)
    document = load_object(data, what, limits)
    version, media_type = document.get("schemaVersion"), document.get("mediaType")
    if version == 1 and media_type not in allowed:
        raise InvalidImage(
            f"{what}: docker schema 1, which has no config and no diff_ids; convert it with "
            "'skopeo copy --format oci' or push the image again with a current tool"
        )
    if version != 2:
        raise InvalidImage(f"{what}: schemaVersion: want 2, found {version!r}")
    head = _shape(document, _IndexShape, what)
    found = media_type if isinstance(media_type, str) and media_type else default
    if found not in allowed:
        raise InvalidImage(f"{what}: mediaType: want one of {', '.join(sorted(allowed))}, found {found!r}")
    return document, found, head


def _descriptors(document: JsonObject, name: str, what: str, limit: str, limits: Limits) -> tuple[Descriptor, ...]:
    found = document.get(name)
    if found is None:  # Go writes an empty list as null
        return ()
    if not isinstance(found, list):
        raise InvalidImage(f"{what}: {name}: Expected `array`, got `{type(found).__name__}`")
    limits.check(limit, len(found), f"{what}: {name}")
    return tuple(descriptor(value, what, f"{name}[{i}]") for i, value in enumerate(found))


def _no_confusion(document: JsonObject, names: Sequence[str], foreign: Sequence[str], what: str, kind: str) -> None:
    folded = {name.casefold(): name for name in (*names, *foreign)}
    for name in document:
        meant = folded.get(name.casefold())
        if meant is not None and (meant != name or meant in foreign):
            raise InvalidImage(
                f"{what}: top level: {name!r} does not belong in {kind}; readers would disagree on it"
            )


def parse_manifest(data: bytes, what: str, *, media_type: str = MANIFEST, limits: Limits = DEFAULT) -> Manifest:
    """Return the image manifest in ``data``; ``media_type`` is the one it was announced with.

    Raises:
        InvalidImage: malformed, an index, docker schema 1; the message names ``what`` and the field.
        LimitExceeded: too long, too deep or too many layers.
    """
    document, found, head = _open(data, what, limits, media_type, MANIFEST_TYPES)
    known = ("schemaVersion", "mediaType", "artifactType", "config", "layers", "subject", "annotations")
    _no_confusion(document, known, ("manifests", "fsLayers"), what, "a manifest")
    if "config" not in document:
        raise InvalidImage(f"{what}: config: missing")
    subject = document.get("subject")
    return Manifest(
        media_type=found,
        config=descriptor(document["config"], what, "config"),
        layers=_descriptors(document, "layers", what, "layers_per_image", limits),
        artifact_type=head.artifactType or "",
        subject=None if subject is None else descriptor(subject, what, "subject"),
        annotations=head.annotations or {},
    )


def parse_index(data: bytes, what: str, *, media_type: str = INDEX, limits: Limits = DEFAULT) -> ImageIndex:
    """Return the image index or manifest list in ``data``; as :func:`parse_manifest`."""
    document, found, _ = _open(data, what, limits, media_type, INDEX_TYPES)
    known = ("schemaVersion", "mediaType", "artifactType", "manifests", "subject", "annotations")
    _no_confusion(document, known, ("layers", "config", "fsLayers"), what, "an index")
    return ImageIndex(found, _descriptors(document, "manifests", what, "manifests_per_index", limits), document)


def parse_config(data: bytes, what: str, *, limits: Limits = DEFAULT) -> Config:
    """Return the image config in ``data``; its other members stay in ``document``."""
    limits.check("config_bytes", len(data), what)
    document = load_object(data, what, limits)
    found = _shape(document, _ConfigShape, what)
    _shape(document["rootfs"], _RootfsShape, what, "rootfs")
    if found.rootfs.type != "layers":
        raise InvalidImage(f"{what}: rootfs.type: want 'layers', found {found.rootfs.type!r}")
    texts = found.rootfs.diff_ids or []
    limits.check("layers_per_image", len(texts), f"{what}: rootfs.diff_ids")
    platform = Platform(found.os or "unknown", found.architecture or "unknown", found.variant or "")
    return Config(platform, digests(texts, what, "rootfs.diff_ids[{}]"), document)


def check_layout(data: bytes, what: str, *, limits: Limits = DEFAULT) -> None:
    """Raise unless ``data`` is the ``oci-layout`` file of a version 1 layout."""
    limits.check("manifest_bytes", len(data), what)
    version = _shape(load_object(data, what, limits), _LayoutShape, what).imageLayoutVersion
    if version.split(".")[0] != "1":
        raise InvalidImage(f"{what}: imageLayoutVersion: want 1.x, found {version!r}")


def guess_media_type(data: bytes, what: str, *, limits: Limits = DEFAULT) -> str:
    """Return the media type of the manifest or index ``data`` that came without one."""
    limits.check("manifest_bytes", len(data), what)
    document = load_object(data, what, limits)
    written = document.get("mediaType")
    if isinstance(written, str) and written:
        return written
    return INDEX if "manifests" in document else MANIFEST


def is_image(entry: Descriptor) -> bool:
    """Return whether an index entry may be an image to run: no artifact, no build attestation."""
    attestation = entry.annotations.get("vnd.docker.reference.type") is not None
    return entry.media_type in MANIFEST_TYPES | INDEX_TYPES and not entry.artifact_type and not attestation


def verify(data: bytes, entry: Descriptor, what: str) -> bytes:
    """Return ``data`` if it has the size and digest of ``entry``.

    Raises:
        DigestMismatch: it has not.
    """
    if len(data) != entry.size:
        raise DigestMismatch(what, f"{len(data)} bytes", f"{entry.size} bytes")
    entry.digest.verify(data, what)
    return data


def manifest_json(
    config: Descriptor,
    layers: Sequence[Descriptor],
    *,
    artifact_type: str = "",
    subject: Descriptor | None = None,
    annotations: Mapping[str, str] | None = None,
) -> bytes:
    """Return an image manifest as deterministic JSON, members in the order of the specification."""
    out: JsonObject = {"schemaVersion": 2, "mediaType": MANIFEST}
    if artifact_type:
        out["artifactType"] = artifact_type
    out["config"] = descriptor_json(config)
    out["layers"] = [descriptor_json(layer) for layer in layers]
    if subject is not None:
        out["subject"] = descriptor_json(subject)
    if annotations:
        out["annotations"] = dict(annotations)
    return dumps(out)


def artifact(
    kind: str, blobs: Sequence[Descriptor], annotations: Mapping[str, str], subject: Descriptor | None = None
) -> tuple[bytes, Descriptor]:
    """Return the manifest of an artifact (image-spec, manifest.md, "Guidelines for Artifact Usage"), described.

    The same arguments give the same bytes. It also needs the blob :data:`EMPTY_JSON`.
    """
    data = manifest_json(
        EMPTY_DESCRIPTOR, blobs, artifact_type=kind, subject=subject.plain if subject else None,
        annotations=annotations,
    )  # fmt: skip
    return data, Descriptor.of(MANIFEST, data, artifact_type=kind)


def index_json(manifests: Sequence[Descriptor], document: JsonObject | None = None) -> bytes:
    """Return an image index of ``manifests``; other members are taken from ``document``."""
    head: JsonObject = {"schemaVersion": 2, "mediaType": INDEX} if document is None else document
    return dumps({**head, "manifests": [descriptor_json(entry) for entry in manifests]})


def references(data: bytes, media_type: str, what: str, *, limits: Limits = DEFAULT) -> tuple[Descriptor, ...]:
    """Return what must be there for the manifest or index ``data`` to be whole; a subject need not be."""
    if media_type in INDEX_TYPES:
        return parse_index(data, what, media_type=media_type, limits=limits).manifests
    manifest = parse_manifest(data, what, media_type=media_type, limits=limits)
    return (manifest.config, *(layer for layer in manifest.layers if not layer.extra.get("urls")))


def add_entry(entries: list[Descriptor], entry: Descriptor, name: str) -> None:
    """List ``entry`` under ``name`` ("" for none) in the entries of a layout's ``index.json``.

    As skopeo does: an older entry of that name stays, but loses the name, and an entry of the same manifest
    that has no name becomes the new one.
    """

    def named(old: Descriptor, name: str) -> Descriptor:
        kept = {key: value for key, value in old.annotations.items() if key not in (REF_NAME, CONTAINERD_NAME)}
        return replace(old, annotations=kept | ({REF_NAME: name} if name else {}))

    new = named(entry, name)
    for i, old in enumerate(entries):
        if name and old.annotations.get(REF_NAME) == name:
            entries[i] = named(old, "")
    for i, old in enumerate(entries):
        if old.digest == new.digest and (REF_NAME not in old.annotations or not name):
            # A manifest that has a name already is listed; it needs no second entry without one.
            entries[i] = new if REF_NAME not in old.annotations else old
            return
    entries.append(new)
