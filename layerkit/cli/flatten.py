"""``layerkit flatten``: layers into one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import emit_json, fields, human, note, progress, table
from layerkit.errors import UsageError

if TYPE_CHECKING:
    from layerkit.every_platform import PlatformsReport

Dst = Annotated[
    str,
    typer.Argument(
        metavar="DST",
        help="Where the result goes: `oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]`, `docker-archive:FILE[:NAME]`, "
        "`docker-daemon:NAME[:TAG]`; "
        "`-` is an archive on standard output.",
    ),
]
CompressionOption = Annotated[
    str,
    typer.Option(
        "--compression", metavar="gzip|zstd|zstd:chunked|none", help="Compression of layers that are written."
    ),
]
Level = Annotated[int | None, typer.Option("--compression-level", metavar="N", help="gzip 1 to 9, zstd 1 to 22.")]
Threads = Annotated[
    int | None,
    typer.Option(
        "--jobs", "-j", min=1, max=64, envvar="LAYERKIT_JOBS",
        help="Threads that compress; the result does not depend on it [default: all cores].",
    ),
]  # fmt: skip
AllPlatforms = Annotated[
    bool, typer.Option("--all-platforms", help="Do it to the images of all platforms, and write a new index.")
]
Created = Annotated[
    str | None,
    typer.Option(
        "--created", metavar="TIME",
        help="Time written into the result, RFC 3339 or seconds since 1970 "
        "[default: SOURCE_DATE_EPOCH, else that of the image].",
    ),
]  # fmt: skip


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
    from layerkit import api, rewrites

    settings = api.Settings(store=o.store_dir(store))
    if all_platforms:
        from layerkit import every_platform

        no_choice(platform)
        with progress(quiet) as step:
            whole = every_platform.flatten(
                src, dst, from_layer=from_layer, to_layer=to_layer, keep_base=keep_base, settings=settings,
                compression=compression, level=level, jobs=jobs, created=created, progress=step,
            )  # fmt: skip
        show_platforms("flatten-platforms", whole, dst, json=json, quiet=quiet)
        return
    with progress(quiet) as step:
        report = rewrites.flatten(
            src, dst, from_layer=from_layer, to_layer=to_layer, keep_base=keep_base, platform=platform,
            settings=settings, compression=compression, level=level, jobs=jobs, created=created, progress=step,
        )  # fmt: skip
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


def no_choice(platform: str | None) -> None:
    """Raise if --all-platforms stands beside --platform.

    Raises:
        UsageError: it does.
    """
    # The environment's variable is a default, which --all-platforms overrides.
    if platform is not None and platform != os.environ.get("LAYERKIT_PLATFORM"):
        raise UsageError("--all-platforms and --platform exclude each other; give one of them")


def show_platforms(schema: str, report: PlatformsReport, dst: str, *, json: bool, quiet: bool) -> None:
    """Print what was made of a multi-platform image."""
    for warning in dict.fromkeys(warning for one in report.images for warning in getattr(one, "warnings", ())):
        note(f"warning: {warning}", quiet=quiet)
    if json:
        emit_json(schema, report.to_dict())
        return
    if report.manifest and dst.rpartition(":")[2] == "-":  # standard output holds the archive
        note(f"{report.manifest}: {len(report.images)} platforms", quiet=quiet)
        return
    fields([("index", f"{report.name or dst}  {report.manifest or 'not written (--dry-run)'}")])
    table(
        "",
        ["PLATFORM", "LAYERS", "BEFORE", "BLOBS", "BEFORE", "MANIFEST"],
        [
            (name, x.layers_after, x.layers_before, human(x.bytes_after), human(x.bytes_before), x.manifest)
            for name, x in zip(report.platforms, report.images, strict=True)
        ],
        right=(1, 2, 3, 4),
    )


def register(app: typer.Typer) -> None:
    """Add this file's commands to ``app``."""
    app.command("flatten", rich_help_panel="Images")(flatten)
