"""``layerkit batch``: many images of registries, split between machines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from layerkit.cli import hook
from layerkit.cli import options as o
from layerkit.cli.render import Output
from layerkit.model.errors import UsageError


def batch(
    refs: Annotated[
        list[str] | None, typer.Argument(metavar="[REF…]", help="`docker://HOST/NAME[:TAG|@DIGEST]`.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--from", metavar="FILE", help="One reference a line; `-` is standard input.")
    ] = None,
    shard: Annotated[
        str,
        typer.Option(
            "--shard",
            metavar="I/N",
            envvar="LAYERKIT_SHARD",
            help="Only part I of N, counted from 0; in a Kubernetes Indexed Job I is JOB_COMPLETION_INDEX.",
        ),
    ] = "0/1",
    wait: Annotated[
        float,
        typer.Option(
            "--wait",
            metavar="SECONDS",
            min=0.1,
            help="How long another shard may show no sign of life before this one does without it.",
        ),
    ] = 60.0,
    index_repository: Annotated[
        str | None,
        typer.Option(
            "--index-repository",
            metavar="NAME",
            help="Where shards find each other's indexes of layers, in the same registry; empty for nowhere "
            "[default: layerkit/indexes with several shards or dask].",
        ),
    ] = None,
    config: hook.ConfigFile = None,
    uid_map: o.UidMap = None,
    gid_map: o.GidMap = None,
    tls_verify: hook.TlsVerify = None,
    all_tags: hook.AllTags = False,
    again: hook.Again = False,
    state: hook.State = None,
    store: o.StoreDir = None,
    workers: hook.Workers = None,
    engine: hook.Engine = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Remap many images in their registries; the same list with other shards does the rest of it.

    Which shard an image belongs to is decided by its name alone, so every machine can be given the whole list, and
    nobody needs to talk to anybody. Each layer is read by one shard, and its index published for the others, which
    wait for it up to `--wait`. Exit code 5 if part of the shard failed; what is done is not done again.

    Examples:
    `layerkit batch --from images.txt --uid-map 0:100000:65536 --workers 8`

    `layerkit batch --from images.txt --config hook.toml --shard $JOB_COMPLETION_INDEX/16 --json`

    `layerkit batch --from images.txt --config hook.toml --engine dask://scheduler:8786`
    """
    hook.need_extra()
    from layerkit.hook.batch import one_pass as once
    from layerkit.hook.batch.shards import Shard
    from layerkit.hook.telemetry import log_as_json

    listed = [*(refs or []), *_lines(source)]
    if not listed:
        raise UsageError("nothing to do: name images, or give --from FILE")
    part, parts = once.parse_shard(shard)
    every = once.parse_refs(listed)
    hosts = None if config else sorted({ref.host for ref in every})
    flags = hook.Flags(
        config, hosts, uid_map, gid_map, tls_verify, state, store, workers, engine,
        index_repository=index_repository,
    )  # fmt: skip
    log_as_json("error")
    wanted = once.Wanted(every, all_tags, again, Shard("", part, parts, wait))
    done = once.run(flags.config(), wanted)
    out, count = Output(json, quiet), len(wanted.ours)
    body = {"shard": part, "shards": parts, "images": count, "failed": done.failed}
    told = out.told("batch", {**body, "jobs": [row.view() for row in done.rows]})
    hook.refuse_failures(done)
    if not told:
        out.note(f"shard {part} of {parts}: {count} images, {len(done.rows)} remaps done")


def _lines(source: str | None) -> list[str]:
    if source is None:
        return []
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text()
    except UnicodeDecodeError as error:
        raise UsageError(f"{source}: {error}") from None
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]
