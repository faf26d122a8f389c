"""layerkit: change who owns files in container images by writing metadata only.

The names below are the public API; they are loaded when they are first used, so that importing the package
costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from layerkit.api.bundle import bundle
    from layerkit.api.open import (
        Mounted,
        OpenImage,
        Settings,
        collect_garbage,
        default_store,
        mapping,
        mount_unpacked,
        mounts,
        open_image,
        umount,
    )
    from layerkit.api.rewrite import Plan, copy, flatten, optimize, remap
    from layerkit.model.errors import Cancelled, LayerkitError
    from layerkit.usecases.settings import open_store

__all__ = [
    "Cancelled",
    "LayerkitError",
    "Mounted",
    "OpenImage",
    "Plan",
    "Settings",
    "bundle",
    "collect_garbage",
    "copy",
    "default_store",
    "flatten",
    "mapping",
    "mount_unpacked",
    "mounts",
    "open_image",
    "open_store",
    "optimize",
    "remap",
    "umount",
]

_ELSEWHERE = {
    "Cancelled": "layerkit.model.errors",
    "LayerkitError": "layerkit.model.errors",
    "Plan": "layerkit.api.rewrite",
    "bundle": "layerkit.api.bundle",
    "copy": "layerkit.api.rewrite",
    "flatten": "layerkit.api.rewrite",
    "optimize": "layerkit.api.rewrite",
    "remap": "layerkit.api.rewrite",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'layerkit' has no attribute {name!r}")
    module = _ELSEWHERE.get(name, "layerkit.api.open")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
