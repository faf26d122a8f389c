"""Stacks of layers to try: as builds make them, which change, move, link and delete; and as odd as may be."""

from __future__ import annotations

from hypothesis import strategies as st
from merge_model import Broken, Files, apply_layer, is_dir, last_of, made
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
    """Return the indexes of layers, entries as they are."""
    return [Index.of(entries, Digest.of(b"%d" % i)) for i, entries in enumerate(layers)]


def stored(layers: list[list[Entry]]) -> list[Index]:
    """Return the indexes of layers in which every stored file has a place of its own."""
    return indexes(
        [
            [e._replace(offset=512 * (i + 1)) if e.size and e.sparse != () else e for i, e in enumerate(entries)]
            for entries in layers
        ]
    )


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
                merge(stored([*layers, [*layer, *more]]))
            except UnsafeEntry:
                continue
            layer += more
        layers.append(layer)
    return layers


ODD_NAMES = st.sampled_from([b"a", b"b", b"a-", b"ab", b"\xff"])


ODD_PATHS = st.lists(ODD_NAMES, min_size=1, max_size=4).map(b"/".join)


XATTRS = st.sampled_from([(), ((b"user.a", b"1"),), ((b"user.a", b""), (b"user.b", b"\0\xff"))])


@st.composite
def entry(draw: st.DrawFn) -> Entry:
    kind = draw(
        st.sampled_from([
            Kind.DIR, Kind.DIR, Kind.DIR, Kind.REG, Kind.REG, Kind.SYMLINK, Kind.CHAR, Kind.FIFO,
            Kind.HARDLINK, Kind.HARDLINK, Kind.WHITEOUT, Kind.OPAQUE,
        ])
    )  # fmt: skip
    path = draw(ODD_PATHS)
    if kind in (Kind.DIR, Kind.OPAQUE) and draw(st.integers(0, 9)) == 0:
        path = b""
    number = draw(st.integers(0, 5))
    regular = kind is Kind.REG
    return Entry(
        path=path,
        kind=kind,
        perm=0o600 + number,
        uid=number,
        mtime=-number,
        size=number if regular else 0,
        offset=512 * number if regular and number else -1,
        sha256=bytes([number]) * 32 if regular else b"",
        major=number if kind is Kind.CHAR else 0,
        link=draw(ODD_PATHS) if kind in (Kind.SYMLINK, Kind.HARDLINK) else b"",
        xattrs=draw(XATTRS),
        sparse=((0, 1), (3, number)) if regular and number == 5 else None,
    )


STACKS = st.lists(st.lists(entry(), max_size=8), max_size=5)


@st.composite
def sound_stack(draw: st.DrawFn) -> list[list[Entry]]:
    """Draw layers that are rarely refused: random ones mostly are, once they hold a few links."""
    files: Files = {b"": made(-1, "root")}
    layers = []
    for number in range(draw(st.integers(1, 6))):
        layer: list[Entry] = []
        for new in draw(st.lists(entry(), min_size=1, max_size=8)):
            if new.kind is Kind.HARDLINK and draw(st.booleans()):
                targets = [e.path for e in layer if e.kind not in (Kind.DIR, Kind.WHITEOUT, Kind.OPAQUE)]
                targets += [p for p, i in files.items() if not is_dir(i)]
                if targets:
                    new = new._replace(link=draw(st.sampled_from(targets)))
            trial = dict(files)
            try:
                apply_layer(trial, last_of([*layer, new]), number)
            except Broken:
                continue
            layer.append(new)
        layers.append(layer)
        apply_layer(files, last_of(layer), number)
    return layers
