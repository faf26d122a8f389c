"""``layerkit inspect``: an image, its layers, the ids in use, and what a map would do."""

from __future__ import annotations

import typer

from layerkit.cli import options as o
from layerkit.cli.render import emit_json, fields, human, line, progress, table


def inspect(
    ref: o.Ref,
    uid_map: o.UidMap = None,
    gid_map: o.GidMap = None,
    subuid_name: o.SubuidName = None,
    overflow_id: o.OverflowId = None,
    squash: o.Squash = False,
    data: o.Data = "auto",
    platform: o.PlatformOption = None,
    store: o.StoreDir = None,
    jobs: o.Jobs = 1,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Show an image: layers, entries, owners, xattrs, and what a map would do to it.

    Examples:
    `layerkit inspect image.tar`

    `layerkit inspect image.tar --uid-map 0:100000:65536 --json`
    """
    from layerkit.api import open as api

    mapping = api.mapping(uid_map, gid_map, subuid_name=subuid_name, overflow_id=overflow_id, squash=squash)
    settings = api.Settings(store=o.store_dir(store), data=data, jobs=jobs)
    with api.open_image(ref, platform=platform, settings=settings) as image, progress(quiet) as step:
        report = image.inspect(mapping, progress=step)
    if json:
        emit_json("inspect", report.to_dict())
        return
    fields(
        [
            ("image", f"{report.name}  {report.manifest}"),
            ("platform", report.platform),
            ("tree", f"{report.entries:,} names, {report.inodes:,} inodes, {human(report.data_bytes)}"),
            ("tree digest", report.tree_digest),
        ]
    )
    table(
        "",
        ["LAYER", "BLOB", "DIFF ID", "ENTRIES", "WHITEOUTS", "TAR"],
        [
            (i, human(row.blob_bytes), row.diff_id, f"{row.entries:,}", f"{row.whiteouts:,}", human(row.tar_bytes))
            for i, row in enumerate(report.layers)
        ],
        right=(0, 1, 3, 4, 5),
    )
    table("", ["KIND", "ENTRIES"], [(k, f"{v:,}") for k, v in report.kinds.items()], right=(1,))
    heads = ["ID", "ENTRIES", "BECOMES"] if mapping else ["ID", "ENTRIES"]
    for what, rows in (("users", report.uids), ("groups", report.gids)):
        cells = [(r.id, f"{r.entries:,}", r.becomes) if mapping else (r.id, f"{r.entries:,}") for r in rows]
        table(what, heads, cells, right=(0, 1, 2))
    if report.xattrs:
        table("", ["XATTR", "INODES"], [(k, f"{v:,}") for k, v in report.xattrs.items()], right=(1,))
    for problem in report.problems:
        line(f"! {problem}")


def register(app: typer.Typer) -> None:
    """Add this file's commands to ``app``."""
    app.command("inspect", rich_help_panel="Images")(inspect)
