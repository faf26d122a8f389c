"""How processes of the hook reach registries: one client for each way, with its connections and tokens."""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import httpx2

from layerkit.hook.config import Registry
from layerkit.images.registry.client import RegistryClient, Repository
from layerkit.images.registry.hosts import base_url, endpoints
from layerkit.images.registry.options import RegistryOptions
from layerkit.linux import configuration
from layerkit.model.digest import Digest
from layerkit.model.errors import RegistryError
from layerkit.model.limits import Limits


@dataclass(frozen=True, slots=True)
class Place:
    """A repository, and how its registry is reached; plain values, as it travels to workers."""

    host: str
    repository: str
    options: RegistryOptions

    def open(self, limits: Limits | None = None) -> Repository:
        """Return the repository, over this process's client; ``limits`` None takes those that are configured."""
        client = _client(self.options, limits or configuration.limits())
        return client.repository(f"{self.host}/{self.repository}")


@cache
def _client(options: RegistryOptions, limits: Limits) -> RegistryClient:
    """Return this process's client: connections and tokens are used again."""
    return RegistryClient(options, limits=limits)


def place_in(registry: Registry, repository: str) -> Place:
    """Return ``repository`` of a configured registry."""
    return Place(registry.host, repository, registry.options)


def resolve(registry: Registry, repository: str, tag: str) -> Digest:
    """Return the digest that a tag means now.

    Raises:
        NotFound: no such tag.
        RegistryError: the registry does not answer.
    """
    return place_in(registry, repository).open().resolve(tag).digest


def upstream(registry: Registry) -> tuple[str, ssl.SSLContext]:
    """Return the URL of a registry, up to before ``/v2``, and how TLS to it is checked.

    Raises:
        RegistryError: it does not answer, so that nobody knows whether it speaks TLS.
    """
    client = _client(registry.options, configuration.limits())
    endpoint = endpoints(registry.host, "", client.options)[-1]
    try:
        scheme = client.transport.scheme(endpoint)
    except httpx2.TransportError as error:
        raise RegistryError(registry.host, 0, f"the registry does not answer: {error}", temporary=True) from None
    return base_url(endpoint, scheme).removesuffix("/v2"), endpoint.ssl_context()


def traffic(places: Iterable[Place], limits: Limits) -> dict[str, int]:
    """Return what went over the wire to and from ``places`` so far, in this process."""
    every = [client.traffic for client in {_client(place.options, limits) for place in places}]
    return {
        "bytes_read": sum(each.bytes_read for each in every),
        "bytes_written": sum(each.bytes_written for each in every),
        "bytes_mounted": sum(each.bytes_mounted for each in every),
    }
