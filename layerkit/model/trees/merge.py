"""Layer indexes to a tree, by the rules of the OCI image-spec (layer.md, "Applying Changesets").

Nothing is applied step by step. All rows are sorted by path, bottom layer first within a path, and what
survives follows from three maxima per path:

* the topmost **entry** at the path;
* the topmost layer that **cuts** it. A whiteout hides what lower layers have at its path; a whiteout, an
  opaque marker or a non-directory hides what lower layers have beneath its path. A layer's markers never
  touch its own entries, so their order in the tar cannot matter;
* the topmost layer with an entry **beneath** the path, which makes the path a directory.

A path is there if its entry, or something beneath it, is not cut. Where the topmost entry is no directory
but a higher layer has something beneath it, a directory takes its place, as in a runtime that unpacks
each layer alone. Markers make nothing: a whiteout in a directory that is nowhere has no effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from layerkit.model.entry import OPAQUE_NAME, Kind
from layerkit.model.errors import InvalidImage, UnsafeEntry, show_path
from layerkit.model.index import Index
from layerkit.model.limits import DEFAULT, Limits
from layerkit.model.tree import Tree
from layerkit.model.trees.merge_columns import inode_columns
from layerkit.model.trees.merge_hardlinks import resolve
from layerkit.model.trees.merge_paths import Paths, Rows, sort_rows

__all__ = ["merge"]

_MISSING = "its directory is in no layer: made as 0755 root:root"
_REPLACED = "a lower layer has no directory here, but an upper one puts entries in it: made as 0755 root:root"


def merge(indexes: Sequence[Index], *, limits: Limits = DEFAULT) -> Tree:
    """Return the tree that the layers make together.

    The tree is canonical: its digest depends on the names, attributes and contents it shows, not on how
    they are spread over layers. Content stays a reference into ``indexes`` by position.

    Args:
        indexes: bottom layer first; none gives a tree of only the root.
        limits: bounds on layers, entries and warnings.

    Raises:
        UnsafeEntry: a hard link to nothing, to a directory or to itself; an entry below something that
            is no directory in the same layer; a whiteout of the root; a path that is not normalised.
        LimitExceeded: more layers or entries than ``limits`` allows.
        InvalidImage: an index with a kind that does not exist.
    """
    limits.check("layers_per_image", len(indexes), "image")
    limits.check("entries_per_image", sum(map(len, indexes)), "image")
    for index in indexes:
        _check_layer(index)
    paths, rows = sort_rows(indexes, limits)
    shown = _surviving(paths, rows)
    base = resolve(indexes, paths, rows)
    keep = np.flatnonzero(shown.exists)
    name = paths.names(keep)
    row_of = np.cumsum(shown.exists, dtype=np.int32) - np.int32(1)
    parent = row_of[paths.parent[keep]]
    parent[0] = -1
    del row_of
    made, replaced = shown.made[keep], shown.replaced[keep]
    source = rows.order[shown.top[keep]]
    if base is not None:
        source = base[source]
    total = rows.total
    layer_of = rows.layer
    # From here on only `source` matters; the path texts are the largest thing in memory.
    del paths, rows, shown, base, keep
    source[made] = total + np.arange(np.count_nonzero(made), dtype=np.int32)
    inode, source = _number(source, total + int(np.count_nonzero(made)))
    source[source >= total] = 0
    columns = inode_columns(indexes, source, layer_of[source])
    del layer_of, source
    is_dir = columns["mode"] >> 12 == Kind.DIR
    nlink = np.bincount(inode, minlength=len(is_dir))
    subdirectory = is_dir[inode]
    subdirectory[0] = False
    nlink += np.where(is_dir, 1 + np.bincount(inode[parent[subdirectory]], minlength=len(is_dir)), 0)
    tree = Tree(
        parent=parent,
        name=name,
        inode=inode,
        nlink=nlink.astype(np.uint32),
        layers=tuple(index.diff_id for index in indexes),
        **columns,
    )
    _check_names(tree)
    return replace(tree, warnings=_warnings(indexes, tree, made, replaced, limits))


@dataclass(frozen=True, slots=True)
class _Surviving:
    """What is left, per path: ``top`` is the place in ``Rows`` of the topmost entry (0 where none)."""

    exists: NDArray[np.bool_]
    top: NDArray[np.int32]
    made: NDArray[np.bool_]
    replaced: NDArray[np.bool_]


def _surviving(paths: Paths, rows: Rows) -> _Surviving:
    count = len(paths.parent)
    at, layer, kind = rows.path, rows.sorted_layer, rows.sorted_kind
    # Layers rise within a path, and of repeated places numpy keeps the last value: each is a maximum.
    entries = np.flatnonzero(kind <= Kind.HARDLINK)
    top = np.zeros(count, np.int32)
    top[at[entries]] = entries
    top_layer = np.full(count, -1, np.int16)
    top_layer[at[entries]] = layer[entries]
    above_bottom = layer > 0
    whiteout = _topmost(count, at, layer, above_bottom & (kind == Kind.WHITEOUT))
    cut = np.maximum(whiteout, _topmost(count, at, layer, above_bottom & (kind == Kind.OPAQUE)))
    plain = (kind <= Kind.HARDLINK) & (kind != Kind.DIR)
    np.maximum(cut, _topmost(count, at, layer, above_bottom & plain), out=cut)
    if cut.any():
        for level in paths.levels[1:]:
            above = paths.parent[level]
            cut[level] = np.maximum(cut[level], cut[above])
            # The root has no whiteout, and every other path is in one of these levels.
            whiteout[level] = np.maximum(whiteout[level], cut[above])
    beneath = np.full(count, -1, np.int16)
    for level in reversed(paths.levels[1:]):
        above = paths.parent[level]
        groups = np.flatnonzero(np.r_[True, above[1:] != above[:-1]])
        beneath[above[groups]] = np.maximum.reduceat(np.maximum(top_layer[level], beneath[level]), groups)
    alive = top_layer >= whiteout
    replaced = alive & (kind[top] != Kind.DIR) & (beneath > top_layer)
    exists = alive | (beneath >= whiteout)
    return _Surviving(exists, top, exists & (~alive | replaced), replaced)


def _topmost(
    count: int, at: NDArray[np.int32], layer: NDArray[np.int16], chosen: NDArray[np.bool_]
) -> NDArray[np.int16]:
    """Return for each path the highest layer of its ``chosen`` rows, 0 where it has none."""
    out = np.zeros(count, np.int16)
    places = np.flatnonzero(chosen)
    out[at[places]] = layer[places]
    return out


def _number(source: NDArray[np.int32], total: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the inode of each name, numbered by first names, and the source row of each inode."""
    places = np.arange(len(source), dtype=np.int32)
    first = np.empty(total, np.int32)
    first[source[::-1]] = places[::-1]
    is_first = first[source] == places
    number = np.cumsum(is_first, dtype=np.int32) - np.int32(1)
    return number[first[source]], source[is_first]


def _check_layer(index: Index) -> None:
    where, kind = str(index.diff_id), index.kind
    known = np.isin(kind, [k.value for k in Kind])
    if not known.all():
        row = int(np.argmin(known))
        raise InvalidImage(f"{where}: {show_path(index.path[row])}: kind {int(kind[row])} does not exist")
    if not len(index):
        return
    path, offsets = index.path, index.path.offsets
    if b"\0" in bytes(path.blob):
        row = int(np.searchsorted(offsets, bytes(path.blob).index(b"\0"), "right")) - 1
        raise UnsafeEntry(where, path[row], "a path cannot hold a NUL")
    starts = offsets[:-1][path.lengths > 0]
    leading = np.frombuffer(path.blob, np.uint8)[starts] == ord("/")
    if leading.any():
        row = int(np.flatnonzero(path.lengths > 0)[np.argmax(leading)])
        raise UnsafeEntry(where, path[row], "a path in an index is relative")
    # The root's rows, if any, are the first ones.
    for row in np.flatnonzero(path.lengths[:3] == 0).tolist():
        if kind[row] not in (Kind.DIR, Kind.OPAQUE):
            raise UnsafeEntry(where, b"", "the root of an image is a directory and cannot be removed")
    # All that lies below a path follows it at once, so looking at the next row is enough.
    plain = (kind <= Kind.HARDLINK) & (kind != Kind.DIR)
    above = np.flatnonzero(plain[:-1] & (np.diff(path.lengths) > 0))
    slash = np.frombuffer(path.blob, np.uint8)[offsets[above + 1] + path.lengths[above]] == ord("/")
    for row in above[slash].tolist():
        if path[row + 1].startswith(path[row]):
            raise _not_a_directory(where, path[row + 1], path[row])
    opaque = np.flatnonzero((kind[:-1] == Kind.OPAQUE) & (np.diff(path.lengths) == 0))
    for row in opaque.tolist():
        # A whiteout of the same path may stand between the marker and the entry.
        for later in range(row + 1, min(row + 3, len(index))):
            if plain[later] and path[later] == path[row]:
                raise _not_a_directory(where, path[row] + b"/" + OPAQUE_NAME, path[row])


def _not_a_directory(where: str, path: bytes, above: bytes) -> UnsafeEntry:
    return UnsafeEntry(where, path, f"{show_path(above)} is no directory in the same layer")


def _check_names(tree: Tree) -> None:
    """Refuse parts that a path of an index never has: a tree with them could not be written safely."""
    lengths, starts = tree.name.lengths, tree.name.offsets[:-1]
    text = np.frombuffer(tree.name.blob, np.uint8)
    empty = np.flatnonzero(lengths == 0)[1:]
    one, two = np.flatnonzero(lengths == 1), np.flatnonzero(lengths == 2)
    dot = one[text[starts[one]] == ord(".")]
    dots = two[(text[starts[two]] == ord(".")) & (text[starts[two] + 1] == ord("."))]
    for rows in (empty, dot, dots):
        if len(rows):
            raise UnsafeEntry("image", tree.path(int(rows[0])), "a path cannot hold an empty part, . or ..")


def _warnings(
    indexes: Sequence[Index], tree: Tree, made: NDArray[np.bool_], replaced: NDArray[np.bool_], limits: Limits
) -> tuple[str, ...]:
    bound = limits.warnings_kept_per_layer
    carried = [text for index in indexes for text in index.warnings[:bound]]
    rows = np.flatnonzero(made)
    own = [f"{show_path(tree.path(r))}: {_REPLACED if replaced[r] else _MISSING}" for r in rows[:bound].tolist()]
    if len(rows) > bound:
        own.append(f"{len(rows) - bound} more directories were made")
    return tuple(carried + own)
