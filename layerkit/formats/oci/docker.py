"""What ``docker save`` and ``podman save`` write: documents to values, and an OCI manifest made from them.

Two layouts exist. The current one has a ``manifest.json`` that lists images by config and layer files
(moby, image/spec/v1.2.md). The legacy one has ``repositories`` and a folder per layer, chained by ``parent``
(image/spec/v1.md); it has no config and no digests, so both are made here, always the same ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from layerkit.formats.oci import documents as oci
from layerkit.formats.strict_json import JsonObject, dumps, load_object, loads
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import InvalidImage
from layerkit.model.image import Image, Layer
from layerkit.model.limits import DEFAULT, Limits

_LEGACY_ID = re.compile(r"[0-9a-f]{64}")
_LAYERS = (
    oci.LAYER_TAR,
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.",
)
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
# Without a dot or a port it is no host but the first part of the name; "localhost" is both.
_HOST = r"(?:(?:[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+|\[[0-9A-Fa-f:]+\])(?::[0-9]+)?|[A-Za-z0-9-]+:[0-9]+)"
_NAME = re.compile(rf"(?:{_HOST}/)?{_PART}(?:/{_PART})*(?::[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?")
_NAME_CHARS = 255 + 1 + 128


class SavedImage(NamedTuple):
    """One entry of ``manifest.json``: file names inside the archive."""

    config: str
    tags: tuple[str, ...]
    layers: tuple[str, ...]


class LegacyLayer(NamedTuple):
    """One folder of the legacy layout: its id, its parent's ("" at the bottom), its ``json``."""

    id: str
    parent: str
    document: JsonObject


def _strings(value: object, what: str, where: str) -> tuple[str, ...]:
    if value is None:  # Go writes an empty list as null
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InvalidImage(f"{what}: {where}: want a list of strings")
    return tuple(value)


def parse_manifest(data: bytes, what: str, *, limits: Limits = DEFAULT) -> tuple[SavedImage, ...]:
    """Return the images that a ``manifest.json`` lists.

    Raises:
        InvalidImage: malformed; the message names ``what`` and the field.
    """
    limits.check("manifest_bytes", len(data), what)
    document = loads(data, what, limits)
    if not isinstance(document, list):
        raise InvalidImage(f"{what}: want a JSON list of images, found {type(document).__name__}")
    limits.check("manifests_per_index", len(document), f"{what}: images")
    images = []
    for i, entry in enumerate(document):
        if not isinstance(entry, dict):
            raise InvalidImage(f"{what}: [{i}]: want an object, found {type(entry).__name__}")
        config = entry.get("Config")
        if not isinstance(config, str) or not config:
            raise InvalidImage(f"{what}: [{i}].Config: want the name of a file, found {config!r}")
        layers = _strings(entry.get("Layers"), what, f"[{i}].Layers")
        limits.check("layers_per_image", len(layers), f"{what}: [{i}].Layers")
        images.append(SavedImage(config, _strings(entry.get("RepoTags"), what, f"[{i}].RepoTags"), layers))
    return tuple(images)


def parse_repositories(data: bytes, what: str, *, limits: Limits = DEFAULT) -> dict[str, str]:
    """Return the ids of the top layers by ``name:tag`` that a legacy ``repositories`` file lists.

    Raises:
        InvalidImage: malformed, or an id that is none.
    """
    limits.check("manifest_bytes", len(data), what)
    found: dict[str, str] = {}
    for name, tags in load_object(data, what, limits).items():
        if not isinstance(tags, dict):
            raise InvalidImage(f"{what}: {name}: want an object of tags, found {type(tags).__name__}")
        for tag, top in tags.items():
            found[f"{name}:{tag}"] = _legacy_id(top, what, f"{name}.{tag}")
    limits.check("manifests_per_index", len(found), f"{what}: images")
    return found


def _legacy_id(value: object, what: str, where: str) -> str:
    if not isinstance(value, str) or not _LEGACY_ID.fullmatch(value):
        raise InvalidImage(f"{what}: {where}: want an id of 64 hex digits, found {value!r}")
    return value


def parse_legacy_layer(data: bytes, layer_id: str, what: str, *, limits: Limits = DEFAULT) -> LegacyLayer:
    """Return what the ``json`` file in the folder ``layer_id`` says."""
    limits.check("config_bytes", len(data), what)
    document = load_object(data, what, limits)
    if document.get("id", layer_id) != layer_id:
        raise InvalidImage(f"{what}: id: found {document['id']!r} in the folder {layer_id!r}")
    parent = document.get("parent") or ""
    return LegacyLayer(layer_id, _legacy_id(parent, what, "parent") if parent else "", document)


def legacy_config(chain: Sequence[LegacyLayer], diff_ids: Sequence[Digest]) -> bytes:
    """Return the image config made from a legacy chain, bottom first, as docker made it in its upgrade.

    Args:
        chain: the folders' contents.
        diff_ids: of their uncompressed layers, in the same order.
    """
    top = chain[-1].document
    config: JsonObject = {"architecture": top.get("architecture") or "amd64", "os": top.get("os") or "linux"}
    config |= {name: top[name] for name in ("created", "author", "config", "docker_version") if top.get(name)}
    config["rootfs"] = {"type": "layers", "diff_ids": [str(diff_id) for diff_id in diff_ids]}
    config["history"] = [_history(layer.document) for layer in chain]
    return dumps(config)


def _history(document: JsonObject) -> JsonObject:
    said: JsonObject = {name: document[name] for name in ("created", "author", "comment") if document.get(name)}
    made_by = document.get("container_config")
    command = made_by.get("Cmd") if isinstance(made_by, dict) else None
    if isinstance(command, list) and all(isinstance(word, str) for word in command) and command:
        said["created_by"] = " ".join(command)
    return said


def normal_name(name: str) -> str:
    """Return an image name with the host, folder and tag that docker leaves out (distribution/reference)."""
    path, _, digest = name.partition("@")
    head, slash, _ = path.partition("/")
    if not slash:
        path = f"docker.io/library/{path}"
    elif "." not in head and ":" not in head and head != "localhost":
        path = f"docker.io/{path}"
    if digest:
        return f"{path}@{digest}"
    return path if ":" in path.rpartition("/")[2] else f"{path}:latest"


def tagged(name: str) -> str:
    """Return ``name`` with the tag that ``docker load`` needs: ``latest`` where it has none."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def is_name(name: str) -> bool:
    """Return whether docker takes ``name`` for an image's, with or without a tag (distribution/reference)."""
    return len(name) <= _NAME_CHARS and _NAME.fullmatch(name) is not None


def is_layer(media_type: str) -> bool:
    """Return whether a blob of this type is a layer's tar, which docker can unpack."""
    return media_type.startswith(_LAYERS)


def to_image(
    name: str, config: bytes, layers: Sequence[Descriptor], what: str, *, limits: Limits = DEFAULT
) -> Image:
    """Return the image with an OCI manifest made from a docker archive's parts; equal parts, equal bytes.

    Args:
        name: what it is called, or "".
        config: the config's exact bytes.
        layers: descriptors of the layer blobs as they lie in the archive, bottom first.
        what: the archive, for messages.
        limits: bounds.

    Raises:
        InvalidImage: a malformed config, or one that lists another number of layers.
    """
    parsed = oci.parse_config(config, f"{what}: config", limits=limits)
    if len(parsed.diff_ids) != len(layers):
        raise InvalidImage(
            f"{what}: {len(layers)} layers, but the config lists {len(parsed.diff_ids)} rootfs.diff_ids; "
            "the two numbers must be equal"
        )
    described = Descriptor.of(oci.CONFIG, config)
    manifest = oci.manifest_json(described, layers)
    descriptor = Descriptor.of(oci.MANIFEST, manifest, platform=parsed.platform)
    pairs = tuple(map(Layer, layers, parsed.diff_ids))
    return Image(name, manifest, descriptor, config, described, pairs, parsed.platform)
