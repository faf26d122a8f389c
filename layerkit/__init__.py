"""layerkit: change who owns files in container images by writing metadata only.

The names below are the public API; they are loaded when they are first used, so that importing the package
costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from layerkit.api import (
        Mounted,
        OpenImage,
        Settings,
        collect_garbage,
        default_store,
        mapping,
        mount_unpacked,
        mounts,
        open_image,
        open_store,
        umount,
    )
    from layerkit.bundling import bundle
    from layerkit.errors import Cancelled, LayerkitError
    from layerkit.plans import Plan, optimize
    from layerkit.rewrites import copy, flatten, remap

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
    "Cancelled": "layerkit.errors",
    "LayerkitError": "layerkit.errors",
    "Plan": "layerkit.plans",
    "bundle": "layerkit.bundling",
    "copy": "layerkit.rewrites",
    "flatten": "layerkit.rewrites",
    "optimize": "layerkit.plans",
    "remap": "layerkit.rewrites",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'layerkit' has no attribute {name!r}")
    module = _ELSEWHERE.get(name, "layerkit.api")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
