"""Where a repository is served: the registry itself, and the mirrors that two kinds of files name.

``registries.conf`` (containers-registries.conf(5), version 2) and containerd's ``hosts.toml`` (its
docs/hosts.md). Certificates come from the ``certs.d`` folders of both, and of docker.
"""

from __future__ import annotations

import os
import ssl
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from layerkit.images.registry.names import api_host, parse_host
from layerkit.images.registry.options import RegistryOptions
from layerkit.model.errors import UsageError

_CERT_DIRS = ("/etc/containers/certs.d", "/etc/docker/certs.d")
_PULL, _RESOLVE, _PUSH = "pull", "resolve", "push"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One place that serves a repository.

    Attributes:
        host: for credentials and messages, ``HOST[:PORT]``.
        repository: the name there; a mirror may know it by another one.
        scheme: ``https`` or ``http``, or "" to find out (only where ``insecure``).
        prefix: of paths, before ``v2`` (with a leading slash) or "".
        ns: what a mirror is told in ``?ns=``, "" for nothing.
        insecure: accept any certificate, and plain HTTP.
        ca: files of certificates to trust besides the system's.
        client_certs: pairs of certificate and key.
        abilities: of ``pull``, ``resolve``, ``push``.
        digest_only: asked for digests, not for tags.
        override_path: ``prefix`` replaces ``/v2`` too.
    """

    host: str
    repository: str
    scheme: str = "https"
    prefix: str = ""
    ns: str = ""
    insecure: bool = False
    ca: tuple[Path, ...] = ()
    client_certs: tuple[tuple[Path, Path], ...] = ()
    abilities: frozenset[str] = frozenset((_PULL, _RESOLVE, _PUSH))
    digest_only: bool = False
    tag_only: bool = False
    override_path: bool = False
    headers: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)

    @property
    def tls_key(self) -> tuple[object, ...]:
        """Return what tells apart connections with other TLS settings."""
        return self.insecure, self.ca, self.client_certs

    def serves(self, *, digest: bool) -> bool:
        """Return whether it may be asked for a manifest, by digest or by tag."""
        if digest:
            return _PULL in self.abilities and not self.tag_only
        return _RESOLVE in self.abilities and not self.digest_only

    def ssl_context(self) -> ssl.SSLContext:
        """Return the TLS settings of a connection.

        Raises:
            UsageError: a certificate or key that cannot be read.
        """
        context = ssl.create_default_context()
        try:
            for path in self.ca:
                context.load_verify_locations(cafile=path)
            for cert, key in self.client_certs:
                context.load_cert_chain(cert, key)
        except (OSError, ssl.SSLError) as error:
            names = ", ".join(str(p) for p in (*self.ca, *(p for pair in self.client_certs for p in pair)))
            raise UsageError(f"{self.host}: cannot load its certificates ({names}): {error}") from None
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def endpoints(host: str, repository: str, options: RegistryOptions) -> list[Endpoint]:
    """Return where to look for a repository, mirrors first and the registry itself last.

    Raises:
        UsageError: a file that is malformed, or that blocks the registry.
    """
    found: list[Endpoint] = []
    upstream = Endpoint(host, repository)
    if (conf := _registries_conf(options)) is not None:
        mirrors, upstream = _from_conf(*conf, upstream)
        found += mirrors
    toml = (options.hosts_dir or Path("/etc/containerd/certs.d")) / host / "hosts.toml"
    if (document := _load(toml)) is not None:
        found += _from_hosts(toml, document, host, repository)
    if not options.mirrors:
        found = []
    return [_with_settings(each, options) for each in (*found, upstream)]


def _with_settings(endpoint: Endpoint, options: RegistryOptions) -> Endpoint:
    if options.tls_verify is not None:
        endpoint = replace(endpoint, insecure=not options.tls_verify)
    if endpoint.insecure and endpoint.scheme == "https":
        endpoint = replace(endpoint, scheme="")
    ca, pairs = _certificates(endpoint.host, options)
    return replace(endpoint, ca=endpoint.ca + ca, client_certs=endpoint.client_certs + pairs)


def _certificates(host: str, options: RegistryOptions) -> tuple[tuple[Path, ...], tuple[tuple[Path, Path], ...]]:
    if options.cert_dir is not None:
        if not options.cert_dir.is_dir():
            raise UsageError(f"--cert-dir {options.cert_dir}: no such folder")
        folders = [options.cert_dir]
    else:
        home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "containers/certs.d"
        folders = [base / host for base in (home, *map(Path, _CERT_DIRS))]
    for folder in folders:
        try:
            names = sorted(folder.iterdir())
        except OSError:
            continue
        certs = tuple(p for p in names if p.suffix == ".cert")
        for cert in certs:
            if not cert.with_suffix(".key").exists():
                raise UsageError(f"{cert}: there is no {cert.with_suffix('.key').name} beside it")
        return tuple(p for p in names if p.suffix == ".crt"), tuple((c, c.with_suffix(".key")) for c in certs)
    return (), ()


def _load(path: Path) -> dict[str, Any] | None:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from None


# registries.conf


def _registries_conf(options: RegistryOptions) -> tuple[Path, dict[str, Any]] | None:
    """Return the file that counts, its drop-ins added, as containers-registries.conf.d(5) says."""
    if options.registries_conf is not None:
        document = _load(options.registries_conf)
        if document is None:
            raise UsageError(f"{options.registries_conf}: cannot be read; LAYERKIT_REGISTRIES_CONF names it")
        return options.registries_conf, document
    user = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "containers/registries.conf"
    for path in (user, Path("/etc/containers/registries.conf")):
        document = _load(path)
        if document is None:
            continue
        for extra in sorted(path.parent.glob("registries.conf.d/*.conf")):
            more = _load(extra) or {}
            kept = _tables(document, "registry")
            new = _tables(more, "registry")
            taken = {_prefix(t) for t in new}
            document["registry"] = [t for t in kept if _prefix(t) not in taken] + new
        return path, document
    return None


def _tables(document: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    found = document.get(name)
    return [t for t in found if isinstance(t, dict)] if isinstance(found, list) else []


def _prefix(table: Mapping[str, Any]) -> str:
    return str(table.get("prefix") or table.get("location") or "")


def _matches(prefix: str, name: str) -> bool:
    """Return whether ``prefix`` (or ``*.DOMAIN``) covers ``HOST/REPOSITORY``."""
    if prefix.startswith("*."):
        return name.partition("/")[0].endswith(prefix[1:])
    return name == prefix or (name.startswith(prefix) and name[len(prefix)] == "/")


def _from_conf(path: Path, document: Mapping[str, Any], upstream: Endpoint) -> tuple[list[Endpoint], Endpoint]:
    name = f"{upstream.host}/{upstream.repository}"
    tables = [t for t in _tables(document, "registry") if _prefix(t) and _matches(_prefix(t), name)]
    if not tables:
        return [], upstream
    table = max(tables, key=lambda t: len(_prefix(t)))
    prefix = _prefix(table)
    if table.get("blocked") is True:
        raise UsageError(f"{path}: {prefix} is blocked there; ask who wrote it, or use another registry")
    rest = name[len(prefix) :].lstrip("/") if not prefix.startswith("*.") else name.partition("/")[2]

    def place(location: str, insecure: object) -> Endpoint:
        host, _, above = location.partition("/")
        repository = "/".join(part for part in (above, rest) if part) or upstream.repository
        return Endpoint(parse_host(host, str(path)), repository, insecure=insecure is True)

    mirrors = []
    only = table.get("mirror-by-digest-only") is True
    for mirror in _tables(table, "mirror"):
        if not isinstance(mirror.get("location"), str):
            raise UsageError(f"{path}: a mirror of {prefix} has no location")
        when = mirror.get("pull-from-mirror", "all")
        mirrors.append(replace(
            place(mirror["location"], mirror.get("insecure")), abilities=frozenset((_PULL, _RESOLVE)),
            digest_only=only or when == "digest-only", tag_only=when == "tag-only",
        ))  # fmt: skip
    location = table.get("location")
    if isinstance(location, str) and location and not prefix.startswith("*."):
        return mirrors, place(location, table.get("insecure"))
    return mirrors, replace(upstream, insecure=table.get("insecure") is True)


# hosts.toml


def _from_hosts(path: Path, document: Mapping[str, Any], host: str, repository: str) -> list[Endpoint]:
    """Return the hosts of a ``hosts.toml`` that pull; ``server`` and pushes stay with the registry itself."""
    found = []
    hosts = document.get("host")
    for url, table in hosts.items() if isinstance(hosts, dict) else ():
        if not isinstance(table, dict):
            continue
        parts = urlsplit(url if "//" in url else f"https://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise UsageError(f"{path}: host {url!r}: want http:// or https://HOST[:PORT][/PATH]")
        can = table.get("capabilities", [_PULL, _RESOLVE])
        base = path.parent
        headers = table.get("header")
        found.append(Endpoint(
            parts.netloc.lower(), repository, scheme=parts.scheme, ns=host,
            prefix=parts.path.rstrip("/"), override_path=table.get("override_path") is True,
            insecure=table.get("skip_verify") is True,
            ca=tuple(base / name for name in _texts(table.get("ca"))),
            client_certs=_pairs(table.get("client"), base, path),
            abilities=frozenset(str(x) for x in can if x != _PUSH) if isinstance(can, list) else frozenset(),
            headers={str(k): str(v[0] if isinstance(v, list) else v) for k, v in headers.items()}
            if isinstance(headers, dict) else {},
        ))  # fmt: skip
    return found


def _texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []


def _pairs(value: object, base: Path, path: Path) -> tuple[tuple[Path, Path], ...]:
    entries = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    if all(isinstance(e, str) for e in entries) and len(entries) == 2:
        entries = [entries]
    out = []
    for entry in entries:
        names = _texts(entry)
        if len(names) not in (1, 2):
            raise UsageError(f"{path}: client: want a file, or a pair of certificate and key")
        out.append((base / names[0], base / names[-1]))
    return tuple(out)


def base_url(endpoint: Endpoint, scheme: str) -> str:
    """Return the URL that paths of the API begin with, without a slash at its end."""
    version = "" if endpoint.override_path else "/v2"
    prefix = endpoint.prefix.removesuffix("/v2") if not endpoint.override_path else endpoint.prefix
    return f"{scheme}://{api_host(endpoint.host)}{prefix}{version}"
