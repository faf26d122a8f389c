"""``layerkit hook``: the registry's pre-pull hook; ``layerkit batch``: many images, split between machines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import Output, human, note, table
from layerkit.model.errors import PartialFailure, UnsupportedHost, UsageError

if TYPE_CHECKING:
    from layerkit.hook.batch.one_pass import Pass
    from layerkit.hook.config import Config
    from layerkit.hook.queue import JobRow, Queue

group = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown",
    help="Remap images in a registry before nodes pull them; the original images stay as they are.",
)  # fmt: skip

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", metavar="FILE", envvar="LAYERKIT_HOOK_CONFIG", help="Settings file; see docs/hook.md."
    ),
]
RegistryHost = Annotated[
    list[str] | None,
    typer.Option("--registry", metavar="HOST[:PORT]", help="Instead of --config: a registry to serve; repeatable."),
]
State = Annotated[
    Path | None,
    typer.Option(
        "--state", metavar="DIR", help="Folder of the queue [default: the local store's path plus -hook]."
    ),
]
Listen = Annotated[str | None, typer.Option("--listen", metavar="ADDRESS:PORT", help="[default: 127.0.0.1:8765]")]
TokenFile = Annotated[
    Path | None,
    typer.Option("--token-file", metavar="FILE", help="The token that clients must send [default: a new one]."),
]
TlsVerify = Annotated[
    str | None,
    typer.Option(
        "--tls-verify", metavar="true|false",
        help="With --registry: false accepts any certificate, and plain HTTP if the registry has no TLS.",
    ),
]  # fmt: skip
Workers = Annotated[int | None, typer.Option("--workers", min=1, max=256, help="Images to work on at once.")]
Engine = Annotated[
    str | None, typer.Option("--engine", metavar="ENGINE", help="processes, threads or dask://HOST:PORT.")
]
LogLevel = Annotated[
    str, typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning or error; one JSON object a line.")
]


@dataclass(frozen=True)
class Flags:
    """What the flags of a hook command say: which file, what stands in place of one, what differs from it.

    The options that only some commands have are those of the classes below; elsewhere they are not given.
    """

    config: ConfigFile = None
    registry: list[str] | None = None
    uid_map: o.UidMap = None
    gid_map: o.GidMap = None
    tls_verify: TlsVerify = None
    listen: str | None = None
    token_file: Path | None = None
    all_tags: bool = False
    again: bool = False
    state: State = None
    store: o.StoreDir = None
    hold: float | None = None
    no_workers: bool = False
    workers: Workers = None
    engine: Engine = None

    def settings(self, hosts: Sequence[str] = ()) -> Config:
        """Return the settings that are meant, for the registries ``hosts`` where flags and file name none.

        Raises:
            UsageError: neither a file nor what a hook cannot do without, or something that is set wrong.
        """
        from layerkit.formats.toml_settings import Table
        from layerkit.hook import config as settings

        if self.config is not None:
            if self.registry or self.uid_map or self.gid_map:
                raise UsageError(
                    "--config names the registries and maps; leave out --registry, --uid-map and --gid-map"
                )
            config = settings.Config.read(Table.load(self.config))
            paths = {"state": self.state, "store": self.store}
        else:
            config = settings.Config.read(Table(self._values(self.registry or hosts), "flags", Path.cwd()))
            paths = {}
        changes = {
            **paths, "token_file": self.token_file, "workers": self.workers, "engine": self.engine,
            "hold_seconds": self.hold,
        }  # fmt: skip
        config = replace(config, **{name: value for name, value in changes.items() if value is not None})  # type: ignore[arg-type]
        if self.listen is None:
            return config
        host, port = settings.listen_address(self.listen, "--listen")
        return replace(config, host=host, port=port)

    def _values(self, hosts: Sequence[str]) -> dict[str, object]:
        """Return what a settings file would say."""
        from layerkit.linux.configuration import SETTINGS

        if not hosts or not self.uid_map:
            raise UsageError("give --config FILE, or --registry HOST and --uid-map C:H:N")
        more: dict[str, object] = {}
        if self.tls_verify is not None:
            more["tls_verify"] = SETTINGS["tls_verify"].read(self.tls_verify, "--tls-verify=")
        store = o.store_dir(self.store).absolute()
        return {
            "registry": [{"host": host, "name": host.replace(":", "-").lower(), **more} for host in hosts],
            "map": [{"uid_map": self.uid_map, **({"gid_map": self.gid_map} if self.gid_map else {})}],
            "store": str(store),
            "state": str((self.state or _state_of(store)).absolute()),
        }


@dataclass(frozen=True)
class ServeFlags(Flags):
    """Of a service that registries notify."""

    registry: RegistryHost = None
    listen: Listen = None
    token_file: TokenFile = None


@dataclass(frozen=True)
class ProxyFlags(Flags):
    """Of a service that nodes pull through."""

    listen: Listen = None
    hold: Annotated[
        float | None,
        typer.Option("--hold", metavar="SECONDS", min=0.0, help="Longest time that a manifest is held."),
    ] = None
    no_workers: Annotated[
        bool, typer.Option("--no-workers", help="Leave the work to a `hook serve` with the same --state.")
    ] = False


@dataclass(frozen=True)
class OnceFlags(Flags):
    """Of one pass over images."""

    all_tags: Annotated[bool, typer.Option("--all-tags", help="Every tag of each repository.")] = False
    again: Annotated[bool, typer.Option("--again", help="Make artifacts again even if they exist.")] = False


def _state_of(store: Path) -> Path:
    """Return where the queue lies where nothing says so."""
    return store.with_name(store.name + "-hook")


def _service_logs(config: Config, level: str) -> None:
    from layerkit.hook.config import read_token
    from layerkit.hook.telemetry import log_as_json

    if level not in ("debug", "info", "warning", "error"):
        raise UsageError(f"--log-level {level!r}: want debug, info, warning or error")
    token, path = read_token(config)
    log_as_json(level, [token])
    note(f"token: {path}")


def _need_extra() -> None:
    """Raise unless the packages of the extra ``hook`` are installed."""
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UnsupportedHost(f"the hook's packages ({error.name})", "pip install 'layerkit[hook]'") from None


@o.command(group)
def serve(flags: ServeFlags = ServeFlags(), log_level: LogLevel = "info") -> None:
    """Receive a registry's notifications, and remap every image that is pushed.

    Let the registry notify `http://ADDRESS:PORT/v1/events/NAME`, with the token as a Bearer header.
    The page at `/` shows jobs and images; `/metrics` is for Prometheus.

    Examples:
    `layerkit hook serve --registry registry.example:5000 --uid-map 0:100000:65536`

    `layerkit hook serve --config /etc/layerkit/hook.toml`
    """
    _need_extra()
    chosen = flags.settings()
    from layerkit.hook.front import http

    _service_logs(chosen, log_level)
    http.serve(chosen, lambda url: note(f"listening on {url}"))


@o.command(group)
def proxy(
    upstream: Annotated[
        str, typer.Argument(metavar="REGISTRY", help="Name of a configured registry, or its host.")
    ],
    flags: ProxyFlags = ProxyFlags(),
    log_level: LogLevel = "info",
) -> None:
    """Proxy a registry, so that nodes find even the first pull of an image remapped.

    A request for a manifest waits until its image is remapped, for at most `--hold` seconds; then it is answered,
    remapped or not. Everything else passes through. Nodes log in as they do at the registry.

    Examples:
    `layerkit hook proxy registry.example:5000 --uid-map 0:100000:65536 --listen 0.0.0.0:5001`

    `layerkit hook proxy main --config /etc/layerkit/hook.toml --hold 5 --no-workers`
    """
    _need_extra()
    chosen = flags.settings([upstream])
    found = chosen.registries.get(upstream) or next(
        (r for r in chosen.registries.values() if r.host == upstream), None
    )
    if found is None:
        raise UsageError(f"{upstream} is not a configured registry; choose one of {', '.join(chosen.registries)}")
    from layerkit.hook.front import http
    from layerkit.hook.front.proxy import Proxy
    from layerkit.hook.telemetry import log_as_json

    log_as_json(log_level)
    http.serve(
        chosen,
        lambda url: note(f"listening on {url}"),
        lambda parts: Proxy(parts, found),
        workers=not flags.no_workers,
    )


@o.command(group)
def run(
    refs: Annotated[
        list[str], typer.Argument(metavar="REF…", help="`docker://HOST/NAME[:TAG|@DIGEST]`; several are allowed.")
    ],
    flags: OnceFlags = OnceFlags(),
    out: Output = Output(),
) -> None:
    """Remap images in their registry once, for cron and CI. Exit code 5 if some of them failed.

    An image that is done already costs a few small requests. With the --state of an interrupted run, it goes on.

    Examples:
    `layerkit hook run docker://registry.example/app:v1 --uid-map 0:100000:65536`

    `layerkit hook run docker://registry.example/app --all-tags --config hook.toml --json`
    """
    _need_extra()
    from layerkit.hook.batch import one_pass as once
    from layerkit.hook.telemetry import log_as_json

    named = once.parse_refs(refs)
    log_as_json("error")
    config = flags.settings(sorted({ref.host for ref in named}))
    done = once.run(config, once.Wanted(named, flags.all_tags, flags.again))
    if not out.told("hook-run", {"jobs": [row.view() for row in done.rows], "failed": done.failed}):
        _show(done.rows)
    _refuse_failures(done)
    if not out.json:
        out.note(f"{len(done.rows)} done")


def batch(
    refs: Annotated[
        list[str] | None, typer.Argument(metavar="[REF…]", help="`docker://HOST/NAME[:TAG|@DIGEST]`.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--from", metavar="FILE", help="One reference per line; `-` is standard input.")
    ] = None,
    shard: Annotated[
        str,
        typer.Option(
            "--shard",
            metavar="I/N",
            envvar="LAYERKIT_SHARD",
            help="Do part I of N, counted from 0; in a Kubernetes Indexed Job I is JOB_COMPLETION_INDEX.",
        ),
    ] = "0/1",
    wait: Annotated[
        float,
        typer.Option(
            "--wait",
            metavar="SECONDS",
            min=0.1,
            help="How long another shard may give no sign of life before this one goes on without it.",
        ),
    ] = 60.0,
    index_repository: Annotated[
        str | None,
        typer.Option(
            "--index-repository",
            metavar="NAME",
            help="Repository in the same registry where shards share their indexes of layers; empty for none "
            "[default: layerkit/indexes with several shards or dask].",
        ),
    ] = None,
    flags: OnceFlags = OnceFlags(),
    out: Output = Output(),
) -> None:
    """Remap many images in their registries; give every machine the same list and another shard.

    An image's name alone decides which shard it belongs to, so no machine needs to talk to another. Each layer is
    read by one shard, which publishes the layer's index for the others; they wait for it up to `--wait`. Exit
    code 5 if part of the shard failed. A second run does only what is missing.

    Examples:
    `layerkit batch --from images.txt --uid-map 0:100000:65536 --workers 8`

    `layerkit batch --from images.txt --config hook.toml --shard $JOB_COMPLETION_INDEX/16 --json`

    `layerkit batch --from images.txt --config hook.toml --engine dask://scheduler:8786`
    """
    _need_extra()
    from layerkit.hook.batch import one_pass as once
    from layerkit.hook.batch.shards import Shard
    from layerkit.hook.telemetry import log_as_json

    listed = [*(refs or []), *_lines(source)]
    if not listed:
        raise UsageError("no images are named: give references, or --from FILE")
    part, parts = once.parse_shard(shard)
    every = once.parse_refs(listed)
    log_as_json("error")
    wanted = once.Wanted(every, flags.all_tags, flags.again, Shard("", part, parts, wait))
    config = flags.settings(sorted({ref.host for ref in every}))
    if index_repository is not None:
        config = config.with_index_repository(index_repository)
    done = once.run(config, wanted)
    count = len(wanted.ours)
    body = {"shard": part, "shards": parts, "images": count, "failed": done.failed}
    told = out.told("batch", {**body, "jobs": [row.view() for row in done.rows]})
    _refuse_failures(done)
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


def _refuse_failures(done: Pass) -> None:
    if done.failed:
        count = len(done.rows) + len(done.missing)
        raise PartialFailure(f"{len(done.failed)} of {count} failed: " + "; ".join(done.failed[:5]))


@dataclass(frozen=True)
class QueuePlace:
    """Where the queue of a hook on this machine is."""

    config: ConfigFile = None
    state: State = None
    store: o.StoreDir = None

    def open(self) -> closing[Queue]:
        """Open the queue, which must exist."""
        from layerkit.formats.toml_settings import Table
        from layerkit.hook.config import Config
        from layerkit.hook.queue import Queue

        state = self.state
        if state is None:
            config = Config.read(Table.load(self.config)) if self.config else None
            state = config.state if config else _state_of(o.store_dir(self.store))
        if not (state / "queue.sqlite").exists():
            raise UsageError(
                f"{state} holds no queue of a hook; name its folder with --state, or its settings with --config"
            )
        return closing(Queue(state))


@o.command(group)
def jobs(
    place: QueuePlace = QueuePlace(),
    only: Annotated[
        str, typer.Option("--only", metavar="STATE", help="waiting, running, done, skipped, gone, dead.")
    ] = "",
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="How many to list at most.")] = 100,
    json: o.Json = False,
) -> None:
    """List the jobs of a hook on this machine, the latest first.

    Example: `layerkit hook jobs --only dead`
    """
    from layerkit.hook.queue import STATES

    if only and only not in STATES:
        raise UsageError(f"--only {only!r}: want one of {', '.join(STATES)}")
    with place.open() as queue:
        rows = queue.jobs(only, limit)
    if not Output(json).told("hook-jobs", {"jobs": [row.view() for row in rows]}):
        _show(rows)


@o.command(group)
def retry(
    job: Annotated[
        list[str] | None, typer.Argument(metavar="[JOB…]", help="Names, as `hook jobs` shows them.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every job that the hook has given up.")] = False,
    place: QueuePlace = QueuePlace(),
) -> None:
    """Run jobs again that the hook has given up.

    Example: `layerkit hook retry --all`
    """
    if bool(job) == all_:
        raise UsageError("name jobs, or give --all")
    with place.open() as queue:
        count = queue.retry(job or None)
    note(f"{count} jobs will run again")


def _show(rows: list[JobRow]) -> None:
    def size(row: JobRow, name: str) -> str:
        value = row.report.get(name)
        return human(value) if isinstance(value, int) else ""

    table(
        "",
        ["JOB", "STATE", "IMAGE", "MAP", "READ", "WRITTEN", "SECONDS", "WHY"],
        [
            (
                row.job[:12], row.state,
                ", ".join(
                    t.repository + (f":{t.tag}" if t.tag else f"@{row.digest[:19]}") for t in row.targets
                ),
                row.mapping, size(row, "bytes_read"), size(row, "meta_bytes"),
                row.report.get("seconds", ""), row.why,
            )
            for row in rows
        ],
        right=(4, 5, 6),
    )  # fmt: skip
