"""What a user can set: the values that command line, API and settings files fill, and that are passed on whole.

What belongs to one use case alone stands beside it (``FlattenOptions`` in ``flatten``), and what a mount takes in
:class:`layerkit.hosts.mounts.spec.MountOptions`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from layerkit.linux import configuration
from layerkit.model.errors import UsageError
from layerkit.model.work import NOTHING_KEPT, NOWHERE, Destination, Kept

if TYPE_CHECKING:
    from layerkit.idmap import Mapping
    from layerkit.images.registry.options import RegistryOptions
    from layerkit.model.image import Image
    from layerkit.model.limits import Limits
    from layerkit.model.ports import ImageSource
    from layerkit.pack import Packing
    from layerkit.store.local import LocalStore


def default_store() -> Path:
    """Return the store that is configured, else ``/var/lib/layerkit`` for root, else one below ``$XDG_DATA_HOME``.

    Root of a user namespace is not root here: it cannot write to /var/lib.
    """
    from layerkit.linux import userns

    named: Path | None = configuration.configured("store")
    if named is not None:
        return named
    if os.geteuid() == 0 and userns.in_initial_userns():
        return Path("/var/lib/layerkit")
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "layerkit"


@dataclass(frozen=True, slots=True)
class Settings:
    """What holds for every operation on an image.

    Attributes:
        store: the local store; None is what is configured, else :func:`default_store`.
        data: ``auto``, ``tar`` or ``objects``: how file data is kept.
        jobs: layers read at the same time.
        strict: refuse overlay xattrs that an image brings, instead of escaping them.
        limits: bounds on input; None is what is configured.
        registry: for ``docker://`` references; None is what is configured.
        published: take published indexes and tables of contents instead of layers where nothing is mounted by it.

    What is not given is what ``LAYERKIT_*`` and config.toml say, see :mod:`layerkit.linux.configuration`.
    """

    store: Path | None = None
    data: str = field(default_factory=partial(configuration.configured, "data"))
    jobs: int = field(default_factory=lambda: configuration.configured("jobs") or 1)
    strict: bool = field(default_factory=partial(configuration.configured, "strict"))
    limits: Limits | None = None
    registry: RegistryOptions | None = None
    published: bool = field(default_factory=partial(configuration.configured, "published"))

    @property
    def store_path(self) -> Path:
        """Return the store's folder."""
        return self.store or default_store()

    @property
    def bounds(self) -> Limits:
        """Return the bounds on input that hold."""
        return self.limits or configuration.limits()

    def open_store(self, *, create: bool = True) -> LocalStore:
        """Open the store, made if there is none and ``create``; close it, or use it in ``with``."""
        from layerkit.store.local import LocalStore

        return LocalStore.open(self.store_path, create=create, limits=self.bounds)

    def destination(self, dst: str | None, near: ImageSource | None = None) -> Destination:
        """Return the place that the reference ``dst`` names, for blobs that come from ``near``; None is nowhere.

        Raises:
            UsageError: no reference.
        """
        from layerkit.images import reference
        from layerkit.images.open import open_sink

        if dst is None:
            return NOWHERE
        parsed = reference.parse(dst)
        return Destination(
            lambda: open_sink(parsed, limits=self.bounds, registry=self.registry, near=near),
            parsed.name,
            dst,
            parsed.transport in ("docker-archive", "docker-daemon"),
        )


@dataclass(frozen=True, slots=True)
class MapOptions:
    """How an id map is spelled.

    Attributes:
        uid_map: ``C:H:N`` texts (container id, host id, count), each may hold several with commas.
        gid_map: the same for groups; none takes the uid map.
        subuid_name: take the map from /etc/subuid and /etc/subgid instead.
        overflow_id: host id for owners outside the map; None makes them an error.
        squash: allow several container ids on one host id.
    """

    uid_map: tuple[str, ...] = ()
    gid_map: tuple[str, ...] = ()
    subuid_name: str | None = None
    overflow_id: int | None = None
    squash: bool = False

    def mapping(self) -> Mapping | None:
        """Return the id map, None where nothing asks for one.

        Raises:
            UsageError: malformed, overlapping or contradictory.
        """
        if not self.uid_map and not self.gid_map and self.subuid_name is None:
            if self.overflow_id is not None or self.squash:
                raise UsageError("--overflow-id and --squash need a map; add --uid-map C:H:N")
            return None
        from layerkit.idmap import IdMap, Mapping

        if self.subuid_name is not None:
            if self.uid_map or self.gid_map:
                raise UsageError(
                    "--subuid-name takes the whole map from /etc/subuid; leave --uid-map and --gid-map out"
                )
            from layerkit.linux.userns import subid_map

            uid, gid = (subid_map(self.subuid_name, kind) for kind in ("uid", "gid"))
            return Mapping(uid, gid, self.overflow_id)
        if not self.uid_map:
            raise UsageError("--gid-map without --uid-map: give the users' map too")
        uid = IdMap.parse(self.uid_map, what="--uid-map", squash=self.squash)
        gid = IdMap.parse(self.gid_map, what="--gid-map", squash=self.squash) if self.gid_map else uid
        return Mapping(uid, gid, self.overflow_id)


KeptBase: TypeAlias = "Callable[[Image], int]"
"""Gives how many layers of an image, from the bottom, are to stay as they are: what ``--keep-base`` means."""


@dataclass(frozen=True, slots=True)
class RewriteOptions:
    """How the layers and the config that are made here are written.

    Attributes:
        packing: compression of new layers.
        created: RFC 3339 time of a changed image; None keeps that of the image.
    """

    packing: Packing
    created: str | None = None

    @classmethod
    def of(
        cls,
        compression: str | None = None,
        level: int | None = None,
        jobs: int | None = None,
        created: str | None = None,
    ) -> RewriteOptions:
        """Return the options that the words of a user mean.

        Args:
            compression: ``gzip``, ``zstd``, ``zstd:chunked`` or ``none``; None: as configured, with its level.
            level: of the compression: gzip 1 to 9, zstd 1 to 22; None is the default.
            jobs: threads that compress; None is what is configured, else one for each core. The result does not
                depend on it.
            created: RFC 3339 or seconds since 1970; None takes ``SOURCE_DATE_EPOCH``, where that is set.

        Raises:
            UsageError: another compression, a level that it does not have, or no time.
        """
        from layerkit.pack import Packing, creation_time

        if compression is None:
            compression, level = (
                configuration.configured("compression"),
                level or configuration.configured("compression_level"),
            )
        how = Packing.parse(compression, level, jobs or configuration.configured("jobs"))
        return cls(how, creation_time(created, os.environ.get("SOURCE_DATE_EPOCH")))


@contextlib.contextmanager
def kept(settings: Settings) -> Iterator[Kept]:
    """Give what the store keeps of layers, and hold it; looking at an image makes no store, and needs none."""
    # Even to read from a store takes writing: locks, and the catalog's log.
    if not os.access(settings.store_path / "version.json", os.R_OK | os.W_OK):
        yield NOTHING_KEPT
        return
    with settings.open_store(create=False) as store, store.hold():
        yield store


def open_store(path: Path | None = None) -> LocalStore:
    """Open the local store at ``path`` (None: the default one), which must exist; to be closed."""
    return Settings(path).open_store(create=False)
