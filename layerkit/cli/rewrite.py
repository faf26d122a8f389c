"""``layerkit flatten``, ``optimize`` and ``copy``: one image made of another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import Output, fields, human, show_platforms, table
from layerkit.model.errors import UsageError

if TYPE_CHECKING:
    from layerkit.usecases.optimize import OptimizeReport


def flatten(
    src: o.Ref,
    dst: o.Dst,
    from_layer: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="LAYER", help="Lowest layer to merge: a number (1 is the lowest) or a digest."
        ),
    ] = None,
    to_layer: Annotated[
        str | None, typer.Option("--to", metavar="LAYER", help="Topmost layer to merge [default: the topmost].")
    ] = None,
    keep_base: o.KeepBase = None,
    how: o.Rewriting = o.Rewriting(),
    out: Output = Output(),
) -> None:
    """Merge layers of an image into one standard layer.

    Files that later layers replace or delete are dropped. Hard links, config, labels and annotations stay.
    The result is read back and compared with the source before it becomes visible.

    Examples:
    `layerkit flatten image.tar oci-archive:flat.tar`

    `layerkit flatten oci:images:app oci:images:app-flat --keep-base oci:images:base`

    `layerkit flatten oci:images:app docker-archive:app.tar:app:flat --from 3`

    `layerkit flatten oci:images:multi oci:images:multi-flat --all-platforms`
    """
    from layerkit.api.rewrite import base_of
    from layerkit.usecases.each_platform import PlatformsReport
    from layerkit.usecases.flatten import FlattenOptions
    from layerkit.usecases.flatten import flatten as use_case

    out = out.toward(dst)
    with out.progress() as step:
        route = how.route(src, dst, step)
        options = FlattenOptions(how.options(), from_layer, to_layer, base_of(keep_base, route.settings))
        report = route.go(lambda work, to: use_case(work, to, options))
    if isinstance(report, PlatformsReport):
        show_platforms("flatten-platforms", report, out)
        return
    short = f"{report.manifest}: {report.layers_after} layers, before {report.layers_before}"
    out.answered("flatten", report, [
        ("image", f"{report.name or dst}  {report.manifest}"),
        ("layers", f"{report.layers_after}, before {report.layers_before}"),
        ("merged", f"{report.merged[0]} to {report.merged[-1]} into {report.layer or 'nothing: no difference'}"),
        ("entries", f"{report.entries:,}, of which {report.whiteouts:,} whiteouts"),
        ("blobs", f"{human(report.bytes_after)}, before {human(report.bytes_before)}"),
        ("tree", f"{report.tree_digest}, as before"),
        ("made in", f"{report.seconds:.2f} s"),
    ], report.warnings, short)  # fmt: skip


def optimize(
    src: o.Ref,
    dst: Annotated[
        str | None,
        typer.Argument(metavar="[DST]", help="Where the result goes, as for `flatten`; not needed with --dry-run."),
    ] = None,
    keep_base: o.KeepBase = None,
    metadata_only: Annotated[
        bool,
        typer.Option(
            "--metadata-only", help="Replace duplicated files by stubs. Only for hosts that mount with metacopy=on."
        ),
    ] = False,
    stock_media_type: o.StockMediaType = False,
    how: o.Rewriting = o.Rewriting(),
    dry_run: o.DryRun = False,
    out: Output = Output(),
) -> None:
    """Remove the bytes that chown and chmod layers duplicate, and those that later layers hide.

    The layers stay separate, the root filesystem stays the same (the result is read back before it becomes
    visible), and layers that need no change keep their digests. The result is a standard image for any runtime.

    Examples:
    `layerkit optimize image.tar --dry-run`

    `layerkit optimize oci:images:app oci:images:app-small --keep-base oci:images:base`

    `layerkit optimize image.tar oci-archive:small.tar --compression zstd`

    `layerkit optimize oci:images:multi oci:images:multi-small --all-platforms`
    """
    from layerkit.api.rewrite import base_of
    from layerkit.usecases.each_platform import PlatformsReport
    from layerkit.usecases.optimize import OptimizeOptions
    from layerkit.usecases.optimize import optimize as use_case

    if dst is None and not dry_run:
        raise UsageError("DST is missing: give one, such as oci-archive:small.tar, or --dry-run to see the plan")
    to = None if dry_run else dst
    out = out.toward(to)
    with out.progress() as step:
        route = how.route(src, to, step)
        base = base_of(keep_base, route.settings)
        options = OptimizeOptions(how.options(), base, metadata_only, stock_media_type)
        report = route.go(lambda work, to: use_case(work, to, options))
    if isinstance(report, PlatformsReport):
        show_platforms("optimize-platforms", report, out)
        return
    if out.told("optimize", report.to_dict(), report.warnings):
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
        base = f"{report.kept_base} layers kept; changing them would save {human(report.base_cost_bytes)} of files"
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


def copy(
    src: o.Ref,
    dst: o.Dst,
    all_platforms: o.AllPlatforms = False,
    platform: o.Platform = None,
    store: o.StoreDir = None,
    out: Output = Output(),
) -> None:
    """Copy an image between any two references, byte for byte.

    Manifests keep their digests. Artifacts attached to the image (remaps, signatures, attestations) are copied
    too. Those attached to an image index need `--all-platforms`. A docker daemon gets no artifacts.

    Examples:
    `layerkit copy image.tar oci:images:app`

    `layerkit copy oci:images:app docker-archive:app.tar:example.com/app:1`

    `layerkit copy docker-daemon:app:1 oci:images:app`

    `layerkit copy oci:images:multi oci-archive:all.tar --all-platforms`
    """
    from layerkit.api import rewrite

    out = out.toward(dst)
    with out.progress() as step:
        report = rewrite.copy(
            src, dst, all_platforms=all_platforms, platform=o.one_platform(platform, all_platforms),
            settings=o.settings(store), progress=step,
        )  # fmt: skip
    out.answered("copy", report, [
        ("image", f"{report.name or dst}  {report.manifest}"),
        ("platforms", len(report.images)),
        ("attached", report.attached or "nothing"),
        *([("left behind", report.left)] if report.left else []),
        ("copied", f"{report.blobs} blobs, {human(report.bytes)}, in {report.seconds:.2f} s"),
    ], archived=f"copied {report.manifest}")  # fmt: skip
