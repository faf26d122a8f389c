"""An image's values as the JSON that the catalog keeps beside its manifest and config."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from layerkit.model.descriptor import Descriptor, Platform
from layerkit.model.digest import Digest
from layerkit.model.errors import StoreError
from layerkit.model.image import Image, Layer


def encode(image: Image) -> str:
    """Return all of ``image`` but for the bytes of its manifest and config."""
    return json.dumps({
        "name": image.name,
        "descriptor": _descriptor_facts(image.descriptor),
        "config_descriptor": _descriptor_facts(image.config_descriptor),
        "layers": [[_descriptor_facts(layer.descriptor), str(layer.diff_id)] for layer in image.layers],
        "platform": asdict(image.platform),
    })  # fmt: skip


def decode(digest: str, manifest: bytes, config: bytes, text: str) -> Image:
    """Return the image of a catalog row.

    Raises:
        StoreError: ``text`` is not what :func:`encode` gives.
    """
    try:
        facts = json.loads(text)
        return Image(
            name=facts["name"],
            manifest=manifest,
            descriptor=_descriptor(facts["descriptor"]),
            config=config,
            config_descriptor=_descriptor(facts["config_descriptor"]),
            layers=tuple(Layer(_descriptor(d), Digest.parse(diff_id)) for d, diff_id in facts["layers"]),
            platform=Platform(**facts["platform"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"catalog: the row of image {digest} is damaged ({error}); run `layerkit store verify --repair`"
        ) from error


def _descriptor_facts(descriptor: Descriptor) -> dict[str, object]:
    return {
        "media_type": descriptor.media_type,
        "digest": str(descriptor.digest),
        "size": descriptor.size,
        "annotations": dict(descriptor.annotations),
        "platform": None if descriptor.platform is None else asdict(descriptor.platform),
        "artifact_type": descriptor.artifact_type,
        "extra": dict(descriptor.extra),
    }


def _descriptor(facts: dict[str, Any]) -> Descriptor:
    platform = facts.pop("platform")
    digest = Digest.parse(facts.pop("digest"))
    return Descriptor(digest=digest, platform=None if platform is None else Platform(**platform), **facts)
