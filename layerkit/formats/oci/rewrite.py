"""An image's config and manifest with other layers in them: history and diff_ids agree, the rest stays.

The result is an OCI image also where the input was a docker one: the two differ in media types alone, and
one manifest must not mix them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from layerkit.formats.oci import documents as oci
from layerkit.formats.strict_json import JsonObject, dumps
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.image import Image, Layer
from layerkit.model.limits import DEFAULT, Limits

_DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
_OCI_LAYERS = {
    _DOCKER_LAYER: oci.LAYER_TAR, _DOCKER_LAYER + ".gzip": oci.LAYER_GZIP, _DOCKER_LAYER + ".zstd": oci.LAYER_ZSTD,
}  # fmt: skip
_BASE = ("org.opencontainers.image.base.digest", "org.opencontainers.image.base.name")


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


def rewrite(
    image: Image,
    layers: Sequence[Layer | NewLayer],
    *,
    created: str | None = None,
    drop_history: bool = False,
    limits: Limits = DEFAULT,
) -> Image:
    """Return ``image`` with ``layers``; see :func:`layerkit.pack.rewrite_image`."""
    old = oci.parse_manifest(
        image.manifest, f"{image.name or 'image'}: manifest", media_type=image.descriptor.media_type, limits=limits
    )
    document = oci.parse_config(image.config, f"{image.name or 'image'}: config", limits=limits).document
    places = _places(image, layers)
    config = _config(document, image, layers, places, created, drop_history)
    config_descriptor = Descriptor(
        oci.CONFIG, Digest.of(config), len(config), annotations=image.config_descriptor.annotations
    )
    kept = [
        replace(
            layer.descriptor, media_type=_OCI_LAYERS.get(layer.descriptor.media_type, layer.descriptor.media_type)
        )
        for layer in layers
    ]
    annotations = dict(old.annotations)
    if len(layers) == 0 or places[0] != [0] or not isinstance(layers[0], Layer):
        # What it says of the image below is no longer so.
        annotations = {key: value for key, value in annotations.items() if key not in _BASE}
    manifest = oci.manifest_json(
        config_descriptor, kept, artifact_type=old.artifact_type, subject=old.subject, annotations=annotations
    )
    return Image(
        name=image.name,
        manifest=manifest,
        descriptor=Descriptor(oci.MANIFEST, Digest.of(manifest), len(manifest), platform=image.descriptor.platform),
        config=config,
        config_descriptor=config_descriptor,
        layers=tuple(Layer(descriptor, layer.diff_id) for descriptor, layer in zip(kept, layers, strict=True)),
        platform=image.platform,
    )


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
            raise ValueError(f"{layer.diff_id} is not a layer of the image, or not in its order")
        out.append([at])
        at += 1
    return out


def _config(
    document: JsonObject,
    image: Image,
    layers: Sequence[Layer | NewLayer],
    places: list[list[int]],
    created: str | None,
    drop_history: bool,
) -> bytes:
    document = dict(document)
    if created is not None:
        document["created"] = created
    rootfs = document["rootfs"]
    assert isinstance(rootfs, dict)
    document["rootfs"] = {**rootfs, "diff_ids": [str(layer.diff_id) for layer in layers]}
    steps = document.get("history")
    if "history" in document:
        history = _history(steps, image, layers, places, document.get("created"), drop_history)
        if history is None:
            del document["history"]
        else:
            document["history"] = history
    return dumps(document)


def _history(
    steps: object,
    image: Image,
    layers: Sequence[Layer | NewLayer],
    places: list[list[int]],
    created: object,
    drop: bool,
) -> list[JsonObject] | None:
    """Return the new history, None where the old one does not say which step made which layer."""
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
            if (at == last and same_step) or old[at].get("empty_layer") is True:
                out.append(old[at])
            elif not drop:
                out.append({**old[at], "empty_layer": True})
        done = max(done, last + 1)
        if not same_step:
            step: JsonObject = {"created": created} if created is not None else {}
            out.append({**step, "created_by": text})
    for step in old[done:]:
        if step.get("empty_layer") is True:
            out.append(step)
        elif not drop:
            out.append({**step, "empty_layer": True})
    return out


__all__ = ["NewLayer", "rewrite"]
