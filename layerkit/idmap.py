"""Id maps: from the ids in an image (container ids) to those on the host. What a map accepts is decided here alone.

A map is total or an error: an owner that it does not cover raises with path, id and ranges, unless the user named
an overflow id. Rules of user_namespaces(7) hold: no overlap, no id 4294967295. Whoever takes a map or an id as text
(flags, hook.toml, mount options, labels, /etc/subuid) has it parsed here. numpy is loaded where columns are mapped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, TypeVar

from layerkit.model import acl_caps
from layerkit.model.errors import InvalidImage, UnmappedId, UnsafeEntry, UsageError
from layerkit.model.limits import DEFAULT

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from layerkit.model.entry import XattrSet
    from layerkit.model.index import Index
    from layerkit.model.tree import Tree

    Ids = NDArray[np.uint32]

Owned = TypeVar("Owned", "Tree", "Index")
"""What has owners: a tree by inode, the index of a layer by row."""

MAX_ID = 0xFFFF_FFFE
"""The highest id: 4294967295 is -1, which the kernel takes for "no id"."""

IdExtent = tuple[int, int, int]
"""(first container id, first host id, number of ids): a line of /proc/PID/uid_map."""

_MAX_DIGITS = 10


def is_id(text: str) -> bool:
    """Return whether ``text`` is an id in plain ASCII digits."""
    return _is_number(text) and int(text) <= MAX_ID


def parse_id(text: str, what: str) -> int:
    """Return the id that ``text`` spells; ``what`` names it in the error.

    Raises:
        UsageError: no plain digits, or above 4294967294.
    """
    if not is_id(text):
        raise UsageError(f"{what} {text!r}: want an id from 0 to {MAX_ID}")
    return int(text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS


@dataclass(frozen=True, slots=True)
class IdMap:
    """A map of ids in its canonical form; make one with :meth:`of`, :meth:`parse` or :meth:`everything`.

    Laws (``f``, ``g`` maps, ``x`` ids they cover): ``f.inverse().apply(f.apply(x)) == x``;
    ``f.compose(g).apply(x) == g.apply(f.apply(x))``; equal functions have equal extents and text.

    Attributes:
        extents: rising by container id, none overlapping there, neighbours merged where they continue
            each other. Host ids overlap in a squashing map only. Empty only for some compositions.
        rest: host id of all that lies outside the extents; None makes that an error.
    """

    extents: tuple[IdExtent, ...]
    rest: int | None = None

    @classmethod
    def of(cls, extents: Iterable[IdExtent], *, what: str = "id map", squash: bool = False) -> IdMap:
        """Return the map made of ``extents``, in any order.

        Args:
            extents: what to map.
            what: name of the map in errors: the flag, or the file.
            squash: allow several container ids to get one host id.

        Raises:
            UsageError: a size below 1, an id above 4294967294, or an overlap.
        """
        rows = sorted(extents)
        for c, h, n in rows:
            text = f"{c}:{h}:{n}"
            if n < 1:
                raise UsageError(f"{what} {text}: the size is at least 1")
            if min(c, h) < 0 or max(c, h) + n - 1 > MAX_ID:
                raise UsageError(f"{what} {text}: goes beyond {MAX_ID}, the highest id there is")
        for (a, ah, an), (b, bh, bn) in pairwise(rows):
            if a + an > b:
                raise UsageError(f"{what}: {a}:{ah}:{an} and {b}:{bh}:{bn} overlap in the container; split them")
        merged = _merged(rows)
        if not squash and (clash := _host_overlap(merged)):
            raise UsageError(
                f"{what}: {_text(clash[:1])} and {_text(clash[1:])} overlap on the host; "
                "if several owners are to become one, add --squash"
            )
        return cls(merged)

    @classmethod
    def parse(cls, texts: Sequence[str], *, what: str = "--uid-map", squash: bool = False) -> IdMap:
        """Return the map that ``texts`` spell: each ``C:H:N``, several separated by commas.

        ``C:H:N:C:H:N:`` with colons all along is taken too: container engines hand maps to their
        helpers in that form.

        Raises:
            UsageError: malformed, or refused by :meth:`of`.
        """
        extents: list[IdExtent] = []
        for piece in (piece for text in texts for piece in text.split(",")):
            fields = piece.removesuffix(":").split(":")
            if len(fields) % 3 or not all(map(_is_number, fields)):
                raise UsageError(
                    f"{what} {piece!r}: want CONTAINER:HOST:SIZE in plain digits, for example 0:100000:65536"
                )
            numbers = iter(map(int, fields))
            extents += zip(numbers, numbers, numbers, strict=True)
        if not extents:
            raise UsageError(f"{what}: no extent is given; give one, such as 0:100000:65536")
        return cls.of(extents, what=what, squash=squash)

    @classmethod
    def of_ranges(cls, ranges: Iterable[tuple[int, int]], *, first: int = 0, what: str = "id map") -> IdMap:
        """Return the map that gives container ids ``first``, ``first`` + 1, … to host ranges (start, size) in turn.

        Raises:
            UsageError: refused by :meth:`of`.
        """
        extents = []
        for start, size in ranges:
            extents.append((first, start, size))
            first += size
        return cls.of(extents, what=what)

    @classmethod
    def identity(cls) -> IdMap:
        """Return the map that keeps every id."""
        return cls(((0, 0, MAX_ID + 1),))

    @classmethod
    def everything(cls, host: int) -> IdMap:
        """Return the map that makes one host id of every id, 4294967295 too."""
        return cls((), host)

    def canonical(self) -> str:
        """Return the extents as ``C:H:N,C:H:N``: the same text for the same function; ``all:H`` of everything."""
        return _text(self.extents) if self.rest is None else f"all:{self.rest}"

    __str__ = canonical

    @property
    def is_injective(self) -> bool:
        """Return whether no two ids become one."""
        return self.rest is None and _host_overlap(self.extents) is None

    @property
    def fits_kernel(self) -> bool:
        """Return whether the kernel takes this map for a user namespace or an idmapped mount."""
        return 0 < len(self.extents) <= DEFAULT.id_map_extents and self.is_injective

    def host_of(self, container: int) -> int | None:
        """Return the host id of one id, None where the map does not cover it."""
        for c, h, n in self.extents:
            if c <= container < c + n:
                return h + container - c
        return self.rest

    def lookup(self, ids: Ids) -> tuple[Ids, NDArray[np.bool_]]:
        """Return for each id its host id and whether the map covers it; where not, the host id is 0.

        Args:
            ids: uint32 of any shape, container ids.
        """
        import numpy as np

        ids = np.asarray(ids, np.uint32)
        if not self.extents:
            return np.full_like(ids, self.rest or 0), np.full(ids.shape, self.rest is not None)
        container, host, size = (np.array(column, np.uint32) for column in zip(*self.extents, strict=True))
        if len(self.extents) == 1:
            # Below the extent, the difference wraps round to more than any size.
            place = ids - container[0]
            inside = place < size[0]
            mapped = place + host[0]
        else:
            # Below all extents the row is -1, the last one, and the difference wraps round as well.
            row = np.searchsorted(container, ids, "right") - 1
            place = ids - container[row]
            inside = place < size[row]
            mapped = place + host[row]
        mapped[~inside] = self.rest or 0
        if self.rest is not None:
            inside[...] = True
        return mapped, inside

    def apply(self, ids: Ids, overflow: int | None = None) -> Ids:
        """Return the host ids of ``ids``; those outside the map become ``overflow`` if one is given.

        Raises:
            UnmappedId: an id outside the map; it names no path, as there is none here.
        """
        mapped, inside = self.lookup(ids)
        if not inside.all():
            if overflow is None:
                raise UnmappedId(b"", "id", int(ids[~inside][0]), self.canonical())
            mapped[~inside] = overflow
        return mapped

    def inverse(self) -> IdMap:
        """Return the map from host ids to container ids.

        Raises:
            UsageError: several ids become one, so there is no way back.
        """
        if (clash := _host_overlap(self.extents)) is not None:
            raise UsageError(f"id map {self}: {_text(clash)} overlap on the host, so it has no inverse")
        if self.rest is not None:
            raise UsageError(f"id map {self}: many ids become one, so it has no inverse")
        return IdMap(_merged(sorted((h, c, n) for c, h, n in self.extents)))

    def compose(self, then: IdMap) -> IdMap:
        """Return the map that does this one, then ``then``; it covers the ids that both let through."""
        out: list[IdExtent] = []
        for c, h, n in self.extents:
            for mid, host, size in then.extents:
                first, end = max(h, mid), min(h + n, mid + size)
                if first < end:
                    out.append((c + first - h, host + first - mid, end - first))
        return IdMap(_merged(sorted(out)))


def _merged(rows: Sequence[IdExtent]) -> tuple[IdExtent, ...]:
    """Return sorted ``rows`` with neighbours joined where the second continues the first on both sides."""
    out: list[IdExtent] = []
    for c, h, n in rows:
        if out and (out[-1][0] + out[-1][2], out[-1][1] + out[-1][2]) == (c, h):
            out[-1] = (*out[-1][:2], out[-1][2] + n)
        else:
            out.append((c, h, n))
    return tuple(out)


def _host_overlap(extents: Sequence[IdExtent]) -> tuple[IdExtent, IdExtent] | None:
    for a, b in pairwise(sorted(extents, key=lambda extent: extent[1])):
        if a[1] + a[2] > b[1]:
            return a, b
    return None


def _text(extents: Iterable[IdExtent]) -> str:
    return ",".join(f"{c}:{h}:{n}" for c, h, n in extents)


@dataclass(frozen=True, slots=True)
class Mapping:
    """How all owners of an image are mapped.

    Attributes:
        uid, gid: the maps.
        overflow: host id for owners outside the maps; None makes them an error. It stands for ids in
            ACLs and capabilities as well.
    """

    uid: IdMap
    gid: IdMap
    overflow: int | None = None

    def __post_init__(self) -> None:
        """Refuse an overflow id that is none.

        Raises:
            UsageError: below 0 or above 4294967294.
        """
        if self.overflow is not None:
            parse_id(str(self.overflow), "--overflow-id")

    @classmethod
    def identity(cls) -> Mapping:
        """Return the mapping that keeps every owner."""
        return cls(IdMap.identity(), IdMap.identity())

    def canonical(self) -> str:
        """Return ``uid=C:H:N,…;gid=C:H:N,…`` and ``;overflow=ID`` where there is one."""
        tail = "" if self.overflow is None else f";overflow={self.overflow}"
        return f"uid={self.uid};gid={self.gid}{tail}"

    __str__ = canonical

    @classmethod
    def parse_canonical(cls, text: str) -> Mapping:
        """Return the mapping that :meth:`canonical` wrote as ``text``.

        Raises:
            UsageError: ``text`` is not the canonical form of a mapping.
        """
        fields = dict(part.partition("=")[::2] for part in text.split(";"))
        if fields.keys() | {"overflow"} != {"uid", "gid", "overflow"}:
            raise UsageError(f"map {text!r}: want uid=C:H:N;gid=C:H:N, and perhaps ;overflow=ID")
        uid, gid = (IdMap.parse([fields[k]], what=f"map {text!r}, {k}", squash=True) for k in ("uid", "gid"))
        overflow = fields.get("overflow")
        mapping = cls(uid, gid, None if overflow is None else parse_id(overflow, f"map {text!r}, overflow"))
        if mapping.canonical() != text:
            raise UsageError(f"map {text!r}: not in its canonical form, which is {mapping.canonical()!r}")
        return mapping

    def of(self, kind: str) -> IdMap:
        """Return the map of ids of ``kind``: that of groups if it begins with ``gid``."""
        return self.gid if kind.startswith("gid") else self.uid

    def lookup(self, kind: str, ids: Ids) -> tuple[Ids, NDArray[np.bool_]]:
        """Return for each id its host id and whether there is one; an overflow id stands in where none is.

        Args:
            kind: ``uid`` or ``gid``, whatever follows.
            ids: uint32 of any shape, container ids.
        """
        mapped, inside = self.of(kind).lookup(ids)
        if self.overflow is not None:
            mapped[~inside] = self.overflow
            inside[...] = True
        return mapped, inside

    def host_of(self, kind: str, container: int) -> int:
        """Return the host id of one id; see :meth:`lookup`.

        Raises:
            UnmappedId: there is none; it names no path.
        """
        found = self.of(kind).host_of(container)
        if found is None:
            found = self.overflow
        if found is None:
            raise UnmappedId(b"", kind, container, self.of(kind).canonical())
        return found

    def inverse(self) -> Mapping:
        """Return the mapping from host ids back to container ids; an owner that none becomes is an error there.

        Raises:
            UsageError: several ids become one.
        """
        return Mapping(self.uid.inverse(), self.gid.inverse())

    def flags(self) -> str:
        """Return the command-line flags that ask for this mapping."""
        flags = [f"--uid-map {self.uid}"]
        if self.gid != self.uid:
            flags.append(f"--gid-map {self.gid}")
        if self.overflow is not None:
            flags.append(f"--overflow-id {self.overflow}")
        if not (self.uid.is_injective and self.gid.is_injective):
            flags.append("--squash")
        return " ".join(flags)

    @property
    def fits_kernel(self) -> bool:
        """Return whether an idmapped mount can show the same: two maps it takes, and no overflow id."""
        return self.uid.fits_kernel and self.gid.fits_kernel and self.overflow is None


@dataclass(frozen=True, slots=True, eq=False)
class Reach:
    """The owners that a tree has, each once and rising, with the number of inodes they own.

    Attributes:
        uid, gid: uint32. uid_inodes, gid_inodes: int64.
        xattr_uids, xattr_gids: ids in ACLs and capabilities (0 for a capability without a rootid).
    """

    uid: Ids
    uid_inodes: NDArray[np.int64]
    gid: Ids
    gid_inodes: NDArray[np.int64]
    xattr_uids: tuple[int, ...]
    xattr_gids: tuple[int, ...]


def reach(tree: Tree) -> Reach:
    """Return the ids in use in ``tree``.

    Raises:
        UnsafeEntry: a malformed ACL or capability.
    """
    import numpy as np

    seen: dict[bool, set[int]] = {True: set(), False: set()}

    def note(kind: str, value: int) -> int:
        seen[kind.startswith("gid")].add(value)
        return value

    for row in range(len(tree.xattr_sets)):
        _mapped_set(tree, row, note)
    uid, uid_inodes = np.unique(tree.uid, return_counts=True)
    gid, gid_inodes = np.unique(tree.gid, return_counts=True)
    return Reach(uid, uid_inodes, gid, gid_inodes, tuple(sorted(seen[False])), tuple(sorted(seen[True])))


def apply(owned: Owned, mapping: Mapping) -> Owned:
    """Return a tree or an index with every owner mapped: of inodes, in ACLs and in file capabilities.

    Capabilities come out as an idmapped mount shows them (:func:`acl_caps.map_capability`). Rows of
    ``xattr_sets`` stay where they are, so a rendering of the tree can be patched by row; a squashing map
    can make two of them equal.

    Raises:
        UnmappedId: an id outside the map and no overflow id; of several, that of the first path.
        UnsafeEntry: a malformed ACL or capability.
    """
    columns, sets, failures = [], [], list[tuple[int, str, int]]()
    for kind, ids in (("uid", owned.uid), ("gid", owned.gid)):
        mapped, inside = mapping.lookup(kind, ids)
        columns.append(mapped)
        if not inside.all():
            inode = int(inside.argmin())
            failures.append((inode, kind, int(ids[inode])))
    for row in range(len(owned.xattr_sets)):
        try:
            sets.append(_mapped_set(owned, row, mapping.host_of))
        except UnmappedId as found:
            users = owned.xattr == row
            if users.any():
                failures.append((int(users.argmax()), found.kind, found.value))
            sets.append(())
    if failures:
        inode, kind, value = min(failures, key=itemgetter(0))
        raise UnmappedId(owned.inode_path(inode), kind, value, mapping.of(kind).canonical())
    return replace(owned, uid=columns[0], gid=columns[1], xattr_sets=tuple(sets))


def _mapped_set(owned: Tree | Index, row: int, mapper: acl_caps.IdMapper) -> XattrSet:
    """Return one set of xattrs with the ids in it mapped."""
    pairs = owned.xattr_sets[row]
    if not any(name in acl_caps.ID_NAMES for name, _ in pairs):
        return pairs
    out = []
    for name, value in pairs:
        try:
            out.append((name, acl_caps.map_value(name, value, mapper)))
        except InvalidImage as error:
            path = owned.inode_path(int((owned.xattr == row).argmax()))
            raise UnsafeEntry("image", path, f"{name.decode()}: {error}; rebuild the image without it") from error
    return tuple(out)
