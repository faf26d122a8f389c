"""The plan that takes doubled and hidden bytes out of an image and keeps its layers. PURE.

A layer is **fixed** (it stays byte for byte) or **free** (it is written anew). Whatever layers are fixed, the
free ones can be made so that the root filesystem stays what it is:

* an inode whose topmost layer is fixed is there already: no layer above that one touches it;
* every other inode goes into the *lowest* free layer that holds its content, no higher than where it was, and
  above every fixed layer that would hide it. It gets its final metadata there: the metadata moves down, the
  content never leaves the layer it is taken from;
* a directory goes into every free layer with something in it, as runtimes that unpack each layer alone need it,
  and above the fixed layers that give it other attributes;
* what fixed layers show and the image does not is whited out, in a free layer that hid it before.

Free layers hold nothing that is hidden later, and no marker that hides nothing. All the rest is the choice of
the fixed layers: first only those that must be (the base, and all below a hard link that leaves its layer),
then also those whose stored files would all stay as they are, unless a marker of theirs would hide nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from layerkit.model.digest import Digest
from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import LossyResult, UsageError
from layerkit.model.index import Index
from layerkit.model.limits import DEFAULT, Limits
from layerkit.model.tree import Node, Tree
from layerkit.model.trees.merge import merge

_CAPABILITY = b"security.capability"
# An int: looking a member of an enum up costs more than what is done with it here.
_REG = int(Kind.REG)

_ContentKey = tuple[bytes, int]
"""sha256 and size: files with the same ones hold the same."""


class Action(Enum):
    """What becomes of a layer."""

    KEEP = "keep"
    REWRITE = "rewrite"
    DROP = "drop"
    STUBS = "stubs"


@dataclass(frozen=True, slots=True, eq=False)
class PlannedLayer:
    """What becomes of one layer.

    Attributes:
        place: of the layer in the image, 0 is the bottom.
        action: kept byte for byte, written anew, left out because nothing is left of it, or written anew with
            stubs for files that a lower layer has.
        index: of the layer as it will be. Offsets, sparse maps and diff_id are the old layer's: they say
            where the content is to be read.
        content: int32 (n,): for each row of ``index`` with stored bytes the row of the old index, else -1.
        bytes_before: stored bytes of regular files. bytes_after: the same once planned.
    """

    place: int
    action: Action
    index: Index
    content: NDArray[np.int32]
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What becomes of every layer, bottom first, and the digest that the tree has before and after."""

    layers: tuple[PlannedLayer, ...]
    tree: Digest
    keep_base: int
    pinned: int = 0
    """Layers from the bottom that could not be touched: the base, or those that a hard link reaches into."""

    @property
    def bytes_before(self) -> int:
        """Return the stored bytes of the files in all layers as they are."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Return the stored bytes of the files in all layers as planned."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def indexes(self) -> list[Index]:
        """Return the layers that are left, bottom first."""
        return [layer.index for layer in self.layers if layer.action is not Action.DROP]

    @property
    def changes(self) -> bool:
        """Return whether any layer becomes another."""
        return any(layer.action is not Action.KEEP for layer in self.layers)


def plan(indexes: Sequence[Index], keep_base: int = 0, *, limits: Limits = DEFAULT) -> Plan:
    """Return the plan for layers with ``indexes``, bottom first, that leaves ``keep_base`` layers alone.

    ``merge(plan.indexes).digest() == merge(indexes).digest()``: this is checked before the plan is returned.

    Raises:
        UsageError: fewer layers than ``keep_base``.
        UnsafeEntry: the layers cannot be merged.
        LossyResult: the plan would change the root filesystem (an error of layerkit).
    """
    if not 0 <= keep_base <= len(indexes):
        raise UsageError(f"--keep-base {keep_base}: the image has {len(indexes)} layers")
    tree = merge(indexes, limits=limits)
    digest = tree.digest()
    image = _Image(indexes, tree, limits)
    pinned = max(keep_base, image.linked)
    fixed = set(range(pinned))
    fixed |= image.untouched(fixed)
    while True:
        image.release_idle(fixed, pinned)
        supply = image.supply(fixed)
        idle = image.with_hidden_files(fixed - set(range(pinned)), supply)
        if not idle:
            break
        fixed -= idle
    result = Plan(image.layers(fixed, supply), digest, keep_base, pinned)
    if merge(result.indexes, limits=limits).digest() != digest:
        raise LossyResult(b"", "the planned layers give a different root filesystem; nothing was written")
    return result


class _Image:
    """The layers and the tree they make; every method takes the set of fixed layers."""

    def __init__(self, indexes: Sequence[Index], tree: Tree, limits: Limits) -> None:
        self._limits = limits
        self._layers = [_Layer(index) for index in indexes]
        self.linked = max((place + 1 for place, x in enumerate(self._layers) if x.links_out), default=0)
        top: dict[bytes, int] = {}
        for place, layer in enumerate(self._layers):
            top.update(dict.fromkeys(layer.entries, place))
        self._folders: dict[bytes, Node] = {}
        inodes: dict[int, _Inode] = {}
        for node in tree.nodes():
            if node.mode >> 12 == Kind.DIR:
                self._folders[node.path] = node
            elif node.inode in inodes:
                inodes[node.inode].names.append(node.path)
            else:
                inodes[node.inode] = _Inode(node, [node.path], top[node.path])
        # A folder that no layer lists is made by whoever unpacks; listing it would say more than the image does.
        self._unlisted = self._folders.keys() - top.keys()
        self._inodes = list(inodes.values())
        self._by_name = {name: inode for inode in self._inodes for name in inode.names}

    def untouched(self, fixed: set[int]) -> set[int]:
        """Return the layers whose stored files would stay as they are if only ``fixed`` were fixed."""
        self._place(fixed, self._shadow(fixed))
        used = {(x.layer, x.row): x for x in self._inodes if x.content}
        return {
            place
            for place, layer in enumerate(self._layers)
            if place not in fixed and all(self._stays(layer, row, used.get((place, row))) for row in layer.stored)
        }

    def _stays(self, layer: _Layer, row: int, inode: _Inode | None) -> bool:
        return (
            inode is not None
            and _attributes(inode.node) == _attributes(layer.index.entry(row))
            and all(layer.inode(name) == row for name in inode.names)
        )

    def release_idle(self, fixed: set[int], pinned: int) -> None:
        """Take from ``fixed`` the layers above ``pinned`` with a marker that would hide nothing."""
        held: set[bytes] = set()
        for place, layer in enumerate(self._layers):
            if place not in fixed:
                continue
            if place >= pinned and any(layer.path[row] not in held for row in layer.marks):
                fixed.discard(place)
                continue
            for path in layer.entries:
                held.add(path)
                held.update(folders_above(path))

    def supply(self, fixed: set[int]) -> _Supply:
        """Return what the ``fixed`` layers show alone, and what of the image that is already."""
        order = sorted(fixed)
        base = merge([self._layers[place].index for place in order], limits=self._limits)
        supply = _Supply({node.path: node for node in base.nodes()}, set(), set())
        names: dict[int, set[bytes]] = defaultdict(set)
        for path, node in supply.shown.items():
            names[node.inode].add(path)
        for inode in self._inodes:
            there = supply.shown.get(inode.names[0])
            if there is None:
                continue
            same = names[there.inode] == set(inode.names) and _attributes(there) == _attributes(inode.node)
            if same or inode.origin in fixed:
                supply.inodes.add(id(inode))
                if base.layer[there.inode] >= 0:
                    supply.used.add((order[int(base.layer[there.inode])], int(base.offset[there.inode])))
        return supply

    def with_hidden_files(self, places: set[int], supply: _Supply) -> set[int]:
        """Return those of the fixed layers at ``places`` that store a file which nobody would see."""
        hidden = set()
        for place in places:
            layer = self._layers[place]
            # A file that is all hole has no place in the tar, and costs nothing.
            at = layer.index.offset[layer.stored].tolist()
            if any(offset >= 0 and (place, offset) not in supply.used for offset in at):
                hidden.add(place)
        return hidden

    def layers(self, fixed: set[int], supply: _Supply) -> tuple[PlannedLayer, ...]:
        """Return all layers, the free ones made anew."""
        shadow = self._shadow(fixed)
        rows: list[dict[bytes, Entry]] = [{} for _ in self._layers]
        content: list[dict[bytes, int]] = [{} for _ in self._layers]
        self._place(fixed, shadow)
        for inode in self._inodes:
            if id(inode) not in supply.inodes:
                self._add(inode, rows[inode.layer], content[inode.layer])
        markers = self._whiteouts(fixed, supply.shown)
        self._add_folders(fixed, shadow, supply.shown, rows, markers)
        return tuple(
            self._planned(place, place in fixed, [*markers[place], *rows[place].values()], content[place])
            for place in range(len(self._layers))
        )

    def _shadow(self, fixed: set[int]) -> _Shadow:
        shadow = _Shadow({}, {}, {}, {})
        for place in sorted(fixed):
            layer = self._layers[place]
            for path, row in layer.entries.items():
                shadow.at[path] = place
                if layer.kind[row] != Kind.DIR:
                    shadow.cut[path] = place
                for folder in folders_above(path):
                    if shadow.beneath.get(folder) == place:
                        break
                    shadow.beneath[folder] = place
                    if folder not in layer.entries:
                        shadow.implied[folder] = place
            for row in layer.marks:
                shadow.cut[layer.path[row]] = place
                if layer.kind[row] == Kind.WHITEOUT:
                    shadow.at[layer.path[row]] = place
        return shadow

    def _place(self, fixed: set[int], shadow: _Shadow) -> None:
        """Choose for every inode of a free layer where it goes and which row's content it takes."""
        mine = [x for x in self._inodes if x.origin not in fixed]
        free = [place for place in range(len(self._layers)) if place not in fixed]
        taken: dict[tuple[int, int], _Inode] = {}
        low: dict[int, int] = {}
        for inode in mine:
            inode.layer, inode.row = inode.origin, self._layers[inode.origin].inode(inode.names[0])
            low[id(inode)] = max(shadow.over(name, folder=False) for name in inode.names)
            if inode.content:
                taken[inode.layer, inode.row] = inode
        # Lower origins first: what they leave is there for those above. First the same path, then any.
        mine.sort(key=lambda x: x.origin)
        for same_path in (True, False):
            for inode in mine:
                for place in free:
                    if place <= low[id(inode)]:
                        continue
                    if place >= inode.layer:
                        break
                    row = self._slot(inode, place, taken, same_path=same_path)
                    if row >= 0:
                        if inode.content:
                            del taken[inode.layer, inode.row]
                            taken[place, row] = inode
                        inode.layer, inode.row = place, row
                        break

    def _slot(self, inode: _Inode, place: int, taken: dict[tuple[int, int], _Inode], *, same_path: bool) -> int:
        layer = self._layers[place]
        slots = (
            [row for row in layer.slots.get(inode.content, ()) if (place, row) not in taken]
            if inode.content
            else []
        )
        if not same_path:
            return next(iter(slots), -1)
        for name in inode.names:
            row = layer.inode(name)
            # Of an inode without content nothing is stored: any row of its kind will do to say that it began here.
            if row in slots or (row >= 0 and inode.content is None and layer.kind[row] == inode.node.mode >> 12):
                return row
        return -1

    def _add(self, inode: _Inode, rows: dict[bytes, Entry], content: dict[bytes, int]) -> None:
        first, *others = inode.names
        made = _entry_of(inode.node)
        if inode.content:
            old = self._layers[inode.layer].index.entry(inode.row)
            made = made._replace(offset=old.offset, sparse=old.sparse)
            content[first] = inode.row
        elif inode.node.mode >> 12 == Kind.REG:
            made = made._replace(sparse=None)
        rows[first] = made
        # An unpacker that chowns a link takes the inode's capability away, and then sets what the link's entry has.
        again = tuple(pair for pair in made.xattrs if pair[0] == _CAPABILITY)
        bare = made._replace(
            kind=Kind.HARDLINK, link=first, xattrs=again, size=0, sha256=b"", offset=-1, sparse=None
        )
        for name in others:
            rows[name] = bare._replace(path=name)

    def _add_folders(
        self,
        fixed: set[int],
        shadow: _Shadow,
        shown: dict[bytes, Node],
        rows: list[dict[bytes, Entry]],
        markers: list[list[Entry]],
    ) -> None:
        used: dict[bytes, set[int]] = defaultdict(set)
        for place, made in enumerate(rows):
            for path in (*made, *(marker.path for marker in markers[place])):
                for folder in folders_above(path):
                    if place in used[folder]:
                        break
                    used[folder].add(place)
        free = [place for place in range(len(self._layers)) if place not in fixed]
        # The deepest first: a folder that goes somewhere needs the folders above it there.
        for path in sorted(self._folders, key=lambda p: -(p.count(b"/") + bool(p))):
            node = self._folders[path]
            where: set[int] = set()
            there = shown.get(path)
            if path in self._unlisted and (there is not None or used[path]):
                continue
            if there is None or _attributes(there) != _attributes(node):
                above = shadow.over(path, folder=True)
                had = {place for place in free if path in self._layers[place].entries}
                # A fixed layer with something in it, but not itself, has it with attributes of its own where each
                # layer is unpacked alone.
                for low in (max(above, shadow.implied.get(path, -1)), above):
                    found = min((x for x in used[path] | had if x > low), default=-1)
                    if found >= 0:
                        break
                where.add(found if found >= 0 else next((x for x in free if x > above), -1))
                where.discard(-1)
            # Runtimes unpack each layer alone: a folder that a layer does not list gets other attributes there,
            # and those of the topmost layer are what an overlay shows.
            where |= used[path]
            for place in where:
                rows[place][path] = _entry_of(node)
                for folder in folders_above(path):
                    used[folder].add(place)

    def _whiteouts(self, fixed: set[int], shown: dict[bytes, Node]) -> list[list[Entry]]:
        """Return per layer the whiteouts of what the fixed layers show and the image does not."""
        out: list[list[Entry]] = [[] for _ in self._layers]
        extra = [path for path in shown if path not in self._folders and path not in self._by_name]
        wanted = {path: -1 for path in extra if path.rpartition(b"/")[0] in self._folders}
        for place in sorted(fixed):
            for path in self._layers[place].entries:
                # Highest layer with anything at or beneath; fixed layers rise, so the last one stays.
                for each in (path, *folders_above(path)):
                    if each in wanted and path in shown:
                        wanted[each] = place
        for path, provider in wanted.items():
            free = [place for place in range(provider + 1, len(self._layers)) if place not in fixed]
            place = next((p for p in reversed(free) if self._layers[p].cuts(path)), free[-1] if free else -1)
            if place >= 0:
                out[place].append(Entry(path, Kind.WHITEOUT, perm=0))
        return out

    def _planned(self, place: int, is_fixed: bool, rows: list[Entry], content: dict[bytes, int]) -> PlannedLayer:
        layer = self._layers[place]
        old, before = layer.index, int(stored_bytes(layer.index).sum())
        same = np.where(np.isin(np.arange(len(old)), layer.stored), np.arange(len(old)), -1).astype(np.int32)
        if is_fixed:
            return PlannedLayer(place, Action.KEEP, old, same, before, before)
        index = Index.of(rows, old.diff_id, old.tar_size)
        if len(index) == len(old) and all(
            _comparable(a) == _comparable(b) for a, b in zip(index.entries(), old.entries(), strict=True)
        ):
            return PlannedLayer(place, Action.KEEP, old, same, before, before)
        reads = np.array([
            content.get(path, -1) if kind == Kind.REG else -1
            for path, kind in zip(index.path.tolist(), index.kind.tolist(), strict=True)
        ], np.int32)  # fmt: skip
        action = Action.REWRITE if len(index) else Action.DROP
        return PlannedLayer(place, action, index, reads, before, int(stored_bytes(index).sum()))


@dataclass(slots=True, eq=False)
class _Inode:
    """An inode of the final tree that is no directory, with its names, and where it is to go.

    ``content`` identifies what it holds, None where that is nothing.
    """

    node: Node
    names: list[bytes]
    origin: int
    layer: int = -1
    row: int = -1
    content: _ContentKey | None = field(init=False)

    def __post_init__(self) -> None:
        node = self.node
        self.content = (node.sha256, node.size) if node.mode >> 12 == _REG and node.size else None


@dataclass(slots=True, eq=False)
class _Shadow:
    """What the fixed layers touch: for a path the highest one; -1 where there is none."""

    at: dict[bytes, int]
    beneath: dict[bytes, int]
    cut: dict[bytes, int]
    implied: dict[bytes, int]
    """Folders that a layer has something in and does not list."""

    def over(self, path: bytes, *, folder: bool) -> int:
        """Return the highest fixed layer that would hide, replace or change what a lower one has at ``path``."""
        top = self.at.get(path, -1)
        if not folder:
            top = max(top, self.beneath.get(path, -1))
        return max(top, self.above(path))

    def above(self, path: bytes) -> int:
        """Return the highest fixed layer that hides what lower ones have beneath a directory of ``path``."""
        return max((self.cut.get(d, -1) for d in folders_above(path)), default=-1)


@dataclass(frozen=True, slots=True, eq=False)
class _Supply:
    """What the fixed layers show: names, the image's inodes (by id) among it, and the files it takes.

    ``used`` holds pairs of a layer's place and the offset of a stored file.
    """

    shown: dict[bytes, Node]
    inodes: set[int]
    used: set[tuple[int, int]]


def folders_above(path: bytes) -> Iterator[bytes]:
    """Yield the directories above ``path``, the nearest first, the root last."""
    while path:
        path = path.rpartition(b"/")[0]
        yield path


class _Layer:
    """One layer's index with its rows by path."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.kind = index.kind.tolist()
        self.path = index.path.tolist()
        self.entries = {path: row for row, path in enumerate(self.path) if self.kind[row] <= Kind.HARDLINK}
        self.marks = [row for row, kind in enumerate(self.kind) if kind > Kind.HARDLINK]
        size = index.size.tolist()
        self.stored = [row for row, kind in enumerate(self.kind) if kind == Kind.REG and size[row] > 0]
        self.slots: dict[_ContentKey, list[int]] = defaultdict(list)
        for row in self.stored:
            self.slots[index.sha256[row].tobytes(), size[row]].append(row)
        # What a marker or a file hides, for the question who hid something.
        self.hides = {self.path[row] for row in self.marks if self.kind[row] == Kind.WHITEOUT}
        self.hides_beneath = {self.path[row] for row in self.marks}
        self.hides_beneath |= {path for path, row in self.entries.items() if self.kind[row] != Kind.DIR}

    @property
    def links_out(self) -> bool:
        """Return whether a hard link names something that is not in this layer."""
        return any(
            self.index.links[int(self.index.link[row])] not in self.entries
            for row in self.entries.values()
            if self.kind[row] == Kind.HARDLINK
        )

    def inode(self, path: bytes) -> int:
        """Return the row of the inode at ``path``, -1 where this layer has none; its hard links are its own."""
        row = self.entries.get(path, -1)
        while row >= 0 and self.kind[row] == Kind.HARDLINK:
            row = self.entries.get(self.index.links[int(self.index.link[row])], -1)
        return row

    def cuts(self, path: bytes) -> bool:
        """Return whether this layer hides what lower ones have at ``path``."""
        return (
            path in self.hides or path in self.entries or any(d in self.hides_beneath for d in folders_above(path))
        )


def _attributes(of: Node | Entry) -> tuple[object, ...]:
    """Return all that the tree shows of an inode but its names."""
    if isinstance(of, Node):
        link = of.target if of.mode >> 12 == Kind.SYMLINK else b""
        size = of.size if of.mode >> 12 == Kind.REG else 0
        head: tuple[object, ...] = (of.mode, size, link)
    else:
        head = (of.perm & 0o7777 | of.kind << 12, of.size, of.link)
    return (*head, of.uid, of.gid, of.mtime, of.mtime_ns, of.major, of.minor, of.xattrs, of.sha256)


def _entry_of(node: Node) -> Entry:
    """Return the row that makes ``node``, without a place for its content."""
    kind = Kind(node.mode >> 12)
    return Entry(
        node.path, kind, node.mode & 0o7777, node.uid, node.gid, node.mtime, node.mtime_ns,
        node.size if kind is Kind.REG else 0, node.major, node.minor, node.target, node.xattrs, -1, node.sha256,
    )  # fmt: skip


def _comparable(entry: Entry) -> Entry:
    """Return ``entry`` without what says nothing: a marker's and a link's attributes are never shown."""
    if entry.kind >= Kind.HARDLINK:
        return Entry(entry.path, entry.kind, link=entry.link)
    return entry


def stored_bytes(index: Index) -> NDArray[np.int64]:
    """Return int64 (n,): the bytes that each row stores in the tar, holes left out; 0 for all but regular files."""
    stored = np.where(index.kind == Kind.REG, index.size, 0)
    for row in np.flatnonzero(index.sparse >= 0).tolist():
        stored[row] = index.sparse_maps.stored_bytes(int(index.sparse[row]))
    return stored
