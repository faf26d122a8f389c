"""The index of a layer: a table of its entries, read once, kept by diff_id."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from layerkit.model import sparse as sparse_maps
from layerkit.model.digest import Digest
from layerkit.model.entry import Entry, Kind, XattrSet
from layerkit.model.sparse import SparseMaps
from layerkit.model.strings import Strings

COLUMNS = {
    "kind": "u1", "perm": "<u2", "uid": "<u4", "gid": "<u4", "mtime": "<i8", "mtime_ns": "<u4", "size": "<i8",
    "major": "<u4", "minor": "<u4", "link": "<i4", "xattr": "<i4", "offset": "<i8", "sha256": "u1",
    "sparse": "<i4",
}  # fmt: skip
"""The columns with a value for each row, and their dtypes; in the order in which the index's file has them."""

_PLAIN = ("perm", "uid", "gid", "mtime", "mtime_ns", "size", "major", "minor", "offset")
"""Those that say the same in an :class:`Entry`."""


def path_key(path: bytes) -> bytes:
    """Return the sort key of the canonical order: parents before children, siblings by their bytes.

    A plain sort puts ``a-b`` between ``a`` and ``a/c``; with ``/`` as the lowest byte it does not, and
    every directory is followed by all that lies below it. Names cannot hold a NUL, so keys stay unique.
    """
    return path.replace(b"/", b"\0")


@dataclass(frozen=True, slots=True, eq=False)
class Index:
    """The entries of one layer as columns of ``n`` rows in canonical order.

    Rows are sorted by (``path_key(path)``, whiteouts and opaques before the entry of the same path).
    A path occurs at most once as an entry, once as a WHITEOUT and once as an OPAQUE: of duplicates in
    the tar the last has won. Nothing is said about parents: they may be missing. Ids are container ids.
    See :class:`~layerkit.model.entry.Entry` for the meaning of each column.

    Attributes:
        diff_id: digest of the uncompressed tar.
        tar_size: its length in bytes.
        path: n strings.
        kind: uint8, values of :class:`Kind`.
        perm: uint16.
        uid, gid: uint32, container ids.
        mtime: int64, seconds. mtime_ns: uint32.
        size: int64, bytes.
        major, minor: uint32.
        link: int32, row of ``links``, -1 where there is none.
        links: link targets.
        xattr: int32, row of ``xattr_sets``; 0 is the empty set.
        xattr_sets: distinct sets, the first is ``()``.
        offset: int64, place of the stored bytes in the tar; -1 where there are none.
        sha256: uint8, shape (n, 32), zeros for all but regular files.
        sparse: int32, row of ``sparse_maps``, -1 for a file without holes.
        sparse_maps: the maps.
        warnings: what was odd but harmless, as text with the path.
    """

    diff_id: Digest
    tar_size: int
    path: Strings
    kind: NDArray[np.uint8]
    perm: NDArray[np.uint16]
    uid: NDArray[np.uint32]
    gid: NDArray[np.uint32]
    mtime: NDArray[np.int64]
    mtime_ns: NDArray[np.uint32]
    size: NDArray[np.int64]
    major: NDArray[np.uint32]
    minor: NDArray[np.uint32]
    link: NDArray[np.int32]
    links: Strings
    xattr: NDArray[np.int32]
    xattr_sets: tuple[XattrSet, ...]
    offset: NDArray[np.int64]
    sha256: NDArray[np.uint8]
    sparse: NDArray[np.int32]
    sparse_maps: SparseMaps
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.path)

    @classmethod
    def of(cls, entries: Iterable[Entry], diff_id: Digest, tar_size: int = 0) -> Index:
        """Return the index of ``entries`` given in tar order: of equal paths the last wins."""
        last: dict[tuple[bytes, int], Entry] = {}
        for e in entries:
            last[path_key(e.path), -e.kind if e.kind >= Kind.WHITEOUT else 0] = e
        rows = [last[key] for key in sorted(last)]
        sets: dict[XattrSet, int] = {(): 0}
        links: dict[bytes, int] = {}
        maps = [e.sparse for e in rows if e.sparse is not None]
        map_rows = iter(range(len(maps)))
        has_link = (Kind.SYMLINK, Kind.HARDLINK)
        return cls(
            diff_id=diff_id,
            tar_size=tar_size,
            path=Strings.of([e.path for e in rows]),
            kind=np.array([e.kind for e in rows], np.uint8),
            link=np.array(
                [links.setdefault(e.link, len(links)) if e.kind in has_link else -1 for e in rows], np.int32
            ),
            links=Strings.of(links),
            xattr=np.array([sets.setdefault(e.xattrs, len(sets)) for e in rows], np.int32),
            xattr_sets=tuple(sets),
            sha256=np.frombuffer(b"".join(e.sha256 or bytes(32) for e in rows), np.uint8).reshape(-1, 32),
            sparse=np.array([-1 if e.sparse is None else next(map_rows) for e in rows], np.int32),
            sparse_maps=SparseMaps.of(maps) if maps else sparse_maps.NONE,
            warnings=(),
            **{name: np.array([getattr(e, name) for e in rows], COLUMNS[name]) for name in _PLAIN},
        )

    def take(self, rows: NDArray[np.integer]) -> Index:
        """Return the index of ``rows`` (rising) alone."""
        return replace(self, path=self.path.take(rows), **{name: getattr(self, name)[rows] for name in COLUMNS})

    def entry(self, row: int) -> Entry:
        """Return row ``row`` as a Python value."""
        kind = Kind(int(self.kind[row]))
        link, hole_map = int(self.link[row]), int(self.sparse[row])
        return Entry(
            path=self.path[row],
            kind=kind,
            link=b"" if link < 0 else self.links[link],
            xattrs=self.xattr_sets[int(self.xattr[row])],
            sha256=self.sha256[row].tobytes() if kind is Kind.REG else b"",
            sparse=None if hole_map < 0 else self.sparse_maps.extents(hole_map),
            **{name: int(getattr(self, name)[row]) for name in _PLAIN},
        )

    def entries(self) -> Iterator[Entry]:
        """Yield every row as a Python value."""
        return map(self.entry, range(len(self)))

    def inode_path(self, row: int) -> bytes:
        """Return the path of ``row``."""
        return self.path[row]


def empty(diff_id: Digest) -> Index:
    """Return the index of a layer without entries."""
    return Index.of((), diff_id)
