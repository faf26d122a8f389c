"""An image: its manifest's exact bytes and what layerkit reads out of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from layerkit.model.descriptor import Descriptor, Platform
from layerkit.model.digest import Digest


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer blob: ``descriptor`` points at the (compressed) blob, ``diff_id`` is its tar's digest."""

    descriptor: Descriptor
    diff_id: Digest


@dataclass(frozen=True, slots=True)
class Image:
    """One image for one platform.

    Attributes:
        name: what the source calls it (a tag, ``repo:tag``), or "".
        manifest: the manifest's exact bytes; for a docker-archive the OCI manifest made from it.
        descriptor: of the manifest: media type, digest, size, platform.
        config: the config's exact bytes.
        config_descriptor: of the config.
        layers: bottom first.
        platform: from the config.
    """

    name: str
    manifest: bytes
    descriptor: Descriptor
    config: bytes
    config_descriptor: Descriptor
    layers: tuple[Layer, ...]
    platform: Platform

    @property
    def diff_ids(self) -> tuple[Digest, ...]:
        """Return the digests of the uncompressed layers, bottom first."""
        return tuple(layer.diff_id for layer in self.layers)


def chain_ids(diff_ids: Iterable[Digest | str]) -> list[str]:
    """Return the chain_id of each layer, bottom first (image-spec, config.md, "Layer ChainID")."""
    import hashlib

    found: list[str] = []
    for text in map(str, diff_ids):
        found.append("sha256:" + hashlib.sha256(f"{found[-1]} {text}".encode()).hexdigest() if found else text)
    return found
