"""Deletions as the kernel writes them, for layers in which podman wrote them as ``.wh.`` files.

With a mount program podman unpacks whiteouts as files, which mean nothing to the kernel: its overlay of such layers
would show both the ``.wh.`` files and what they delete. A few small folders between the layers put that right, so
that a mount without a map, a build or a commit needs no server: below each layer one that deletes in its name
(a whiteout acts on lower layers alone), and on top one that hides the ``.wh.`` files, in folders that look
like those they cover.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from layerkit.metaonly import OPAQUE, WHITEOUT_DEVICE, WHITEOUT_MODE, YES, Namespace
from layerkit.model.entry import OPAQUE_NAME, WHITEOUT_PREFIX

if TYPE_CHECKING:
    from layerkit.hosts.podman.layers import StorageLayer
    from layerkit.model.index import Index
    from layerkit.model.tree import Tree

TOP = "top"


def stack(root: Path, layers: Sequence[StorageLayer], below: Iterable[int]) -> list[Path]:
    """Return ``layers`` (top first) with what :func:`write_marks` wrote to ``root`` between them."""
    wanted = set(below)
    found = [root / TOP]
    for place, layer in enumerate(layers):
        found.append(layer.path)
        if place in wanted:
            found.append(root / str(place))
    return found


def marks_in(layer: StorageLayer, index: Index) -> tuple[list[bytes], list[bytes]]:
    """Return what podman's files in ``layer`` delete: (paths in lower layers, folders whose lower content goes)."""
    import numpy as np

    from layerkit.model.entry import Kind

    base = os.fsencode(layer.path)
    removed, opaque = (
        index.path.take(np.flatnonzero(index.kind == kind)).tolist() for kind in (Kind.WHITEOUT, Kind.OPAQUE)
    )
    return (
        [path for path in removed if os.path.lexists(os.path.join(base, _mark(path)))],
        [path for path in opaque if os.path.lexists(os.path.join(base, path, OPAQUE_NAME))],
    )


def _mark(path: bytes) -> bytes:
    folder, _, name = path.rpartition(b"/")
    return os.path.join(folder, WHITEOUT_PREFIX + name)


def write_marks(
    root: Path, marks: Sequence[tuple[list[bytes], list[bytes]]], tree: Tree, namespace: Namespace
) -> tuple[int, ...]:
    """Write the folders below ``root``; return the places of the layers (top first) that have one below them.

    Args:
        root: an empty folder.
        marks: of each layer, top first, see :func:`marks_in`.
        tree: what the layers show together.
        namespace: where the kernel reads ``overlay.opaque``.
    """
    below = []
    for place, (removed, opaque) in enumerate(marks[:-1]):
        if removed or opaque:
            below.append(place)
            folder = os.fsencode(root / str(place))
            for path in removed:
                _whiteout(os.path.join(folder, path))
            for path in opaque:
                os.makedirs(os.path.join(folder, path), exist_ok=True)
                os.setxattr(os.path.join(folder, path), namespace.xattr(OPAQUE), YES)
    top = os.fsencode(root / TOP)
    os.mkdir(top)
    rows = {path: row for row, path in enumerate(tree.paths()) if int(tree.mode[tree.inode[row]]) >> 12 == 4}
    covered: set[bytes] = {b""}
    for removed, opaque in marks:
        for path in (*map(_mark, removed), *(os.path.join(folder, OPAQUE_NAME) for folder in opaque)):
            folder = os.path.dirname(path)
            # A folder that another layer deletes must not come back.
            if folder in rows:
                _whiteout(os.path.join(top, path))
                while folder not in covered:
                    covered.add(folder)
                    folder = os.path.dirname(folder)
    for path in sorted(covered, reverse=True):
        _look_like(os.path.join(top, path), tree, int(tree.inode[rows[path]]), namespace)
    return tuple(below)


def _whiteout(path: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if not os.path.lexists(path):
        os.mknod(path, WHITEOUT_MODE, WHITEOUT_DEVICE)


def _look_like(path: bytes, tree: Tree, inode: int, namespace: Namespace) -> None:
    """Give a folder the attributes of an inode of ``tree``."""
    os.chown(path, int(tree.uid[inode]), int(tree.gid[inode]))
    os.chmod(path, int(tree.mode[inode]) & 0o7777)
    for name, value in tree.xattr_sets[int(tree.xattr[inode])]:
        os.setxattr(path, namespace.escaped(name), value)
    moment = int(tree.mtime[inode]) * 1_000_000_000 + int(tree.mtime_ns[inode])
    os.utime(path, ns=(moment, moment))
