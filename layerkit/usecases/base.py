"""Which layers of an image are those of the image it was built on: what ``--keep-base`` means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from layerkit.model.errors import UsageError
from layerkit.model.image import Image

KeptBase = Callable[[Image], int]
"""Gives the number of layers of an image, from the bottom, that are to stay as they are."""


def kept_base(keep: str | int, find: Callable[[str, Image], Image]) -> KeptBase:
    """Return what counts the layers of the base ``keep``: a reference, or their number.

    Args:
        keep: what the user said; a number that is also a file is a reference.
        find: gives the image that a reference names, for the platform of the other image.

    Returns:
        A function that raises ``UsageError`` for more layers than there are, or another image's base.
    """
    text = str(keep)
    is_number = text.isascii() and text.lstrip("-").isdigit() and not Path(text).exists()

    def count(image: Image) -> int:
        if not is_number:
            return _layers_of(find(text, image), image, text)
        if not 0 <= int(text) <= len(image.layers):
            raise UsageError(f"--keep-base {text}: the image has {len(image.layers)} layers")
        return int(text)

    return count


def _layers_of(base: Image, image: Image, ref: str) -> int:
    count = len(base.layers)
    same = 0
    while same < min(count, len(image.layers)) and image.diff_ids[same] == base.diff_ids[same]:
        same += 1
    if same < count:
        raise UsageError(
            f"--keep-base {ref}: only {same} of its {count} layers are the lowest ones of the image; "
            "it was built on another version of it"
        )
    return count
