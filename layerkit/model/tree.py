"""The tree: layers merged by the OCI rules, as columns of names and of inodes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from layerkit.model.digest import Digest
from layerkit.model.entry import Kind, XattrSet
from layerkit.model.errors import InvalidImage, LossyResult
from layerkit.model.sparse import SparseMaps
from layerkit.model.strings import Strings

_SHOWN = {
    "parent": "<i4", "inode": "<i4", "mode": "<u4", "uid": "<u4", "gid": "<u4", "size": "<i8", "mtime": "<i8",
    "mtime_ns": "<u4", "major": "<u4", "minor": "<u4", "target": "<i4", "xattr": "<i4", "sha256": "u1",
}  # fmt: skip
"""The columns that the digest covers, in its order."""

INODE_COLUMNS = (
    "nlink",
    "layer",
    "offset",
    "sparse",
    *(name for name in _SHOWN if name not in ("parent", "inode")),
)
"""Those with a value for each inode."""

_PLAIN = ("mode", "uid", "gid", "nlink", "size", "mtime", "mtime_ns", "major", "minor")
"""Those that say the same in a :class:`Node`."""


class Node(NamedTuple):
    """One name of a tree with its inode, as a Python value; for edges and tests."""

    path: bytes
    inode: int
    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    mtime: int
    mtime_ns: int
    major: int
    minor: int
    target: bytes
    xattrs: XattrSet
    sha256: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """A root filesystem's metadata: ``n`` names (dentries) over ``m`` inodes.

    Names come in canonical order (``model.index.path_key``): row 0 is the root, a parent stands before
    its children, siblings rise by their bytes, and all below a directory follows it without a gap.
    Inodes are numbered by their first name. A hard link is a second name of an inode, never a path.
    Content is a reference: ``layers[layer[i]]``, ``offset``, ``size``, ``sha256``; no data is held.

    Attributes:
        parent: int32 (n,), row of the parent name; -1 for the root.
        name: n strings, the last part of the path; ``b""`` for the root.
        inode: int32 (n,), the inode of the name.
        mode: uint32 (m,), ``st_mode`` with the type bits.
        uid, gid: uint32 (m,): container ids, or host ids once a map was applied.
        nlink: uint32 (m,): names of the inode; for a directory 2 + its directories.
        size: int64 (m,), bytes; a regular file's logical size, a symlink's target length, else 0.
        mtime: int64 (m,), seconds. mtime_ns: uint32 (m,).
        major, minor: uint32 (m,), of devices.
        target: int32 (m,), row of ``targets`` for a symlink, else -1.
        targets: symlink targets.
        xattr: int32 (m,), row of ``xattr_sets``; 0 is the empty set.
        xattr_sets: distinct sets in order of first use, after ``()``; a squashing map can make some equal.
        layer: int32 (m,), row of ``layers`` that holds a regular file's bytes; -1 where there are none.
        offset: int64 (m,), place of the stored bytes in that layer's uncompressed tar, else -1.
        sha256: uint8 (m, 32), of a regular file's logical content, else zeros.
        sparse: int32 (m,), row of ``sparse_maps``, -1 for a file without holes.
        sparse_maps: runs of data of sparse files.
        layers: diff_ids, bottom first.
        warnings: what was odd but harmless, as text with the path.
    """

    parent: NDArray[np.int32]
    name: Strings
    inode: NDArray[np.int32]
    mode: NDArray[np.uint32]
    uid: NDArray[np.uint32]
    gid: NDArray[np.uint32]
    nlink: NDArray[np.uint32]
    size: NDArray[np.int64]
    mtime: NDArray[np.int64]
    mtime_ns: NDArray[np.uint32]
    major: NDArray[np.uint32]
    minor: NDArray[np.uint32]
    target: NDArray[np.int32]
    targets: Strings
    xattr: NDArray[np.int32]
    xattr_sets: tuple[XattrSet, ...]
    layer: NDArray[np.int32]
    offset: NDArray[np.int64]
    sha256: NDArray[np.uint8]
    sparse: NDArray[np.int32]
    sparse_maps: SparseMaps
    layers: tuple[Digest, ...]
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.parent)

    @property
    def inodes(self) -> int:
        """Return ``m``, the number of inodes."""
        return len(self.mode)

    @property
    def kind(self) -> NDArray[np.uint8]:
        """Return uint8 (m,): the :class:`Kind` of each inode."""
        return (self.mode >> 12).astype(np.uint8)

    @property
    def data_bytes(self) -> int:
        """Return the sum of the logical sizes of regular files, hard links counted once."""
        return int(self.size[self.kind == Kind.REG].sum())

    @property
    def has_content(self) -> NDArray[np.bool_]:
        """Return bool (m,): the regular files that are not empty."""
        files: NDArray[np.bool_] = (self.kind == Kind.REG) & (self.size > 0)
        return files

    def first_name(self) -> NDArray[np.int64]:
        """Return int64 (m,): for each inode the row of its first name."""
        return np.unique(self.inode, return_index=True)[1]

    def paths(self) -> list[bytes]:
        """Return the full path of every name, in order; ``b""`` for the root."""
        parents, names = self.parent.tolist(), self.name.tolist()
        paths = [b""] * len(names)
        for row in range(1, len(names)):
            above = paths[parents[row]]
            paths[row] = above + b"/" + names[row] if above else names[row]
        return paths

    def path(self, row: int) -> bytes:
        """Return the full path of name ``row`` without building those of all others."""
        parts = []
        while row > 0:
            parts.append(self.name[row])
            row = int(self.parent[row])
        return b"/".join(reversed(parts))

    def inode_path(self, inode: int) -> bytes:
        """Return the path of the first name of ``inode``."""
        return self.path(int(np.argmax(self.inode == inode)))

    def refuse(self, bad: NDArray[np.bool_], what: str | Callable[[int], str]) -> None:
        """Raise if inodes are ``bad`` (m,); ``what`` may be called with the first of them, whose path is told.

        Raises:
            LossyResult: there is such an inode.
        """
        if bad.any():
            inode = int(bad.argmax())
            raise LossyResult(self.inode_path(inode), what if isinstance(what, str) else what(inode))

    def nodes(self) -> Iterator[Node]:
        """Yield every name with its inode as a Python value."""
        for path, i in zip(self.paths(), self.inode.tolist(), strict=True):
            target = int(self.target[i])
            yield Node(
                path=path,
                inode=i,
                target=b"" if target < 0 else self.targets[target],
                xattrs=self.xattr_sets[int(self.xattr[i])],
                sha256=self.sha256[i].tobytes() if self.mode[i] >> 12 == Kind.REG else b"",
                **{name: int(getattr(self, name)[i]) for name in _PLAIN},
            )

    def subset(self, keep: NDArray[np.bool_]) -> Tree:
        """Return the names ``keep`` only, among which are the root and all names of an inode or none."""
        rows = np.flatnonzero(keep)
        number = np.cumsum(keep, dtype=np.int32) - np.int32(1)
        parent = number[self.parent[rows]]
        parent[0] = -1
        # Inodes are numbered by first names, and so stay in that order.
        inodes, inode = np.unique(self.inode[rows], return_inverse=True)
        columns = {name: getattr(self, name)[inodes] for name in INODE_COLUMNS}
        return replace(self, parent=parent, name=self.name.take(rows), inode=inode.astype(np.int32), **columns)

    def digest(self) -> Digest:
        """Return the sha256 of what the tree shows: names, inodes, attributes and content.

        How the bytes are stored does not count (layers, offsets, holes), so two images with the same
        root filesystem have the same tree digest whatever layers it is cut into.
        """
        xattr, xattr_sets = self._canonical_xattrs()
        h = hashlib.sha256(b"layerkit.tree.v1\0")
        for strings in (self.name, self.targets):
            # Lengths go first: without them "ab","c" and "a","bc" would be the same bytes.
            h.update(len(strings).to_bytes(8, "little"))
            h.update(strings.lengths.astype("<i8").tobytes())
            h.update(strings.blob)
        columns = {name: (getattr(self, name), dtype) for name, dtype in _SHOWN.items()} | {"xattr": (xattr, "<i4")}
        for column, dtype in columns.values():
            h.update(len(column).to_bytes(8, "little"))
            h.update(np.ascontiguousarray(column, dtype).data)
        for pairs in xattr_sets:
            h.update(len(pairs).to_bytes(8, "little"))
            for text in (part for pair in pairs for part in pair):
                h.update(len(text).to_bytes(8, "little") + text)
        return Digest("sha256", h.hexdigest())

    def _canonical_xattrs(self) -> tuple[NDArray[np.int32], tuple[XattrSet, ...]]:
        """Return ``xattr`` and ``xattr_sets`` with distinct sets in order of first use, all of them used."""
        highest = np.maximum.accumulate(np.concatenate([np.zeros(1, np.int32), self.xattr]))
        in_order = bool((self.xattr <= highest[:-1] + 1).all()) and int(highest[-1]) + 1 == len(self.xattr_sets)
        if in_order and len(set(self.xattr_sets)) == len(self.xattr_sets):
            return self.xattr, self.xattr_sets
        rows, first = np.unique(self.xattr, return_index=True)
        sets: dict[XattrSet, int] = {(): 0}
        number = np.zeros(len(self.xattr_sets), np.int32)
        for row in rows[np.argsort(first)].tolist():
            number[row] = sets.setdefault(self.xattr_sets[row], len(sets))
        return number[self.xattr], tuple(sets)

    def check(self) -> None:
        """State the invariants of a tree.

        Raises:
            InvalidImage: one does not hold; the message names it. A tree from ``merge`` always holds them.
        """
        for problem in self._problems():
            raise InvalidImage(f"tree: {problem}")

    def _problems(self) -> Iterator[str]:
        """Yield what is broken. Each check relies on those before it, so only the first one counts."""
        n, m = len(self), self.inodes
        lengths = {len(getattr(self, name)) for name in INODE_COLUMNS}
        if len(self.name) != n or len(self.inode) != n or lengths != {m}:
            yield "column lengths"
        if n == 0 or m == 0 or self.parent[0] != -1 or self.name[0] != b"" or self.inode[0] != 0:
            yield "no root"
        if self.mode[0] >> 12 != Kind.DIR:
            yield "the root is not a directory"
        if (self.parent[1:] < 0).any():
            yield "a second root"
        if (self.parent >= np.arange(n)).any():
            yield "a parent after its child"
        highest = np.maximum.accumulate(self.inode)
        if (self.inode < 0).any() or (self.inode[1:] > highest[:-1] + 1).any() or highest[-1] != m - 1:
            yield "inodes not numbered by first name"
        is_dir = self.kind == Kind.DIR
        if (np.bincount(self.inode, minlength=m)[is_dir] != 1).any():
            yield "a directory with two names"
        if not is_dir[self.inode[self.parent[1:]]].all():
            yield "a parent that is no directory"
        if (self.name.lengths[1:] == 0).any() or b"/" in self.name.blob or b"\0" in self.name.blob:
            yield "a name that is no name"
        if not self._in_order():
            yield "names of a directory that do not rise, or not all below it in one run"
        if (self.mtime_ns >= 1_000_000_000).any():
            yield "nanoseconds"
        is_symlink = self.kind == Kind.SYMLINK
        if ((self.target >= 0) != is_symlink).any() or (self.target >= len(self.targets)).any():
            yield "a symlink target that is not there, or not a symlink's"
        if not self.xattr_sets or self.xattr_sets[0] != ():
            yield "the empty xattr set"
        if (self.xattr < 0).any() or (self.xattr >= len(self.xattr_sets)).any():
            yield "an xattr set that is not there"

    def _in_order(self) -> bool:
        """Return whether names stand in canonical order; parents are known to come first."""
        names = self.name.tolist()
        # The directories that lead to the last name, and in each the name that was taken last.
        rows, last = [0], [b""]
        for row, above in enumerate(self.parent.tolist()):
            if row == 0:
                continue
            while rows and rows[-1] != above:
                rows.pop()
                last.pop()
            if not rows or last[-1] >= names[row]:
                return False
            last[-1] = names[row]
            rows.append(row)
            last.append(b"")
        return True
