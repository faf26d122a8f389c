"""``layerkit store``: what the local store holds, whether it is whole, and what can go."""

from __future__ import annotations

from typing import Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import Output, human, line, note, table

group = typer.Typer(no_args_is_help=True, help="Look after the local store.", rich_markup_mode="markdown")


@o.command(group)
def df(store: o.StoreDir = None, json: o.Json = False) -> None:
    """Show how much space data, indexes and the metadata of each map take.

    Example: `layerkit store df`
    """
    with o.open_store(store) as held:
        report = held.df()
    if Output(json).told("store-df", report.to_dict()):
        return
    table(
        "",
        ["WHAT", "COUNT", "ON DISK", "SIZE"],
        [(r.what, f"{r.count:,}", human(r.allocated_bytes), human(r.apparent_bytes)) for r in report.classes],
        right=(1, 2, 3),
    )
    if report.metas:
        table(
            "metadata layers",
            ["IMAGE", "MAP", "FORM", "ON DISK", "ENTRIES", "BYTES/ENTRY"],
            [
                (", ".join(m.images) or "-", m.map or "none (shared by all maps)", m.rendering,
                 human(m.allocated_bytes), f"{m.entries:,}", f"{m.bytes_per_entry:.0f}")
                for m in report.metas
            ],
            right=(3, 4, 5),
        )  # fmt: skip
    note(f"a full copy for each map would take {human(report.saved_bytes)} more")


@o.command(group)
def ls(store: o.StoreDir = None, json: o.Json = False) -> None:
    """List the images in the store, with the maps that have metadata of their own.

    Example: `layerkit store ls --json`
    """
    with o.open_store(store) as held:
        rows = held.ls()
    if Output(json).told("store-ls", {"images": [row.to_dict() for row in rows]}):
        return
    table(
        "",
        ["NAME", "MANIFEST", "PLATFORM", "LAYERS", "MAPS"],
        [(r.names or "-", r.manifest, r.platform, r.layers, [m or "none" for m in r.maps]) for r in rows],
        right=(3,),
    )


@o.command(group)
def rm(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Names or digests as `store ls` shows them.")
    ],
    store: o.StoreDir = None,
    out: Output = Output(),
) -> None:
    """Remove images by name; `layerkit store gc` then frees what no other image uses.

    Example: `layerkit store rm image:latest && layerkit store gc`
    """
    with o.open_store(store) as held:
        for name in names:
            held.remove_image(name)
            out.note(f"removed {name}")
    out.told("store-rm", {"removed": names})


@o.command(group)
def verify(
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove what is damaged; remap or mount the image to get it back.")
    ] = False,
    shallow: Annotated[
        bool, typer.Option("--shallow", help="Check only the sizes of data, not its bytes.")
    ] = False,
    store: o.StoreDir = None,
    json: o.Json = False,
) -> None:
    """Check everything in the store against its digests; exit 1 if something is damaged.

    Example: `layerkit store verify --repair`
    """
    with o.open_store(store) as held:
        findings = held.verify(repair=repair, deep=not shallow)
    damaged = [f for f in findings if f.is_damage]
    whole = {"whole": not damaged, "findings": [f.to_dict() for f in findings]}
    if not Output(json).told("store-verify", whole):
        for finding in findings:
            line(finding)
        line("the store is whole" if not damaged else f"damaged: {len(damaged)}; --repair removes them")
    if damaged and not repair:
        raise typer.Exit(1)


@o.command(group)
def gc(store: o.StoreDir = None, dry_run: o.DryRun = False, json: o.Json = False) -> None:
    """Free what no image and no mount uses: layers, old metadata, leftovers of killed runs.

    Example: `layerkit store gc --dry-run`
    """
    from layerkit.usecases.collect_garbage import collect_garbage

    with o.open_store(store) as held:
        report = collect_garbage(held, dry_run=dry_run)
    if Output(json).told("store-gc", {"dry_run": dry_run, **report.to_dict()}):
        return
    for removed in report.removed:
        line(removed)
    line(f"{'would free' if dry_run else 'freed'} {human(report.freed_bytes)}")
