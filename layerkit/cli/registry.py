"""``layerkit pull``: an image from a registry, ready for a map; ``layerkit index``: what is known of layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import Output, human, next_mount, table

group = typer.Typer(
    no_args_is_help=True, help="Publish indexes of layers, so that nobody has to read the layers again.",
    rich_markup_mode="markdown",
)  # fmt: skip


@o.command(group, "push")
def push_indexes(
    src: o.Ref,
    dst: Annotated[
        str | None,
        typer.Argument(metavar="[DST]", help="Where the image and its indexes go [default: to SRC itself]."),
    ] = None,
    mount_from: Annotated[
        list[str] | None,
        typer.Option("--mount-from", metavar="REPOSITORY", help="A repository there that may have some."),
    ] = None,
    how: o.Reading = o.Reading(),
    out: Output = Output(),
) -> None:
    """Attach the indexes of an image's layers to it, as an OCI artifact.

    With them a remap for a registry reads no layer, and a layer that images share is indexed once. A layer is not
    read if the local store has its index.

    Examples:
    `layerkit index push docker://registry.example.com/team/app:v1`

    `layerkit index push oci:images:app docker://registry.example.com/team/app:v1`
    """
    from layerkit.api import registry

    with out.progress() as step:
        report = registry.push_indexes(
            src, dst, platform=how.platform, settings=how.settings, mount_from=mount_from or (), progress=step
        )
    share = 100 * report.bytes / report.image_bytes if report.image_bytes else 0
    out.answered("index-push", report, [
        ("image", f"{report.name}  {report.manifest}"),
        ("artifact", report.artifact),
        ("indexes", f"{human(report.bytes)} for {report.layers} layers, {share:.2f} % of the image's bytes"),
        ("sent", f"{report.blobs} indexes; {report.layers_read} layers read for them"),
    ])  # fmt: skip


@o.command(group, "pull")
def pull_indexes(ref: o.Ref, how: o.Reading = o.Reading(), out: Output = Output()) -> None:
    """Fetch the published indexes of an image, or its layers' own tables of contents (eStargz, zstd:chunked).

    No layer is read. Such indexes are unproven: only `inspect` and published remaps use them, and they are kept
    apart from the store. Mounts here always use what was read from the layers themselves.

    Example: `layerkit index pull docker://registry.example.com/team/app:v1`
    """
    from layerkit.api import registry

    report = registry.pull_indexes(ref, platform=how.platform, settings=how.settings)
    if out.told("index-pull", report.to_dict(), report.notes):
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


def pull(
    ref: o.Ref,
    ids: o.Map = o.Map(),
    key: Annotated[
        Path | None,
        typer.Option(
            "--key", metavar="FILE", help="Public key; a published remap must be signed with it to be used."
        ),
    ] = None,
    require_published: Annotated[
        bool, typer.Option("--require-published", help="Fail if no published remap is correct.")
    ] = False,
    own_meta: o.OwnMeta = False,
    data: o.Data = "auto",
    how: o.Reading = o.Reading(),
    out: Output = Output(),
) -> None:
    """Fetch an image into the local store for a map, and verify the remap published for it.

    Every layer is read and checked. A published remap (see `layerkit remap SRC docker://…`) is compared byte for
    byte with a remap made from the layers. If there is none, or a wrong one, the remap is made here. Only what
    was verified is ever mounted.

    Examples:
    `layerkit pull docker://registry.example.com/team/app:v1 --uid-map 0:100000:65536`

    `layerkit pull docker://registry.example.com/team/app:v1 --subuid-name alice --key cosign.pub`
    """
    from layerkit.api import registry

    mapping = ids.mapping()
    with out.progress() as step:
        report = registry.pull(
            ref, mapping, key=key, require_published=require_published, own_meta=own_meta, platform=how.platform,
            settings=replace(how.settings, data=data), progress=step,
        )  # fmt: skip
    made = report.remap
    if report.published:
        published = f"{report.published} agrees{', signed by the key' if report.signed else ''}"
    else:
        published = "no correct one for this map; made here"
    refused = [f"not used: {text}" for text in report.refused]
    if out.answered("pull", report, [
        ("image", f"{made.name}  {made.manifest}"),
        ("map", made.map_text or "none"),
        ("entries", f"{made.entries:,} in {made.layers} layers, {human(made.data_bytes)} of data"),
        ("published", published if mapping is not None else "not looked for: no map given"),
        ("made in", f"{made.seconds:.2f} s, {made.layers_read} layers read"),
    ], refused):  # fmt: skip
        next_mount(made, out)
