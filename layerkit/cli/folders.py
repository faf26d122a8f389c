"""``layerkit unpack`` and ``pack``: an image as a plain root filesystem, and what changed in it as a layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import Output, human


def unpack(
    src: o.Ref,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The root filesystem: a new folder, or an empty one.")
    ],
    ids: o.Map = o.Map(),
    copy: Annotated[
        str,
        typer.Option(
            "--copy",
            metavar="auto|reflink|bytes",
            help="Share blocks with the store if the filesystem can (auto), always (reflink), or never (bytes).",
        ),
    ] = "auto",
    how: o.Bringing = o.Bringing(),
    out: Output = Output(),
) -> None:
    """Write an image as a plain root filesystem, with mapped owners if a map is given.

    DIR appears whole or not at all. The layers are read into the local store, so a second run is faster;
    `layerkit store gc` removes them again.

    Examples:
    `layerkit unpack image.tar rootfs`

    `layerkit unpack oci:images:app rootfs --uid-map 0:100000:65536`

    `layerkit unpack store:app /srv/xfs/rootfs --store /srv/xfs/store --copy reflink`
    """
    mapping = ids.mapping()
    with how.open(src) as image, out.progress() as step:
        result = image.unpack(folder, mapping, copy=copy, progress=step)
    shared = f", {human(result.shared_bytes)} shared with the store" if result.shared_bytes else ""
    out.answered("unpack", result, [
        ("image", f"{result.name}  {result.manifest}"),
        ("map", result.map_text or "none"),
        ("folder", result.target),
        ("entries", f"{result.entries:,}, {human(result.data_bytes)} of data{shared}"),
        ("made in", f"{result.seconds:.2f} s, {result.layers_read} of {result.layers} layers read"),
    ], result.warnings)  # fmt: skip


def pack(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A root filesystem, as `layerkit unpack` writes it.")
    ],
    dst: o.Dst,
    base: Annotated[str, typer.Option("--base", metavar="SRC", help="The image that DIR was unpacked from.")],
    ids: o.PlainMap = o.PlainMap(),
    checksum: Annotated[
        bool,
        typer.Option("--checksum", help="Read every file, also those whose size and time are the same as in SRC."),
    ] = False,
    message: Annotated[str, typer.Option("--message", metavar="TEXT", help="Comment in the history.")] = "",
    compression: o.Compression = "gzip",
    level: o.Level = None,
    created: o.Created = None,
    how: o.Reading = o.Reading(),
    out: Output = Output(),
) -> None:
    """Write SRC with the changes in DIR as one more layer.

    Removed files become whiteouts. If DIR was unpacked with a map, give the same map, so that owners are mapped
    back. Without changes the layer is empty. Sockets and the host's security labels are left out.

    Examples:
    `layerkit pack rootfs oci:images:app-2 --base oci:images:app`

    `layerkit pack rootfs app-2.tar --base app.tar --uid-map 0:100000:65536 --message "settings of the site"`
    """
    from layerkit.usecases.from_folder import PackOptions
    from layerkit.usecases.from_folder import pack as use_case
    from layerkit.usecases.settings import RewriteOptions

    out, rewrite = out.toward(dst), RewriteOptions.of(compression, level, created=created)
    options = PackOptions(rewrite, ids.mapping(), message, checksum)
    with how.open(base) as image, out.progress() as step, image.kept(step) as work:
        result = use_case(folder, work, image.settings.destination(dst, image.source), options)
    out.answered("pack", result, [
        ("image", f"{dst}  {result.manifest}"),
        ("base", f"{result.name}  {result.base}"),
        ("layer", f"{result.layer}  {human(result.layer_bytes)}"),
        ("changes", f"{result.added:,} added, {result.changed:,} changed, {result.removed:,} removed"),
        ("made in", f"{result.seconds:.2f} s, {human(result.hashed_bytes)} compared"),
    ], result.warnings)  # fmt: skip
