"""PURE: layers whose files are stubs over the files of the layers below them, for hosts with ``metacopy=on``.

A stub has the size, owner, mode, times and xattrs of its file, no data, and the xattr
``trusted.overlay.metacopy``: overlayfs takes the data from the same path in the layers below, or from the path in
``trusted.overlay.redirect`` (Documentation/filesystems/overlayfs.rst, "Metadata only copy up").
"""

from __future__ import annotations

from collections.abc import Mapping as Mapped
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from layerkit.metaonly import METACOPY, REDIRECT, Namespace
from layerkit.model.entry import Kind, XattrSet
from layerkit.model.errors import InvalidImage, UnsafeEntry, UsageError, show_path
from layerkit.model.index import Index
from layerkit.model.limits import DEFAULT, Limits
from layerkit.model.sparse import SparseMaps
from layerkit.model.tree import Tree
from layerkit.model.trees.merge import merge
from layerkit.usecases.waste import Action, Plan, PlannedLayer, folders_above, stored_bytes

STOCK_WARNINGS = (
    "containerd drops trusted.* xattrs when it unpacks: every file reads as ZEROS there, without an error",
    'podman writes the holes as zeros and shows files as EPERM, unless storage.conf has mountopt = "metacopy=on"',
    "docker keeps the xattr and shows files as EPERM, unless its overlay mounts have metacopy=on",
    "umoci and other tools that unpack into plain folders give files of zeros",
)
"""What stubs do under a standard media type, runtime by runtime."""

VENDOR_WARNINGS = (
    "podman and containerd refuse an image with a layer of this media type (`podman load` takes it, and shows "
    "files as EPERM unless its mountopt has metacopy=on); docker pulls it; --stock-media-type writes the standard "
    "one, with dangers of its own",
)
"""What they do under layerkit's own."""

_METACOPY, _REDIRECT = Namespace.TRUSTED.xattr(METACOPY), Namespace.TRUSTED.xattr(REDIRECT)
_AMONG_STUBS = "which would mean something else among stubs; leave out --metadata-only"
# A stub has a PAX header and a map of its hole: no smaller than a file of so many bytes.
_LEAST_BYTES = 2048


def as_stubs(index: Index, rows: Mapped[int, bytes]) -> Index:
    """Return ``index`` with stubs at ``rows``, which are regular files.

    Each row has its redirect, an absolute path, or b"" where the data is at the same path.
    """
    sets: dict[XattrSet, int] = {pairs: at for at, pairs in reversed(list(enumerate(index.xattr_sets)))}
    all_sets = list(index.xattr_sets)
    xattr, sparse, offset = index.xattr.copy(), index.sparse.copy(), index.offset.copy()
    for row, redirect in rows.items():
        mine = Namespace.TRUSTED.stub(redirect).items()
        pairs = tuple(sorted((*index.xattr_sets[int(index.xattr[row])], *mine)))
        at = sets.setdefault(pairs, len(all_sets))
        if at == len(all_sets):
            all_sets.append(pairs)
        xattr[row] = at
    chosen = np.fromiter(rows, np.int64, len(rows))
    maps = [index.sparse_maps.extents(at) for at in range(len(index.sparse_maps))]
    sparse[chosen], offset[chosen] = len(maps), -1
    return replace(
        index, xattr=xattr, xattr_sets=tuple(all_sets), sparse=sparse, offset=offset,
        sparse_maps=SparseMaps.of([*maps, ()]),
    )  # fmt: skip


def filled(index: Index, below: Tree) -> Index:
    """Return ``index`` with its stubs as the files that overlayfs makes of them over ``below``.

    Raises:
        InvalidImage: a stub without a file of its size beneath it.
    """
    stub_sets = {at for at, pairs in enumerate(index.xattr_sets) if any(name == _METACOPY for name, _ in pairs)}
    rows = np.flatnonzero(np.isin(index.xattr, list(stub_sets)) & (index.kind == Kind.REG)).tolist()
    at = _files(below)
    sha256, sparse = index.sha256.copy(), index.sparse.copy()
    for row in rows:
        pairs = dict(index.xattr_sets[int(index.xattr[row])])
        path = pairs.get(_REDIRECT, b"/" + index.path[row])[1:]
        inode = at.get(path, -1)
        if inode < 0 or below.size[inode] != index.size[row]:
            raise InvalidImage(
                f"{show_path(index.path[row])}: a stub over {show_path(path)}, which has no such data"
            )
        sha256[row], sparse[row] = below.sha256[inode], -1
    plain = tuple(tuple(p for p in pairs if p[0] not in (_METACOPY, _REDIRECT)) for pairs in index.xattr_sets)
    return replace(index, xattr_sets=plain, sha256=sha256, sparse=sparse)


def plan_stubs(indexes: Sequence[Index], keep_base: int = 0, *, limits: Limits = DEFAULT) -> Plan:
    """Return the plan that makes stubs of the files which a layer repeats with other metadata.

    The layers below keep their bytes, so that they stay shared; nothing that is hidden goes away, and ``keep_base``
    layers from the bottom are left alone.

    Raises:
        UsageError: fewer layers than ``keep_base``.
        UnsafeEntry: a layer that would be rewritten brings overlay xattrs of its own.
    """
    if not 0 <= keep_base <= len(indexes):
        raise UsageError(f"--keep-base {keep_base}: the image has {len(indexes)} layers")
    layers = []
    for place, index in enumerate(indexes):
        before = int(stored_bytes(index).sum())
        rows = _doubled(index, merge(indexes[:place], limits=limits)) if place >= max(1, keep_base) else {}
        every = np.arange(len(index), dtype=np.int32)
        content = np.where((index.kind == Kind.REG) & (index.size > 0), every, -1).astype(np.int32)
        if not rows:
            layers.append(PlannedLayer(place, Action.KEEP, index, content, before, before))
            continue
        refuse_overlay(index, [Namespace.TRUSTED], _AMONG_STUBS)
        made = as_stubs(index, rows)
        content[np.fromiter(rows, np.int64, len(rows))] = -1
        layers.append(PlannedLayer(place, Action.STUBS, made, content, before, int(stored_bytes(made).sum())))
    return Plan(tuple(layers), merge(indexes, limits=limits).digest(), keep_base, keep_base)


def _files(tree: Tree) -> dict[bytes, int]:
    """Return the inode of each name of a regular file that is not empty."""
    regular = tree.has_content
    chosen: NDArray[np.bool_] = regular[tree.inode]
    pairs = zip(tree.paths(), tree.inode.tolist(), chosen.tolist(), strict=True)
    return {path: inode for path, inode, is_file in pairs if is_file}


def _doubled(index: Index, below: Tree) -> dict[int, bytes]:
    """Return the rows of ``index`` whose data is in ``below`` too, each with its redirect, b"" for none."""
    kind, path = index.kind.tolist(), index.path.tolist()
    files = _files(below)
    contents: dict[tuple[bytes, int], bytes] = {}
    for name, inode in files.items():
        contents.setdefault((below.sha256[inode].tobytes(), int(below.size[inode])), name)
    linked = {index.links[int(index.link[row])] for row, k in enumerate(kind) if k == Kind.HARDLINK}
    gone = {path[row] for row, k in enumerate(kind) if k == Kind.WHITEOUT}
    cut = gone | {path[row] for row, k in enumerate(kind) if k == Kind.OPAQUE}
    out: dict[int, bytes] = {}
    for row in np.flatnonzero((index.kind == Kind.REG) & (index.size >= _LEAST_BYTES)).tolist():
        hole_map = int(index.sparse[row])
        # An unpacker may see a whiteout of the same path before or after the entry.
        if path[row] in gone or (hole_map >= 0 and index.sparse_maps.stored_bytes(hole_map) < _LEAST_BYTES):
            continue
        content = index.sha256[row].tobytes(), int(index.size[row])
        inode = files.get(path[row], -1)
        if inode >= 0 and (below.sha256[inode].tobytes(), int(below.size[inode])) == content:
            # One inode has one redirect for all its names; and in an opaque folder overlayfs looks no further down.
            alone = path[row] not in linked and cut.isdisjoint(folders_above(path[row]))
            out[row] = b"" if alone else b"/" + path[row]
        elif content in contents:
            out[row] = b"/" + contents[content]
    return out


def refuse_overlay(index: Index, namespaces: Sequence[Namespace], why: str) -> None:
    """Raise if an entry of ``index`` brings overlay xattrs of one of ``namespaces``; ``why`` ends the message.

    Raises:
        UnsafeEntry: it does.
    """
    prefixes = tuple(namespace.prefix for namespace in namespaces)
    for at, pairs in enumerate(index.xattr_sets):
        users = np.flatnonzero(index.xattr == at)
        found = [name for name, _ in pairs if name.startswith(prefixes)]
        if len(users) and found:
            path = index.path[int(users[0])]
            raise UnsafeEntry(
                str(index.diff_id), path, f"brings the overlay xattr {show_path(found[0])} of its own, {why}"
            )
