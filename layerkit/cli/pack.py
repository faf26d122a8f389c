"""``layerkit pack``: the changes in a root filesystem as a layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import Output, fields, human


def pack(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A root filesystem, as `layerkit unpack` writes it.")
    ],
    dst: o.Dst,
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
    compression: o.Compression = "gzip",
    level: o.Level = None,
    created: o.Created = None,
    platform: o.Platform = None,
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
    from layerkit.api.open import open_image
    from layerkit.usecases.from_folder import PackOptions
    from layerkit.usecases.from_folder import pack as use_case
    from layerkit.usecases.settings import RewriteOptions

    out, settings = Output(json, quiet, dst), o.settings(store)
    mapping = o.mapping(uid_map, gid_map, subuid_name)
    options = PackOptions(RewriteOptions.of(compression, level, created=created), mapping, message, checksum)
    with (
        open_image(base, platform=platform, settings=settings) as image,
        out.progress() as step,
        image.kept(step) as work,
    ):
        result = use_case(folder, work, settings.destination(dst, image.source), options)
    out.warn(result.warnings)
    if out.told("pack", result.to_dict()) or out.holds_archive:
        return
    fields([
        ("image", f"{dst}  {result.manifest}"),
        ("base", f"{result.name}  {result.base}"),
        ("layer", f"{result.layer}  {human(result.layer_bytes)}"),
        ("changes", f"{result.added:,} added, {result.changed:,} changed, {result.removed:,} removed"),
        ("made in", f"{result.seconds:.2f} s, {human(result.hashed_bytes)} compared"),
    ])  # fmt: skip
