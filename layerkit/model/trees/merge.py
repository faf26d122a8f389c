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

A hard link's target is an entry of its own layer, wherever that stands in the tar; failing that, what the layers
below show at that path once the link's layer has hidden its part of them.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress, islice, pairwise, repeat
from operator import ne
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerkit.model.entry import OPAQUE_NAME, Kind, XattrSet
from layerkit.model.errors import InvalidImage, LimitExceeded, UnsafeEntry, show_path
from layerkit.model.index import COLUMNS, Index
from layerkit.model.limits import DEFAULT, Limits
from layerkit.model.sparse import SparseMaps
from layerkit.model.strings import Strings, offsets_of
from layerkit.model.tree import Tree

_NAMES_AT_ONCE = 1 << 16
_MISSING = "its directory is in no layer: made as 0755 root:root"
_REPLACED = "a lower layer has no directory here, but an upper one puts entries in it: made as 0755 root:root"
_NOTHING = "which is not there"
_DIRECTORY = "which is a directory"
_CYCLE = "which leads back to itself through hard links"

_MADE: dict[str, Any] = {"kind": int(Kind.DIR), "perm": 0o755, "link": -1, "offset": -1, "sparse": -1}
"""Row 0, a directory that no layer has; 0 in every other column."""

Column = NDArray[Any]


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
    paths, rows = _sort_rows(indexes, limits)
    shown = _surviving(paths, rows)
    base = _resolve_links(indexes, paths, rows)
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
    columns = _inode_columns(indexes, source, layer_of[source])
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
    """What is left, per path: ``top`` is the place in ``_Rows`` of the topmost entry (0 where none)."""

    exists: NDArray[np.bool_]
    top: NDArray[np.int32]
    made: NDArray[np.bool_]
    replaced: NDArray[np.bool_]


def _surviving(paths: _Paths, rows: _Rows) -> _Surviving:
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


# The rows of all layers in canonical order, and the paths they name with every directory above them.


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """The rows of all layers: row 0 is a made root, then the layers' rows, bottom layer first.

    ``order``, ``path``, ``sorted_layer`` and ``sorted_kind`` have one value per *place*: rows sorted by
    path, then layer, markers before the entry. ``layer`` and ``kind`` have one per row.

    Attributes:
        order: int32, the row at each place.
        path: int32, row of ``_Paths``; never falls.
        sorted_layer: int16. sorted_kind: uint8.
        layer: int16. kind: uint8.
        starts: first row of each layer.
    """

    order: NDArray[np.int32]
    path: NDArray[np.int32]
    sorted_layer: NDArray[np.int16]
    sorted_kind: NDArray[np.uint8]
    layer: NDArray[np.int16]
    kind: NDArray[np.uint8]
    starts: list[int]

    @property
    def total(self) -> int:
        """Return the number of rows."""
        return len(self.order)


@dataclass(frozen=True, slots=True, eq=False)
class _Paths:
    r"""Distinct paths in canonical order, each after the directory that holds it.

    Attributes:
        keys: ``path_key`` of each path that some row names, as Latin-1 text: it compares like the bytes,
            and faster.
        start: int32, where the last part of each key begins.
        length: int64, of that part.
        place: int32, the path of each key; between them lie the directories that no row names.
        added: their names, by path.
        parent: int32 per path, -1 for the root.
        depth: int16 per path.
        levels: the paths of each depth, rising.
    """

    keys: list[str]
    start: NDArray[np.int32]
    length: NDArray[np.int64]
    place: NDArray[np.int32]
    added: dict[int, str]
    parent: NDArray[np.int32]
    depth: NDArray[np.int16]
    levels: list[NDArray[np.int32]]

    def names(self, rows: NDArray[np.int64]) -> Strings:
        """Return the last part of each path of ``rows`` (which rise)."""
        wanted = np.zeros(len(self.parent), np.bool_)
        wanted[rows] = True
        chosen = wanted[self.place]
        keys, starts = list(compress(self.keys, chosen.tolist())), self.start[chosen]
        listed = np.ones(len(self.parent), np.bool_)
        listed[list(self.added)] = False
        listed = listed[rows]
        lengths = np.empty(len(rows), np.int64)
        lengths[listed] = self.length[chosen]
        lengths[~listed] = [len(self.added[row]) for row in rows[~listed].tolist()]
        blobs, done = [], 0
        # In pieces, so that the names are never all there as Python objects.
        for first in range(0, len(rows), _NAMES_AT_ONCE):
            part = slice(first, first + _NAMES_AT_ONCE)
            count = int(np.count_nonzero(listed[part]))
            pairs = zip(keys[done : done + count], starts[done : done + count].tolist(), strict=True)
            names = [key[start:] for key, start in pairs]
            done += count
            if count < len(listed[part]):
                known = iter(names)
                places = zip(rows[part].tolist(), listed[part].tolist(), strict=True)
                names = [next(known) if is_listed else self.added[row] for row, is_listed in places]
            blobs.append("".join(names).encode("latin-1"))
        return Strings(b"".join(blobs), offsets_of(lengths))


def _sort_rows(indexes: Sequence[Index], limits: Limits) -> tuple[_Paths, _Rows]:
    """Return the paths and the rows of ``indexes``, bottom layer first.

    Raises:
        LimitExceeded: missing directories make more entries than ``limits`` allows, or a path too deep.
    """
    keys, starts, sizes = [""], list[int](), [np.zeros(1, np.int64)]
    for index in indexes:
        starts.append(len(keys))
        sizes.append(index.path.lengths)
        # One byte for one byte, so the offsets stay right for the whole blob.
        text = bytes(index.path.blob).replace(b"/", b"\0").decode("latin-1")
        keys += [text[a:b] for a, b in pairwise(index.path.offsets.tolist())]
    layer = np.zeros(len(keys), np.int16)
    for i, (a, b) in enumerate(pairwise([*starts, len(keys)])):
        layer[a:b] = i
    kind = np.concatenate([np.array([Kind.DIR], np.uint8), *(index.kind for index in indexes)])
    # Every layer is a sorted run already, and merging runs is what this sort is best at. It is stable:
    # within a path, rows stay in the order of the layers.
    ordered = sorted(range(len(keys)), key=keys.__getitem__)
    order = np.array(ordered, np.int32)
    texts = list(map(keys.__getitem__, ordered))
    del keys, ordered
    fresh = np.ones(len(texts), np.bool_)
    fresh[1:] = np.fromiter(map(ne, islice(texts, 1, None), texts), np.bool_, len(texts) - 1)
    texts = list(compress(texts, fresh.tolist()))
    paths = _paths(texts, np.concatenate(sizes)[order[fresh]], limits)
    path = paths.place[np.cumsum(fresh, dtype=np.int32) - np.int32(1)]
    return paths, _Rows(order, path, layer[order], kind[order], layer, kind, starts)


def _paths(keys: list[str], sizes: NDArray[np.int64], limits: Limits) -> _Paths:
    """Return the paths of sorted, distinct ``keys``, whose lengths are ``sizes``."""
    count = len(keys)
    parts = np.fromiter(map(str.count, keys, repeat("\0")), np.int64, count) + 1
    parts[0] = 0
    if int(parts.max()) > min(limits.path_depth, 32767):
        raise LimitExceeded("path_depth", int(parts.max()), limits.path_depth, "image")
    depth = parts.astype(np.int16)
    parent, levels = _parents(depth)
    start = np.fromiter(map(str.rfind, keys, repeat("\0")), np.int32, count) + np.int32(1)
    # The last path one level up is the directory, unless that is missing: then it is some other path.
    right = sizes[parent] == np.maximum(start - 1, 0)
    above = map(keys.__getitem__, parent.tolist())
    right &= np.fromiter(map(str.startswith, keys, above), np.bool_, count)
    right[0] = True
    place = np.arange(count, dtype=np.int32)
    paths = _Paths(keys, start, sizes - start, place, {}, parent, depth, levels)
    return paths if right.all() else _with_missing(paths, np.flatnonzero(~right), limits)


def _with_missing(listed: _Paths, orphans: NDArray[np.int64], limits: Limits) -> _Paths:
    """Return the paths with the directories that no row names, each right before the first path in it."""
    keys, depth = listed.keys, listed.depth
    extra = np.zeros(len(keys), np.int64)
    allowed = limits.entries_per_image - len(keys)
    missing: list[list[str]] = []
    for row in orphans.tolist():
        directories = keys[row].split("\0")[:-1]
        shared = 0
        for ours, theirs in zip(directories, keys[row - 1].split("\0"), strict=False):
            if ours != theirs:
                break
            shared += 1
        missing.append(directories[shared:])
        extra[row] = len(directories) - shared
        # Deep paths without their directories multiply: some bytes of input for thousands of entries.
        allowed -= len(directories) - shared
        if allowed < 0:
            found = limits.entries_per_image - allowed
            raise LimitExceeded("entries_per_image", found, limits.entries_per_image, "image")
    place = (np.arange(len(keys)) + np.cumsum(extra)).astype(np.int32)
    full = np.zeros(len(keys) + int(extra.sum()), np.int16)
    full[place] = depth
    added: dict[int, str] = {}
    for row, names in zip(orphans.tolist(), missing, strict=True):
        first, level = int(place[row]) - len(names), int(depth[row]) - len(names)
        for i, name in enumerate(names):
            added[first + i] = name
            full[first + i] = level + i
    parent, levels = _parents(full)
    return replace(listed, place=place, added=added, parent=parent, depth=full, levels=levels)


def _parents(depth: NDArray[np.int16]) -> tuple[NDArray[np.int32], list[NDArray[np.int32]]]:
    """Return for each path the last one before it that is one level up, and the paths of each level."""
    by_depth = np.argsort(depth, kind="stable").astype(np.int32)
    bounds = np.searchsorted(depth[by_depth], np.arange(int(depth.max()) + 2)).tolist()
    levels = [by_depth[a:b] for a, b in pairwise(bounds)]
    parent = np.zeros(len(depth), np.int32)
    for upper, level in pairwise(levels):
        if len(upper):
            parent[level] = upper[np.maximum(np.searchsorted(upper, level) - 1, 0)]
    parent[0] = -1
    return parent, levels


# Hard links to inodes: which row holds the attributes and the content behind a HARDLINK row.


def _resolve_links(indexes: Sequence[Index], paths: _Paths, rows: _Rows) -> NDArray[np.int32] | None:
    """Return for each row the row of its inode (itself for all but links), or None if there are no links.

    Raises:
        UnsafeEntry: a target that is not there, is a directory, or is the link itself. Every link is
            looked at, also one that an upper layer removes: the layer that holds it is broken.
    """
    links = np.flatnonzero(rows.kind == Kind.HARDLINK).astype(np.int32)
    if not len(links):
        return None
    layer = rows.layer[links].astype(np.int64)
    target = np.concatenate([
        _targets(indexes[i], links[layer == i] - rows.starts[i], paths) for i in np.unique(layer).tolist()
    ])  # fmt: skip
    entries = np.flatnonzero(rows.sorted_kind <= Kind.HARDLINK)
    # Each layer has one entry at a path, so (path, layer) rises without repeats.
    code = rows.path[entries] * np.int64(len(indexes)) + rows.sorted_layer[entries]
    wanted = target * len(indexes) + layer
    found = np.minimum(np.searchsorted(code, wanted), len(code) - 1)
    here = code[found] == wanted
    base = np.arange(rows.total, dtype=np.int32)
    base[links[here]] = rows.order[entries[found[here]]]
    below = _Below(paths, rows)
    for i in np.flatnonzero(~here).tolist():
        row = below.entry(int(target[i]), int(layer[i])) if target[i] >= 0 else -1
        if row < 0:
            raise _refused(indexes, rows, int(links[i]), _NOTHING)
        base[links[i]] = row
    for _ in range(len(links).bit_length() + 1):
        # Each round doubles the steps that a link has gone along its chain.
        base[links] = base[base[links]]
    kind = rows.kind[base[links]]
    for bad, why in ((Kind.HARDLINK, _CYCLE), (Kind.DIR, _DIRECTORY)):
        if (kind == bad).any():
            raise _refused(indexes, rows, int(links[np.argmax(kind == bad)]), why)
    return base


def _targets(index: Index, rows: NDArray[np.int32], paths: _Paths) -> NDArray[np.int64]:
    """Return the path that each link of ``rows`` names, -1 where there is none."""
    link, which = np.unique(index.link[rows], return_inverse=True)
    found = np.full(len(link), -1, np.int64)
    keys = paths.keys
    for i, row in enumerate(link.tolist()):
        key = "" if row < 0 else index.links[row].replace(b"/", b"\0").decode("latin-1")
        place = bisect_left(keys, key)
        if place < len(keys) and keys[place] == key:
            found[i] = paths.place[place]
    return found[which]


def _refused(indexes: Sequence[Index], rows: _Rows, row: int, why: str) -> UnsafeEntry:
    layer = int(rows.layer[row])
    index, row = indexes[layer], row - rows.starts[layer]
    target = index.links[int(index.link[row])] if index.link[row] >= 0 else b""
    return UnsafeEntry(str(index.diff_id), index.path[row], f"hard link to {show_path(target) or '/'}, {why}")


class _Below:
    """What the layers below one layer show, with that layer's markers applied. Links need it rarely."""

    def __init__(self, paths: _Paths, rows: _Rows) -> None:
        self._paths, self._rows = paths, rows
        self._cuts: dict[tuple[int, int], int] = {}
        self.entry = functools.cache(self._entry)

    def _entry(self, path: int, layer: int) -> int:
        """Return the row of the entry at ``path``, -1 where there is none or a directory was made."""
        rows = self._rows
        places, layers, kinds = self._at(path, path + 1, layer)
        whiteouts = (kinds == Kind.WHITEOUT) & (layers <= layer)
        cut = max(self._cut(int(self._paths.parent[path]), layer), _last(layers, whiteouts))
        entry = np.flatnonzero((kinds <= Kind.HARDLINK) & (layers < layer) & (layers >= cut))
        if not len(entry):
            return -1
        top = int(entry[-1])
        if kinds[top] != Kind.DIR and self._made_since(path, int(layers[top]), layer):
            return -1
        return int(rows.order[places + top])

    def _made_since(self, path: int, low: int, high: int) -> bool:
        """Return whether a layer between ``low`` and ``high`` has an entry beneath ``path``."""
        depth = self._paths.depth
        end = path + 1
        while end < len(depth) and depth[end] > depth[path]:
            end += 1
        if end == path + 1:
            return False
        _, layers, kinds = self._at(path + 1, end, high)
        return bool(((kinds <= Kind.HARDLINK) & (layers > low) & (layers < high)).any())

    def _at(self, path: int, end: int, layer: int) -> tuple[int, NDArray[np.int16], NDArray[np.uint8]]:
        """Return the first place of the paths from ``path`` to ``end``, their layers and kinds."""
        a, b = np.searchsorted(self._rows.path, [path, end]).tolist()
        return a, self._rows.sorted_layer[a:b], self._rows.sorted_kind[a:b]

    def _cut(self, path: int, layer: int) -> int:
        """Return the lowest layer that ``path`` and the directories above it let through beneath them."""
        todo = []
        while path >= 0 and (path, layer) not in self._cuts:
            todo.append(path)
            path = int(self._paths.parent[path])
        cut = self._cuts[path, layer] if path >= 0 else 0
        for path in reversed(todo):
            _, layers, kinds = self._at(path, path + 1, layer)
            markers = (kinds > Kind.HARDLINK) & (layers <= layer)
            plain = (kinds <= Kind.HARDLINK) & (kinds != Kind.DIR) & (layers < layer)
            cut = self._cuts[path, layer] = max(cut, _last(layers, markers | plain))
        return cut


def _last(layers: NDArray[np.int16], chosen: NDArray[np.bool_]) -> int:
    return int(layers[chosen].max(initial=0))


# Inodes from the rows that hold them: one column at a time, so that only one is held twice.


def _inode_columns(indexes: Sequence[Index], source: NDArray[np.int32], layer: NDArray[np.int16]) -> dict[str, Any]:
    """Return the columns of a tree's inodes by the names that ``Tree`` gives them, all but ``nlink``.

    ``source`` (m,) is the row of each inode, 0 for a made directory, and ``layer`` (m,) its layer.
    """

    def gather(name: str, dtype: str) -> Column:
        made = np.array([_MADE.get(name, 0)], dtype)
        return np.concatenate([made, *(np.asarray(getattr(i, name), dtype) for i in indexes)])[source]

    kind = gather("kind", "u1")
    device = (kind == Kind.CHAR) | (kind == Kind.BLOCK)
    regular = kind == Kind.REG
    mode = (gather("perm", "u4") & np.uint32(0o7777)) | (kind.astype(np.uint32) << np.uint32(12))
    sha256 = np.concatenate([np.zeros((1, 32), np.uint8), *(i.sha256 for i in indexes)])[source]
    texts, sets = dict[bytes, int](), dict[XattrSet, int]({(): 0})
    link = np.where(kind == Kind.SYMLINK, gather("link", "i4"), -1)
    target = _interned(link, layer, link >= 0, [i.links for i in indexes], texts)
    targets = Strings.of(texts)
    size = np.where(regular, gather("size", "i8"), 0)
    links = target >= 0
    size[links] = targets.lengths[target[links]]
    offset = np.where(regular, gather("offset", "i8"), -1)
    xattr = gather("xattr", "i4")
    xattr = np.maximum(_interned(xattr, layer, xattr > 0, [i.xattr_sets for i in indexes], sets), 0)
    sparse, sparse_maps = _sparse(indexes, gather("sparse", "i4"), layer)
    return {
        **{name: gather(name, COLUMNS[name]) for name in ("uid", "gid", "mtime", "mtime_ns")},
        "mode": mode,
        "size": size,
        "major": np.where(device, gather("major", "u4"), np.uint32(0)),
        "minor": np.where(device, gather("minor", "u4"), np.uint32(0)),
        "target": target,
        "targets": targets,
        "xattr": xattr,
        "xattr_sets": tuple(sets),
        "layer": np.where(offset >= 0, layer, np.int16(-1)).astype(np.int32),
        "offset": offset,
        "sha256": sha256,
        "sparse": sparse,
        "sparse_maps": sparse_maps,
    }


def _interned(
    column: Column, layer: Column, used: NDArray[np.bool_], tables: Sequence[Any], numbers: dict[Any, int]
) -> NDArray[np.int32]:
    """Return ``column`` with rows of one common table in place of rows of each layer's own; -1 if unused.

    ``numbers`` takes what is new to the common table, in order of first use.
    """
    out = np.full(len(column), -1, np.int32)
    places = np.flatnonzero(used)
    if len(places):
        starts = np.cumsum([0, *map(len, tables)])
        codes = starts[layer[places]] + column[places]
        distinct, first, which = np.unique(codes, return_index=True, return_inverse=True)
        common = np.empty(len(distinct), np.int32)
        owners = np.searchsorted(starts, distinct, "right") - 1
        rows = (distinct - starts[owners]).tolist()
        for i in np.argsort(first).tolist():
            common[i] = numbers.setdefault(tables[int(owners[i])][rows[i]], len(numbers))
        out[places] = common[which]
    return out


def _sparse(indexes: Sequence[Index], sparse: Column, layer: Column) -> tuple[NDArray[np.int32], SparseMaps]:
    out = np.full(len(sparse), -1, np.int32)
    places = np.flatnonzero(sparse >= 0)
    out[places] = np.arange(len(places))
    starts, offsets, lengths = [0], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for at, row in zip(layer[places].tolist(), sparse[places].tolist(), strict=True):
        maps = indexes[at].sparse_maps
        a, b = int(maps.starts[row]), int(maps.starts[row + 1])
        offsets.append(maps.offset[a:b])
        lengths.append(maps.length[a:b])
        starts.append(starts[-1] + b - a)
    return out, SparseMaps(np.array(starts, np.int64), np.concatenate(offsets), np.concatenate(lengths))
