"""What holds for every operation on an image, and the store that it is about."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from layerkit.model import limits as bounds
from layerkit.model.digest import Digest
from layerkit.model.errors import NotFound

if TYPE_CHECKING:
    from layerkit.images.registry.options import RegistryOptions
    from layerkit.model.digest import Digest
    from layerkit.model.index import Index
    from layerkit.model.limits import Limits
    from layerkit.store.local import LocalStore


def default_store() -> Path:
    """Return the store of this user: ``/var/lib/layerkit`` for root, else below ``$XDG_DATA_HOME``.

    Root of a user namespace is not root here: it cannot write to /var/lib.
    """
    from layerkit.linux import userns

    if os.geteuid() == 0 and userns.in_initial_userns():
        return Path("/var/lib/layerkit")
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "layerkit"


@dataclass(frozen=True, slots=True)
class Settings:
    """What holds for every operation on an image.

    Attributes:
        store: the local store; None is :func:`default_store`.
        data: ``auto``, ``tar`` or ``objects``: how file data is kept.
        jobs: layers read at the same time.
        strict: refuse overlay xattrs that an image brings, instead of escaping them.
        limits: bounds on input; None takes the defaults with those of ``LAYERKIT_LIMIT_*``.
        registry: for ``docker://`` references; None takes the options of the environment.
        published: take published indexes and tables of contents instead of layers where nothing is mounted by
            it; None follows ``LAYERKIT_PUBLISHED``, and does so where that is not set.
    """

    store: Path | None = None
    data: str = "auto"
    jobs: int = 1
    strict: bool = False
    limits: Limits | None = None
    registry: RegistryOptions | None = None
    published: bool | None = None

    @property
    def store_path(self) -> Path:
        """Return the store's folder."""
        return self.store if self.store is not None else default_store()


def usable_store(path: Path) -> bool:
    """Return whether there is a store at ``path``, of this user and to be written to."""
    # Even to read from one takes writing: locks, and the catalog's log.
    return os.access(path / "version.json", os.R_OK | os.W_OK)


@contextlib.contextmanager
def store_at(path: Path, limits: Limits, *, create: bool = True) -> Iterator[LocalStore]:
    """Open the store at ``path``, made if there is none and ``create``; closed at the end of the block."""
    from layerkit.store.local import LocalStore

    store = LocalStore.open(path, create=create, limits=limits)
    try:
        yield store
    finally:
        store.close()


@contextlib.contextmanager
def kept(path: Path) -> Iterator[tuple[Callable[[Digest], Index | None], Callable[[Digest], BinaryIO | None]]]:
    """Give what loads indexes and opens tars that the store at ``path`` has; one that cannot be used has none."""
    if not usable_store(path):
        yield (lambda _: None), (lambda _: None)
        return
    with open_store(path) as store:

        def open_tar(diff_id: Digest) -> BinaryIO | None:
            try:
                return open(store.tar_path(diff_id), "rb", buffering=0)  # noqa: PTH123
            except (NotFound, FileNotFoundError):
                return None

        with store.hold():
            yield store.load_index, open_tar


def open_store(path: Path | None = None) -> contextlib.AbstractContextManager[LocalStore]:
    """Open the local store at ``path`` (None: the default one), which must exist."""
    return store_at(path or default_store(), bounds.from_environment(), create=False)
