"""Descriptors and platforms (OCI image-spec, descriptor.md and image-index.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from layerkit.model.digest import Digest
from layerkit.model.errors import UsageError


@dataclass(frozen=True, slots=True)
class Platform:
    """What an image runs on."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Return the platform that ``os/arch[/variant]`` spells.

        Raises:
            UsageError: not two or three non-empty parts.
        """
        parts = text.split("/")
        if len(parts) not in (2, 3) or not all(parts):
            raise UsageError(f"--platform {text!r}: want os/arch or os/arch/variant, for example linux/arm64/v8")
        return cls(*parts)

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A typed, sized pointer to content.

    Attributes:
        media_type: as written.
        digest: of the bytes pointed at.
        size: their number.
        annotations: as written.
        platform: where an index gives one.
        artifact_type: where given, else "".
        extra: JSON members not named here, by name, as decoded values, so that writing keeps them.
    """

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    platform: Platform | None = None
    artifact_type: str = ""
    extra: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def of(
        cls, media_type: str, data: bytes, *, annotations: Mapping[str, str] | None = None, artifact_type: str = "",
        platform: Platform | None = None,
    ) -> Descriptor:  # fmt: skip
        """Return the descriptor of ``data``."""
        return cls(media_type, Digest.of(data), len(data), annotations or {}, platform, artifact_type)

    @property
    def plain(self) -> Descriptor:
        """Return the pointer alone: annotations such as a tag, or a platform, are an index's business."""
        return Descriptor(self.media_type, self.digest, self.size)
