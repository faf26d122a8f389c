"""The Python API for OCI runtime bundles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layerkit.api.open import OpenImage
    from layerkit.formats.runtime.config import Wishes
    from layerkit.idmap import Mapping
    from layerkit.model.ports import Progress
    from layerkit.usecases.bundle import BundleReport


def bundle(
    image: OpenImage,
    folder: str | Path,
    mapping: Mapping | None = None,
    wishes: Wishes | None = None,
    *,
    rootless: bool = False,
    rendering: str | None = None,
    own_meta: bool = False,
    progress: Progress | None = None,
) -> BundleReport:
    """Make an OCI runtime bundle of ``image`` in ``folder``: mounted, with a config.json, ready for runc or crun.

    ``folder`` is a new or empty one, or a bundle of the same image and map that is not mounted. The other arguments
    are those of :class:`~layerkit.usecases.bundle.BundleOptions`.

    Raises:
        UsageError: no command, a folder in use, a map that no namespace can have.
        UnmappedId: the process's user, or an owner, is outside the map.
        InvalidImage: a malformed config, or a user that the image does not have.
    """
    from layerkit.formats.runtime.config import Wishes
    from layerkit.usecases import bundle as use_case

    options = use_case.BundleOptions(
        mapping, wishes or Wishes(), rootless, rendering, image.settings.data, own_meta
    )
    return use_case.bundle(image.work(progress), image.settings, Path(folder), options)


def remove(folder: str | Path) -> None:
    """Unmount and delete a bundle, with everything written in its container.

    Raises:
        NotFound: no bundle of layerkit's.
        LayerkitError: a container still runs in it.
    """
    from layerkit.hosts.bundle import folder as folders

    folders.remove(Path(folder))
