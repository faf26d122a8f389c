"""Tar members to columns, thousands at a time, and the columns of a layer to its index."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerkit.formats.tar import header as tar_header
from layerkit.formats.tar import names as tar_names
from layerkit.formats.tar import order as tar_order
from layerkit.formats.tar import pax as tar_pax
from layerkit.formats.tar.acl import ACL_XATTRS
from layerkit.formats.tar.pax import Records
from layerkit.idmap import MAX_ID
from layerkit.model import sparse as sparse_maps
from layerkit.model.digest import Digest
from layerkit.model.entry import WHITEOUT_PREFIX, Extent, Kind, XattrSet
from layerkit.model.errors import UnsafeEntry, show_path
from layerkit.model.index import COLUMNS, Index
from layerkit.model.limits import Limits
from layerkit.model.sparse import SparseMaps
from layerkit.model.strings import Strings

_BATCH_ROWS = 2048
_PART_ROWS = 1 << 18
_OVERRIDE_BYTES = 32 << 20  # of PAX data held until the next batch is decoded
_MAX_MAJOR, _MAX_MINOR = (1 << 12) - 1, (1 << 20) - 1  # the kernel's dev_t
_XATTR_KEYS = (tar_pax.XATTR, tar_pax.LIBARCHIVE_XATTR, *ACL_XATTRS)
_MAX_SECONDS = 1 << 62
_DIR, _REG, _SYMLINK, _HARDLINK = map(int, (Kind.DIR, Kind.REG, Kind.SYMLINK, Kind.HARDLINK))
_DECODED = {name: dtype for name, dtype in COLUMNS.items() if name != "sha256"}

_Blocks = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Headers (k, 512), and where in the tar they are."""


class Table:
    """The members of one layer so far.

    Attributes:
        rows: members added.
        digests: the walker appends the sha256 of each member whose type is a regular file's, in order.
        overrides: PAX records by row, for rows not decoded yet.
        placed: (offset, logical size, runs) by row, where the header alone does not say it.
    """

    def __init__(self, layer: str, limits: Limits) -> None:
        """``layer`` names the layer in errors."""
        self.rows = 0
        self.digests: list[bytes] = []
        self.overrides: dict[int, Records] = {}
        self.placed: dict[int, tuple[int, int, tuple[Extent, ...] | None]] = {}
        self._layer, self._limits = layer, limits
        self._override_bytes = 0
        self._bodies: list[bytes] = []
        self._body_rows: list[int] = []
        self._members: list[_Blocks] = []
        self._extensions: list[_Blocks] = []
        self._pending = self._decoded = 0
        self._columns = {name: _Column(dtype) for name, dtype in _DECODED.items()}
        self._hashed, self._kept = _Column("?"), _Column("?")
        self._keys: list[bytes] = []
        self._sha = bytearray()
        self._links: dict[bytes, int] = {}
        self._xattr_sets: dict[XattrSet, int] = {(): 0}
        self._maps: list[tuple[Extent, ...]] = []
        self._metadata_bytes = 0
        self._warnings: list[str] = []
        self._warning_count = 0

    def warn(self, text: str) -> None:
        """Keep ``text``, or only count it once there are many."""
        self._warning_count += 1
        if len(self._warnings) < self._limits.warnings_kept_per_layer:
            self._warnings.append(text)

    def add(self, blocks: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        """Add members: copies of their (k, 512) header ``blocks``, found at ``offsets`` in the tar."""
        self._members.append((blocks, offsets))
        self.rows += len(blocks)
        self._pending += len(blocks)
        self._limits.check("entries_per_layer", self.rows, f"{self._layer}: entries")

    def add_extensions(self, blocks: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        """Add headers that are no members, for their checksums to be verified."""
        self._extensions.append((blocks, offsets))
        self._pending += len(blocks)

    def is_crowded(self, size: int) -> bool:
        """Return whether a batch had better be decoded before ``size`` more bytes of records are held."""
        return self._override_bytes + size > _OVERRIDE_BYTES and bool(self.overrides)

    def hold(self, row: int, records: Records, size: int) -> None:
        """Keep the PAX ``records`` (``size`` bytes) of ``row`` until it is decoded."""
        self.overrides[row] = records
        self._override_bytes += size

    def hold_bodies(self, ahead: list[int], bodies: list[bytes]) -> None:
        """Keep small PAX ``bodies``, each of the member that will be ``ahead`` rows after those added so far."""
        self._bodies += bodies
        self._body_rows += [self.rows + row for row in ahead]

    def verify(self) -> None:
        """Verify the checksums of what is not decoded yet.

        Raises:
            InvalidImage: a wrong one.
        """
        for blocks, at in self._extensions + self._members:
            tar_header.verify_checksums(blocks, at, self._layer)

    def decode_if_full(self) -> None:
        """Decode what was added if it is much."""
        if self._pending >= _BATCH_ROWS or self._override_bytes > _OVERRIDE_BYTES:
            self.decode()

    def decode(self) -> None:
        """Decode what was added.

        Raises:
            InvalidImage: a header, name or record that is malformed, unsafe or beyond a limit.
        """
        layer, limits = self._layer, self._limits
        if self._extensions:
            self._verified(self._extensions)
        self._pending = self._override_bytes = 0
        self._sha += b"".join(self.digests)
        self.digests.clear()
        if not self._members:
            return
        blocks, at = self._verified(self._members)
        header = tar_header.decode(blocks, layer)
        first, n = self._decoded, len(blocks)
        self._decoded += n
        kind = tar_header.KIND_OF_FLAG[header.flag]
        hashed = kind == _REG
        columns: dict[str, NDArray[Any]] = {
            **header.numbers, "kind": kind, "perm": header.numbers["mode"] & 0o7777,
            "mtime_ns": np.zeros(n, np.uint32), "link": np.full(n, -1, np.int32), "xattr": np.zeros(n, np.int32),
            "offset": at + tar_header.BLOCK, "sparse": np.full(n, -1, np.int32),
        }  # fmt: skip
        self._apply_bodies(header, columns, first)
        self._apply_overrides(header, columns, first)
        self._apply_places(columns, first)
        columns["size"][~hashed] = 0
        columns["offset"][columns["size"] == 0] = -1
        self._legacy_folders(header, columns)
        paths = tar_names.normalise_all(header.name, layer, limits)
        self._check_numbers(columns, paths)
        kept = self._whiteouts(columns, paths)
        self._resolve_links(header, columns, paths)
        if b"" in paths and any(not p and k not in (_DIR, Kind.OPAQUE) for p, k in zip(paths, kind, strict=True)):
            raise UnsafeEntry(layer, b"", "the root is not a folder")
        self._keys += [path.replace(b"/", b"\0") for path in paths]
        self._metadata_bytes += sum(map(len, paths))
        limits.check("metadata_bytes_per_layer", self._metadata_bytes, f"{layer}: bytes of names and xattrs")
        for name in _DECODED:
            self._columns[name].append(columns[name])
        self._hashed.append(hashed)
        self._kept.append(kept)

    # --- steps of decode ---------------------------------------------------------------------------------

    def _verified(self, added: list[_Blocks]) -> _Blocks:
        """Return ``added`` as one, its checksums verified, and empty the list."""
        blocks, at = (np.concatenate(parts) for parts in zip(*added, strict=True))
        added.clear()
        tar_header.verify_checksums(blocks, at, self._layer)
        return blocks, at

    def _apply_bodies(self, header: tar_header.Headers, columns: dict[str, NDArray[Any]], first: int) -> None:
        """Take times and names of a batch of PAX headers at once, and parse those that have more in them."""
        bodies, rows = self._bodies, self._body_rows
        self._bodies, self._body_rows = [], []
        found = tar_pax.common(bodies)
        timed = [rows[i] - first for i in found.timed]
        columns["mtime"][timed], columns["mtime_ns"][timed] = found.seconds, found.nanoseconds
        for i, name in zip(found.named, found.names, strict=True):
            header.name[rows[i] - first] = name
        for i in found.others:
            self.overrides[rows[i]] = tar_pax.parse(bodies[i], self._layer, self._limits)

    def _apply_overrides(self, header: tar_header.Headers, columns: dict[str, NDArray[Any]], first: int) -> None:
        layer = self._layer
        rows, seconds, nanoseconds = list[int](), list[int](), list[int]()
        for row, records in self.overrides.items():
            i = row - first
            extended = False
            for key, value in records.items():
                if key == b"mtime":
                    if value:
                        s, ns = tar_pax.time(value, layer)
                        if abs(s) > _MAX_SECONDS:
                            raise UnsafeEntry(layer, header.name[i], f"the mtime {s} is out of range")
                        rows.append(i)
                        seconds.append(s)
                        nanoseconds.append(ns)
                elif key in (b"atime", b"ctime"):
                    pass
                elif key == b"path":
                    if value:
                        header.name[i] = value
                elif key == b"linkpath":
                    if value:
                        header.link[i] = value
                elif key in (b"uid", b"gid"):
                    if value:
                        columns[key.decode()][i] = min(tar_pax.number(value, key.decode(), layer), MAX_ID + 1)
                elif key in (b"SCHILY.devmajor", b"SCHILY.devminor"):
                    if value and columns["kind"][i] in (Kind.CHAR, Kind.BLOCK):
                        name = key[len(b"SCHILY.dev") :].decode()
                        columns[name][i] = min(tar_pax.number(value, name, layer), MAX_ID)
                elif key.startswith(_XATTR_KEYS):
                    extended = True
                elif key == b"RHT.security.selinux":
                    self.warn(f"{show_path(header.name[i])}: its SELinux label is not kept")
            if extended:
                pairs = tar_pax.xattrs(records, layer, header.name[i], self._limits)
                number = self._xattr_sets.get(pairs)
                if number is None:
                    number = self._xattr_sets[pairs] = len(self._xattr_sets)
                    self._metadata_bytes += sum(len(name) + len(value) for name, value in pairs)
                columns["xattr"][i] = number
        self.overrides.clear()
        columns["mtime"][rows], columns["mtime_ns"][rows] = seconds, nanoseconds

    def _apply_places(self, columns: dict[str, NDArray[Any]], first: int) -> None:
        for row, (offset, size, runs) in self.placed.items():
            i = row - first
            columns["size"][i] = size
            columns["offset"][i] = offset if runs is None or runs else -1
            if runs is not None:
                columns["sparse"][i] = len(self._maps)
                self._maps.append(runs)
        self.placed.clear()

    def _legacy_folders(self, header: tar_header.Headers, columns: dict[str, NDArray[Any]]) -> None:
        """Make directories of regular files with a trailing slash, as tar had them before there was type 5."""
        kind = columns["kind"]
        for i in np.flatnonzero(kind == _REG).tolist():
            if header.name[i][-1:] != b"/":
                continue
            flag = header.flag[i]
            # All tools take NUL so; for "0" GNU tar does and Go and Python do not, so only where there is
            # nothing but the old format to read it by.
            if not (flag == 0 or (flag == ord("0") and not header.ustar[i])) or columns["size"][i]:
                raise UnsafeEntry(self._layer, header.name[i], "a regular file whose name ends in a slash")
            kind[i] = _DIR

    def _check_numbers(self, columns: dict[str, NDArray[Any]], paths: list[bytes]) -> None:
        bounds = {
            "uid": MAX_ID, "gid": MAX_ID, "size": (1 << 63) - 1, "major": _MAX_MAJOR, "minor": _MAX_MINOR,
        }  # fmt: skip
        for name, high in bounds.items():
            column = columns[name]
            if int(column.min()) < 0 or int(column.max()) > high:
                i = int(np.argmax((column < 0) | (column > high)))
                raise UnsafeEntry(self._layer, paths[i], f"the {name} {int(column[i])} is out of range")
        self._limits.check("file_bytes", int(columns["size"].max()), f"{self._layer}: bytes of a file")

    def _whiteouts(self, columns: dict[str, NDArray[Any]], paths: list[bytes]) -> NDArray[np.bool_]:
        kept = np.ones(len(paths), np.bool_)
        prefix = WHITEOUT_PREFIX
        for i, path in enumerate(paths if prefix in b"\0".join(paths) else []):
            if prefix not in path:
                continue
            meaning = tar_names.whiteout(path, Kind(int(columns["kind"][i])), self._layer)
            if meaning is None:
                kept[i] = False
                self.warn(f"{show_path(path)}: left behind by AUFS, dropped")
                continue
            paths[i], kind = meaning
            if kind >= Kind.WHITEOUT:
                for name in ("perm", "uid", "gid", "mtime", "mtime_ns", "size", "xattr"):
                    columns[name][i] = 0
                for name in ("offset", "sparse"):
                    columns[name][i] = -1
                columns["kind"][i] = kind
        return kept

    def _resolve_links(
        self, header: tar_header.Headers, columns: dict[str, NDArray[Any]], paths: list[bytes]
    ) -> None:
        kind, links = columns["kind"], self._links
        for i in np.flatnonzero((kind == _SYMLINK) | (kind == _HARDLINK)).tolist():
            link = header.link[i]
            if kind[i] == _HARDLINK:
                link = tar_names.target(link, paths[i], self._layer, self._limits)
            elif not link or b"\0" in link:
                raise UnsafeEntry(self._layer, paths[i], "a symlink whose target is empty or has a NUL")
            else:
                self._limits.check("link_target_bytes", len(link), f"{self._layer}: bytes of a symlink's target")
            number = links.get(link)
            if number is None:
                number = links[link] = len(links)
                self._metadata_bytes += len(link)
            columns["link"][i] = number

    # --- the index ---------------------------------------------------------------------------------------

    def index(self, diff_id: Digest, tar_size: int) -> Index:
        """Return the index of all members: sorted, of duplicates the last.

        Raises:
            UnsafeEntry: a path that is at one time a folder and at another something else with names below.
        """
        self.decode()
        # Column by column, each part let go once it is copied; here and below that halves the peak.
        columns = {name: self._columns.pop(name).take() for name in _DECODED}
        sha256 = np.zeros((self.rows, 32), np.uint8)
        sha256[self._hashed.take()] = np.frombuffer(self._sha, np.uint8).reshape(-1, 32)
        self._sha = bytearray()
        sha256[columns["kind"] != _REG] = 0
        columns["sha256"] = sha256
        del sha256
        members = tar_order.Members(self._layer, columns, self._keys, list(self._links))
        self._keys = []
        order, path = tar_order.arrange(members, self._kept.take(), self.warn)
        return Index(
            diff_id=diff_id,
            tar_size=tar_size,
            path=path,
            links=Strings.of(members.links),
            xattr_sets=tuple(self._xattr_sets),
            sparse_maps=SparseMaps.of(self._maps) if self._maps else sparse_maps.NONE,
            warnings=tuple(self._all_warnings()),
            **{name: columns.pop(name)[order] for name in list(columns)},
        )

    def _all_warnings(self) -> Iterator[str]:
        yield from self._warnings
        if self._warning_count > len(self._warnings):
            yield f"and {self._warning_count - len(self._warnings)} more warnings"


class _Column:
    """A column that grows; in large pieces, because the memory of small ones is not given back when freed."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._parts: list[NDArray[Any]] = []
        self._free = 0  # rows of the last part that are not filled; their memory is not touched yet

    def append(self, values: NDArray[Any]) -> None:
        while len(values):
            if not self._free:
                self._parts.append(np.empty(_PART_ROWS, self._dtype))
                self._free = _PART_ROWS
            n = min(self._free, len(values))
            start = _PART_ROWS - self._free
            self._parts[-1][start : start + n] = values[:n]
            self._free -= n
            values = values[n:]

    def take(self) -> NDArray[Any]:
        """Return the column whole, and be empty."""
        parts, self._parts = self._parts, []
        if not parts:
            return np.zeros(0, self._dtype)
        parts[-1] = parts[-1][: _PART_ROWS - self._free]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
