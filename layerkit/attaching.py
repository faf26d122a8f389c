"""What an attached artifact is made with: a rendering of META, and a statement, signed if a key is given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layerkit.attach import Attest, Render
    from layerkit.formats.intoto import Attestation
    from layerkit.limits import Limits
    from layerkit.model.descriptor import Descriptor
    from layerkit.model.image import Image


def attester(image: Image, where: str, sign_key: Path | None, limits: Limits) -> Attest:
    """Return what makes the statement about an artifact; a key that cannot be read is found out now.

    Args:
        image: what the artifact is attached to.
        where: where that image was read from.
        sign_key: a private key, None for an unsigned statement.
        limits: bounds on the artifact's manifest.
    """
    from importlib.metadata import version

    from layerkit.formats import artifact, intoto

    signer = None
    if sign_key is not None:
        from layerkit.stores.keys import FileSigner

        signer = FileSigner(sign_key)

    def attest(made: Descriptor, manifest: bytes) -> Attestation:
        found = artifact.parse(manifest, f"artifact {made.digest}", limits=limits)
        payload = intoto.statement(image, where, made, found, version("layerkit"))
        return intoto.attestation(payload, made, signer)

    return attest


def renderer(form: str) -> Render:
    """Return what writes META in the form ``erofs`` or ``tar``."""
    if form == "tar":
        from layerkit.emit.tar import write_tar

        return write_tar
    from layerkit.emit.erofs import build_meta

    return build_meta
