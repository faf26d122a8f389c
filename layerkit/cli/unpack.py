"""``layerkit unpack``: an image as a plain root filesystem."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import Output, fields, human


def unpack(
    src: o.Ref,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The root filesystem: a new folder, or an empty one.")
    ],
    uid_map: o.UidMap = None,
    gid_map: o.GidMap = None,
    subuid_name: o.SubuidName = None,
    overflow_id: o.OverflowId = None,
    squash: o.Squash = False,
    copy: Annotated[
        str,
        typer.Option(
            "--copy",
            metavar="auto|reflink|bytes",
            help="Share blocks with the store where the filesystem can (auto), insist on it (reflink), or never.",
        ),
    ] = "auto",
    data: o.Data = "auto",
    platform: o.Platform = None,
    store: o.StoreDir = None,
    jobs: o.Jobs = 1,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write an image as a plain root filesystem, with mapped owners if a map is given.

    DIR appears whole or not at all. The layers are read into the local store, so that a second time is
    faster; `layerkit store gc` takes them away again.

    Examples:
    `layerkit unpack image.tar rootfs`

    `layerkit unpack oci:images:app rootfs --uid-map 0:100000:65536`

    `layerkit unpack store:app /srv/xfs/rootfs --store /srv/xfs/store --copy reflink`
    """
    from layerkit.api.open import open_image

    out, mapping = Output(json, quiet), o.mapping(uid_map, gid_map, subuid_name, overflow_id, squash)
    settings = o.settings(store, data=data, jobs=jobs)
    with open_image(src, platform=platform, settings=settings) as image, out.progress() as step:
        result = image.unpack(folder, mapping, copy=copy, progress=step)
    out.warn(result.warnings)
    if out.told("unpack", result.to_dict()):
        return
    shared = f", {human(result.shared_bytes)} shared with the store" if result.shared_bytes else ""
    fields([
        ("image", f"{result.name}  {result.manifest}"),
        ("map", result.map_text or "none"),
        ("folder", result.target),
        ("entries", f"{result.entries:,}, {human(result.data_bytes)} of data{shared}"),
        ("made in", f"{result.seconds:.2f} s, {result.layers_read} of {result.layers} layers read"),
    ])  # fmt: skip
