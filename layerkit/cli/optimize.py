"""``layerkit optimize``: an image without the bytes that it holds twice or hides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import Output, fields, human, show_platforms, table
from layerkit.model.errors import UsageError

if TYPE_CHECKING:
    from layerkit.usecases.optimize import OptimizeReport


def optimize(
    src: o.Ref,
    dst: Annotated[
        str | None,
        typer.Argument(metavar="[DST]", help="Where the result goes, as for `flatten`. Not needed with --dry-run."),
    ] = None,
    keep_base: o.KeepBase = None,
    metadata_only: Annotated[
        bool,
        typer.Option(
            "--metadata-only",
            help="Make stubs of doubled files instead, for hosts that mount with metacopy=on and for no others.",
        ),
    ] = False,
    stock_media_type: o.StockMediaType = False,
    compression: o.Compression = "gzip",
    level: o.Level = None,
    jobs: o.Threads = None,
    created: o.Created = None,
    platform: o.Platform = None,
    all_platforms: o.AllPlatforms = False,
    store: o.StoreDir = None,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Take out the bytes that chown and chmod layers duplicate, and those that later layers hide.

    The layers stay apart, the root filesystem stays what it is (the result is read back before it becomes
    visible), and layers that need no change keep their digests. It is a standard image for every runtime.

    Examples:
    `layerkit optimize image.tar --dry-run`

    `layerkit optimize oci:images:app oci:images:app-small --keep-base oci:images:base`

    `layerkit optimize image.tar oci-archive:small.tar --compression zstd`

    `layerkit optimize oci:images:multi oci:images:multi-small --all-platforms`
    """
    from layerkit.api.rewrite import Route, base_of
    from layerkit.usecases.each_platform import PlatformsReport
    from layerkit.usecases.optimize import OptimizeOptions
    from layerkit.usecases.optimize import optimize as use_case
    from layerkit.usecases.settings import RewriteOptions

    if dst is None and not dry_run:
        raise UsageError("where to? give DST, for example oci-archive:small.tar, or --dry-run for the plan alone")
    to = None if dry_run else dst
    out, settings = Output(json, quiet, to), o.settings(store)
    rewrite = RewriteOptions.of(compression, level, jobs, created)
    options = OptimizeOptions(rewrite, base_of(keep_base, settings), metadata_only, stock_media_type)
    with out.progress() as step:
        route = Route(src, to, settings, o.one_platform(platform, all_platforms), all_platforms, step)
        report = route.go(lambda work, to: use_case(work, to, options))
    if isinstance(report, PlatformsReport):
        show_platforms("optimize-platforms", report, out)
        return
    out.warn(report.warnings)
    if out.told("optimize", report.to_dict()):
        return
    if out.holds_archive:
        out.note(f"{report.manifest}: {_saved(report)}")
    else:
        _show(report, dst or "")


def _saved(report: OptimizeReport) -> str:
    """Return what was saved, and of what: never bytes of tars beside bytes of compressed blobs."""
    less = f"{abs(report.saved_percent)} % {'less' if report.saved_percent >= 0 else 'more'}"
    return f"{less}, {'layers as they are compressed' if report.compared == 'blobs' else 'files, uncompressed'}"


def _show(report: OptimizeReport, dst: str) -> None:
    rows = [
        ("image", f"{report.name or dst}  {report.manifest or 'not written (--dry-run)'}"),
        ("layers", f"{report.layers_after}, before {report.layers_before}"),
        ("files", f"{human(report.file_bytes_after)}, before {human(report.file_bytes_before)}"),
    ]
    if report.bytes_after is not None:
        rows.append(("blobs", f"{human(report.bytes_after)}, before {human(report.bytes_before)}"))
    rows.append(("saved", _saved(report)))
    if report.kept_base:
        base = f"{report.kept_base} layers kept; touching them would save {human(report.base_cost_bytes)} of files"
        rows.append(("base", base))
    fields([*rows, ("tree", f"{report.tree_digest}, as before")])
    table(
        "",
        ["LAYER", "ACTION", "FILES", "AFTER", "ENTRIES", "AFTER", "BLOB", "AFTER", "DIGEST"],
        [
            (
                x.number, x.action, human(x.file_bytes_before), human(x.file_bytes_after), f"{x.entries_before:,}",
                f"{x.entries_after:,}", human(x.blob_bytes_before),
                "" if x.blob_bytes_after is None else human(x.blob_bytes_after), x.digest_after[:19],
            )
            for x in report.layers
        ],
        right=(0, 2, 3, 4, 5, 6, 7),
    )  # fmt: skip
