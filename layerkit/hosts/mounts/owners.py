"""Owners in a META to owners in a mount, with the standard library alone: a container waits for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from layerkit.model.errors import UnmappedId, UsageError

MAX_ID = (1 << 32) - 2
OVERFLOW_ID = 65534
Extent = tuple[int, int, int]
"""(container id, id in the mount program's user namespace, count)."""


@dataclass(frozen=True, slots=True)
class IdMaps:
    """How owners in the layers become owners in the mount.

    Attributes:
        uid, gid: extents; none keeps every id.
        squash_uid, squash_gid: the one id that everything belongs to instead.
        overflow: id for owners outside the extents; None makes them an error.
    """

    uid: tuple[Extent, ...] = ()
    gid: tuple[Extent, ...] = ()
    squash_uid: int | None = None
    squash_gid: int | None = None
    overflow: int | None = None

    @property
    def canonical(self) -> str:
        """Return a text that is equal for equal maps, "" where every id is kept."""
        parts = []
        for kind, extents, squash in (("uid", self.uid, self.squash_uid), ("gid", self.gid, self.squash_gid)):
            if squash is not None:
                parts.append(f"{kind}=all:{squash}")
            elif extents and not _is_identity(extents):
                parts.append(f"{kind}=" + ",".join(f"{c}:{h}:{n}" for c, h, n in sorted(extents)))
        return ";".join(parts)

    @classmethod
    def parse(cls, text: str) -> IdMaps:
        """Return the maps that :attr:`canonical` wrote as ``text``.

        Raises:
            UsageError: it did not.
        """
        found: dict[str, tuple[tuple[Extent, ...], int | None]] = {}
        for part in text.split(";") if text else ():
            kind, _, value = part.partition("=")
            if value.startswith("all:"):
                found[kind] = ((), one_id(value[4:], part))
            else:
                found[kind] = (extents(value.replace(",", ":"), part), None)
        (uid, squash_uid), (gid, squash_gid) = (found.get(kind, ((), None)) for kind in ("uid", "gid"))
        return cls(uid, gid, squash_uid, squash_gid)

    def inverse(self) -> IdMaps:
        """Return the maps from the owners in a mount back to those in the layers.

        What no map gives out becomes 65534, the kernel's overflow id, but for 0: what podman itself makes in a
        container's folder is root's.
        """
        uid, gid = (
            (*((host, container, count) for container, host, count in side), *_roots(side))
            for side in (self.uid, self.gid)
        )
        squash_uid, squash_gid = (None if squash is None else 0 for squash in (self.squash_uid, self.squash_gid))
        return IdMaps(uid, gid, squash_uid, squash_gid, OVERFLOW_ID)

    def table(self, ids: Iterable[int], kind: str) -> dict[int, int]:
        """Return the id to show for each of ``ids`` (``kind`` is ``uid`` or ``gid``).

        Raises:
            UnmappedId: one lies outside, and no overflow id was given; its path is left empty.
        """
        map_extents, squash = (self.uid, self.squash_uid) if kind == "uid" else (self.gid, self.squash_gid)
        return {number: self._one(number, map_extents, squash, kind) for number in ids}

    def one(self, kind: str, number: int) -> int:
        """Return the id for one inside an xattr; ``kind`` begins with ``uid``, ``gid`` or ``rootid``."""
        if kind.startswith("gid"):
            return self._one(number, self.gid, self.squash_gid, kind)
        return self._one(number, self.uid, self.squash_uid, kind)

    def _one(self, number: int, map_extents: tuple[Extent, ...], squash: int | None, kind: str) -> int:
        if squash is not None:
            return squash
        if not map_extents:
            return number
        for container, host, count in map_extents:
            if container <= number < container + count:
                return host + number - container
        if self.overflow is None:
            shown = ", ".join(f"{c}:{h}:{n}" for c, h, n in map_extents)
            raise UnmappedId(b"", kind, number, shown)
        return self.overflow


def extents(text: str, what: str) -> tuple[Extent, ...]:
    """Return the extents of ``C:H:N:C:H:N…``; colons at the ends do no harm.

    Raises:
        UsageError: not threes of numbers, beyond the last id, or overlapping on either side.
    """
    words = [word for word in text.split(":") if word]
    if len(words) % 3:
        raise UsageError(f"{what}={text}: want threes of container id, id, count")
    numbers = [one_id(word, what) for word in words]
    found = tuple(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
    for side in (0, 1):
        runs = sorted((extent[side], extent[side] + extent[2]) for extent in found)
        if any(count <= 0 for *_, count in found) or any(end > MAX_ID + 1 for _, end in runs):
            raise UsageError(f"{what}={text}: a count of 0, or ids above {MAX_ID}")
        if any(end > start for (_, end), (start, _) in pairwise(runs)):
            raise UsageError(f"{what}={text}: ranges overlap")
    return found


def _roots(side: tuple[Extent, ...]) -> tuple[Extent, ...]:
    """Return the extent that keeps 0, unless ``side`` gives 0 out."""
    return () if not side or any(host == 0 for _, host, _ in side) else ((0, 0, 1),)


def _is_identity(map_extents: tuple[Extent, ...]) -> bool:
    # What lies outside is an error even then, but nothing has to be shifted for it.
    return all(container == host for container, host, _ in map_extents)


def one_id(text: str, what: str) -> int:
    """Return the id that ``text`` spells.

    Raises:
        UsageError: it is none.
    """
    if not (text.isascii() and text.isdigit()) or int(text) > MAX_ID + 1:
        raise UsageError(f"{what}: {text!r} is no id")
    return int(text)
