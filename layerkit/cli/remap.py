"""``layerkit remap``: the main command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.options import AllPlatforms, CompressionOption, Created, Level
from layerkit.cli.render import emit_json, fields, human, next_mount, note, progress
from layerkit.model.errors import UsageError
from layerkit.usecases.settings import RewriteOptions

if TYPE_CHECKING:
    from layerkit.model.reports import RemapReport
    from layerkit.usecases.each_platform import PlatformsReport


def remap(
    src: o.Ref,
    dst: Annotated[
        str | None,
        typer.Argument(
            metavar="[DST]",
            help="Where the image and its remap artifact go (`docker://…`, `oci:DIR[:TAG]`, "
            "`oci-archive:FILE[:TAG]`); without it the result stays in the local store, for `layerkit mount`.",
        ),
    ] = None,
    uid_map: o.UidMap = None,
    gid_map: o.GidMap = None,
    subuid_name: o.SubuidName = None,
    overflow_id: o.OverflowId = None,
    squash: o.Squash = False,
    strict: o.Strict = False,
    rendering: Annotated[
        str | None,
        typer.Option(
            "--rendering",
            metavar="auto|erofs|directory|fuse|tar",
            help="Form of the metadata: tar is for artifacts only.",
        ),
    ] = None,
    namespace: Annotated[
        str,
        typer.Option(
            "--namespace",
            metavar="auto|trusted|user",
            help="Xattr namespace of the stubs: user for userxattr mounts.",
        ),
    ] = "auto",
    own_meta: Annotated[
        bool,
        typer.Option("--own-meta", help="Write metadata for this map even where an idmapped mount needs none."),
    ] = False,
    form: Annotated[
        str,
        typer.Option(
            "--form",
            metavar="artifact|layer|portable",
            help="What DST gets: the image with META attached, META as a layer of it, or all layers written anew.",
        ),
    ] = "artifact",
    stock_media_type: Annotated[
        bool,
        typer.Option(
            "--stock-media-type",
            help="With --form layer: the standard media type. DANGEROUS: most runtimes show files of zeros.",
        ),
    ] = False,
    statement: Annotated[
        bool, typer.Option("--statement", help="Attach an in-toto statement of what was done to the artifact.")
    ] = False,
    sign_key: Annotated[
        Path | None,
        typer.Option(
            "--sign-key",
            metavar="FILE",
            help="Sign that statement with this private key (PEM or cosign's; password in LAYERKIT_KEY_PASSWORD).",
        ),
    ] = None,
    compression: CompressionOption = "gzip",
    level: Level = None,
    created: Created = None,
    data: o.Data = "auto",
    platform: o.PlatformOption = None,
    all_platforms: AllPlatforms = False,
    store: o.StoreDir = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            "-j",
            min=1,
            max=64,
            envvar="LAYERKIT_JOBS",
            help="Layers read at the same time [default: 1], or threads that compress [default: all cores].",
        ),
    ] = None,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Apply an id map to an image by writing metadata only.

    The image stays as it is. Without DST the result is kept in the local store and can be mounted at once;
    with DST the image is copied there byte for byte, and the metadata is attached to it as an OCI artifact.
    `--form portable` writes every layer anew instead, for runtimes without any support.

    Examples:
    `layerkit remap image.tar --uid-map 0:100000:65536`

    `layerkit remap oci:images:app --uid-map 0:100000:1000 --uid-map 1000:1000:1 --gid-map 0:100000:65536`

    `layerkit remap image.tar oci-archive:remapped.tar --subuid-name alice`

    `layerkit remap docker://reg.example.com/app:1 docker://reg.example.com/app:1 --uid-map 0:100000:65536`

    `layerkit remap image.tar docker-archive:out.tar:app:remapped --form portable --uid-map 0:100000:65536`
    """
    from layerkit.api import open as api

    mapping = api.mapping(uid_map, gid_map, subuid_name=subuid_name, overflow_id=overflow_id, squash=squash)
    if form not in ("artifact", "layer", "portable"):
        raise UsageError(f"--form {form!r}: want artifact, layer or portable")
    if form != "artifact" and (dst is None or mapping is None):
        raise UsageError(f"--form {form} writes an image: give DST and a map")
    if stock_media_type and form != "layer":
        raise UsageError("--stock-media-type means something only with --form layer")
    if all_platforms and (form == "artifact" or dry_run):
        raise UsageError("--all-platforms goes with --form portable or layer; else choose with --platform")
    if (statement or sign_key) and (dst is None or form != "artifact"):
        raise UsageError(
            "--statement and --sign-key are about what is attached to an image: give DST, --form artifact"
        )
    settings = api.Settings(store=o.store_dir(store), data=data, jobs=jobs or 1, strict=strict)
    if form != "artifact" and dst is not None and mapping is not None and not dry_run:
        from layerkit.api.rewrite import Route
        from layerkit.usecases.each_platform import PlatformsReport
        from layerkit.usecases.remap import RemapOptions
        from layerkit.usecases.remap import remap as use_case

        options = RemapOptions(
            mapping, RewriteOptions.of(compression, level, jobs, created), form, stock_media_type
        )
        with progress(quiet) as step:
            route = Route(src, dst, settings, o.one_platform(platform, all_platforms), all_platforms, step)
            made = route.go(lambda work, to: use_case(work, to, options))
        if isinstance(made, PlatformsReport):
            _show_all(made, dst, json, quiet)
        else:
            _show(made, dst, json, quiet)
        return
    with api.open_image(src, platform=platform, settings=settings) as image:
        if dry_run:
            plan = image.inspect(mapping)
            _print_plan(plan.to_dict(), json)
            return
        with progress(quiet) as step:
            if dst is None:
                result = image.remap(
                    mapping, rendering=rendering, namespace=namespace, own_meta=own_meta, progress=step
                )
            else:
                result = image.attach(
                    mapping, dst, rendering=rendering or "auto", namespace=namespace, statement=statement,
                    sign_key=sign_key, progress=step,
                )  # fmt: skip
    _show(result, dst, json, quiet)


def _show_all(whole: PlatformsReport, dst: str, json: bool, quiet: bool) -> None:
    for warning in dict.fromkeys(warning for one in whole.images for warning in one.warnings):
        note(f"warning: {warning}", quiet=quiet)
    if json:
        emit_json("remap-platforms", whole.to_dict())
    elif dst.rpartition(":")[2] != "-":  # standard output holds the archive
        fields([("index", f"{whole.name}  {whole.manifest}"), ("map", whole.images[0].map_text), ("written", dst)])
        fields([(name, one.manifest) for name, one in zip(whole.platforms, whole.images, strict=True)])


def _show(result: RemapReport, dst: str | None, json: bool, quiet: bool) -> None:
    for warning in result.warnings:
        note(f"warning: {warning}", quiet=quiet)
    if json:
        emit_json("remap", result.to_dict())
        return
    if dst is not None and dst.rpartition(":")[2] == "-":  # standard output holds the archive
        return
    fields(
        [
            ("image", f"{result.name}  {result.manifest}"),
            ("map", result.map_text or "none"),
            ("entries", f"{result.entries:,} in {result.layers} layers, {human(result.data_bytes)} of data"),
            ("metadata", f"{human(result.meta_bytes)} for this map ({result.how})"),
            ("made in", f"{result.seconds:.2f} s, {result.layers_read} layers read"),
        ]
    )
    if result.artifact:
        fields([("artifact", result.artifact), ("written", str(dst))])
    elif dst is not None:
        fields([("written", dst)])
    else:
        next_mount(result, quiet=quiet)


def _print_plan(plan: dict[str, object], json: bool) -> None:
    if json:
        emit_json("remap-plan", plan)
    else:
        fields(
            [(name.replace("_", " "), value) for name, value in plan.items() if not isinstance(value, (list, dict))]
        )


def register(app: typer.Typer) -> None:
    """Add this file's commands to ``app``."""
    app.command("remap", rich_help_panel="Images")(remap)
