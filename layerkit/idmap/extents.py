"""One id map: extents from container ids to host ids, and the arithmetic on them."""

from __future__ import annotations

import pwd
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from layerkit.errors import UnmappedId, UsageError
from layerkit.limits import DEFAULT

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
