"""``layerkit pack``: the changes in a root filesystem as a layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.options import CompressionOption, Created, Dst, Level
from layerkit.cli.render import emit_json, fields, human, note, progress


def pack(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A root filesystem, as `layerkit unpack` writes it.")
    ],
    dst: Dst,
    base: Annotated[str, typer.Option("--base", metavar="SRC", help="The image that DIR was unpacked from.")],
    uid_map: o.UidMap = None,
    gid_map: o.GidMap = None,
    subuid_name: o.SubuidName = None,
    checksum: Annotated[
        bool,
        typer.Option(
            "--checksum", help="Read every file; else those with the size and time of the base count as it."
        ),
    ] = False,
    message: Annotated[str, typer.Option("--message", metavar="TEXT", help="What the history says of it.")] = "",
    compression: CompressionOption = "gzip",
    level: Level = None,
    created: Created = None,
    platform: o.PlatformOption = None,
    store: o.StoreDir = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write an image with what changed in DIR since SRC as one more layer.

    What was removed becomes whiteouts. Of a folder that was unpacked with a map, give the same map: owners are
    mapped back. Without a change the layer is empty. Sockets and the host's security labels are left out.

    Examples:
    `layerkit pack rootfs oci:images:app-2 --base oci:images:app`

    `layerkit pack rootfs app-2.tar --base app.tar --uid-map 0:100000:65536 --message "settings of the site"`
    """
    from layerkit.api import open as api
    from layerkit.pack import Packing

    mapping = api.mapping(uid_map, gid_map, subuid_name=subuid_name)
    settings = api.Settings(store=o.store_dir(store))
    with api.open_image(base, platform=platform, settings=settings) as image, progress(quiet) as step:
        result = image.pack(
            folder, dst, mapping, packing=Packing.parse(compression, level), created=created, message=message,
            checksum=checksum, progress=step,
        )  # fmt: skip
    for warning in result.warnings:
        note(f"warning: {warning}", quiet=quiet)
    # An archive on standard output leaves no room there for anything else.
    if dst in ("-", "oci-archive:-", "docker-archive:-"):
        return
    if json:
        emit_json("pack", result.to_dict())
        return
    fields(
        [
            ("image", f"{dst}  {result.manifest}"),
            ("base", f"{result.name}  {result.base}"),
            ("layer", f"{result.layer}  {human(result.layer_bytes)}"),
            ("changes", f"{result.added:,} added, {result.changed:,} changed, {result.removed:,} removed"),
            ("made in", f"{result.seconds:.2f} s, {human(result.hashed_bytes)} compared"),
        ]
    )


def register(app: typer.Typer) -> None:
    """Add this file's commands to ``app``."""
    app.command("pack", rich_help_panel="Images")(pack)
