"""Stacks of layers in which files are changed, moved, linked and deleted, as builds do it."""

from __future__ import annotations

from hypothesis import strategies as st
from trees import file

from layerkit.model.digest import Digest
from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import UnsafeEntry
from layerkit.model.index import Index
from layerkit.model.trees.merge import merge


def gone(path: bytes) -> Entry:
    return Entry(path, Kind.WHITEOUT)


def link(path: bytes, target: bytes) -> Entry:
    return Entry(path, Kind.HARDLINK, link=target)


def indexes(layers: list[list[Entry]]) -> list[Index]:
    """Return indexes in which every stored file has a place of its own."""
    out = []
    for number, entries in enumerate(layers):
        placed = [
            e._replace(offset=512 * (i + 1)) if e.size and e.sparse != () else e for i, e in enumerate(entries)
        ]
        out.append(Index.of(placed, Digest.of(b"%d" % number)))
    return out


NAMES = st.sampled_from([b"a", b"b", b"c"])


PATHS = st.lists(NAMES, min_size=1, max_size=3).map(b"/".join)


@st.composite
def change(draw: st.DrawFn, shown: list[Entry]) -> list[Entry]:
    """Draw what one step of a build writes: mostly about what is there already."""
    path, number = draw(PATHS), draw(st.integers(0, 3))
    is_old: bool = draw(st.booleans())
    old = draw(st.sampled_from(shown)) if shown and is_old else None
    what: str = draw(st.sampled_from(
        ["file", "file", "folder", "link", "gone", "opaque", "symlink", "device", "mode", "owner", "time", "xattr",
         "move", "copy"]
    ))  # fmt: skip
    if old is not None and what in ("mode", "owner", "time", "xattr"):
        if what == "xattr":
            return [old._replace(xattrs=((b"user.x", b"%d" % number),))]
        new = {"mode": old._replace(perm=number), "owner": old._replace(uid=number)}
        return [new.get(what) or old._replace(mtime=number)]
    if old is not None and what == "gone":
        return [gone(old.path)]
    if old is not None and what in ("move", "copy") and old.kind is Kind.REG:
        return [old._replace(path=path, uid=number), *([gone(old.path)] if what == "move" else [])]
    if what == "link":
        return [link(path, old.path if old is not None else draw(PATHS))]
    if what in ("folder", "opaque"):
        return [Entry(path, Kind.DIR if what == "folder" else Kind.OPAQUE, perm=0o700 + number)]
    if what == "gone":
        return [gone(path)]
    if what == "symlink":
        return [Entry(path, Kind.SYMLINK, link=b"%d" % number)]
    if what == "device":
        return [Entry(path, Kind.CHAR, major=number)]
    sparse = draw(st.sampled_from([(), ((0, 1),)])) if number == 3 and draw(st.booleans()) else None
    return [file(path, b"x" * number, uid=draw(st.integers(0, 2)))._replace(sparse=sparse)]


@st.composite
def stack(draw: st.DrawFn) -> list[list[Entry]]:
    """Draw layers that merge."""
    layers: list[list[Entry]] = []
    for _ in range(draw(st.integers(1, 6))):
        layer: list[Entry] = []
        shown = [e for entries in layers for e in entries if e.kind < Kind.HARDLINK]
        for _ in range(draw(st.integers(0, 7))):
            more = draw(change(shown + [e for e in layer if e.kind < Kind.HARDLINK]))
            try:
                merge(indexes([*layers, [*layer, *more]]))
            except UnsafeEntry:
                continue
            layer += more
        layers.append(layer)
    return layers
