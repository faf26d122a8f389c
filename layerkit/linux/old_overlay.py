"""Overlays by mount(2): for kernels whose overlayfs takes no layers one by one (6.8), or without fsopen (5.2).

Everything has to go into one page of text, and the mount shows at its place at once.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from layerkit.formats.overlay_options import OverlayOptions
from layerkit.linux import syscalls as sc
from layerkit.model.errors import UnsupportedHost

_RDONLY, _NODEV = 0x1, 0x4
_libc = ctypes.CDLL(None, use_errno=True)


def mount_overlay(
    target: Path,
    lower: Sequence[int],
    *,
    upper: int | None = None,
    work: int | None = None,
    source: str = "overlay",
    read_only: bool = True,
    nodev: bool = False,
    by_descriptor: bool = False,
) -> None:
    """Mount an overlay with ``metacopy=on`` at ``target``.

    Args:
        target: an existing folder.
        lower: descriptors of the layers, top first.
        upper: descriptor of the writable layer's folder.
        work: descriptor of an empty folder beside it.
        source: what the mount table shows as the source.
        read_only: forbid writing through the mount.
        nodev: device nodes cannot be opened.
        by_descriptor: name layers by their descriptors even where their paths have room.

    Raises:
        UnsupportedHost: more layers than a page of text has room for.
        OSError: as mount(2).
    """
    options = _options(lower, upper, work, os.readlink)
    if by_descriptor or not options.fits:
        options = _options(lower, upper, work, str)
    if not options.fits:
        raise UnsupportedHost(
            f"an overlay of {len(lower)} layers by mount(2) ({options.size} bytes of options)",
            "Linux 6.8 or newer takes 500; flatten the image",
        )
    text = os.fsencode(str(options))
    flags = (_RDONLY if read_only else 0) | (_NODEV if nodev else 0)
    if _libc.mount(source.encode(), os.fsencode(target), b"overlay", ctypes.c_ulong(flags), text) != 0:
        raise sc.failed(ctypes.get_errno(), "mount overlay", target)


def _options(
    lower: Sequence[int], upper: int | None, work: int | None, name: Callable[[str], str]
) -> OverlayOptions:
    layers, places = (
        [name(f"/proc/self/fd/{fd}") for fd in fds if fd is not None] for fds in (lower, (upper, work))
    )
    over, beside = places or ("", "")
    return OverlayOptions(tuple(layers), (), over, beside, (("metacopy", "on"),))
