"""``layerkit verify``: digests, structure, and that a metadata layer agrees with its image."""

from __future__ import annotations

import typer

from layerkit.cli import options as o
from layerkit.cli.render import emit_json, fields, line, progress


def verify(
    ref: o.Ref,
    platform: o.PlatformOption = None,
    store: o.StoreDir = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Read an image whole and check it: digests, sizes, structure, and every remap artifact attached to it.

    An artifact is checked by making it again from the image: the bytes must be equal. Nothing is stored.
    What the local store keeps of an image is checked by `layerkit store verify`.

    Example: `layerkit verify oci-archive:remapped.tar`
    """
    from layerkit.api import open as api

    settings = api.Settings(store=o.store_dir(store))
    with api.open_image(ref, platform=platform, settings=settings) as image, progress(quiet) as step:
        report = image.verify(progress=step)
    if json:
        emit_json("verify", report.to_dict())
        return
    fields(
        [
            ("image", f"{report.name}  {report.manifest}"),
            ("layers", f"{report.layers}, every digest and size is right"),
            ("tree", f"{report.entries:,} entries, {report.tree_digest}"),
        ]
    )
    for artifact in report.artifacts:
        line(f"artifact  {artifact} agrees with the image")


def register(app: typer.Typer) -> None:
    """Add this file's commands to ``app``."""
    app.command("verify", rich_help_panel="Images")(verify)
