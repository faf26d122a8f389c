"""Images in registries (OCI distribution-spec 1.1 and the docker registry API that it grew from).

``client`` is what others build on: :class:`~layerkit.images.registry.client.RegistryClient` and the repositories
it gives. ``source`` and ``sink`` are the ports of the use cases over it. Importing this package is cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from layerkit.model.limits import DEFAULT, Limits

if TYPE_CHECKING:
    from layerkit.images.registry.options import RegistryOptions
    from layerkit.images.registry.sink import RegistrySink
    from layerkit.images.registry.source import RegistrySource
    from layerkit.model.digest import Digest
    from layerkit.model.ports import ImageSource


def open_source(
    path: str, tag: str, digest: Digest | None, *, options: RegistryOptions | None = None, limits: Limits = DEFAULT
) -> RegistrySource:
    """Return the image ``path`` (``[HOST/]NAME``) with ``tag`` or ``digest``, with a client of its own.

    Raises:
        UsageError: no such name can be.
    """
    from layerkit.images.registry.client import RegistryClient
    from layerkit.images.registry.names import RegistryRef
    from layerkit.images.registry.source import RegistrySource

    ref = RegistryRef.of(path, tag if tag or digest else "latest", digest)
    client = RegistryClient(options, limits=limits)
    return RegistrySource(client.repository(ref), ref, limits=limits, owned=client)


def open_sink(
    path: str,
    tag: str,
    digest: Digest | None,
    *,
    options: RegistryOptions | None = None,
    near: ImageSource | None = None,
    mount_from: Sequence[str] = (),
    attach_only: bool = False,
    limits: Limits = DEFAULT,
) -> RegistrySink:
    """Return where the image ``path`` (``[HOST/]NAME``) goes, with a client of its own.

    Args:
        path: registry and repository.
        tag: what it is called there; "" is ``latest``, or no tag where ``digest`` is given.
        digest: the digest that it must have.
        options: None takes those of the environment.
        near: where blobs will come from; if it is this registry, they are mounted and not sent.
        mount_from: further repositories of this registry that may have blobs.
        attach_only: the image is there, and all that is put is attached to it.
        limits: bounds.

    Raises:
        UsageError: no such name can be.
    """
    from layerkit.images.registry.client import RegistryClient
    from layerkit.images.registry.names import RegistryRef
    from layerkit.images.registry.sink import RegistrySink

    ref = RegistryRef.of(path, tag, digest)
    client = RegistryClient(options, limits=limits)
    neighbours = list(mount_from)
    if near is not None and (repository := near.repository_at(ref.host)):
        neighbours.append(repository)
    return RegistrySink(
        client.repository(ref), ref, mount_from=neighbours, attach_only=attach_only, limits=limits, owned=client
    )


__all__ = ["open_sink", "open_source"]
