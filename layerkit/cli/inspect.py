"""``layerkit inspect``, ``verify`` and ``analyze``: what an image holds, whether it is whole, what it wastes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import Output, analysis_page, fields, human, line, note, table, write_page
from layerkit.model.errors import UsageError, show_path

if TYPE_CHECKING:
    from layerkit.model.reports import InspectReport
    from layerkit.usecases.analyze import AnalyzeReport, SharingReport

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


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


def analyze(
    refs: Annotated[list[str], typer.Argument(metavar="REF...", help="Images, as for `layerkit inspect`.")],
    html: o.Html = None,
    fail_over: Annotated[
        str | None,
        typer.Option(
            "--fail-over",
            metavar="SIZE|PERCENT",
            help="Exit 1 if an image wastes more than this: 50MB, 20MiB, or 5% of its stored bytes.",
        ),
    ] = None,
    top: Annotated[int, typer.Option("--top", min=0, metavar="N", help="How many worst paths to show.")] = 10,
    how: o.Reading = o.Reading(),
    out: Output = Output(),
) -> None:
    """Show what each layer of an image adds, duplicates for a metadata change, and hides.

    For several images it also shows what they share and what they could share.

    Examples:
    `layerkit analyze image.tar`

    `layerkit analyze image.tar --html report.html`

    `layerkit analyze oci:images:app --fail-over 5% --quiet`
    """
    from layerkit.usecases.analyze import sharing

    limit = parse_limit(fail_over) if fail_over is not None else None
    if html is not None and len(refs) > 1:
        raise UsageError(f"--html shows one image, not {len(refs)}; run the command once for each image")
    reports, held = [], []
    with out.progress() as step:
        for ref in refs:
            with how.open(ref) as image:
                report, indexes = image.analyze(progress=step)
            reports.append(report)
            held.append((report.name, indexes))
    shared = sharing(held) if len(refs) > 1 else None
    if html is not None:
        write_page(html, analysis_page(reports[0]))
    images = [report.to_dict() for report in reports]
    if not out.told("analyze", {"images": images, "sharing": shared.to_dict() if shared else None}):
        for report in reports:
            _show_use(report, top)
        if shared:
            _show_sharing(shared)
    over = [report for report in reports if limit is not None and limit < _used(report, fail_over or "")]
    for report in over:
        note(
            f"layerkit: {show_path(report.name)}: {human(report.wasted_bytes)} "
            f"({100 - report.efficiency_percent:.2f} %) wasted, more than {fail_over}; see `layerkit optimize`"
        )
    if over:
        raise typer.Exit(1)


def parse_limit(text: str) -> float:
    """Return the number that ``text`` spells: bytes, or per cent where it ends in ``%``.

    Raises:
        UsageError: neither a size nor a percentage.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(%|[kKMG]?i?B?)", text.strip(), re.ASCII)
    unit = found[2].upper() if found else "?"
    if unit in ("K", "M", "G", "KI", "MI", "GI"):
        unit += "B"
    if found is None or (unit != "%" and unit not in _UNITS):
        raise UsageError(f"--fail-over {text!r}: want a size or a percentage, for example 50MB, 20MiB or 5%")
    return float(found[1]) * _UNITS.get(unit, 1)


def _used(report: AnalyzeReport, limit: str) -> float:
    if not limit.strip().endswith("%"):
        return report.wasted_bytes
    return 100 * report.wasted_bytes / report.file_bytes if report.file_bytes else 0.0


def _show_use(report: AnalyzeReport, top: int) -> None:
    fields([
        ("image", f"{show_path(report.name)}  {report.manifest}"),
        ("files", f"{human(report.file_bytes)} in {len(report.layers)} layers"),
        ("compressed", human(report.blob_bytes)),
        ("duplicated", f"{human(report.duplicated_bytes)}  {_causes(report.causes)}".rstrip()),
        ("hidden", human(report.hidden_bytes)),
        ("efficiency", f"{report.efficiency_percent} %"),
    ])  # fmt: skip
    table(
        "",
        ["LAYER", "BLOB", "FILES", "NEW", "DUPLICATED", "CAUSE", "HIDDEN", "WHITEOUTS", "IDLE", "MADE BY"],
        [
            (
                x.number, human(x.blob_bytes), human(x.file_bytes), human(x.new_bytes), human(x.duplicated_bytes),
                _causes(x.causes), human(x.hidden_bytes), f"{x.whiteouts:,}", f"{x.idle_whiteouts:,}",
                show_path(x.history)[:60],
            )
            for x in report.layers
        ],
        right=(0, 1, 2, 3, 4, 6, 7, 8),
    )  # fmt: skip
    worst = report.paths[:top]
    if worst:
        table(
            "",
            ["WASTED", "CAUSE", "LAYERS", "PATH"],
            [(human(p.bytes), _causes(p.causes), ",".join(map(str, p.layers)), p.path) for p in worst],
            right=(0,),
        )
        if len(report.paths) > top:
            line(f"and {len(report.paths) - top:,} more paths")


def _causes(causes: dict[str, int]) -> str:
    return ", ".join(f"{cause} {human(size)}" for cause, size in causes.items())


def _show_sharing(shared: SharingReport) -> None:
    fields([
        ("images", len(shared.images)),
        ("files", f"{human(shared.file_bytes)} in all layers of all images"),
        ("shared", f"{human(shared.same_layer_bytes)} by equal layers"),
        ("could share", f"{human(shared.same_file_bytes)} more: equal files in different layers"),
        ("distinct", human(shared.distinct_bytes)),
    ])  # fmt: skip
    table(
        "",
        ["BOTH HOLD", "IMAGE", "IMAGE"],
        [(human(size), show_path(shared.images[a]), show_path(shared.images[b])) for a, b, size in shared.pairs],
        right=(0,),
    )
