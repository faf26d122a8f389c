"""The hook's settings: one TOML file, checked whole before anything starts.

URLs live here and nowhere else: an event names a repository, the configuration says where that is.

::

    listen = "127.0.0.1:8765"
    state = "/var/lib/layerkit-hook"
    token_file = "/etc/layerkit/hook.token"

    [[registry]]
    name = "main"
    host = "registry.example:5000"
    repositories = ["library/*", "team/**"]

    [[map]]
    uid_map = ["0:100000:65536"]
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from layerkit.hook.queue.jobs import Policy
from layerkit.hook.tables import Table
from layerkit.model.errors import UsageError

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_SHORTEST_TOKEN = 16

INDEX_REPOSITORY = "layerkit/indexes"
"""Where those that share no store find each other's indexes of layers, unless another place is configured."""


@dataclass(frozen=True)
class Registry:
    """A registry that the hook may talk to.

    Attributes:
        name: in the paths of the hook and in its reports.
        host: ``HOST[:PORT]``, where it is asked.
        aliases: other names that events may call it by; they are compared and never connected to.
        repositories: patterns of the names that are served; ``*`` stands for one part of a name, ``**`` for any.
        tls_verify: as of the registry client; False also allows plain HTTP.
        authfile: with its credentials, as ``skopeo login`` writes it.
        cert_dir: with its CA and client certificate.
        concurrency: jobs that talk to it at the same time.
        index_repository: keeps the index of every layer for others that work on this registry; "" for none, None
            where it is needed, see :meth:`Config.index_repository`. Whoever may write to it is believed.
    """

    name: str
    host: str
    aliases: tuple[str, ...] = ()
    repositories: tuple[str, ...] = ("**",)
    tls_verify: bool | None = None
    authfile: Path | None = None
    cert_dir: Path | None = None
    concurrency: int = 8
    index_repository: str | None = None

    @cached_property
    def _allowed(self) -> re.Pattern[str]:
        return re.compile("|".join(_pattern(each) for each in self.repositories))

    def serves(self, repository: str) -> bool:
        """Return whether ``repository`` is on the list of what is served; the one of our indexes never is."""
        ours = INDEX_REPOSITORY if self.index_repository is None else self.index_repository
        return repository != ours and self._allowed.fullmatch(repository) is not None


@dataclass(frozen=True, slots=True)
class Remap:
    """What every image is remapped for: the canonical map, and the form of META."""

    name: str
    mapping: str
    rendering: str = "erofs"
    namespace: str = "trusted"


@dataclass(frozen=True, slots=True)
class Tls:
    """Certificate and key of the hook; with ``client_ca`` a client must show a certificate of that CA as well."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a client may ask for.

    Attributes:
        body_bytes: of one request.
        events: in one request.
        rate: requests a second of one address, over a longer time.
        burst: requests of one address at once.
        failures: wrong tokens of one address in a minute.
    """

    body_bytes: int = 4 << 20
    events: int = 10_000
    rate: float = 500.0
    burst: int = 20_000
    failures: int = 30


@dataclass(frozen=True, slots=True)
class Config:
    """All settings; see the module.

    Attributes:
        host: address to listen on.
        port: 0 takes a free one.
        state: folder of the queue, on a local disk.
        store: the local store, which keeps the indexes of layers.
        token_file: with the token on its first line; None makes one in ``state``.
        registries: by name.
        remaps: what every image is remapped for.
        platforms: ``os/arch[/variant]`` of an index that are remapped; empty takes all of linux.
        workers: jobs at the same time.
        engine: ``processes``, ``threads`` or ``dask://HOST:PORT``.
        engine_tls: CA, certificate and key for ``dask+tls://HOST:PORT``.
        apart: others with stores of their own work on the same images, as the shards of a batch do.
        publish_indexes: also attach the indexes of its layers to each image.
        statements: also attach a statement (in-toto) to each artifact, of what it was made from.
        sign_key: private key to sign these statements with; implies ``statements``.
        drain_seconds: what a stopping service waits for running jobs.
        keep_days: how long a finished job is known.
        hold_seconds: how long the proxy holds a manifest.
        tls: None serves plain HTTP.
        bounds: on requests.
        policy: of retries and leases.
    """

    registries: Mapping[str, Registry]
    remaps: tuple[Remap, ...]
    state: Path
    store: Path
    host: str = "127.0.0.1"
    port: int = 8765
    token_file: Path | None = None
    platforms: tuple[str, ...] = ()
    workers: int = 2
    engine: str = "processes"
    engine_tls: tuple[Path, Path, Path] | None = None
    apart: bool = False
    publish_indexes: bool = False
    statements: bool = False
    sign_key: Path | None = None
    drain_seconds: float = 30.0
    keep_days: float = 90.0
    hold_seconds: float = 20.0
    tls: Tls | None = None
    bounds: Bounds = field(default_factory=Bounds)
    policy: Policy = field(default_factory=Policy)

    def index_repository(self, registry: Registry) -> str:
        """Return the repository of ``registry`` in which indexes of layers are shared, "" for none.

        Where all who work have one store, that is where they find each other's, and nothing need be published.
        """
        if registry.index_repository is not None:
            return registry.index_repository
        return INDEX_REPOSITORY if self.apart or self.engine.startswith("dask") else ""

    def registry_for(self, named: str, host: str) -> Registry | None:
        """Return the registry that a request means: by the name in its path, else by the host in the event.

        Where only one is configured, an event that says nothing that is known means that one: senders such as zot
        say nothing of themselves.
        """
        if named:
            return self.registries.get(named)
        for registry in self.registries.values():
            if host and host in (registry.host, registry.name, *registry.aliases):
                return registry
        return next(iter(self.registries.values())) if len(self.registries) == 1 else None


def _pattern(text: str) -> str:
    parts = re.split(r"(\*\*|\*)", text)
    return "".join({"**": r"\S*", "*": r"[^/\s]*"}.get(part, re.escape(part)) for part in parts)


def load(path: Path) -> Config:
    """Return the settings in the TOML file ``path``.

    Raises:
        UsageError: not there, not TOML, an unknown or missing name, a value that cannot mean anything.
    """
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from None
    return parse(values, str(path), path.parent)


def parse(values: Mapping[str, object], where: str, base: Path) -> Config:
    """Return the settings that ``values`` hold; relative paths are below ``base``; as :func:`load`."""
    from layerkit.api.open import default_store

    top = Table(values, where, base)
    registries = [_registry(top.table(v, f"[[registry]] {n + 1}")) for n, v in enumerate(top.tables("registry"))]
    remaps = [_remap(top.table(v, f"[[map]] {n + 1}")) for n, v in enumerate(top.tables("map"))]
    for what, names in (("registry", [r.name for r in registries]), ("map", [m.name for m in remaps])):
        if not names:
            raise UsageError(f"{where}: no [[{what}]]: the hook needs one at least")
        if twice := {name for name in names if names.count(name) > 1}:
            raise UsageError(f"{where}: two [[{what}]] called {min(twice)!r}")
    host, port = listen_address(top.get("listen", str, "127.0.0.1:8765"), where)
    state = top.path("state", Path("/var/lib/layerkit-hook"))
    store = top.path("store", default_store())
    assert state is not None and store is not None
    config = Config(
        registries={each.name: each for each in registries},
        remaps=tuple(remaps),
        state=state,
        store=store,
        host=host,
        port=port,
        token_file=top.path("token_file"),
        platforms=top.texts("platforms"),
        workers=top.number("workers", 2, least=1, most=256),
        engine=top.get("engine", str, "processes"),
        engine_tls=_engine_tls(top.table(top.get("engine_tls", dict, {}), "[engine_tls]")),
        publish_indexes=top.get("publish_indexes", bool, False),
        statements=top.get("statements", bool, False),
        sign_key=top.path("sign_key"),
        drain_seconds=top.seconds("drain_seconds", 30.0),
        keep_days=top.seconds("keep_days", 90.0),
        hold_seconds=top.seconds("hold_seconds", 20.0),
        tls=_tls(top.table(top.get("tls", dict, {}), "[tls]")),
        bounds=_bounds(top.table(top.get("limits", dict, {}), "[limits]")),
        policy=_policy(top.table(top.get("retry", dict, {}), "[retry]")),
    )
    top.done()
    check_engine(config.engine, f"{where}: engine")
    return config


def check_engine(engine: str, what: str) -> None:
    """Raise unless ``engine`` is one; ``what`` names the setting."""
    if not re.fullmatch(r"processes|threads|dask(\+tls)?://.+", engine):
        raise UsageError(f"{what} {engine!r}: want processes, threads or dask://HOST:PORT")


def with_index_repository(config: Config, repository: str) -> Config:
    """Return ``config`` with another repository of indexes in every registry, "" for none.

    Raises:
        UsageError: no name of a repository.
    """
    if repository:
        _check_repository(repository)
    changed = {name: replace(each, index_repository=repository) for name, each in config.registries.items()}
    return replace(config, registries=changed)


def _check_repository(name: str) -> None:
    from layerkit.images.registry.names import RegistryRef

    if RegistryRef.of(f"registry.invalid/{name}").repository != name:
        raise UsageError(f"index_repository = {name!r}: want a name without host, tag and digest")


def _registry(table: Table) -> Registry:
    from layerkit.images.registry.names import parse_host

    host = parse_host(table.get("host", str), f"{table.where}, host")
    registry = Registry(
        name=table.get("name", str, host.partition(":")[0]),
        host=host,
        aliases=table.texts("aliases"),
        repositories=table.texts("repositories", ("**",)),
        tls_verify=table.get("tls_verify", bool, None),
        authfile=table.path("authfile"),
        cert_dir=table.path("cert_dir"),
        concurrency=table.number("concurrency", 8, least=1, most=1000),
        index_repository=table.get("index_repository", str, None),
    )
    table.done()
    if not _NAME.fullmatch(registry.name):
        raise UsageError(f"{table.where}: name = {registry.name!r}: want lower-case letters, digits, '.', '_', '-'")
    if registry.index_repository:
        _check_repository(registry.index_repository)
    return registry


def _remap(table: Table) -> Remap:
    from layerkit.api.open import mapping

    chosen = mapping(
        list(table.texts("uid_map")), list(table.texts("gid_map")), subuid_name=table.get("subuid_name", str, None),
        overflow_id=table.get("overflow_id", int, None), squash=table.get("squash", bool, False),
    )  # fmt: skip
    if chosen is None:
        raise UsageError(f'{table.where}: give uid_map = ["C:H:N"] or subuid_name')
    text = chosen.canonical()
    remap = Remap(
        table.get("name", str, text), text, table.choice("rendering", ("erofs", "tar")),
        table.choice("namespace", ("trusted", "user")),
    )  # fmt: skip
    table.done()
    return remap


def _tls(table: Table) -> Tls | None:
    if not table.left:
        return None
    certificate, key, client_ca = table.path("certificate"), table.path("key"), table.path("client_ca")
    table.done()
    if certificate is None or key is None:
        raise UsageError(f"{table.where}: certificate and key belong together")
    return Tls(certificate, key, client_ca)


def _engine_tls(table: Table) -> tuple[Path, Path, Path] | None:
    if not table.left:
        return None
    ca, certificate, key = (table.path(name) for name in ("ca", "certificate", "key"))
    table.done()
    if ca is None or certificate is None or key is None:
        raise UsageError(f"{table.where}: ca, certificate and key belong together")
    return ca, certificate, key


def _bounds(table: Table) -> Bounds:
    default = Bounds()
    bounds = Bounds(
        table.number("body_bytes", default.body_bytes, least=1024, most=1 << 30),
        table.number("events", default.events, least=1, most=1_000_000),
        table.seconds("rate", default.rate),
        table.number("burst", default.burst, least=1, most=10_000_000),
        table.number("failures", default.failures, least=1, most=1_000_000),
    )
    table.done()
    return bounds


def _policy(table: Table) -> Policy:
    default = Policy()
    policy = Policy(
        table.number("attempts", default.attempts, least=1, most=1000),
        table.number("losses", default.losses, least=1, most=1_000_000),
        *(table.seconds(n, getattr(default, n)) for n in
          ("first_seconds", "most_seconds", "lease_seconds", "recheck_seconds")),
    )  # fmt: skip
    table.done()
    return policy


def listen_address(text: str, where: str) -> tuple[str, int]:
    """Return host and port of ``ADDRESS:PORT``."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"{where}: listen = {text!r}: want ADDRESS:PORT")
    return host.strip("[]"), int(port)


def read_token(config: Config) -> tuple[str, Path]:
    """Return the token that clients must show, and the file it is in; made there if none is configured.

    Raises:
        UsageError: no such file, others may read it, or the token is too short to be safe.
    """
    import os
    import secrets

    path = config.token_file or config.state / "token"
    if config.token_file is None and not path.exists():
        config.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "w") as file:  # noqa: PTH123 - a file descriptor
            file.write(secrets.token_urlsafe(32) + "\n")
    try:
        token, mode = path.read_text().strip(), path.stat().st_mode
    except OSError as error:
        raise UsageError(f"{path}: the hook's token: {error.strerror}") from None
    if mode & 0o007:
        raise UsageError(f"{path}: the hook's token can be read by everybody; chmod 600 it")
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(f"{path}: the hook's token: want {_SHORTEST_TOKEN} printable characters or more")
    return token, path


__all__ = [
    "INDEX_REPOSITORY", "Bounds", "Config", "Registry", "Remap", "Tls", "check_engine", "listen_address", "load",
    "parse", "read_token", "with_index_repository",
]  # fmt: skip
