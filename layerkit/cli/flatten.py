"""``layerkit flatten``: layers into one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.options import AllPlatforms, CompressionOption, Created, Dst, Level, Threads, one_platform
from layerkit.cli.render import emit_json, fields, human, note, progress, show_platforms

if TYPE_CHECKING:
    pass


def flatten(
    src: o.Ref,
    dst: Dst,
    from_layer: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="LAYER", help="Lowest layer to merge: a number (1 is the lowest) or digest."
        ),
    ] = None,
    to_layer: Annotated[
        str | None, typer.Option("--to", metavar="LAYER", help="Topmost layer to merge [default: the top].")
    ] = None,
    keep_base: Annotated[
        str | None,
        typer.Option(
            "--keep-base", metavar="REF|N", help="Leave the layers of this image, or the lowest N, as they are."
        ),
    ] = None,
    compression: CompressionOption = "gzip",
    level: Level = None,
    jobs: Threads = None,
    created: Created = None,
    platform: o.PlatformOption = None,
    all_platforms: AllPlatforms = False,
    store: o.StoreDir = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Merge layers of an image into one standard layer.

    What later layers replace or delete is gone, hard links stay, and config, labels and annotations are
    untouched. The result is read back and compared with the source before it becomes visible.

    Examples:
    `layerkit flatten image.tar oci-archive:flat.tar`

    `layerkit flatten oci:images:app oci:images:app-flat --keep-base oci:images:base`

    `layerkit flatten oci:images:app docker-archive:app.tar:app:flat --from 3`

    `layerkit flatten oci:images:multi oci:images:multi-flat --all-platforms`
    """
    from layerkit.api.rewrite import Route, base_of
    from layerkit.usecases.each_platform import PlatformsReport
    from layerkit.usecases.flatten import FlattenOptions
    from layerkit.usecases.flatten import flatten as use_case
    from layerkit.usecases.settings import RewriteOptions, Settings

    settings = Settings(o.store_dir(store))
    rewrite = RewriteOptions.of(compression, level, jobs, created)
    options = FlattenOptions(rewrite, from_layer, to_layer, base_of(keep_base, settings))
    with progress(quiet) as step:
        route = Route(src, dst, settings, one_platform(platform, all_platforms), all_platforms, step)
        report = route.go(lambda work, to: use_case(work, to, options))
    if isinstance(report, PlatformsReport):
        show_platforms("flatten-platforms", report, dst, json=json, quiet=quiet)
        return
    for warning in report.warnings:
        note(f"warning: {warning}", quiet=quiet)
    if json:
        emit_json("flatten", report.to_dict())
        return
    if dst.rpartition(":")[2] == "-":  # standard output holds the archive
        note(f"{report.manifest}: {report.layers_after} layers, before {report.layers_before}", quiet=quiet)
        return
    fields(
        [
            ("image", f"{report.name or dst}  {report.manifest}"),
            ("layers", f"{report.layers_after}, before {report.layers_before}"),
            (
                "merged",
                f"{report.merged[0]} to {report.merged[-1]} into {report.layer or 'nothing: no difference'}",
            ),
            ("entries", f"{report.entries:,}, of which {report.whiteouts:,} whiteouts"),
            ("blobs", f"{human(report.bytes_after)}, before {human(report.bytes_before)}"),
            ("tree", f"{report.tree_digest}, as before"),
            ("made in", f"{report.seconds:.2f} s"),
        ]
    )


def register(app: typer.Typer) -> None:
    """Add this file's commands to ``app``."""
    app.command("flatten", rich_help_panel="Images")(flatten)
