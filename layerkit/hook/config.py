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

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from layerkit.formats.oci.remap_artifact import FORMAT_VERSION
from layerkit.formats.toml_settings import Table, one_of, whole
from layerkit.hook.queue import Key, Policy
from layerkit.images.registry.names import RegistryRef, parse_host
from layerkit.images.registry.options import RegistryOptions, Retry
from layerkit.model.digest import Digest
from layerkit.model.errors import UsageError
from layerkit.usecases.settings import MapOptions, default_store

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_SHORTEST_TOKEN = 16

INDEX_REPOSITORY = "layerkit/indexes"
"""Where those that share no store find each other's indexes of layers, unless another place is configured."""


@dataclass(frozen=True)
class Registry:
    """A registry that the hook may talk to.

    Attributes:
        host: ``HOST[:PORT]``, where it is asked.
        name: in the paths of the hook and in its reports.
        aliases: other names that events may call it by; they are compared and never connected to.
        repositories: patterns of the names that are served; ``*`` stands for one part of a name, ``**`` for any.
        concurrency: jobs that talk to it at the same time.
        index_repository: keeps the index of every layer for others that work on this registry; "" for none, None
            where it is needed, see :meth:`Config.index_repository`. Whoever may write to it is believed.
        options: how it is reached.
    """

    host: str
    name: str = ""
    aliases: tuple[str, ...] = ()
    repositories: tuple[str, ...] = ("**",)
    concurrency: int = whole(8, 1, 1000)
    index_repository: str | None = None
    options: RegistryOptions = field(default_factory=RegistryOptions)

    def __post_init__(self) -> None:
        """Refuse what is no name of a repository of indexes."""
        name = self.index_repository
        if name and RegistryRef.of(f"registry.invalid/{name}").repository != name:
            raise UsageError(f"index_repository = {name!r}: want a name without host, tag and digest")

    @classmethod
    def read(cls, table: Table) -> Registry:
        """Return what ``[[registry]]`` says."""
        # Few attempts here: the queue tries again, later, and lets other jobs go first.
        options = table.fill(
            RegistryOptions, ("tls_verify", "authfile", "cert_dir"), mirrors=False, retry=Retry(3, most_seconds=5.0)
        )
        found = table.fill(cls, options=options)
        host = parse_host(found.host, f"{table.where}, host")
        found = replace(found, host=host, name=found.name or host.partition(":")[0])
        if not _NAME.fullmatch(found.name):
            raise UsageError(
                f"{table.where}: name = {found.name!r}: want lower-case letters, digits, '.', '_', '-'"
            )
        return found

    @cached_property
    def _allowed(self) -> re.Pattern[str]:
        signs = {"**": r"\S*", "*": r"[^/\s]*"}
        return re.compile("|".join(
            "".join(signs.get(part, re.escape(part)) for part in re.split(r"(\*\*|\*)", pattern))
            for pattern in self.repositories
        ))  # fmt: skip

    def serves(self, repository: str) -> bool:
        """Return whether ``repository`` is on the list of what is served; the one of our indexes never is."""
        ours = INDEX_REPOSITORY if self.index_repository is None else self.index_repository
        return repository != ours and self._allowed.fullmatch(repository) is not None


@dataclass(frozen=True, slots=True)
class Remap:
    """What every image is remapped for: the canonical map, and the form of META."""

    mapping: str
    name: str = ""
    rendering: str = one_of("erofs", "tar")
    namespace: str = one_of("trusted", "user")

    @property
    def options(self) -> str:
        """Return the form of META as canonical text."""
        return json.dumps({"namespace": self.namespace, "rendering": self.rendering}, separators=(",", ":"))

    @classmethod
    def read(cls, table: Table) -> Remap:
        """Return what ``[[map]]`` says."""
        chosen = table.fill(MapOptions, ("uid_map", "gid_map", "subuid_name", "overflow_id", "squash")).mapping()
        if chosen is None:
            raise UsageError(f'{table.where}: give uid_map = ["C:H:N"] or subuid_name')
        found = table.fill(cls, mapping=chosen.canonical())
        return replace(found, name=found.name or found.mapping)


@dataclass(frozen=True, slots=True)
class Tls:
    """Certificate and key of the hook; with ``client_ca`` a client must show a certificate of that CA as well."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True)
class ClusterTls:
    """Certificates for a dask cluster that speaks TLS."""

    ca: Path
    certificate: Path
    key: Path


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

    body_bytes: int = whole(4 << 20, 1024, 1 << 30)
    events: int = whole(10_000, 1, 1_000_000)
    rate: float = 500.0
    burst: int = whole(20_000, 1, 10_000_000)
    failures: int = whole(30, 1, 1_000_000)


@dataclass(frozen=True, slots=True)
class Config:
    """All settings; see the module.

    Attributes:
        registries: by name.
        remaps: what every image is remapped for.
        state: folder of the queue, on a local disk.
        store: the local store, which keeps the indexes of layers.
        host: address to listen on.
        port: 0 takes a free one.
        token_file: with the token on its first line; None makes one in ``state``.
        platforms: ``os/arch[/variant]`` of an index that are remapped; empty takes all of linux.
        workers: jobs at the same time.
        engine: ``processes``, ``threads`` or ``dask://HOST:PORT``.
        engine_tls: for ``dask+tls://HOST:PORT``.
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
    state: Path = Path("/var/lib/layerkit-hook")
    store: Path = field(default_factory=default_store)
    host: str = "127.0.0.1"
    port: int = 8765
    token_file: Path | None = None
    platforms: tuple[str, ...] = ()
    workers: int = whole(2, 1, 256)
    engine: str = "processes"
    engine_tls: ClusterTls | None = None
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

    def __post_init__(self) -> None:
        """Refuse an engine that is none."""
        if not re.fullmatch(r"processes|threads|dask(\+tls)?://.+", self.engine):
            raise UsageError(f"engine = {self.engine!r}: want processes, threads or dask://HOST:PORT")

    @classmethod
    def read(cls, top: Table) -> Config:
        """Return the settings in ``top``.

        Raises:
            UsageError: an unknown or missing name, a value that cannot mean anything.
        """
        registries = [Registry.read(table) for table in top.tables("registry")]
        remaps = [Remap.read(table) for table in top.tables("map")]
        for what, names in (("registry", [r.name for r in registries]), ("map", [m.name for m in remaps])):
            if not names:
                raise UsageError(f"{top.where}: no [[{what}]] is given; the hook needs at least one")
            if twice := {name for name in names if names.count(name) > 1}:
                raise UsageError(f"{top.where}: two [[{what}]] called {min(twice)!r}")
        host, port = listen_address(top.take("listen", str, "127.0.0.1:8765"), top.where)
        tls, engine_tls = top.table("tls"), top.table("engine_tls")
        return top.fill(
            cls,
            registries={each.name: each for each in registries},
            remaps=tuple(remaps),
            host=host,
            port=port,
            apart=False,
            tls=tls.fill(Tls) if tls else None,
            engine_tls=engine_tls.fill(ClusterTls) if engine_tls else None,
            bounds=top.table("limits").fill(Bounds),
            policy=top.table("retry").fill(Policy),
        )

    def keys(self, digest: Digest) -> list[Key]:
        """Return the jobs that a manifest is worth: one for each configured map."""
        return [Key(digest, remap.mapping, remap.options, FORMAT_VERSION) for remap in self.remaps]

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

    def with_index_repository(self, name: str) -> Config:
        """Return it with another repository of indexes in every registry, "" for none.

        Raises:
            UsageError: no name of a repository.
        """
        changed = {known: replace(each, index_repository=name) for known, each in self.registries.items()}
        return replace(self, registries=changed)


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
    path = config.token_file or config.state / "token"
    if config.token_file is None and not path.exists():
        config.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(0o600, exist_ok=False)
        path.write_text(secrets.token_urlsafe(32) + "\n")
    try:
        token, mode = path.read_text().strip(), path.stat().st_mode
    except OSError as error:
        raise UsageError(f"{path}: the hook's token: {error.strerror}") from None
    if mode & 0o007:
        raise UsageError(f"{path}: everybody can read the hook's token; run chmod 600 on the file")
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(f"{path}: the hook's token: want {_SHORTEST_TOKEN} printable characters or more")
    return token, path
