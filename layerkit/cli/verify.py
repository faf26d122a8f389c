"""``layerkit verify``: digests, structure, and that a metadata layer agrees with its image."""

from __future__ import annotations

from layerkit.cli import options as o
from layerkit.cli.render import Output, fields, line


def verify(
    ref: o.Ref,
    platform: o.Platform = None,
    store: o.StoreDir = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Read an image whole and check it: digests, sizes, structure, and every remap artifact attached to it.

    An artifact is checked by making it again from the image: the bytes must be equal. Nothing is stored.
    What the local store keeps of an image is checked by `layerkit store verify`.

    Example: `layerkit verify oci-archive:remapped.tar`
    """
    from layerkit.api.open import open_image

    out = Output(json, quiet)
    with open_image(ref, platform=platform, settings=o.settings(store)) as image, out.progress() as step:
        report = image.verify(progress=step)
    if out.told("verify", report.to_dict()):
        return
    fields([
        ("image", f"{report.name}  {report.manifest}"),
        ("layers", f"{report.layers}, every digest and size is right"),
        ("tree", f"{report.entries:,} entries, {report.tree_digest}"),
    ])  # fmt: skip
    for artifact in report.artifacts:
        line(f"artifact  {artifact} agrees with the image")
