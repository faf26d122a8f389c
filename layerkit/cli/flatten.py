"""``layerkit flatten``: layers into one."""

from __future__ import annotations

from typing import Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import Output, fields, human, show_platforms


def flatten(
    src: o.Ref,
    dst: o.Dst,
    from_layer: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="LAYER", help="Lowest layer to merge: a number (1 is the lowest) or digest."
        ),
    ] = None,
    to_layer: Annotated[
        str | None, typer.Option("--to", metavar="LAYER", help="Topmost layer to merge [default: the top].")
    ] = None,
    keep_base: o.KeepBase = None,
    compression: o.Compression = "gzip",
    level: o.Level = None,
    jobs: o.Threads = None,
    created: o.Created = None,
    platform: o.Platform = None,
    all_platforms: o.AllPlatforms = False,
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
    from layerkit.usecases.settings import RewriteOptions

    out, settings = Output(json, quiet, dst), o.settings(store)
    rewrite = RewriteOptions.of(compression, level, jobs, created)
    options = FlattenOptions(rewrite, from_layer, to_layer, base_of(keep_base, settings))
    with out.progress() as step:
        route = Route(src, dst, settings, o.one_platform(platform, all_platforms), all_platforms, step)
        report = route.go(lambda work, to: use_case(work, to, options))
    if isinstance(report, PlatformsReport):
        show_platforms("flatten-platforms", report, out)
        return
    out.warn(report.warnings)
    if out.told("flatten", report.to_dict()):
        return
    if out.holds_archive:
        out.note(f"{report.manifest}: {report.layers_after} layers, before {report.layers_before}")
        return
    fields([
        ("image", f"{report.name or dst}  {report.manifest}"),
        ("layers", f"{report.layers_after}, before {report.layers_before}"),
        ("merged", f"{report.merged[0]} to {report.merged[-1]} into {report.layer or 'nothing: no difference'}"),
        ("entries", f"{report.entries:,}, of which {report.whiteouts:,} whiteouts"),
        ("blobs", f"{human(report.bytes_after)}, before {human(report.bytes_before)}"),
        ("tree", f"{report.tree_digest}, as before"),
        ("made in", f"{report.seconds:.2f} s"),
    ])  # fmt: skip
