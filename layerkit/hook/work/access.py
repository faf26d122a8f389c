"""How processes of the hook reach registries: one client for each, with its connections and tokens."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2

from layerkit.linux import configuration
from layerkit.model.digest import Digest
from layerkit.model.errors import RegistryError
from layerkit.model.limits import Limits

if TYPE_CHECKING:
    from layerkit.images.registry.client import RegistryClient

_ATTACHED = re.compile(r"sha(?:256|512)-[0-9a-f]{64,128}(\..*)?")


@dataclass(frozen=True, slots=True)
class Access:
    """How a registry is reached; plain values, as it travels to workers."""

    host: str
    tls_verify: bool | None = None
    authfile: Path | None = None
    cert_dir: Path | None = None


def resolve(access: Access, repository: str, tag: str) -> Digest:
    """Return the digest that a tag means now.

    Raises:
        NotFound: no such tag.
        RegistryError: the registry does not answer.
    """
    return client_of(access, configuration.limits()).repository(f"{access.host}/{repository}").resolve(tag).digest


def all_tags(access: Access, repository: str) -> list[str]:
    """Return the tags of a repository, without those that only attach something to an image.

    Raises:
        NotFound: no such repository.
        RegistryError: the registry does not answer.
    """
    tags = client_of(access, configuration.limits()).repository(f"{access.host}/{repository}").tags()
    return [tag for tag in tags if not _ATTACHED.fullmatch(tag)]


def upstream(access: Access) -> tuple[str, ssl.SSLContext]:
    """Return the URL of a registry, up to before ``/v2``, and how TLS to it is checked.

    Raises:
        RegistryError: it does not answer, so that nobody knows whether it speaks TLS.
    """
    from layerkit.images.registry.hosts import base_url, endpoints

    client = client_of(access, configuration.limits())
    endpoint = endpoints(access.host, "", client.options)[-1]
    try:
        scheme = client.transport.scheme(endpoint)
    except httpx2.TransportError as error:
        raise RegistryError(access.host, 0, f"the registry does not answer: {error}", temporary=True) from None
    return base_url(endpoint, scheme).removesuffix("/v2"), endpoint.ssl_context()


@cache
def client_of(access: Access, limits: Limits) -> RegistryClient:
    """Return this process's client for a registry: connections and tokens are used again."""
    from layerkit.images.registry.client import RegistryClient
    from layerkit.images.registry.options import RegistryOptions, Retry

    # Few attempts here: the queue tries again, later, and lets other jobs go first.
    options = RegistryOptions(
        authfile=access.authfile, tls_verify=access.tls_verify, cert_dir=access.cert_dir, mirrors=False,
        retry=Retry(attempts=3, most_seconds=5.0),
    )  # fmt: skip
    return RegistryClient(options, limits=limits)


__all__ = ["Access", "all_tags", "client_of", "resolve", "upstream"]
