"""Makes the plan: see the package's docstring for the rules. PURE."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import LossyResult, UsageError
from layerkit.model.index import Index
from layerkit.model.limits import DEFAULT, Limits
from layerkit.model.tree import Node, Tree
from layerkit.model.trees.merge import merge
from layerkit.usecases.waste.parts import (
    Inode,
    Layer,
    Shadow,
    Supply,
    attributes,
    comparable,
    entry_of,
    folders_above,
    stored_sum,
)
from layerkit.usecases.waste.planned import Action, Plan, PlannedLayer

_CAPABILITY = b"security.capability"


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
        raise LossyResult(b"", "the planned layers make another root filesystem; nothing was written")
    return result


class _Image:
    """The layers and the tree they make; every method takes the set of fixed layers."""

    def __init__(self, indexes: Sequence[Index], tree: Tree, limits: Limits) -> None:
        self._limits = limits
        self._layers = [Layer(index) for index in indexes]
        self.linked = max((place + 1 for place, x in enumerate(self._layers) if x.links_out), default=0)
        top: dict[bytes, int] = {}
        for place, layer in enumerate(self._layers):
            top.update(dict.fromkeys(layer.entries, place))
        self._folders: dict[bytes, Node] = {}
        inodes: dict[int, Inode] = {}
        for node in tree.nodes():
            if node.mode >> 12 == Kind.DIR:
                self._folders[node.path] = node
            elif node.inode in inodes:
                inodes[node.inode].names.append(node.path)
            else:
                inodes[node.inode] = Inode(node, [node.path], top[node.path])
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

    def _stays(self, layer: Layer, row: int, inode: Inode | None) -> bool:
        return (
            inode is not None
            and attributes(inode.node) == attributes(layer.index.entry(row))
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

    def supply(self, fixed: set[int]) -> Supply:
        """Return what the ``fixed`` layers show alone, and what of the image that is already."""
        order = sorted(fixed)
        base = merge([self._layers[place].index for place in order], limits=self._limits)
        supply = Supply({node.path: node for node in base.nodes()}, set(), set())
        names: dict[int, set[bytes]] = defaultdict(set)
        for path, node in supply.shown.items():
            names[node.inode].add(path)
        for inode in self._inodes:
            there = supply.shown.get(inode.names[0])
            if there is None:
                continue
            same = names[there.inode] == set(inode.names) and attributes(there) == attributes(inode.node)
            if same or inode.origin in fixed:
                supply.inodes.add(id(inode))
                if base.layer[there.inode] >= 0:
                    supply.used.add((order[int(base.layer[there.inode])], int(base.offset[there.inode])))
        return supply

    def with_hidden_files(self, places: set[int], supply: Supply) -> set[int]:
        """Return those of the fixed layers at ``places`` that store a file which nobody would see."""
        hidden = set()
        for place in places:
            layer = self._layers[place]
            # A file that is all hole has no place in the tar, and costs nothing.
            at = layer.index.offset[layer.stored].tolist()
            if any(offset >= 0 and (place, offset) not in supply.used for offset in at):
                hidden.add(place)
        return hidden

    def layers(self, fixed: set[int], supply: Supply) -> tuple[PlannedLayer, ...]:
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

    def _shadow(self, fixed: set[int]) -> Shadow:
        shadow = Shadow({}, {}, {}, {})
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

    def _place(self, fixed: set[int], shadow: Shadow) -> None:
        """Choose for every inode of a free layer where it goes and which row's content it takes."""
        mine = [x for x in self._inodes if x.origin not in fixed]
        free = [place for place in range(len(self._layers)) if place not in fixed]
        taken: dict[tuple[int, int], Inode] = {}
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

    def _slot(self, inode: Inode, place: int, taken: dict[tuple[int, int], Inode], *, same_path: bool) -> int:
        layer = self._layers[place]
        if not same_path:
            rows = layer.slots.get(inode.content, []) if inode.content else []
            return next((row for row in rows if (place, row) not in taken), -1)
        slots = layer.slots.get(inode.content, []) if inode.content else []
        for name in inode.names:
            row = layer.inode(name)
            if row < 0:
                continue
            if inode.content is None:
                # Nothing is stored of it: any row of its kind will do to say that it began here.
                if layer.kind[row] == inode.node.mode >> 12:
                    return row
            elif row in slots and (place, row) not in taken:
                return row
        return -1

    def _add(self, inode: Inode, rows: dict[bytes, Entry], content: dict[bytes, int]) -> None:
        first, *others = inode.names
        made = entry_of(inode.node)
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
        shadow: Shadow,
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
            if there is None or attributes(there) != attributes(node):
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
                rows[place][path] = entry_of(node)
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
        old, before = layer.index, stored_sum(layer.index)
        same = np.where(np.isin(np.arange(len(old)), layer.stored), np.arange(len(old)), -1).astype(np.int32)
        if is_fixed:
            return PlannedLayer(place, Action.KEEP, old, same, before, before)
        index = Index.of(rows, old.diff_id, old.tar_size)
        if len(index) == len(old) and all(
            comparable(a) == comparable(b) for a, b in zip(index.entries(), old.entries(), strict=True)
        ):
            return PlannedLayer(place, Action.KEEP, old, same, before, before)
        reads = np.array([
            content.get(path, -1) if kind == Kind.REG else -1
            for path, kind in zip(index.path.tolist(), index.kind.tolist(), strict=True)
        ], np.int32)  # fmt: skip
        action = Action.REWRITE if len(index) else Action.DROP
        return PlannedLayer(place, action, index, reads, before, stored_sum(index))


__all__ = ["plan"]
