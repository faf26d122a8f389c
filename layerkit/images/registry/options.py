"""What a user can set about registries, and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from layerkit.linux.configuration import configured


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


def from_settings() -> RegistryOptions:
    """Return the options that are configured: by ``LAYERKIT_*``, by what podman and skopeo read, in config.toml.

    Raises:
        UsageError: a value that means nothing.
    """
    names = ("authfile", "tls_verify", "cert_dir", "registries_conf", "hosts_dir", "mirrors")
    return RegistryOptions(**{name: configured(name) for name in names})
