"""``layerkit copy``: between any two references."""

from __future__ import annotations

from typing import Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.options import Dst
from layerkit.cli.render import emit_json, fields, human, note, progress


def copy(
    src: o.Ref,
    dst: Dst,
    all_platforms: Annotated[
        bool, typer.Option("--all-platforms", help="Copy the images of all platforms, with their index.")
    ] = False,
    platform: o.PlatformOption = None,
    store: o.StoreDir = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Copy an image between any two references, byte for byte.

    Manifests keep their digests. Artifacts attached to what is copied (remaps, signatures, attestations) come
    along; those attached to an index come only with `--all-platforms`, none of them into a docker daemon.

    Examples:
    `layerkit copy image.tar oci:images:app`

    `layerkit copy oci:images:app docker-archive:app.tar:example.com/app:1`

    `layerkit copy docker-daemon:app:1 oci:images:app`

    `layerkit copy oci:images:multi oci-archive:all.tar --all-platforms`
    """
    from layerkit.api import open as api
    from layerkit.api import rewrite as rewrites

    with progress(quiet) as step:
        report = rewrites.copy(
            src, dst, all_platforms=all_platforms, platform=platform,
            settings=api.Settings(store=o.store_dir(store)), progress=step,
        )  # fmt: skip
    if json:
        emit_json("copy", report.to_dict())
        return
    if dst.rpartition(":")[2] == "-":  # standard output holds the archive
        note(f"copied {report.manifest}", quiet=quiet)
        return
    fields(
        [
            ("image", f"{report.name or dst}  {report.manifest}"),
            ("platforms", len(report.images)),
            ("attached", report.attached or "nothing"),
            *([("left behind", report.left)] if report.left else []),
            ("copied", f"{report.blobs} blobs, {human(report.bytes)}, in {report.seconds:.2f} s"),
        ]
    )


def register(app: typer.Typer) -> None:
    """Add this file's commands to ``app``."""
    app.command("copy", rich_help_panel="Images")(copy)
