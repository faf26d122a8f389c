"""A tree as Linux's filesystems keep it: pure, for every rendering of the tree alike.

A filesystem that is given an ACL does not simply store it: the mode takes the permissions that the ACL stands for,
an ACL that says no more than a mode is kept as the mode alone, and a malformed one is refused (``fs/posix_acl.c``:
``posix_acl_update_mode``, ``posix_acl_valid``). Every symlink has mode 0777 (symlink(7)), whatever a tar says.
An EROFS image holds whatever is written into it, so this has to happen before, or a folder and an EROFS image of
one tree would differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from layerkit.model import acl_caps as acl
from layerkit.model.acl_caps import ACL_NAMES, AclEntry
from layerkit.model.entry import Kind, XattrSet
from layerkit.model.errors import InvalidImage, LossyResult
from layerkit.model.tree import Tree

_ACCESS, _DEFAULT = ACL_NAMES
_PERMISSIONS = np.uint32(0o777)
_ORDER = (acl.USER_OBJ, acl.USER, acl.GROUP_OBJ, acl.GROUP, acl.MASK, acl.OTHER)


def as_kept(tree: Tree) -> Tree:
    """Return ``tree`` with its modes and ACLs as they read back from a filesystem.

    Raises:
        LossyResult: an ACL that the kernel refuses, or on something that it takes none for.
    """
    mode = np.where(tree.kind == Kind.SYMLINK, tree.mode & ~np.uint32(0o7777) | _PERMISSIONS, tree.mode)
    sets = list(tree.xattr_sets)
    for row, pairs in enumerate(tree.xattr_sets):
        if not any(name in ACL_NAMES for name, _ in pairs):
            continue
        users = tree.xattr == row
        if not users.any():
            continue
        try:
            sets[row], bits = _kept(pairs)
        except InvalidImage as error:
            path = tree.inode_path(int(np.argmax(users)))
            raise LossyResult(path, f"has {error}, which no kernel stores") from None
        _check_kinds(tree, sets[row], users)
        if bits is not None:
            mode = np.where(users, mode & ~_PERMISSIONS | np.uint32(bits), mode)
    return replace(tree, mode=mode, xattr_sets=tuple(sets))


def _kept(pairs: XattrSet) -> tuple[XattrSet, int | None]:
    """Return ``pairs`` as they are kept, and the permission bits that their access ACL decides."""
    kept, bits = list[tuple[bytes, bytes]](), None
    for name, value in pairs:
        if name in ACL_NAMES:
            entries = acl.decode_acl(value)
            if not entries:  # how an ACL is removed
                continue
            _check_valid(entries)
            if name == _ACCESS:
                bits = _permissions(entries)
                if len(entries) == 3:
                    continue
            value = acl.encode_acl(
                e if e.tag in (acl.USER, acl.GROUP) else e._replace(id=acl.NO_ID) for e in entries
            )
        kept.append((name, value))
    return tuple(kept), bits


def _check_valid(entries: Sequence[AclEntry]) -> None:
    tags = [entry.tag for entry in entries]
    if tags != sorted(tags, key=_ORDER.index) or any(
        tags.count(t) != 1 for t in (acl.USER_OBJ, acl.GROUP_OBJ, acl.OTHER)
    ):
        raise InvalidImage("an ACL without one entry each for owner, group and others, in this order")
    named = [entry for entry in entries if entry.tag in (acl.USER, acl.GROUP)]
    if tags.count(acl.MASK) > 1 or (named and acl.MASK not in tags):
        raise InvalidImage("an ACL with named entries and not one mask")
    if any(entry.id == acl.NO_ID for entry in named):
        raise InvalidImage(f"an ACL for the id {acl.NO_ID}, which is none")


def _permissions(entries: Sequence[AclEntry]) -> int:
    """Return the permission bits that an access ACL stands for (acl(5), "Correspondence")."""
    by_tag = {entry.tag: entry.perm for entry in entries}
    return by_tag[acl.USER_OBJ] << 6 | by_tag.get(acl.MASK, by_tag[acl.GROUP_OBJ]) << 3 | by_tag[acl.OTHER]


def _check_kinds(tree: Tree, kept: XattrSet, users: NDArray[np.bool_]) -> None:
    said = "has an ACL that the kernel does not take on "
    tree.refuse(users & (tree.kind == Kind.SYMLINK), said + "a symlink")
    if _DEFAULT in dict(kept):
        tree.refuse(users & (tree.kind != Kind.DIR), said + "what is no directory")
