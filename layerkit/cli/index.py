"""``layerkit index``: the indexes of layers, published beside images."""

from __future__ import annotations

from typing import Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import Output, fields, human, table

group = typer.Typer(
    no_args_is_help=True, help="Publish what is known of layers, so that nobody has to read them again.",
    rich_markup_mode="markdown",
)  # fmt: skip


@group.command()
def push(
    src: o.Ref,
    dst: Annotated[
        str | None,
        typer.Argument(
            metavar="[DST]", help="Where image and indexes go; without it they are attached where it is."
        ),
    ] = None,
    mount_from: Annotated[
        list[str] | None,
        typer.Option("--mount-from", metavar="REPOSITORY", help="One of DST's registry that may have some."),
    ] = None,
    platform: o.Platform = None,
    store: o.StoreDir = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Attach the indexes of an image's layers to it, as an OCI artifact.

    With them a remap for a registry reads no layer, and layers that images share are indexed once. Layers whose
    index the local store keeps are not read for it.

    Examples:
    `layerkit index push docker://registry.example.com/team/app:v1`

    `layerkit index push oci:images:app docker://registry.example.com/team/app:v1`
    """
    from layerkit.api import registry

    out = Output(json, quiet)
    with out.progress() as step:
        report = registry.push_indexes(
            src, dst, platform=platform, settings=o.settings(store), mount_from=mount_from or (), progress=step
        )
    if out.told("index-push", report.to_dict()):
        return
    share = 100 * report.bytes / report.image_bytes if report.image_bytes else 0
    fields([
        ("image", f"{report.name}  {report.manifest}"),
        ("artifact", report.artifact),
        ("indexes", f"{human(report.bytes)} for {report.layers} layers, {share:.2f} % of the image's bytes"),
        ("sent", f"{report.blobs} indexes; {report.layers_read} layers read for them"),
    ])  # fmt: skip


@group.command()
def pull(
    ref: o.Ref,
    platform: o.Platform = None,
    store: o.StoreDir = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Fetch the published indexes of an image, or its layers' own tables of contents (eStargz, zstd:chunked).

    No layer is read. What comes this way is unproven: it serves `inspect` and remaps that are published, and is
    kept apart from the store. What is mounted here is always read from the layers themselves.

    Example: `layerkit index pull docker://registry.example.com/team/app:v1`
    """
    from layerkit.api import registry

    out = Output(json, quiet)
    report = registry.pull_indexes(ref, platform=platform, settings=o.settings(store))
    out.warn(report.notes)
    if out.told("index-pull", report.to_dict()):
        return
    table(
        "",
        ["LAYER", "ENTRIES", "FROM"],
        [(layer.digest, f"{layer.entries:,}", _ORIGINS[layer.origin]) for layer in report.layers],
        right=(1,),
    )
    out.note(f"read {human(report.bytes)} instead of {human(report.image_bytes)}")


_ORIGINS = {
    "store": "the local store (proven)",
    "cache": "an earlier pull (unproven)",
    "artifact": "a published index (unproven)",
    "toc": "its table of contents (unproven)",
}
