"""``layerkit inspect``: an image, its layers, the ids in use, and what a map would do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerkit.cli import options as o
from layerkit.cli.render import Output, fields, human, line, table

if TYPE_CHECKING:
    from layerkit.model.reports import InspectReport


def inspect(
    ref: o.Ref,
    uid_map: o.UidMap = None,
    gid_map: o.GidMap = None,
    subuid_name: o.SubuidName = None,
    overflow_id: o.OverflowId = None,
    squash: o.Squash = False,
    data: o.Data = "auto",
    platform: o.Platform = None,
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
    from layerkit.api.open import open_image

    out, mapping = Output(json, quiet), o.mapping(uid_map, gid_map, subuid_name, overflow_id, squash)
    settings = o.settings(store, data=data, jobs=jobs)
    with open_image(ref, platform=platform, settings=settings) as image, out.progress() as step:
        report = image.inspect(mapping, progress=step)
    if not out.told("inspect", report.to_dict()):
        _show(report)


def _show(report: InspectReport) -> None:
    fields([
        ("image", f"{report.name}  {report.manifest}"),
        ("platform", report.platform),
        ("tree", f"{report.entries:,} names, {report.inodes:,} inodes, {human(report.data_bytes)}"),
        ("tree digest", report.tree_digest),
    ])  # fmt: skip
    table(
        "",
        ["LAYER", "BLOB", "DIFF ID", "ENTRIES", "WHITEOUTS", "TAR"],
        [
            (
                row.number,
                human(row.blob_bytes),
                row.diff_id,
                f"{row.entries:,}",
                f"{row.whiteouts:,}",
                human(row.tar_bytes),
            )
            for row in report.layers
        ],
        right=(0, 1, 3, 4, 5),
    )
    table("", ["KIND", "ENTRIES"], [(k, f"{v:,}") for k, v in report.kinds.items()], right=(1,))
    width = 3 if report.map_text else 2
    for what, rows in (("users", report.uids), ("groups", report.gids)):
        cells = [(r.id, f"{r.entries:,}", r.becomes)[:width] for r in rows]
        table(what, ["ID", "ENTRIES", "BECOMES"][:width], cells, right=(0, 1, 2))
    if report.xattrs:
        table("", ["XATTR", "INODES"], [(k, f"{v:,}") for k, v in report.xattrs.items()], right=(1,))
    for problem in report.problems:
        line(f"! {problem}")
