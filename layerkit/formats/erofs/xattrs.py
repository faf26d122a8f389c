"""Which xattrs of a tree are stored where: the shared area, and what each inode says of it.

Every distinct pair of name and value is stored once in the shared area and named by its id from the
inodes. Pairs that hold owner ids are the exception: they are distinct per xattr set, whatever their value,
because an id map may make two values equal and the layout must not depend on the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layerkit.formats.erofs import format as f
from layerkit.model.entry import XattrSet
from layerkit.model.errors import LossyResult
from layerkit.model.tree import Tree

ID_NAMES = (b"system.posix_acl_access", b"system.posix_acl_default", b"security.capability")
"""Names whose values hold owner ids; a fixup gives one by its place here."""

_LIST_MAX = 65536
"""What listxattr(2) can return at most (``XATTR_LIST_MAX``)."""

_OURS = 2
"""A stub brings two xattrs of its own: a shared one (metacopy) and an inline one (redirect)."""


@dataclass(frozen=True, slots=True, eq=False)
class XattrPlan:
    """The xattrs of an image.

    Attributes:
        area: the shared area.
        extra_id: id of the pair that was asked for apart from the tree, -1 if none was.
        starts: int64 (sets + 1,): row of ``ids`` where those of a set begin.
        ids: uint32: shared xattr ids, set by set.
        inline: by set, the entries that found no room among the shared ids; b"" nearly always.
        names: by set, its (index, name) pairs, for the name filter.
        fixups: (offset of the value in ``area``, its length, set, place in ``ID_NAMES``).
    """

    area: bytes
    extra_id: int
    starts: NDArray[np.int64]
    ids: NDArray[np.uint32]
    inline: tuple[bytes, ...]
    names: tuple[tuple[tuple[int, bytes], ...], ...]
    fixups: tuple[tuple[int, int, int, int], ...]

    @property
    def shared(self) -> NDArray[np.int64]:
        """Return int64 (sets,): the number of shared ids of each set."""
        return np.diff(self.starts)

    def filters(self, more: Sequence[tuple[int, bytes]] = ()) -> NDArray[np.uint32]:
        """Return uint32 (sets,): the name filter of each set, with the names ``more`` added."""
        return np.array([f.name_filter((*names, *more)) for names in self.names], np.uint32)


def plan(tree: Tree, extra: tuple[bytes, bytes] | None = None, extra_bytes: int = 0) -> XattrPlan:
    """Return where the xattrs of ``tree`` go.

    Args:
        tree: whose ``xattr_sets`` are to be stored; those that no inode has are left out.
        extra: a pair (name, value) to be shared besides, by inodes that the caller chooses.
        extra_bytes: the longest list of names that the caller adds to an inode, for the limits.

    Raises:
        LossyResult: a name or a value that EROFS or the kernel cannot hold.
    """
    area = bytearray()
    extra_id = -1
    seen: dict[object, int] = {}
    if extra is not None:
        parts = f.split_xattr_name(extra[0])
        assert parts is not None
        extra_id = _add(area, parts, extra[1])[0]
        seen[extra] = extra_id
    used = np.zeros(len(tree.xattr_sets), bool)
    used[tree.xattr] = True
    starts, ids, inlines, fixups = [0], list[int](), list[bytes](), list[tuple[int, int, int, int]]()
    all_names = []
    for row, pairs in enumerate(tree.xattr_sets):
        names, inline = [], bytearray()
        if used[row]:
            _check_list(tree, row, pairs, extra_bytes)
            # Ids first: so they are always shared, and patching never looks into inodes.
            ordered = sorted(pairs, key=lambda pair: pair[0] not in ID_NAMES)
            for place, (name, value) in enumerate(ordered):
                parts = f.split_xattr_name(name)
                if parts is None or len(value) > f.XATTR_VALUE_MAX:
                    raise LossyResult(_path(tree, row), _why(name, value))
                names.append(parts)
                if place >= f.XATTR_SHARED_MAX - _OURS:
                    inline += f.xattr_entry(*parts, value)
                    continue
                key: object = (row, name) if name in ID_NAMES else (name, value)
                if key not in seen:
                    seen[key], offset = _add(area, parts, value)
                    if name in ID_NAMES:
                        fixups.append((offset, len(value), row, ID_NAMES.index(name)))
                ids.append(seen[key])
            if len(inline) > f.XATTR_BODY_MAX - 4096:
                raise LossyResult(_path(tree, row), "more xattrs than an EROFS inode holds (some 256 KiB)")
        starts.append(len(ids))
        inlines.append(bytes(inline))
        all_names.append(tuple(names))
    return XattrPlan(
        bytes(area), extra_id, np.array(starts, np.int64), np.array(ids, np.uint32), tuple(inlines),
        tuple(all_names), tuple(fixups),
    )  # fmt: skip


def _add(area: bytearray, parts: tuple[int, bytes], value: bytes) -> tuple[int, int]:
    """Append an entry; return its shared id and the offset of its value in the area."""
    at = len(area)
    area += f.xattr_entry(*parts, value)
    return at // 4, at + f.XATTR_ENTRY_BYTES + len(parts[1])


def _path(tree: Tree, row: int) -> bytes:
    return tree.inode_path(int(np.argmax(tree.xattr == row)))


def _check_list(tree: Tree, row: int, pairs: XattrSet, extra_bytes: int) -> None:
    total = sum(len(name) + 1 for name, _ in pairs) + extra_bytes
    if total > _LIST_MAX:
        what = f"names of xattrs that take {total} bytes; listxattr(2) returns no more than {_LIST_MAX}"
        raise LossyResult(_path(tree, row), what)


def _why(name: bytes, value: bytes) -> str:
    shown = name.decode("utf-8", "backslashreplace")
    if len(value) > f.XATTR_VALUE_MAX:
        return f"xattr {shown!r} of {len(value)} bytes; EROFS holds {f.XATTR_VALUE_MAX}"
    return (
        f"xattr {shown!r}: EROFS holds user., trusted., security. and POSIX ACL names of up to {f.NAME_MAX} bytes"
    )
