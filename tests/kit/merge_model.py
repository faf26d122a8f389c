"""A model of the merge that shares nothing with it: a dict of paths, layers applied in turn; and stacks to try."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st

from layerkit.model.digest import Digest
from layerkit.model.entry import Entry, Kind
from layerkit.model.index import Index


class Broken(Exception):
    """The model refuses the layers."""


@dataclass(eq=False)
class Inode:
    entry: Entry
    layer: int
    marks: list[str] = field(default_factory=list)


Files = dict[bytes, Inode]


def is_dir(inode: Inode) -> bool:
    return inode.entry.kind is Kind.DIR


def ancestors(path: bytes) -> list[bytes]:
    parts = path.split(b"/")
    return [b"", *(b"/".join(parts[:i]) for i in range(1, len(parts)))] if path else []


def drop_below(files: Files, path: bytes) -> None:
    for name in [n for n in files if n != path and (not path or n.startswith(path + b"/"))]:
        del files[name]


def drop(files: Files, path: bytes) -> None:
    drop_below(files, path)
    files.pop(path, None)


def made(layer: int, why: str) -> Inode:
    return Inode(Entry(b"", Kind.DIR, perm=0o755), layer, [why])


def apply_layer(files: Files, entries: list[Entry], layer: int) -> None:
    """Apply one layer: first its markers, then its entries, parents first."""
    own = {e.path: e for e in entries if e.kind <= Kind.HARDLINK}
    for e in entries:
        inside = [*ancestors(e.path), *([e.path] if e.kind is Kind.OPAQUE else [])]
        if any(p in own and own[p].kind is not Kind.DIR for p in inside):
            raise Broken("below something that is no directory")
    for e in entries:
        if e.kind is Kind.WHITEOUT:
            drop(files, e.path)
        elif e.kind is Kind.OPAQUE:
            drop_below(files, e.path)
    below = dict(files)
    fresh = {p: Inode(e, layer) for p, e in own.items() if e.kind is not Kind.HARDLINK}

    def follow(path: bytes, seen: frozenset[bytes]) -> Inode:
        if path in seen:
            raise Broken("cycle")
        if path in own:
            return follow(own[path].link, seen | {path}) if own[path].kind is Kind.HARDLINK else fresh[path]
        if path not in below:
            raise Broken("nothing")
        return below[path]

    for path in sorted(own, key=lambda p: p.split(b"/")):
        for above in ancestors(path):
            if above not in files:
                files[above] = made(layer, "missing")
            elif not is_dir(files[above]):
                drop(files, above)
                files[above] = made(layer, "replaced")
        inode = fresh[path] if path in fresh else follow(path, frozenset())
        if own[path].kind is Kind.HARDLINK and is_dir(inode):
            raise Broken("directory")
        if not (is_dir(inode) and path in files and is_dir(files[path])):
            drop(files, path)
        files[path] = inode


def last_of(entries: list[Entry]) -> list[Entry]:
    """Return ``entries`` without those that a later one of the same path replaces."""
    return list({(e.path, e.kind if e.kind >= Kind.WHITEOUT else None): e for e in entries}.values())


def model(layers: list[list[Entry]]) -> Files:
    files: Files = {b"": made(-1, "root")}
    for number, entries in enumerate(layers):
        apply_layer(files, last_of(entries), number)
    return files


NAMES = st.sampled_from([b"a", b"b", b"a-", b"ab", b"\xff"])


PATHS = st.lists(NAMES, min_size=1, max_size=4).map(b"/".join)


XATTRS = st.sampled_from([(), ((b"user.a", b"1"),), ((b"user.a", b""), (b"user.b", b"\0\xff"))])


@st.composite
def entry(draw: st.DrawFn) -> Entry:
    kind = draw(
        st.sampled_from([
            Kind.DIR, Kind.DIR, Kind.DIR, Kind.REG, Kind.REG, Kind.SYMLINK, Kind.CHAR, Kind.FIFO,
            Kind.HARDLINK, Kind.HARDLINK, Kind.WHITEOUT, Kind.OPAQUE,
        ])
    )  # fmt: skip
    path = draw(PATHS)
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
        link=draw(PATHS) if kind in (Kind.SYMLINK, Kind.HARDLINK) else b"",
        xattrs=draw(XATTRS),
        sparse=((0, 1), (3, number)) if regular and number == 5 else None,
    )


STACKS = st.lists(st.lists(entry(), max_size=8), max_size=5)


def indexes(layers: list[list[Entry]]) -> list[Index]:
    return [Index.of(entries, Digest.of(b"%d" % i)) for i, entries in enumerate(layers)]


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
