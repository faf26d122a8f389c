"""What a user can set about registries, and where it comes from."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from layerkit.model.errors import UsageError

_FALSE, _TRUE = frozenset(("0", "false", "no", "off")), frozenset(("1", "true", "yes", "on"))


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and how long faults that may pass are waited out.

    Attributes:
        attempts: of one request, the first included.
        base_seconds: the wait before the second; it doubles each time, and a random part of it is taken.
        most_seconds: of one wait, also where the registry asks for more with ``Retry-After``.
    """

    attempts: int = 6
    base_seconds: float = 0.5
    most_seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class RegistryOptions:
    """Settings of the registry client.

    Attributes:
        authfile: the only file that credentials come from; None looks where podman and docker keep them.
        tls_verify: False accepts any certificate, and plain HTTP from a registry that does not speak TLS;
            None follows ``registries.conf`` and ``hosts.toml``, and verifies where they say nothing.
        cert_dir: folder with ``*.crt``, ``*.cert`` and ``*.key`` for every registry; None looks in certs.d.
        registries_conf: file with mirrors; None takes the user's, else the system's.
        hosts_dir: containerd's folder of ``HOST/hosts.toml``; None takes ``/etc/containerd/certs.d``.
        mirrors: whether mirrors are asked.
        connect_seconds: bound on making a connection.
        read_seconds: bound on silence of a connection.
        retry: for faults that may pass.
        chunk_bytes: of an upload in parts.
    """

    authfile: Path | None = None
    tls_verify: bool | None = None
    cert_dir: Path | None = None
    registries_conf: Path | None = None
    hosts_dir: Path | None = None
    mirrors: bool = True
    connect_seconds: float = 15.0
    read_seconds: float = 60.0
    retry: Retry = field(default_factory=Retry)
    chunk_bytes: int = 16 << 20


def from_environment() -> RegistryOptions:
    """Return the options that the environment gives: ``LAYERKIT_*``, and what podman and skopeo read.

    ``LAYERKIT_AUTHFILE`` (else ``REGISTRY_AUTH_FILE``), ``LAYERKIT_TLS_VERIFY``, ``LAYERKIT_CERT_DIR``,
    ``LAYERKIT_REGISTRIES_CONF`` (else ``CONTAINERS_REGISTRIES_CONF``), ``LAYERKIT_HOSTS_DIR``,
    ``LAYERKIT_MIRRORS``.

    Raises:
        UsageError: a value that means nothing.
    """

    def path(*names: str) -> Path | None:
        return next((Path(value).expanduser() for name in names if (value := os.environ.get(name))), None)

    mirrors = flag("LAYERKIT_MIRRORS")
    return RegistryOptions(
        authfile=path("LAYERKIT_AUTHFILE", "REGISTRY_AUTH_FILE"),
        tls_verify=flag("LAYERKIT_TLS_VERIFY"),
        cert_dir=path("LAYERKIT_CERT_DIR"),
        registries_conf=path("LAYERKIT_REGISTRIES_CONF", "CONTAINERS_REGISTRIES_CONF"),
        hosts_dir=path("LAYERKIT_HOSTS_DIR"),
        mirrors=True if mirrors is None else mirrors,
    )


def flag(name: str) -> bool | None:
    """Return what the variable ``name`` says, None where it is not set.

    Raises:
        UsageError: neither yes nor no.
    """
    text = os.environ.get(name, "")
    return truth(text, name) if text else None


def truth(text: str, what: str) -> bool:
    """Return what ``text``, the value of ``what``, says.

    Raises:
        UsageError: neither yes nor no.
    """
    if text.lower() not in _TRUE | _FALSE:
        raise UsageError(f"{what}={text!r}: want true or false")
    return text.lower() in _TRUE


__all__ = ["RegistryOptions", "Retry", "flag", "from_environment", "truth"]
