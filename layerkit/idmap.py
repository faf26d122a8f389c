"""Id maps: from the ids in an image (container ids) to those on the host. Pure arithmetic on columns.

A map is total or an error: an owner that it does not cover raises with path, id and ranges, unless the
user named an overflow id. Rules of user_namespaces(7) hold: no overlap, no id 4294967295.
"""

from __future__ import annotations

import pwd
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from layerkit.model import acl_caps
from layerkit.model.entry import XattrSet
from layerkit.model.errors import InvalidImage, UnmappedId, UnsafeEntry, UsageError
from layerkit.model.limits import DEFAULT
from layerkit.model.tree import Tree

__all__ = ["MAX_ID", "IdExtent", "IdMap", "Mapping", "Reach", "apply", "check", "reach"]


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
    uid, uid_inodes = np.unique(tree.uid, return_counts=True)
    gid, gid_inodes = np.unique(tree.gid, return_counts=True)
    seen: set[tuple[str, int]] = set()

    def note(kind: str, value: int) -> int:
        seen.add(("gid" if kind.startswith("gid") else "uid", value))
        return value

    for row, pairs in enumerate(tree.xattr_sets):
        for name, value in pairs:
            try:
                acl_caps.map_value(name, value, note)
            except InvalidImage as error:
                raise _malformed(tree, row, name, error) from error
    inside = {kind: tuple(sorted(v for k, v in seen if k == kind)) for kind in ("uid", "gid")}
    return Reach(uid, uid_inodes, gid, gid_inodes, inside["uid"], inside["gid"])


def apply(tree: Tree, mapping: Mapping) -> Tree:
    """Return ``tree`` with every owner mapped: of inodes, in ACLs and in file capabilities.

    Capabilities come out as an idmapped mount shows them (:func:`acl_caps.map_capability`). Rows of
    ``xattr_sets`` stay where they are, so a rendering of the tree can be patched by row; a squashing map
    can make two of them equal.

    Raises:
        UnmappedId: an id outside the map and no overflow id; of several, that of the first path.
        UnsafeEntry: a malformed ACL or capability.
    """
    sets = _mapped_sets(tree, mapping)
    uid, gid = (_owners(tree, mapping, kind) for kind in ("uid", "gid"))
    failures = [found for found in (uid, gid, sets) if isinstance(found, _Unmapped)]
    if failures:
        first = min(failures, key=lambda found: found.inode)
        raise UnmappedId(tree.inode_path(first.inode), first.kind, first.value, first.ranges)
    assert not isinstance(uid, _Unmapped) and not isinstance(gid, _Unmapped) and not isinstance(sets, _Unmapped)
    return tree.with_owners(uid, gid, sets)


def check(tree: Tree, mapping: Mapping) -> None:
    """Raise what :func:`apply` would raise."""
    apply(tree, mapping)


class _Unmapped(Exception):
    """An id that the map does not cover; an exception only inside a set of xattrs."""

    def __init__(self, kind: str, value: int, ranges: str, inode: int = 0) -> None:
        self.kind, self.value, self.ranges, self.inode = kind, value, ranges, inode


def _owners(tree: Tree, mapping: Mapping, kind: str) -> Ids | _Unmapped:
    ids = tree.uid if kind == "uid" else tree.gid
    mapped, inside = mapping.lookup(kind, ids)
    if not inside.all():
        inode = int(np.argmin(inside))
        return _Unmapped(kind, int(ids[inode]), mapping.of(kind).canonical(), inode)
    return mapped


def _mapped_sets(tree: Tree, mapping: Mapping) -> tuple[XattrSet, ...] | _Unmapped:
    def one(kind: str, value: int) -> int:
        mapped, inside = mapping.lookup(kind, np.array([value], np.uint32))
        if not inside[0]:
            raise _Unmapped(kind, value, mapping.of(kind).canonical())
        return int(mapped[0])

    sets, failures = [], list[_Unmapped]()
    for row, pairs in enumerate(tree.xattr_sets):
        if not any(name in acl_caps.ID_NAMES for name, _ in pairs):
            sets.append(pairs)
            continue
        mapped_pairs = []
        for name, value in pairs:
            try:
                mapped_pairs.append((name, acl_caps.map_value(name, value, one)))
            except InvalidImage as error:
                raise _malformed(tree, row, name, error) from error
            except _Unmapped as found:
                users = tree.xattr == row
                if users.any():
                    found.inode = int(np.argmax(users))
                    failures.append(found)
                break
        sets.append(tuple(mapped_pairs))
    return min(failures, key=lambda found: found.inode) if failures else tuple(sets)


def _malformed(tree: Tree, row: int, name: bytes, error: InvalidImage) -> UnsafeEntry:
    path = tree.inode_path(int(np.argmax(tree.xattr == row)))
    return UnsafeEntry("image", path, f"{name.decode()}: {error}; rebuild the image without it")


# ---- from layerkit/idmap/extents.py
MAX_ID = 0xFFFF_FFFE
"""The highest id: 4294967295 is -1, which the kernel takes for "no id"."""

IdExtent = tuple[int, int, int]
"""(first container id, first host id, number of ids)."""

Ids = NDArray[np.uint32]

_SUBID_FILES = {"uid": Path("/etc/subuid"), "gid": Path("/etc/subgid")}
_MAX_DIGITS = 10


@dataclass(frozen=True, slots=True)
class IdMap:
    """A map of ids in its canonical form; make one with :meth:`of` or :meth:`parse`.

    Laws (``f``, ``g`` maps, ``x`` ids they cover): ``f.inverse().apply(f.apply(x)) == x``;
    ``f.compose(g).apply(x) == g.apply(f.apply(x))``; equal functions have equal extents and text.

    Attributes:
        extents: rising by container id, none overlapping there, neighbours merged where they continue
            each other. Host ids overlap in a squashing map only. Empty only for some compositions.
    """

    extents: tuple[IdExtent, ...]

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
            if len(fields) % 3 or not all(is_number(field) for field in fields):
                raise UsageError(
                    f"{what} {piece!r}: want CONTAINER:HOST:SIZE in plain digits, for example 0:100000:65536"
                )
            numbers = iter(map(int, fields))
            extents += zip(numbers, numbers, numbers, strict=True)
        if not extents:
            raise UsageError(f"{what}: no extent is given, for example 0:100000:65536")
        return cls.of(extents, what=what, squash=squash)

    @classmethod
    def from_subid(cls, name: str, kind: str = "uid", path: Path | None = None) -> IdMap:
        """Return the map that gives container ids 0, 1, … to the subordinate ids of a user.

        The ranges follow one another in the order of the file, as ``podman run --subuidname`` has them.

        Args:
            name: user name, or a user id in digits; the file may name the user either way.
            kind: ``uid`` or ``gid``.
            path: the file, where it is not ``/etc/subuid`` or ``/etc/subgid`` (subuid(5)).

        Raises:
            UsageError: the file cannot be read, has no range for the user, or a malformed one.
        """
        source = path if path is not None else _SUBID_FILES[kind]
        try:
            lines = source.read_text("utf-8", "surrogateescape").splitlines()
        except OSError as error:
            raise UsageError(f"{source}: {error.strerror}; give the map with --{kind}-map instead") from error
        owners = _names_of(name)
        extents: list[IdExtent] = []
        container = 0
        for number, line in enumerate(lines, 1):
            fields = line.strip().split(":")
            if line.startswith("#") or fields[0] not in owners:
                continue
            if len(fields) != 3 or not all(is_number(field) for field in fields[1:]):
                raise UsageError(f"{source}, line {number}: want NAME:FIRST:SIZE, found {line!r}")
            first, size = int(fields[1]), int(fields[2])
            if size:
                extents.append((container, first, size))
                container += size
        if not extents:
            raise UsageError(f"{source}: no range for {name!r}; `usermod --add-sub{kind}s FIRST-LAST` adds one")
        return cls.of(extents, what=str(source))

    @classmethod
    def identity(cls) -> IdMap:
        """Return the map that keeps every id."""
        return cls(((0, 0, MAX_ID + 1),))

    def canonical(self) -> str:
        """Return the extents as ``C:H:N,C:H:N``: the same text for the same function."""
        return _text(self.extents)

    __str__ = canonical

    @property
    def is_injective(self) -> bool:
        """Return whether no two ids become one."""
        return _host_overlap(self.extents) is None

    @property
    def kernel_extents(self) -> tuple[IdExtent, ...]:
        """Return the extents as lines of ``/proc/PID/uid_map`` (namespace id, parent's id, length)."""
        return self.extents

    @property
    def fits_kernel(self) -> bool:
        """Return whether the kernel takes this map for a user namespace or an idmapped mount."""
        return 0 < len(self.extents) <= DEFAULT.id_map_extents and self.is_injective

    def lookup(self, ids: Ids) -> tuple[Ids, NDArray[np.bool_]]:
        """Return for each id its host id and whether the map covers it; where not, the host id is 0.

        Args:
            ids: uint32 of any shape, container ids.
        """
        ids = np.asarray(ids, np.uint32)
        if not self.extents:
            return np.zeros_like(ids), np.zeros(ids.shape, np.bool_)
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
        mapped[~inside] = 0
        return mapped, inside

    def apply(self, ids: Ids, overflow: int | None = None) -> Ids:
        """Return the host ids of ``ids``; those outside the map become ``overflow`` if one is given.

        Raises:
            UnmappedId: an id outside the map; it names no path, as there is none here.
        """
        ids = np.asarray(ids, np.uint32)
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


def is_number(text: str) -> bool:
    """Return whether ``text`` is a number in plain ASCII digits, of a length that an id can have."""
    return text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS


def _names_of(user: str) -> set[str]:
    """Return the name and the uid of ``user``, as far as the host knows them."""
    names = {user} - {""}
    try:
        entry = pwd.getpwuid(int(user)) if is_number(user) else pwd.getpwnam(user)
    except (KeyError, OverflowError):
        return names
    return names | {entry.pw_name, str(entry.pw_uid)}


# ---- from layerkit/idmap/mapping.py
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
        if self.overflow is not None and not 0 <= self.overflow <= MAX_ID:
            raise UsageError(f"--overflow-id {self.overflow}: want an id from 0 to {MAX_ID}")

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
        overflow = fields.get("overflow")
        if fields.keys() | {"overflow"} != {"uid", "gid", "overflow"} or (overflow and not is_number(overflow)):
            raise UsageError(f"map {text!r}: want uid=C:H:N;gid=C:H:N, and perhaps ;overflow=ID")
        uid, gid = (IdMap.parse([fields[k]], what=f"map {text!r}, {k}", squash=True) for k in ("uid", "gid"))
        mapping = cls(uid, gid, int(overflow) if overflow else None)
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
