"""``layerkit finalize``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerkit.cli.render import Output, fields
from layerkit.model.errors import UsageError

if TYPE_CHECKING:
    from layerkit.hosts.finalize.finalize import FinalizeReport


def finalize(
    upper: Annotated[Path, typer.Argument(metavar="UPPER", help="The upperdir of an overlay that is not mounted.")],
    lower: Annotated[
        str | None,
        typer.Option("--lower", metavar="DIR[:DIR…][::DATA…]", help="The lower folders of UPPER, top first."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Change nothing; exit 1 if a change is needed.")] = False,
    undo: Annotated[
        Path | None, typer.Option("--undo", metavar="FILE", help="Undo the changes that FILE lists.")
    ] = None,
    stacking: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="classic|data-only",
            help="How it will be mounted: `UPPER:DIR` (classic; keeps whiteouts in the root) or `UPPER::DIR`.",
        ),
    ] = "classic",
    namespace: Annotated[
        str, typer.Option("--namespace", metavar="trusted|user", help="Namespace of the overlay xattrs.")
    ] = "trusted",
    out: Output = Output(),
) -> None:
    """Complete an upper that was chowned with metacopy=on, so that its lower is read for data only.

    Every folder becomes complete and opaque, and every stub says where its data is. The upper must not be mounted.
    If the command is killed, run it again to go on, or use `--undo` to go back.

    Examples:
    `layerkit finalize upper --lower base --check`

    `layerkit finalize upper --lower app:base --for data-only`, then
    `mount -t overlay -o ro,lowerdir=upper::app::base overlay /mnt`

    `layerkit finalize upper --undo upper.layerkit-undo`
    """
    from layerkit.hosts.finalize import finalize as work
    from layerkit.hosts.mounts.spec import check_word
    from layerkit.metaonly import Namespace

    if undo is not None:
        if lower is not None or check:
            raise UsageError("--undo takes no --lower and no --check: layerkit finalize UPPER --undo FILE")
        steps = work.undo(upper, undo)
        if not out.told("finalize-undo", {"upper": str(upper), "steps": steps}):
            out.note(f"undone: {steps:,} changes in {upper}")
        return
    if lower is None:
        raise UsageError("--lower is missing: give the folders that UPPER was mounted over, top first")
    check_word(stacking, "--for", ("classic", "data-only"))
    check_word(namespace, "--namespace", tuple(Namespace))
    result = work.finalize(
        upper, lower, check=check, keep_root_whiteouts=stacking == "classic", namespace=Namespace(namespace)
    )
    if not out.told("finalize", result.to_dict()):
        _show(result, "would " if check else "")
        if check:
            out.note(*result.examples)
    if check and not result.final:
        raise typer.Exit(1)


def _show(result: FinalizeReport, would: str) -> None:
    rows = [("upper", result.upper)]
    if result.final:
        rows.append(("state", "already final: nothing to do"))
    else:
        rows += [
            (f"{would}make", f"{result.made:,} entries that only the lower layers have"),
            (f"{would}redirect", f"{result.redirects:,} stubs"),
            (f"{would}close", f"{result.opaque:,} folders"),
            (f"{would}remove", f"{result.whiteouts:,} whiteouts"),
        ]
    if result.root_whiteouts:
        rows.append(("root", f"keeps {result.root_whiteouts} whiteouts; --for data-only removes them"))
    if result.undo_file:
        rows.append(("undo", f"layerkit finalize {result.upper} --undo {result.undo_file}"))
    fields(rows)
