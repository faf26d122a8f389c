"""What ``layerkit optimize`` does with its words, in this process."""

from __future__ import annotations

from typing import Any, Unpack

from layerkit.api.rewrite import Rewriting, base_of, rewriting
from layerkit.usecases import optimize as use_case


def optimize_to(
    src: str,
    dst: str | None,
    *,
    keep_base: str | int | None = None,
    stock_media_type: bool = False,
    all_platforms: bool = False,
    **how: Unpack[Rewriting],
) -> Any:
    """Write the image ``src`` to ``dst`` without doubled and hidden bytes; None makes the plan alone."""
    route, rewrite = rewriting(src, dst, all_platforms, how)
    base = base_of(keep_base, route.settings)
    options = use_case.OptimizeOptions(rewrite, base, stock_media_type=stock_media_type)
    return route.go(lambda work, to: use_case.optimize(work, to, options))
