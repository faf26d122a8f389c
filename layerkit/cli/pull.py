"""``layerkit pull``: an image from a registry into the store, ready for a map."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import Output, fields, human, next_mount


def pull(
    ref: o.Ref,
    uid_map: o.UidMap = None,
    gid_map: o.GidMap = None,
    subuid_name: o.SubuidName = None,
    overflow_id: o.OverflowId = None,
    squash: o.Squash = False,
    key: Annotated[
        Path | None,
        typer.Option(
            "--key", metavar="FILE", help="Public key: a published remap counts only if it has signed it."
        ),
    ] = None,
    require_published: Annotated[
        bool, typer.Option("--require-published", help="Fail where no published remap is right.")
    ] = False,
    own_meta: o.OwnMeta = False,
    data: o.Data = "auto",
    platform: o.Platform = None,
    store: o.StoreDir = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Bring an image into the local store for a map, and verify the remap that is published beside it.

    Every layer is read and checked. A published remap (see `layerkit remap SRC docker://…`) is compared byte for
    byte with what the layers make of the map; where there is none, or a wrong one, the remap is made here. Nothing
    is ever mounted that did not verify.

    Examples:
    `layerkit pull docker://registry.example.com/team/app:v1 --uid-map 0:100000:65536`

    `layerkit pull docker://registry.example.com/team/app:v1 --subuid-name alice --key cosign.pub`
    """
    from layerkit.api import registry

    out, mapping = Output(json, quiet), o.mapping(uid_map, gid_map, subuid_name, overflow_id, squash)
    with out.progress() as step:
        report = registry.pull(
            ref, mapping, key=key, require_published=require_published, own_meta=own_meta, platform=platform,
            settings=o.settings(store, data=data), progress=step,
        )  # fmt: skip
    out.warn(f"not used: {text}" for text in report.refused)
    if out.told("pull", report.to_dict()):
        return
    made = report.remap
    if report.published:
        published = f"{report.published} agrees{', signed by the key' if report.signed else ''}"
    else:
        published = "none that is right for this map; made here"
    fields([
        ("image", f"{made.name}  {made.manifest}"),
        ("map", made.map_text or "none"),
        ("entries", f"{made.entries:,} in {made.layers} layers, {human(made.data_bytes)} of data"),
        ("published", published if mapping is not None else "not looked for without a map"),
        ("made in", f"{made.seconds:.2f} s, {made.layers_read} layers read"),
    ])  # fmt: skip
    next_mount(made, out)
