"""Parts of the planner: layers by path, inodes, and what the fixed layers touch. PURE."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from layerkit.model.entry import Entry, Kind
from layerkit.model.index import Index
from layerkit.model.tree import Node

# An int: looking a member of an enum up costs more than what is done with it here.
_REG = int(Kind.REG)

ContentKey = tuple[bytes, int]
"""sha256 and size: files with the same ones hold the same."""


@dataclass(slots=True, eq=False)
class Inode:
    """An inode of the final tree that is no directory, with its names, and where it is to go.

    ``content`` identifies what it holds, None where that is nothing.
    """

    node: Node
    names: list[bytes]
    origin: int
    layer: int = -1
    row: int = -1
    content: ContentKey | None = field(init=False)

    def __post_init__(self) -> None:
        node = self.node
        self.content = (node.sha256, node.size) if node.mode >> 12 == _REG and node.size else None


@dataclass(slots=True, eq=False)
class Shadow:
    """What the fixed layers touch: for a path the highest one; -1 where there is none."""

    at: dict[bytes, int]
    beneath: dict[bytes, int]
    cut: dict[bytes, int]
    implied: dict[bytes, int]
    """Folders that a layer has something in and does not list."""

    def over(self, path: bytes, *, folder: bool) -> int:
        """Return the highest fixed layer that would hide, replace or change what a lower one has at ``path``."""
        top = self.at.get(path, -1)
        if not folder:
            top = max(top, self.beneath.get(path, -1))
        return max(top, self.above(path))

    def above(self, path: bytes) -> int:
        """Return the highest fixed layer that hides what lower ones have beneath a directory of ``path``."""
        return max((self.cut.get(d, -1) for d in folders_above(path)), default=-1)


@dataclass(frozen=True, slots=True, eq=False)
class Supply:
    """What the fixed layers show: names, the image's inodes (by id) among it, and the files it takes.

    ``used`` holds pairs of a layer's place and the offset of a stored file.
    """

    shown: dict[bytes, Node]
    inodes: set[int]
    used: set[tuple[int, int]]


def folders_above(path: bytes) -> Iterator[bytes]:
    """Yield the directories above ``path``, the nearest first, the root last."""
    while path:
        path = path.rpartition(b"/")[0]
        yield path


class Layer:
    """One layer's index with its rows by path."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.kind = index.kind.tolist()
        self.path = index.path.tolist()
        self.entries = {path: row for row, path in enumerate(self.path) if self.kind[row] <= Kind.HARDLINK}
        self.marks = [row for row, kind in enumerate(self.kind) if kind > Kind.HARDLINK]
        size = index.size.tolist()
        self.stored = [row for row, kind in enumerate(self.kind) if kind == Kind.REG and size[row] > 0]
        self.slots: dict[ContentKey, list[int]] = defaultdict(list)
        for row in self.stored:
            self.slots[index.sha256[row].tobytes(), size[row]].append(row)
        # What a marker or a file hides, for the question who hid something.
        self.hides = {self.path[row] for row in self.marks if self.kind[row] == Kind.WHITEOUT}
        self.hides_beneath = {self.path[row] for row in self.marks}
        self.hides_beneath |= {path for path, row in self.entries.items() if self.kind[row] != Kind.DIR}

    @property
    def links_out(self) -> bool:
        """Return whether a hard link names something that is not in this layer."""
        return any(
            self.index.links[int(self.index.link[row])] not in self.entries
            for row in self.entries.values()
            if self.kind[row] == Kind.HARDLINK
        )

    def inode(self, path: bytes) -> int:
        """Return the row of the inode at ``path``, -1 where this layer has none; its hard links are its own."""
        row = self.entries.get(path, -1)
        while row >= 0 and self.kind[row] == Kind.HARDLINK:
            row = self.entries.get(self.index.links[int(self.index.link[row])], -1)
        return row

    def cuts(self, path: bytes) -> bool:
        """Return whether this layer hides what lower ones have at ``path``."""
        return (
            path in self.hides or path in self.entries or any(d in self.hides_beneath for d in folders_above(path))
        )


def attributes(of: Node | Entry) -> tuple[object, ...]:
    """Return all that the tree shows of an inode but its names."""
    if isinstance(of, Node):
        link = of.target if of.mode >> 12 == Kind.SYMLINK else b""
        size = of.size if of.mode >> 12 == Kind.REG else 0
        head: tuple[object, ...] = (of.mode, size, link)
    else:
        head = (of.perm & 0o7777 | of.kind << 12, of.size, of.link)
    return (*head, of.uid, of.gid, of.mtime, of.mtime_ns, of.major, of.minor, of.xattrs, of.sha256)


def entry_of(node: Node) -> Entry:
    """Return the row that makes ``node``, without a place for its content."""
    kind = Kind(node.mode >> 12)
    return Entry(
        node.path, kind, node.mode & 0o7777, node.uid, node.gid, node.mtime, node.mtime_ns,
        node.size if kind is Kind.REG else 0, node.major, node.minor, node.target, node.xattrs, -1, node.sha256,
    )  # fmt: skip


def comparable(entry: Entry) -> Entry:
    """Return ``entry`` without what says nothing: a marker's and a link's attributes are never shown."""
    if entry.kind >= Kind.HARDLINK:
        return Entry(entry.path, entry.kind, link=entry.link)
    return entry


def stored_sum(index: Index) -> int:
    """Return the bytes that the regular files of ``index`` store, holes left out."""
    return sum(
        index.sparse_maps.stored_bytes(int(index.sparse[row])) if index.sparse[row] >= 0 else int(index.size[row])
        for row in np.flatnonzero(index.kind == Kind.REG).tolist()
    )


__all__ = [
    "ContentKey", "Inode", "Layer", "Shadow", "Supply", "attributes", "comparable", "entry_of", "folders_above",
    "stored_sum",
]  # fmt: skip
