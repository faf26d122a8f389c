"""``layerkit remap``: the main command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import Output, fields, human, line, next_mount, warnings_of
from layerkit.model.errors import UsageError

if TYPE_CHECKING:
    from layerkit.model.reports import InspectReport, RemapReport
    from layerkit.usecases.each_platform import PlatformsReport


def remap(
    src: o.Ref,
    dst: Annotated[
        str | None,
        typer.Argument(
            metavar="[DST]",
            help="Where the image and its remap artifact go (`docker://…`, `oci:DIR[:TAG]`, "
            "`oci-archive:FILE[:TAG]`). Without DST the result stays in the local store, for `layerkit mount`.",
        ),
    ] = None,
    ids: o.Map = o.Map(),
    strict: o.Strict = False,
    rendering: Annotated[
        str | None,
        typer.Option(
            "--rendering", metavar="auto|erofs|directory|fuse|tar",
            help="Rendering of the metadata; tar is for artifacts only.",
        ),
    ] = None,
    namespace: Annotated[
        str,
        typer.Option(
            "--namespace", metavar="auto|trusted|user",
            help="Namespace of the stubs' xattrs; user is for mounts with userxattr.",
        ),
    ] = "auto",
    own_meta: o.OwnMeta = False,
    form: Annotated[
        str,
        typer.Option(
            "--form", metavar="artifact|layer|portable",
            help="What DST gets: the image with META attached, META as one more layer, or all layers rewritten.",
        ),
    ] = "artifact",
    stock_media_type: o.StockMediaType = False,
    statement: Annotated[
        bool, typer.Option("--statement", help="Attach an in-toto statement that says what was done.")
    ] = False,
    sign_key: Annotated[
        Path | None,
        typer.Option(
            "--sign-key", metavar="FILE",
            help="Sign the statement with this private key (PEM or cosign's; password: LAYERKIT_KEY_PASSWORD).",
        ),
    ] = None,
    compression: o.Compression = "gzip",
    level: o.Level = None,
    created: o.Created = None,
    data: o.Data = "auto",
    platform: o.Platform = None,
    all_platforms: o.AllPlatforms = False,
    store: o.StoreDir = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", "-j", min=1, max=64, envvar="LAYERKIT_JOBS",
            help="Layers read at the same time [default: 1], or threads that compress [default: all cores].",
        ),
    ] = None,
    dry_run: o.DryRun = False,
    out: Output = Output(),
) -> None:  # fmt: skip
    """Apply an id map to an image by writing metadata only.

    The image stays as it is. Without DST the result is kept in the local store and can be mounted at once.
    With DST the image is copied there byte for byte, and the metadata is attached to it as an OCI artifact.
    `--form portable` instead rewrites every layer as plain OCI, which any runtime can use.

    Examples:
    `layerkit remap image.tar --uid-map 0:100000:65536`

    `layerkit remap oci:images:app --uid-map 0:100000:1000 --uid-map 1000:1000:1 --gid-map 0:100000:65536`

    `layerkit remap image.tar oci-archive:remapped.tar --subuid-name alice`

    `layerkit remap docker://reg.example.com/app:1 docker://reg.example.com/app:1 --uid-map 0:100000:65536`

    `layerkit remap image.tar docker-archive:out.tar:app:remapped --form portable --uid-map 0:100000:65536`
    """
    out, mapping = out.toward(dst), ids.mapping()
    if form not in ("artifact", "layer", "portable"):
        raise UsageError(f"--form {form!r}: want artifact, layer or portable")
    if form != "artifact" and (dst is None or mapping is None):
        raise UsageError(f"--form {form} writes an image: give DST and a map")
    if stock_media_type and form != "layer":
        raise UsageError("--stock-media-type needs --form layer")
    if all_platforms and (form == "artifact" or dry_run):
        raise UsageError("--all-platforms needs --form portable or layer; else name one image with --platform")
    if (statement or sign_key) and (dst is None or form != "artifact"):
        raise UsageError(
            "--statement and --sign-key need an artifact to be attached to: give DST and --form artifact"
        )
    settings = o.settings(store, data=data, jobs=jobs or 1, strict=strict)
    if form != "artifact" and dst is not None and mapping is not None and not dry_run:
        from layerkit.api.rewrite import Route
        from layerkit.usecases.each_platform import PlatformsReport
        from layerkit.usecases.remap import RemapOptions
        from layerkit.usecases.remap import remap as use_case
        from layerkit.usecases.settings import RewriteOptions

        rewrite = RewriteOptions.of(compression, level, jobs, created)
        options = RemapOptions(mapping, rewrite, form, stock_media_type)
        with out.progress() as step:
            route = Route(src, dst, settings, o.one_platform(platform, all_platforms), all_platforms, step)
            made = route.go(lambda work, to: use_case(work, to, options))
        if isinstance(made, PlatformsReport):
            _show_all(made, out)
        else:
            _show(made, out)
        return
    from layerkit.api.open import open_image

    with open_image(src, platform=platform, settings=settings) as image:
        if dry_run:
            _show_plan(image.inspect(mapping), out)
            return
        with out.progress() as step:
            if dst is None:
                result = image.remap(
                    mapping, rendering=rendering, namespace=namespace, own_meta=own_meta, progress=step
                )
            else:
                result = image.attach(
                    mapping, dst, rendering=rendering or "auto", namespace=namespace, statement=statement,
                    sign_key=sign_key, progress=step,
                )  # fmt: skip
    _show(result, out)


def _show_all(whole: PlatformsReport, out: Output) -> None:
    if not out.told("remap-platforms", whole.to_dict(), warnings_of(whole)) and not out.holds_archive:
        fields([
            ("index", f"{whole.name}  {whole.manifest}"), ("map", whole.images[0].map_text), ("written", out.dst),
        ])  # fmt: skip
        fields([(name, one.manifest) for name, one in zip(whole.platforms, whole.images, strict=True)])


def _show(result: RemapReport, out: Output) -> None:
    if out.answered("remap", result, [
        ("image", f"{result.name}  {result.manifest}"),
        ("map", result.map_text or "none"),
        ("entries", f"{result.entries:,} in {result.layers} layers, {human(result.data_bytes)} of data"),
        ("metadata", f"{human(result.meta_bytes)} for this map ({result.how})"),
        ("made in", f"{result.seconds:.2f} s, {result.layers_read} layers read"),
        *([("artifact", result.artifact)] if result.artifact else []),
        *([("written", out.dst)] if out.dst is not None else []),
    ], result.warnings) and out.dst is None:  # fmt: skip
        next_mount(result, out)


def _show_plan(plan: InspectReport, out: Output) -> None:
    if out.told("remap-plan", plan.to_dict()):
        return
    outside = sum(row.becomes == "unmapped" for row in (*plan.uids, *plan.gids))
    fields([
        ("image", f"{plan.name}  {plan.manifest}"),
        ("map", plan.map_text or "none"),
        ("entries", f"{plan.entries:,} in {len(plan.layers)} layers, {human(plan.data_bytes)} of data"),
        ("owners", f"{len(plan.uids)} users, {len(plan.gids)} groups, {outside} of them outside the map"),
        ("made", "nothing (--dry-run)"),
    ])  # fmt: skip
    for problem in plan.problems:
        line(f"! {problem}")
