"""Other owners for an image that is there already, without laying it out again.

An owner stands in three places: in the inode (uid and gid, one 64-bit word), and in the values of POSIX
ACLs and of file capabilities, which lie in the shared xattr area. :class:`Fixups` says where each is; it
is made when an image is written, and serves every id map of the same tree.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from layerkit.errors import InvalidImage, UsageError
from layerkit.formats.erofs import format as f
from layerkit.formats.erofs.xattrs import ID_NAMES
from layerkit.model.tree import Tree

_MAGIC = b"LKEROFIX"
_VERSION = 1
_HEAD = struct.Struct("<8sIIQQII32s")
_XATTR = struct.Struct("<QIII")


class XattrFixup(NamedTuple):
    """A value with owner ids in the shared xattr area.

    Attributes:
        offset: place of the value in the image, in bytes.
        length: of the value; no map changes it.
        set: row of ``Tree.xattr_sets`` that the value belongs to.
        which: its name, as a place in ``ID_NAMES``.
    """

    offset: int
    length: int
    set: int
    which: int


@dataclass(frozen=True, slots=True, eq=False)
class Fixups:
    """Where an image holds owner ids.

    Attributes:
        image_bytes: size of the image.
        meta_bytes: place in the image that nids count from.
        rows: uint32 (m,): the tree's inodes in the order in which they lie in the image.
        nids: uint32 (m,): where each of them lies, rising.
        xattrs: the values with ids.
        sets: number of ``Tree.xattr_sets``, to notice another tree.
    """

    image_bytes: int
    meta_bytes: int
    rows: NDArray[np.uint32]
    nids: NDArray[np.uint32]
    xattrs: tuple[XattrFixup, ...]
    sets: int

    def inode_numbers(self) -> NDArray[np.uint32]:
        """Return uint32 (m,): the ``st_ino`` that the image gives to each inode of the tree."""
        out = np.empty(len(self.rows), np.uint32)
        out[self.rows] = self.nids
        return out

    def encode(self) -> bytes:
        """Return the fixups as bytes: versioned, with a sha256 over all of it."""
        columns = self.rows.astype("<u4").tobytes() + self.nids.astype("<u4").tobytes()
        body = columns + b"".join(_XATTR.pack(*x) for x in self.xattrs)
        head = (_MAGIC, _VERSION, len(self.rows), self.image_bytes, self.meta_bytes, len(self.xattrs), self.sets)
        blank = _HEAD.pack(*head, bytes(32))
        return _HEAD.pack(*head, hashlib.sha256(blank + body).digest()) + body

    @classmethod
    def decode(cls, data: bytes | memoryview, where: str = "fixups") -> Fixups:
        """Return the fixups that ``data`` holds.

        Raises:
            InvalidImage: another version, or damaged; ``where`` names the place.
        """
        view = memoryview(data)
        if len(view) < _HEAD.size:
            raise InvalidImage(f"{where}: {len(view)} bytes, too short for fixups; build the metadata image again")
        *head, digest = _HEAD.unpack_from(view)
        magic, version, rows, image_bytes, meta_bytes, values, sets = head
        if magic != _MAGIC or version != _VERSION:
            raise InvalidImage(f"{where}: not fixups of version {_VERSION}; build the metadata image again")
        body = view[_HEAD.size :]
        h = hashlib.sha256(_HEAD.pack(*head, bytes(32)))
        h.update(body)
        if len(body) != 8 * rows + _XATTR.size * values or h.digest() != digest:
            raise InvalidImage(f"{where}: the fixups are damaged; build the metadata image again")
        return cls(
            image_bytes, meta_bytes, np.frombuffer(body, "<u4", rows), np.frombuffer(body, "<u4", rows, 4 * rows),
            tuple(XattrFixup(*x) for x in _XATTR.iter_unpack(body[8 * rows :])), sets,
        )  # fmt: skip


class Patch:
    """The owners of one tree, ready to be put into the bytes of an image, window by window."""

    def __init__(self, fixups: Fixups, tree: Tree) -> None:
        """Take the owners of ``tree``: the tree of the image after an id map.

        Raises:
            UsageError: the tree is another one than the image's.
        """
        if tree.inodes != len(fixups.rows) or len(tree.xattr_sets) != fixups.sets:
            raise UsageError(
                f"the image has {len(fixups.rows)} inodes and {fixups.sets} xattr sets, the tree has "
                f"{tree.inodes} and {len(tree.xattr_sets)}: it is another tree"
            )
        self._words = fixups.nids.astype(np.int64)
        self._words *= f.SLOT_BYTES // 8
        self._words += (fixups.meta_bytes + f.OWNER_OFFSET) // 8
        owners = np.empty((tree.inodes, 2), "<u4")
        owners[:, 0] = tree.uid
        owners[:, 1] = tree.gid
        self._owners = owners.view("<u8").ravel()[fixups.rows]
        self.values = [(fix.offset, _value(tree, fix)) for fix in fixups.xattrs]
        """(offset in the image, bytes) of every xattr value with ids; they may span windows."""

    def apply(self, window: NDArray[np.uint64], start: int) -> None:
        """Write the owners of the inodes that lie in ``window``.

        Args:
            window: uint64, little-endian words of the image, changed in place.
            start: place of its first word in the image, in words.
        """
        a, b = np.searchsorted(self._words, (start, start + len(window))).tolist()
        window[self._words[a:b] - start] = self._owners[a:b]


def _value(tree: Tree, fix: XattrFixup) -> bytes:
    name = ID_NAMES[fix.which]
    for own_name, value in tree.xattr_sets[fix.set]:
        if own_name == name and len(value) == fix.length:
            return value
    raise UsageError(
        f"xattr set {fix.set} of the tree has no {name.decode()} of {fix.length} bytes, the image has: "
        "it is another tree, or not passed through metadata_layer"
    )
