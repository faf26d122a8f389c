"""Which entry of an image index fits a platform (OCI image-spec, image-index.md, "platform")."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable

from layerkit.model.descriptor import Platform

_MACHINES = {
    "x86_64": ("amd64", ""),
    "i386": ("386", ""),
    "i486": ("386", ""),
    "i586": ("386", ""),
    "i686": ("386", ""),
    "aarch64": ("arm64", "v8"),
    "armv8l": ("arm", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "armv5tel": ("arm", "v5"),
    "ppc64le": ("ppc64le", ""),
    "s390x": ("s390x", ""),
    "riscv64": ("riscv64", ""),
    "loongarch64": ("loong64", ""),
    "mips64": ("mips64le", ""),
}
# What an absent variant means.
_BASELINE = {"arm64": "v8", "arm": "v7", "amd64": "v1"}


@functools.cache
def host() -> Platform:
    """Return the platform of this machine."""
    machine = os.uname().machine
    return Platform("linux", *_MACHINES.get(machine, (machine, "")))


def _rank(have: Platform, want: Platform) -> tuple[int, int] | None:
    """Return how well ``have`` serves ``want``, lower is better, or None where it does not."""
    if (have.os, have.architecture) != (want.os, want.architecture):
        return None
    baseline = _BASELINE.get(want.architecture, "")
    if have.variant == want.variant:
        return 0, 0
    have_level, want_level = (_level(p.variant or baseline) for p in (have, want))
    if have_level == want_level and (have_level is not None or not (have.variant and want.variant)):
        return 1, 0
    if have_level is not None and want_level is not None and have_level < want_level:
        return 2, want_level - have_level  # a newer processor runs what was built for an older one
    # Nothing was said about the variant: any is better than none, the lowest first.
    return None if want.variant else (3, have_level or 0)


def _level(variant: str) -> int | None:
    digits = variant.removeprefix("v").partition(".")[0]
    return int(digits) if variant.startswith("v") and digits.isascii() and digits.isdigit() else None


def choose(platforms: Iterable[Platform | None], want: Platform) -> int | None:
    """Return the place of the platform that serves ``want`` best, the first of equals.

    The exact variant wins, then the same one under another spelling (``arm64`` is ``arm64/v8``), then the
    highest lower one; where ``want`` has no variant at last any. None in ``platforms`` is passed over.
    """
    ranked = [
        (rank, place)
        for place, have in enumerate(platforms)
        if have is not None and (rank := _rank(have, want)) is not None
    ]
    return min(ranked)[1] if ranked else None
