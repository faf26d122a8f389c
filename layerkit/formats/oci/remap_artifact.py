"""The remap artifact: a metadata layer attached to an image that stays as it is.

An OCI 1.1 manifest (image-spec, manifest.md, "Guidelines for Artifact Usage") whose ``subject`` is the
image's manifest. Its layers are the META's blobs; what a mounter must know before it touches them is in
the annotations. In a registry it is a referrer, in a layout or archive one more entry of ``index.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from layerkit.formats.oci import documents as oci
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import InvalidImage
from layerkit.model.limits import DEFAULT, Limits

ARTIFACT_TYPE = "application/vnd.layerkit.remap.v1"
META_EROFS = "application/vnd.layerkit.meta.v1.erofs"
META_TAR = "application/vnd.layerkit.meta.v1.tar"

FORMAT_VERSION = 1

_PREFIX = "io.layerkit.remap."
VERSION_KEY = _PREFIX + "version"
MAP_KEY = _PREFIX + "map"
NAMESPACE_KEY = _PREFIX + "namespace"
RENDERING_KEY = _PREFIX + "rendering"
LAYERS_KEY = _PREFIX + "diff-ids"

NAMESPACES = ("trusted", "user")
RENDERINGS = ("erofs", "tar")


@dataclass(frozen=True, slots=True)
class RemapArtifact:
    """What a remap artifact's manifest says.

    Attributes:
        subject: the manifest of the image that it belongs to.
        blobs: the META's blobs.
        mapping: the id map as canonical text.
        namespace: of the stubs' xattrs, ``trusted`` or ``user``.
        rendering: ``erofs`` or ``tar``.
        diff_ids: the layers whose data the META points at, bottom first.
        format_version: of the META.
        annotations: all of them; the ones above need not be among those to be encoded.
    """

    subject: Descriptor
    blobs: tuple[Descriptor, ...]
    mapping: str
    namespace: str
    rendering: str
    diff_ids: tuple[Digest, ...]
    format_version: int = FORMAT_VERSION
    annotations: Mapping[str, str] = field(default_factory=dict)

    def encode(self) -> tuple[bytes, Descriptor]:
        """Return the manifest, and its descriptor; see :func:`documents.artifact`.

        Raises:
            ValueError: a namespace or rendering that is none, no blob.
        """
        known = self.namespace in NAMESPACES and self.rendering in RENDERINGS
        if not known or not self.blobs or self.format_version < 1:
            raise ValueError(f"not a remap artifact: {self}")
        said = dict(self.annotations) | {
            VERSION_KEY: str(self.format_version),
            MAP_KEY: self.mapping,
            NAMESPACE_KEY: self.namespace,
            RENDERING_KEY: self.rendering,
            LAYERS_KEY: ",".join(map(str, self.diff_ids)),
        }
        return oci.artifact(ARTIFACT_TYPE, self.blobs, dict(sorted(said.items())), self.subject)


def parse(data: bytes, what: str, *, limits: Limits = DEFAULT) -> RemapArtifact:
    """Return the remap artifact whose manifest is ``data``.

    Raises:
        InvalidImage: no remap artifact, a newer version, or a part of it missing or malformed.
    """
    manifest = oci.parse_manifest(data, what, limits=limits)
    if manifest.artifact_type != ARTIFACT_TYPE:
        found = manifest.artifact_type or manifest.config.media_type
        raise InvalidImage(f"{what}: want artifactType {ARTIFACT_TYPE}, found {found!r}")
    if manifest.subject is None:
        raise InvalidImage(f"{what}: subject: missing; a remap artifact belongs to an image")
    if manifest.config.digest != oci.EMPTY_DESCRIPTOR.digest or manifest.config.media_type != oci.EMPTY:
        raise InvalidImage(
            f"{what}: config: want the empty one ({oci.EMPTY}), found {manifest.config.media_type!r}"
        )
    if not manifest.layers:
        raise InvalidImage(f"{what}: layers: want at least one blob")
    said = manifest.annotations

    def need(key: str) -> str:
        if not said.get(key):
            raise InvalidImage(f"{what}: annotations[{key!r}]: missing")
        return said[key]

    def one_of(key: str, allowed: tuple[str, ...]) -> str:
        if need(key) not in allowed:
            raise InvalidImage(f"{what}: annotations[{key!r}]: want {' or '.join(allowed)}, found {said[key]!r}")
        return said[key]

    version = need(VERSION_KEY)
    if version != str(FORMAT_VERSION):
        raise InvalidImage(
            f"{what}: annotations[{VERSION_KEY!r}]: this layerkit reads version {FORMAT_VERSION}, "
            f"found {version!r}; use a newer one"
        )
    texts = said.get(LAYERS_KEY, "")
    return RemapArtifact(
        subject=manifest.subject,
        blobs=manifest.layers,
        mapping=need(MAP_KEY),
        namespace=one_of(NAMESPACE_KEY, NAMESPACES),
        rendering=one_of(RENDERING_KEY, RENDERINGS),
        diff_ids=oci.digests(texts.split(",") if texts else (), what, f"annotations[{LAYERS_KEY!r}]"),
        annotations=said,
    )


def is_attached(manifest: oci.Manifest, subject: Digest, artifact_type: str = "") -> bool:
    """Return whether ``manifest`` is attached to ``subject`` and of ``artifact_type`` where that is given.

    An artifact without ``artifactType`` has the media type of its config as its type (image-spec, manifest.md).
    """
    if manifest.subject is None or manifest.subject.digest != subject:
        return False
    return not artifact_type or artifact_type == (manifest.artifact_type or manifest.config.media_type)
