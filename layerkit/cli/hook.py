"""``layerkit hook``: the registry's pre-pull hook."""

from __future__ import annotations

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
    help="Remap images in a registry before nodes pull them; the signed originals stay as they are.",
)  # fmt: skip

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", metavar="FILE", envvar="LAYERKIT_HOOK_CONFIG", help="Settings, see docs/hook.md."
    ),
]
RegistryHost = Annotated[
    list[str] | None,
    typer.Option("--registry", metavar="HOST[:PORT]", help="Instead of --config: a registry to serve; repeatable."),
]
State = Annotated[
    Path | None,
    typer.Option(
        "--state", metavar="DIR", help="Folder of the queue [default: the local store's name with -hook]."
    ),
]
Listen = Annotated[str | None, typer.Option("--listen", metavar="ADDRESS:PORT", help="[default: 127.0.0.1:8765]")]
TokenFile = Annotated[
    Path | None,
    typer.Option("--token-file", metavar="FILE", help="The token clients must show; without it one is made."),
]
TlsVerify = Annotated[
    str | None,
    typer.Option(
        "--tls-verify", metavar="true|false",
        help="With --registry: false takes any certificate, and plain HTTP if it speaks nothing else.",
    ),
]  # fmt: skip
Workers = Annotated[int | None, typer.Option("--workers", min=1, max=256, help="Images at the same time.")]
Engine = Annotated[
    str | None, typer.Option("--engine", metavar="ENGINE", help="processes, threads or dask://HOST:PORT.")
]
AllTags = Annotated[bool, typer.Option("--all-tags", help="Every tag of each repository.")]
Again = Annotated[bool, typer.Option("--again", help="Make the artifacts anew, also those that are there.")]
LogLevel = Annotated[
    str, typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning or error; one JSON object a line.")
]


@dataclass(frozen=True, slots=True)
class Flags:
    """What the flags of a hook command say: which file, what stands in place of one, what differs from it."""

    file: Path | None
    registries: Sequence[str] | None
    uid_map: list[str] | None
    gid_map: list[str] | None
    tls_verify: str | None
    state: Path | None
    store: Path | None
    workers: int | None
    engine: str | None
    listen: str | None = None
    token_file: Path | None = None
    hold_seconds: float | None = None
    index_repository: str | None = None

    def config(self) -> Config:
        """Return the settings that are meant.

        Raises:
            UsageError: neither a file nor what a hook cannot do without, or something that is set wrong.
        """
        from layerkit.formats.toml_settings import Table
        from layerkit.hook import config as settings

        if self.file is not None:
            if self.registries or self.uid_map or self.gid_map:
                raise UsageError(
                    "--config says which registries and maps; leave --registry, --uid-map and --gid-map out"
                )
            config = settings.Config.read(Table.load(self.file))
            paths = {"state": self.state, "store": self.store}
        else:
            config = settings.Config.read(Table(self._values(), "flags", Path.cwd()))
            paths = {}
        changes = {
            **paths, "token_file": self.token_file, "workers": self.workers, "engine": self.engine,
            "hold_seconds": self.hold_seconds,
        }  # fmt: skip
        config = replace(config, **{name: value for name, value in changes.items() if value is not None})  # type: ignore[arg-type]
        if self.listen is not None:
            host, port = settings.listen_address(self.listen, "--listen")
            config = replace(config, host=host, port=port)
        return config if self.index_repository is None else config.with_index_repository(self.index_repository)

    def _values(self) -> dict[str, object]:
        """Return what a settings file would say."""
        from layerkit.linux.configuration import SETTINGS

        if not self.registries or not self.uid_map:
            raise UsageError("give --config FILE, or --registry HOST and --uid-map C:H:N")
        more: dict[str, object] = {}
        if self.tls_verify is not None:
            more["tls_verify"] = SETTINGS["tls_verify"].read(self.tls_verify, "--tls-verify=")
        store = o.store_dir(self.store).absolute()
        return {
            "registry": [
                {"host": host, "name": host.replace(":", "-").lower(), **more} for host in self.registries
            ],
            "map": [{"uid_map": self.uid_map, **({"gid_map": self.gid_map} if self.gid_map else {})}],
            "store": str(store),
            "state": str((self.state or _state_of(store)).absolute()),
        }


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


def need_extra() -> None:
    """Raise unless the packages of the extra ``hook`` are installed."""
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UnsupportedHost(f"the hook's packages ({error.name})", "pip install 'layerkit[hook]'") from None


@group.command()
def serve(
    config: ConfigFile = None,
    registry: RegistryHost = None,
    uid_map: o.UidMap = None,
    gid_map: o.GidMap = None,
    tls_verify: TlsVerify = None,
    listen: Listen = None,
    token_file: TokenFile = None,
    state: State = None,
    store: o.StoreDir = None,
    workers: Workers = None,
    engine: Engine = None,
    log_level: LogLevel = "info",
) -> None:
    """Take a registry's notifications, and remap every image that is pushed.

    Point the registry's notifications at `http://ADDRESS:PORT/v1/events/NAME`, with the token as a Bearer header.
    The page at `/` shows jobs and images; `/metrics` is for Prometheus.

    Examples:
    `layerkit hook serve --registry registry.example:5000 --uid-map 0:100000:65536`

    `layerkit hook serve --config /etc/layerkit/hook.toml`
    """
    need_extra()
    flags = Flags(config, registry, uid_map, gid_map, tls_verify, state, store, workers, engine, listen, token_file)
    chosen = flags.config()
    from layerkit.hook.front import http

    _service_logs(chosen, log_level)
    http.serve(chosen, lambda url: note(f"listening on {url}"))


@group.command()
def proxy(
    upstream: Annotated[
        str, typer.Argument(metavar="REGISTRY", help="Name of a configured registry, or its host.")
    ],
    config: ConfigFile = None,
    uid_map: o.UidMap = None,
    gid_map: o.GidMap = None,
    tls_verify: TlsVerify = None,
    listen: Listen = None,
    state: State = None,
    store: o.StoreDir = None,
    hold: Annotated[
        float | None,
        typer.Option("--hold", metavar="SECONDS", min=0.0, help="How long a manifest is held at most."),
    ] = None,
    no_workers: Annotated[
        bool, typer.Option("--no-workers", help="Leave the work to a `hook serve` with the same --state.")
    ] = False,
    workers: Workers = None,
    engine: Engine = None,
    log_level: LogLevel = "info",
) -> None:
    """Stand before a registry: nodes pull through here, and find the first pull remapped already.

    A request for a manifest is held until its image is remapped, at most `--hold` seconds, and answered then
    whatever has become of that. Everything else passes through. Nodes log in as they would at the registry.

    Examples:
    `layerkit hook proxy registry.example:5000 --uid-map 0:100000:65536 --listen 0.0.0.0:5001`

    `layerkit hook proxy main --config /etc/layerkit/hook.toml --hold 5 --no-workers`
    """
    need_extra()
    hosts = None if config else [upstream]
    flags = Flags(config, hosts, uid_map, gid_map, tls_verify, state, store, workers, engine, listen, None, hold)
    chosen = flags.config()
    found = chosen.registries.get(upstream) or next(
        (r for r in chosen.registries.values() if r.host == upstream), None
    )
    if found is None:
        raise UsageError(f"{upstream}: not among the configured registries: {', '.join(chosen.registries)}")
    from layerkit.hook.front import http
    from layerkit.hook.front.proxy import Proxy
    from layerkit.hook.telemetry import log_as_json

    log_as_json(log_level)
    http.serve(
        chosen, lambda url: note(f"listening on {url}"), lambda parts: Proxy(parts, found), workers=not no_workers
    )


@group.command()
def run(
    refs: Annotated[
        list[str], typer.Argument(metavar="REF…", help="`docker://HOST/NAME[:TAG|@DIGEST]`; several are allowed.")
    ],
    config: ConfigFile = None,
    uid_map: o.UidMap = None,
    gid_map: o.GidMap = None,
    tls_verify: TlsVerify = None,
    all_tags: AllTags = False,
    again: Again = False,
    state: State = None,
    store: o.StoreDir = None,
    workers: Workers = None,
    engine: Engine = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Remap images in their registry once, and end: for cron and CI. Exit code 5 if part of them failed.

    What is there already costs a few small requests. With the state of an interrupted run it goes on from there.

    Examples:
    `layerkit hook run docker://registry.example/app:v1 --uid-map 0:100000:65536`

    `layerkit hook run docker://registry.example/app --all-tags --config hook.toml --json`
    """
    need_extra()
    from layerkit.hook.batch import one_pass as once
    from layerkit.hook.telemetry import log_as_json

    named = once.parse_refs(refs)
    hosts = None if config else sorted({ref.host for ref in named})
    flags = Flags(config, hosts, uid_map, gid_map, tls_verify, state, store, workers, engine)
    out = Output(json, quiet)
    log_as_json("error")
    done = once.run(flags.config(), once.Wanted(named, all_tags, again))
    if not out.told("hook-run", {"jobs": [row.view() for row in done.rows], "failed": done.failed}):
        _show(done.rows)
    refuse_failures(done)
    if not json:
        out.note(f"{len(done.rows)} done")


def refuse_failures(done: Pass) -> None:
    """Raise if a part of a pass failed.

    Raises:
        PartialFailure: which.
    """
    if done.failed:
        count = len(done.rows) + len(done.missing)
        raise PartialFailure(f"{len(done.failed)} of {count} failed: " + "; ".join(done.failed[:5]))


@group.command()
def jobs(
    config: ConfigFile = None,
    state: State = None,
    store: o.StoreDir = None,
    only: Annotated[
        str, typer.Option("--only", metavar="STATE", help="waiting, running, done, skipped, gone, dead.")
    ] = "",
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="At most so many.")] = 100,
    json: o.Json = False,
) -> None:
    """List the jobs of a hook on this machine, what happened last first.

    Example: `layerkit hook jobs --only dead`
    """
    from layerkit.hook.queue import STATES

    if only and only not in STATES:
        raise UsageError(f"--only {only!r}: want one of {', '.join(STATES)}")
    with _queue(config, state, store) as queue:
        rows = queue.jobs(only, limit)
    if not Output(json).told("hook-jobs", {"jobs": [row.view() for row in rows]}):
        _show(rows)


@group.command()
def retry(
    job: Annotated[
        list[str] | None, typer.Argument(metavar="[JOB…]", help="Names, as `hook jobs` shows them.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="All jobs that were given up.")] = False,
    config: ConfigFile = None,
    state: State = None,
    store: o.StoreDir = None,
) -> None:
    """Let jobs that were given up run again.

    Example: `layerkit hook retry --all`
    """
    if bool(job) == all_:
        raise UsageError("name jobs, or give --all")
    with _queue(config, state, store) as queue:
        count = queue.retry(job or None)
    note(f"{count} jobs wait to run again")


def _queue(config: Path | None, state: Path | None, store: Path | None) -> closing[Queue]:
    from layerkit.formats.toml_settings import Table
    from layerkit.hook.config import Config
    from layerkit.hook.queue import Queue

    if state is None:
        state = Config.read(Table.load(config)).state if config else _state_of(o.store_dir(store))
    if not (state / "queue.sqlite").exists():
        raise UsageError(
            f"{state}: no queue of a hook; name its folder with --state, or its settings with --config"
        )
    return closing(Queue(state))


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
