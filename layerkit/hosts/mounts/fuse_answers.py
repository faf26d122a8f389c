"""From a tree in a file and a map to what our FUSE server answers.

Only the standard library: a mount waits for it.
"""

from __future__ import annotations

import mmap
import os
from typing import BinaryIO

from layerkit.formats.meta.fuse_tree import FuseTree
from layerkit.hosts.podman.mount_options import IdMaps
from layerkit.linux import fuse
from layerkit.model import acl_caps
from layerkit.model.errors import InvalidImage, UnmappedId


def open_tree(file: BinaryIO) -> FuseTree:
    """Return the tree in ``file``, mapped into memory.

    Raises:
        InvalidImage: there is none in it.
    """
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise InvalidImage(f"{file.name}: empty; remove its folder, and it is made again")
    return FuseTree(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), str(file.name))


def answers(tree: FuseTree, maps: IdMaps, data: int | None = None) -> fuse.Answers:
    """Return the answers about ``tree`` with its owners, also those in xattrs, mapped.

    Args:
        tree: with the owners of the image.
        maps: how to map them.
        data: as :class:`layerkit.linux.fuse.Answers` has it.

    Raises:
        UnmappedId: an owner outside the map, with the first path that has it.
    """
    try:
        uids, gids = maps.table(tree.facts.uids, "uid"), maps.table(tree.facts.gids, "gid")
    except UnmappedId as error:
        raise _with_path(error, tree) from None
    sets = [
        tuple((name, acl_caps.map_value(name, value, maps.one)) for name, value in pairs)
        for pairs in tree.xattr_sets()
    ]
    return fuse.Answers(tree, uids, gids, sets, data)


def _with_path(error: UnmappedId, tree: FuseTree) -> UnmappedId:
    """Return ``error`` with the first path that has the owner."""
    for row in range(tree.inodes):
        inode = tree.inode(row)
        if (inode.gid if error.kind == "gid" else inode.uid) == error.value:
            return UnmappedId(tree.path(inode), error.kind, error.value, error.ranges)
    return error
