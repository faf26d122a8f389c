"""What a plan says: which layers stay, which are written anew, and with what in them. PURE."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from layerkit.model.digest import Digest
from layerkit.model.index import Index


class Action(Enum):
    """What becomes of a layer."""

    KEEP = "keep"
    REWRITE = "rewrite"
    DROP = "drop"
    STUBS = "stubs"


@dataclass(frozen=True, slots=True, eq=False)
class PlannedLayer:
    """What becomes of one layer.

    Attributes:
        place: of the layer in the image, 0 is the bottom.
        action: kept byte for byte, written anew, left out because nothing is left of it, or written anew with
            stubs for files that a lower layer has.
        index: of the layer as it will be. Offsets, sparse maps and diff_id are the old layer's: they say
            where the content is to be read.
        content: int32 (n,): for each row of ``index`` with stored bytes the row of the old index, else -1.
        bytes_before: stored bytes of regular files. bytes_after: the same once planned.
    """

    place: int
    action: Action
    index: Index
    content: NDArray[np.int32]
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What becomes of every layer, bottom first, and the digest that the tree has before and after."""

    layers: tuple[PlannedLayer, ...]
    tree: Digest
    keep_base: int
    pinned: int = field(default=0)
    """Layers from the bottom that could not be touched: the base, or those that a hard link reaches into."""

    @property
    def bytes_before(self) -> int:
        """Return the stored bytes of the files in all layers as they are."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Return the stored bytes of the files in all layers as planned."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def indexes(self) -> list[Index]:
        """Return the layers that are left, bottom first."""
        return [layer.index for layer in self.layers if layer.action is not Action.DROP]

    @property
    def changes(self) -> bool:
        """Return whether any layer becomes another."""
        return any(layer.action is not Action.KEEP for layer in self.layers)


__all__ = ["Action", "Plan", "PlannedLayer"]
