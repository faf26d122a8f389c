"""The registry client: repositories with their manifests, blobs, tags and referrers.

::

    with RegistryClient() as client:
        repo = client.repository("registry.example.com/team/app")
        descriptor, data = repo.manifest("v1")
        for layer in oci.parse_manifest(data, "v1").layers:
            reader = repo.open_blob(layer)

One client serves any number of registries and threads. Every answer that has a digest is checked against it,
but for the bytes of :meth:`Repository.open_blob`, which the reader verifies as it goes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import TracebackType

from layerkit.images.registry import options as settings
from layerkit.images.registry.hosts import endpoints
from layerkit.images.registry.listing import pages, texts
from layerkit.images.registry.names import RegistryRef, parse_host
from layerkit.images.registry.repository import Repository
from layerkit.images.registry.transport import Ask, Traffic, Transport
from layerkit.model.errors import UsageError
from layerkit.model.limits import DEFAULT, Limits

_CATALOG_SCOPE = frozenset(("registry:catalog:*",))


class RegistryClient:
    """Connections, credentials and tokens for any number of registries."""

    def __init__(
        self,
        options: settings.RegistryOptions | None = None,
        *,
        limits: Limits = DEFAULT,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Nothing is connected yet.

        Args:
            options: None takes those of the environment.
            limits: bounds on what is read.
            sleep: waits between attempts; may raise to stop the work.

        Raises:
            UsageError: a file that the options name is not there.
        """
        self.options = options or settings.from_environment()
        if self.options.authfile is not None and not self.options.authfile.is_file():
            raise UsageError(f"{self.options.authfile}: no such file; --authfile names the one of `podman login`")
        self.limits = limits
        self.transport = Transport(self.options, sleep=sleep)

    @property
    def traffic(self) -> Traffic:
        """Return what went over the wire so far."""
        return self.transport.traffic

    def repository(self, ref: RegistryRef | str) -> Repository:
        """Return the repository of ``ref`` (``HOST/NAME``, tag and digest are ignored).

        Raises:
            UsageError: no reference, or a registry that ``registries.conf`` blocks.
        """
        parsed = RegistryRef.parse(ref) if isinstance(ref, str) else ref
        return Repository(self, parsed.host, parsed.repository)

    def catalog(self, host: str) -> Iterator[str]:
        """Yield the repositories of a registry; some offer no such list.

        Raises:
            RegistryError: refused, or the listing goes in a circle.
        """
        endpoint = endpoints(parse_host(host), "", self.options)[-1]
        ask = Ask(endpoint, "GET", "/_catalog", f"catalog of {host}", frozenset((200,)), _CATALOG_SCOPE)
        for document in pages(self.transport, ask, self.limits):
            yield from texts(document.get("repositories"))

    def close(self) -> None:
        """Close all connections."""
        self.transport.close()

    def __enter__(self) -> RegistryClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


__all__ = ["RegistryClient", "Repository"]
