"""Id maps: from the ids in an image (container ids) to those on the host. Pure arithmetic on columns.

A map is total or an error: an owner that it does not cover raises with path, id and ranges, unless the
user named an overflow id. Rules of user_namespaces(7) hold: no overlap, no id 4294967295.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layerkit.errors import InvalidImage, UnmappedId, UnsafeEntry
from layerkit.formats import acl_caps
from layerkit.idmap.extents import MAX_ID, IdExtent, IdMap, Ids
from layerkit.idmap.mapping import Mapping
from layerkit.model.entry import XattrSet
from layerkit.model.tree import Tree

__all__ = ["MAX_ID", "IdExtent", "IdMap", "Mapping", "Reach", "apply", "check", "reach"]


@dataclass(frozen=True, slots=True, eq=False)
class Reach:
    """The owners that a tree has, each once and rising, with the number of inodes they own.

    Attributes:
        uid, gid: uint32. uid_inodes, gid_inodes: int64.
        xattr_uids, xattr_gids: ids in ACLs and capabilities (0 for a capability without a rootid).
    """

    uid: Ids
    uid_inodes: NDArray[np.int64]
    gid: Ids
    gid_inodes: NDArray[np.int64]
    xattr_uids: tuple[int, ...]
    xattr_gids: tuple[int, ...]


def reach(tree: Tree) -> Reach:
    """Return the ids in use in ``tree``.

    Raises:
        UnsafeEntry: a malformed ACL or capability.
    """
    uid, uid_inodes = np.unique(tree.uid, return_counts=True)
    gid, gid_inodes = np.unique(tree.gid, return_counts=True)
    seen: set[tuple[str, int]] = set()

    def note(kind: str, value: int) -> int:
        seen.add(("gid" if kind.startswith("gid") else "uid", value))
        return value

    for row, pairs in enumerate(tree.xattr_sets):
        for name, value in pairs:
            try:
                acl_caps.map_value(name, value, note)
            except InvalidImage as error:
                raise _malformed(tree, row, name, error) from error
    inside = {kind: tuple(sorted(v for k, v in seen if k == kind)) for kind in ("uid", "gid")}
    return Reach(uid, uid_inodes, gid, gid_inodes, inside["uid"], inside["gid"])


def apply(tree: Tree, mapping: Mapping) -> Tree:
    """Return ``tree`` with every owner mapped: of inodes, in ACLs and in file capabilities.

    Capabilities come out as an idmapped mount shows them (:func:`acl_caps.map_capability`). Rows of
    ``xattr_sets`` stay where they are, so a rendering of the tree can be patched by row; a squashing map
    can make two of them equal.

    Raises:
        UnmappedId: an id outside the map and no overflow id; of several, that of the first path.
        UnsafeEntry: a malformed ACL or capability.
    """
    sets = _mapped_sets(tree, mapping)
    uid, gid = (_owners(tree, mapping, kind) for kind in ("uid", "gid"))
    failures = [found for found in (uid, gid, sets) if isinstance(found, _Unmapped)]
    if failures:
        first = min(failures, key=lambda found: found.inode)
        raise UnmappedId(tree.inode_path(first.inode), first.kind, first.value, first.ranges)
    assert not isinstance(uid, _Unmapped) and not isinstance(gid, _Unmapped) and not isinstance(sets, _Unmapped)
    return tree.with_owners(uid, gid, sets)


def check(tree: Tree, mapping: Mapping) -> None:
    """Raise what :func:`apply` would raise."""
    apply(tree, mapping)


class _Unmapped(Exception):
    """An id that the map does not cover; an exception only inside a set of xattrs."""

    def __init__(self, kind: str, value: int, ranges: str, inode: int = 0) -> None:
        self.kind, self.value, self.ranges, self.inode = kind, value, ranges, inode


def _owners(tree: Tree, mapping: Mapping, kind: str) -> Ids | _Unmapped:
    ids = tree.uid if kind == "uid" else tree.gid
    mapped, inside = mapping.lookup(kind, ids)
    if not inside.all():
        inode = int(np.argmin(inside))
        return _Unmapped(kind, int(ids[inode]), mapping.of(kind).canonical(), inode)
    return mapped


def _mapped_sets(tree: Tree, mapping: Mapping) -> tuple[XattrSet, ...] | _Unmapped:
    def one(kind: str, value: int) -> int:
        mapped, inside = mapping.lookup(kind, np.array([value], np.uint32))
        if not inside[0]:
            raise _Unmapped(kind, value, mapping.of(kind).canonical())
        return int(mapped[0])

    sets, failures = [], list[_Unmapped]()
    for row, pairs in enumerate(tree.xattr_sets):
        if not any(name in acl_caps.ID_NAMES for name, _ in pairs):
            sets.append(pairs)
            continue
        mapped_pairs = []
        for name, value in pairs:
            try:
                mapped_pairs.append((name, acl_caps.map_value(name, value, one)))
            except InvalidImage as error:
                raise _malformed(tree, row, name, error) from error
            except _Unmapped as found:
                users = tree.xattr == row
                if users.any():
                    found.inode = int(np.argmax(users))
                    failures.append(found)
                break
        sets.append(tuple(mapped_pairs))
    return min(failures, key=lambda found: found.inode) if failures else tuple(sets)


def _malformed(tree: Tree, row: int, name: bytes, error: InvalidImage) -> UnsafeEntry:
    path = tree.inode_path(int(np.argmax(tree.xattr == row)))
    return UnsafeEntry("image", path, f"{name.decode()}: {error}; rebuild the image without it")
