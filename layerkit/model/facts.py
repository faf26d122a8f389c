"""What is worth remembering of a tree: enough to remap and mount it again without merging its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import msgspec
import numpy as np

from layerkit.model.digest import Digest
from layerkit.model.errors import InvalidImage
from layerkit.model.tree import Tree

VERSION = 1


@dataclass(frozen=True, slots=True)
class TreeFacts:
    """Sums over one tree with container ids.

    Attributes:
        tree: its digest, as text.
        names: entries of the root filesystem.
        inodes: inodes behind them.
        data_bytes: sum of the logical sizes of regular files, hard links counted once.
        uids, gids: every container id that a map has to cover, in ACLs and capabilities as well; rising.
        data_layers: diff_ids (text) of the layers that hold data of a file that is still visible.
        warnings: of the merge.
    """

    tree: str
    names: int
    inodes: int
    data_bytes: int
    uids: tuple[int, ...]
    gids: tuple[int, ...]
    data_layers: tuple[str, ...]
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, tree: Tree, uids: tuple[int, ...], gids: tuple[int, ...]) -> TreeFacts:
        """Return the facts of ``tree``, whose owners are ``uids`` and ``gids``."""
        used = np.unique(tree.layer[tree.has_content])
        return cls(
            tree=str(tree.digest()),
            names=len(tree),
            inodes=tree.inodes,
            data_bytes=tree.data_bytes,
            uids=uids,
            gids=gids,
            # An image may have the same layer twice.
            data_layers=tuple(dict.fromkeys(str(tree.layers[row]) for row in used.tolist())),
            warnings=tree.warnings,
        )

    def to_dict(self) -> dict[str, object]:
        """Return a JSON-able form that :meth:`from_dict` takes back."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, value: Mapping[str, object]) -> TreeFacts | None:
        """Return the facts that ``value`` holds, or None if another version wrote them.

        Raises:
            InvalidImage: the version is ours and the content is not.
        """
        if value.get("version") != VERSION:
            return None
        try:
            facts = msgspec.convert(value, cls)
            for text in (facts.tree, *facts.data_layers):
                Digest.parse(text)
        except msgspec.ValidationError as error:
            raise InvalidImage(f"facts of a tree: {error}") from None
        return facts
