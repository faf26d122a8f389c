"""A model of the merge that shares nothing with it: a dict of paths, layers applied in turn."""

from __future__ import annotations

from dataclasses import dataclass, field

from layerkit.model.entry import Entry, Kind


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
