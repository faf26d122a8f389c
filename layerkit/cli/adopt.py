"""``layerkit adopt``, and what ``layerkit mount`` does with layers that a runtime has unpacked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import Output, fields, human
from layerkit.model.errors import UsageError

if TYPE_CHECKING:
    from layerkit.hosts.adopted.mount import AdoptReport

SCHEMES = ("containers-storage:", "containerd:", "docker-storage:", "folders:")
"""How a reference begins that names layers which a runtime has unpacked."""

Stacking = Annotated[
    str,
    typer.Option(
        "--stacking", metavar="auto|data-only|classic",
        help="For unpacked layers: how metadata is put over them; auto takes what the kernel supports.",
    ),
]  # fmt: skip
Reread = Annotated[bool, typer.Option("--reread", help="For unpacked layers: accept folders that changed.")]


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
        Path, typer.Argument(metavar="DIR", help="A new folder for `upper`, `work` and, if needed, `meta`.")
    ],
    ids: o.Map = o.Map(),
    stacking: Stacking = "auto",
    reread: Reread = False,
    store: o.StoreDir = None,
    out: Output = Output(),
) -> None:
    """Write an upper that shows a runtime's unpacked layers under an id map; mount it with any tool.

    Only what the map changes is written, as stubs without data. `layerkit mount` takes the same references and
    also mounts them.

    Example: `layerkit adopt containers-storage:app /srv/app-upper --uid-map 0:100000:65536 --stacking classic`
    """
    from layerkit.hosts.adopted import mount as adopting
    from layerkit.hosts.adopted.sources import find_unpacked
    from layerkit.hosts.mounts.choose import MountOptions

    settings, mapping, options = o.settings(store), ids.mapping(), MountOptions(stacking=stacking, reread=reread)
    if mapping is None:
        raise UsageError("adopt needs a map: add --uid-map C:H:N or --subuid-name NAME")
    with settings.open_store() as held, out.progress() as step:
        report = adopting.write_upper(find_unpacked(ref), folder, mapping, held, options, progress=step)
    tell("adopt", report, out, ("written", str(folder)))


def tell(schema: str, report: AdoptReport, out: Output, first: tuple[str, str]) -> None:
    """Print what was made of unpacked layers; ``first`` is the first line."""
    out.warn(report.warnings)
    if out.told(schema, report.to_dict()):
        return
    layers = f"{len(report.folders)} folders"
    if report.runtime != "folders":
        layers = f"{len(report.folders)} unpacked by {report.runtime}"
    read = f", {report.read_folders} read now" if report.read_folders else ", none read again"
    fields([
        first,
        ("map", report.map_text or "none"),
        ("layers", layers + read + f" ({report.stacking})"),
        ("metadata", f"{human(report.meta_bytes)} for this map ({report.how})"),
        *([("to mount", report.mount_line)] if report.mount_line else []),
    ])  # fmt: skip
