"""The maps of an image's users and groups together, and their text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layerkit.errors import UsageError
from layerkit.idmap.extents import MAX_ID, IdMap, Ids, is_number


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
