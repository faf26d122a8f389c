"""``layerkit adopt``, and what ``layerkit mount`` does with layers that a runtime has unpacked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import emit_json, fields, human, note, progress
from layerkit.model.errors import UsageError

if TYPE_CHECKING:
    from layerkit.hosts.adopted.mount import AdoptReport
    from layerkit.idmap import Mapping

_SCHEMES = ("containers-storage:", "containerd:", "docker-storage:", "folders:")

Stacking = Annotated[
    str,
    typer.Option(
        "--stacking",
        metavar="auto|data-only|classic",
        help="For unpacked layers: how metadata lies over them; auto takes what the kernel can do.",
    ),
]
Reread = Annotated[bool, typer.Option("--reread", help="For unpacked layers: accept folders that changed.")]


def is_unpacked(ref: str) -> bool:
    """Return whether ``ref`` names layers that a runtime has unpacked."""
    return ref.startswith(_SCHEMES)


def mount_unpacked(
    ref: str,
    target: Path,
    mapping: Mapping | None,
    store: Path,
    *,
    stacking: str,
    rendering: str | None,
    own_meta: bool,
    upper: Path | None,
    work: Path | None,
    reread: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Mount unpacked layers and say so."""
    from layerkit.api import open as api

    with progress(quiet) as step:
        report = api.mount_unpacked(
            ref, target, mapping, stacking=stacking, rendering=rendering, own_meta=own_meta,
            upper=upper, work=work, reread=reread, store=store, progress=step,
        )  # fmt: skip
    _tell(
        report,
        "mount",
        json,
        quiet,
        [("mounted", f"{report.name} on {target}" + ("" if upper else " (read-only)"))],
    )


def adopt(
    ref: Annotated[
        str,
        typer.Argument(
            metavar="REF",
            help="Unpacked layers: `containers-storage:NAME`, `containerd:[ROOT@NAMESPACE]NAME`, "
            "`docker-storage:NAME`, `folders:UPPER:...:LOWEST`.",
        ),
    ],
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A new folder; gets `upper`, `work` and maybe `meta`.")
    ],
    uid_map: o.UidMap = None,
    gid_map: o.GidMap = None,
    subuid_name: o.SubuidName = None,
    overflow_id: o.OverflowId = None,
    squash: o.Squash = False,
    stacking: Stacking = "auto",
    reread: Reread = False,
    store: o.StoreDir = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write an upper that shows a runtime's unpacked layers under an id map, to be mounted without layerkit.

    Only what the map changes is written, as stubs without data. `layerkit mount` takes the same references and
    mounts them itself.

    Example: `layerkit adopt containers-storage:app /srv/app-upper --uid-map 0:100000:65536 --stacking classic`
    """
    from layerkit.api import open as api
    from layerkit.hosts.adopted import mount as adopting
    from layerkit.hosts.adopted.sources import find_unpacked
    from layerkit.usecases.settings import Settings

    mapping = api.mapping(uid_map, gid_map, subuid_name=subuid_name, overflow_id=overflow_id, squash=squash)
    if mapping is None:
        raise UsageError("adopt without a map would write nothing: add --uid-map C:H:N or --subuid-name NAME")
    settings = Settings(o.store_dir(store))
    with settings.open_store() as held, progress(quiet) as step:
        report = adopting.write_upper(
            find_unpacked(ref),
            folder,
            mapping,
            held,
            stacking=stacking,
            reread=reread,
            limits=settings.bounds,
            progress=step,
        )
    _tell(report, "adopt", json, quiet, [("written", str(folder))])


def _tell(report: AdoptReport, schema: str, json: bool, quiet: bool, head: list[tuple[str, object]]) -> None:
    for warning in report.warnings:
        note(f"warning: {warning}", quiet=quiet)
    if json:
        emit_json(schema, report.to_dict())
        return
    layers = f"{len(report.folders)} unpacked by {report.runtime}" if report.runtime != "folders" else (
        f"{len(report.folders)} folders"
    )  # fmt: skip
    read = f", {report.read_folders} read now" if report.read_folders else ", none read again"
    fields([
        *head,
        ("map", report.map_text or "none"),
        ("layers", layers + read + f" ({report.stacking})"),
        ("metadata", f"{human(report.meta_bytes)} for this map ({report.how})"),
        *([("to mount", report.mount_line)] if report.mount_line else []),
    ])  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add this file's commands to ``app``."""
    app.command("adopt", rich_help_panel="Host")(adopt)
