"""``layerkit inspect`` and ``verify``: what an image holds, what a map would do, and whether it is whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerkit.cli import options as o
from layerkit.cli.render import Output, fields, human, line, table

if TYPE_CHECKING:
    from layerkit.model.reports import InspectReport


def inspect(ref: o.Ref, ids: o.Map = o.Map(), how: o.Bringing = o.Bringing(), out: Output = Output()) -> None:
    """Show an image's layers, entries, owners and xattrs, and what a map would do to it.

    Examples:
    `layerkit inspect image.tar`

    `layerkit inspect image.tar --uid-map 0:100000:65536 --json`
    """
    mapping = ids.mapping()
    with how.open(ref) as image, out.progress() as step:
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
            (row.number, human(row.blob_bytes), row.diff_id, *map("{:,}".format, (row.entries, row.whiteouts)),
             human(row.tar_bytes))
            for row in report.layers
        ],
        right=(0, 1, 3, 4, 5),
    )  # fmt: skip
    table("", ["KIND", "ENTRIES"], [(k, f"{v:,}") for k, v in report.kinds.items()], right=(1,))
    width = 3 if report.map_text else 2
    for what, rows in (("users", report.uids), ("groups", report.gids)):
        cells = [(r.id, f"{r.entries:,}", r.becomes)[:width] for r in rows]
        table(what, ["ID", "ENTRIES", "BECOMES"][:width], cells, right=(0, 1, 2))
    if report.xattrs:
        table("", ["XATTR", "INODES"], [(k, f"{v:,}") for k, v in report.xattrs.items()], right=(1,))
    for problem in report.problems:
        line(f"! {problem}")


def verify(ref: o.Ref, how: o.Reading = o.Reading(), out: Output = Output()) -> None:
    """Check an image: digests, sizes, structure, and every remap artifact attached to it.

    The whole image is read. An artifact is made again from the image, and its bytes must be equal. Nothing is
    stored. To check the local store, use `layerkit store verify`.

    Example: `layerkit verify oci-archive:remapped.tar`
    """
    with how.open(ref) as image, out.progress() as step:
        report = image.verify(progress=step)
    told = out.answered("verify", report, [
        ("image", f"{report.name}  {report.manifest}"),
        ("layers", f"{report.layers}, every digest and size is right"),
        ("tree", f"{report.entries:,} entries, {report.tree_digest}"),
    ])  # fmt: skip
    for artifact in report.artifacts if told else ():
        line(f"artifact  {artifact} agrees with the image")
