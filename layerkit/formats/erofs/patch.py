"""Other owners for an image that is there already, without laying it out again.

An owner stands in three places: in the inode (uid and gid, one 64-bit word), and in the values of POSIX
ACLs and of file capabilities, which lie in the shared xattr area. :class:`Fixups` says where each is; it
is made when an image is written, and serves every id map of the same tree.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from layerkit.formats.erofs import format as f
from layerkit.idmap import Mapping
from layerkit.model import acl_caps
from layerkit.model.errors import InvalidImage

_WINDOW_BYTES = 1 << 20
_MAGIC = b"LKEROFIX"
_VERSION = 1
_HEAD = struct.Struct("<8sIIQQII32s")
_XATTR = struct.Struct("<QIII")


class XattrFixup(NamedTuple):
    """A value with owner ids in the shared xattr area.

    Attributes:
        offset: place of the value in the image, in bytes.
        length: of the value; no map changes it.
        set: row of ``Tree.xattr_sets`` that the value belongs to; a value is its set's alone.
        which: its name, as a place in ``acl_caps.ID_NAMES``.
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


def patch_meta(source: int, target: int, fixups: Fixups, mapping: Mapping) -> None:
    """Write the image at ``source`` to ``target`` with every owner mapped: of inodes, in ACLs and capabilities.

    The result is byte for byte what :func:`~layerkit.formats.erofs.meta.build_meta` makes of the mapped tree.

    Args:
        source: descriptor of an image that ``build_meta`` wrote of a tree with container ids.
        target: descriptor of an empty file, open for reading and writing.
        fixups: returned when ``source`` was built.
        mapping: covers every owner of the tree; the caller has checked that.

    Raises:
        InvalidImage: ``source`` is not the image that ``fixups`` belongs to, or has an owner without a host id.
    """
    patch = _Patch(fixups, mapping)
    found = os.fstat(source).st_size
    if found != fixups.image_bytes:
        raise InvalidImage(
            f"metadata image of {found} bytes, its fixups are for {fixups.image_bytes}; build it again"
        )
    # One pass through a small window beats copying the file (or cloning it) and writing through a map of it:
    # nearly every block holds an inode, so nearly every block is written anyway.
    window = np.empty(_WINDOW_BYTES // 8, "<u8")
    raw = window.view(np.uint8).data
    at = 0
    while at < found:
        got = os.preadv(source, [raw[: min(_WINDOW_BYTES, found - at)]], at)
        if got <= 0 or got % 8:
            raise InvalidImage(f"metadata image: read of {got} bytes at {at} of {found}; build it again")
        patch.apply(window[: got // 8], at // 8)
        done = 0
        while done < got:
            done += os.pwrite(target, raw[done:got], at + done)
        at += got
    for fix in fixups.xattrs:
        os.pwrite(target, patch.value(fix, os.pread(source, fix.length, fix.offset)), fix.offset)


class _Patch:
    """An id map, ready to be put into the bytes of an image with container ids, window by window."""

    def __init__(self, fixups: Fixups, mapping: Mapping) -> None:
        """Take where the ids are, and what becomes of them."""
        self._words = fixups.nids.astype(np.int64)
        self._words *= f.SLOT_BYTES // 8
        self._words += (fixups.meta_bytes + f.OWNER_OFFSET) // 8
        self._mapping = mapping

    def apply(self, window: NDArray[np.uint64], start: int) -> None:
        """Map the owners of the inodes in ``window``, words of the image from the ``start``-th on, in place."""
        a, b = np.searchsorted(self._words, (start, start + len(window))).tolist()
        places = self._words[a:b] - start
        owners = window[places].view("<u4").reshape(-1, 2)
        for column, kind in enumerate(("uid", "gid")):
            owners[:, column] = self._ids(kind, owners[:, column])
        window[places] = owners.view("<u8").ravel()

    def value(self, fix: XattrFixup, value: bytes) -> bytes:
        """Return the xattr value that ``fix`` is of, and that was ``value``, with its ids mapped."""
        name = acl_caps.ID_NAMES[fix.which]
        mapped = acl_caps.map_value(name, value, lambda kind, one: int(self._ids(kind, np.array([one], "<u4"))[0]))
        return acl_caps.capability_with_rootid(mapped) if name == acl_caps.CAPABILITY_NAME else mapped

    def _ids(self, kind: str, ids: NDArray[np.uint32]) -> NDArray[np.uint32]:
        mapped, inside = self._mapping.lookup(kind, ids)
        if not inside.all():
            # Whoever patches has checked the map against the tree, where the paths are.
            raise InvalidImage(
                f"the image has the {kind} {ids[~inside][0]}, which its tree has not: build it again"
            )
        return mapped
