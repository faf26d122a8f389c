"""The index of a layer as a file: raw little-endian columns, each with its checksum, ready for mmap.

Layout: a fixed head, a table of the parts (offset, length, CRC-32), then the parts, each at a multiple of
64 bytes. Columns are read where they lie. The checksums guard against damage, not against an attacker:
who can write into the store can write anything there.
"""

from __future__ import annotations

import itertools
import mmap
import struct
from typing import Any

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from layerkit.model.digest import Digest
from layerkit.model.entry import Kind, XattrSet
from layerkit.model.errors import InvalidImage
from layerkit.model.index import COLUMNS, Index
from layerkit.model.sparse import SparseMaps
from layerkit.model.strings import Strings

MAGIC = b"lk.index"
VERSION = 1

_ALIGN = 64
# magic, version, parts, rows, bytes of the tar, bytes of the file; then the CRC of it and the table.
_HEAD = struct.Struct("<8sIIQQQ")
_PART = struct.Struct("<QQI4x")
_CRC = struct.Struct("<I4x")
_STRINGS = ("diff_id", "path", "links", "xattrs", "warnings")
_SPARSE = {"starts": "<i8", "offset": "<i8", "length": "<i8"}
# The order of the parts in the file.
_PARTS = (
    *COLUMNS,
    *(f"{name}.{half}" for name in _STRINGS for half in ("offsets", "blob")),
    "xattr_sets",
    *(f"sparse_maps.{name}" for name in _SPARSE),
)
_TABLE_BYTES = len(_PARTS) * _PART.size


def encode(index: Index) -> list[bytes | memoryview]:
    """Return ``index`` as the buffers of its file, in order; equal indexes give equal bytes."""
    pairs = [text for xattrs in index.xattr_sets for pair in xattrs for text in pair]
    strings = {
        "diff_id": Strings.of([str(index.diff_id).encode()]),
        "path": index.path,
        "links": index.links,
        "xattrs": Strings.of(pairs),
        "warnings": Strings.of([text.encode() for text in index.warnings]),
    }
    parts: dict[str, bytes | memoryview] = {
        name: _raw(getattr(index, name), dtype) for name, dtype in COLUMNS.items()
    }
    for name, column in strings.items():
        parts[f"{name}.offsets"] = _raw(column.offsets, "<i8")
        parts[f"{name}.blob"] = column.blob
    # Where each set's pairs begin among the texts; its texts are names and values by turns.
    starts = np.cumsum([0] + [2 * len(xattrs) for xattrs in index.xattr_sets])
    parts["xattr_sets"] = _raw(starts, "<i8")
    for name, dtype in _SPARSE.items():
        parts[f"sparse_maps.{name}"] = _raw(getattr(index.sparse_maps, name), dtype)
    table, body = [], list[bytes | memoryview]()
    at = _aligned(_HEAD.size + _TABLE_BYTES + _CRC.size)
    for name in _PARTS:
        part = parts[name]
        size = len(part)
        table.append(_PART.pack(at, size, isal_zlib.crc32(part)))
        body += [part, bytes(_aligned(size) - size)]
        at += _aligned(size)
    head = _HEAD.pack(MAGIC, VERSION, len(_PARTS), len(index), index.tar_size, at) + b"".join(table)
    head += _CRC.pack(isal_zlib.crc32(head))
    head += bytes(_aligned(len(head)) - len(head))
    return [head, *(part for part in body if len(part))]


def decode(buffer: bytes | bytearray | memoryview | mmap.mmap, where: str) -> Index:
    """Return the index that ``buffer`` (a file's bytes, or its mmap) holds; ``where`` names the file.

    The columns are views of ``buffer``, which must stay as it is while the index is in use.

    Raises:
        InvalidImage: no index, one of another version, or one that is damaged.
    """
    view = memoryview(buffer).cast("B")
    parts, rows, tar_size = _parts(view, where)
    columns: dict[str, NDArray[Any]] = {name: np.frombuffer(parts[name], dtype) for name, dtype in COLUMNS.items()}
    columns["sha256"] = columns["sha256"].reshape(-1, 32)
    strings = {name: _strings(parts, name, where) for name in _STRINGS}
    maps = SparseMaps(*(np.frombuffer(parts[f"sparse_maps.{name}"], dtype) for name, dtype in _SPARSE.items()))
    _check_maps(maps, where)
    sets = _xattr_sets(np.frombuffer(parts["xattr_sets"], "<i8"), strings["xattrs"].tolist(), where)
    limits = {
        "link": (-1, len(strings["links"])), "xattr": (0, len(sets)), "sparse": (-1, len(maps)),
        "offset": (-1, tar_size + 1), "size": (0, 1 << 62), "mtime_ns": (0, 1_000_000_000), "perm": (0, 0o10000),
    }  # fmt: skip
    _check(len(strings["path"]) == rows and len(strings["diff_id"]) == 1, "the number of names", where)
    for name, column in columns.items():
        _check(len(column) == rows, f"the length of column {name}", where)
        if name in limits and rows:
            low, high = limits[name]
            _check(low <= int(column.min()) and int(column.max()) < high, f"a value in column {name}", where)
    _check(np.isin(columns["kind"], list(Kind)).all(), "a kind of entry", where)
    try:
        diff_id = Digest.parse(strings["diff_id"][0].decode("ascii", "replace"))
        warnings = tuple(text.decode() for text in strings["warnings"])
    except (InvalidImage, UnicodeDecodeError) as e:
        raise _damaged("its texts", where) from e
    return Index(
        diff_id=diff_id,
        tar_size=tar_size,
        path=strings["path"],
        links=strings["links"],
        xattr_sets=sets,
        sparse_maps=maps,
        warnings=warnings,
        **columns,
    )


def _parts(view: memoryview, where: str) -> tuple[dict[str, memoryview], int, int]:
    """Return the verified parts by name, the number of rows and the tar's size."""
    end = _HEAD.size + _TABLE_BYTES
    if len(view) < _HEAD.size or view[: len(MAGIC)] != MAGIC:
        raise InvalidImage(f"{where}: not an index of layerkit; remove it, and the layer is read again")
    _magic, version, count, rows, tar_size, size = _HEAD.unpack_from(view)
    if version != VERSION:
        raise InvalidImage(
            f"{where}: an index of version {version}, this layerkit reads {VERSION}; "
            "remove it, and the layer is read again"
        )
    _check(count == len(_PARTS) and size == len(view) and len(view) >= end + _CRC.size, "its length", where)
    _check(_CRC.unpack_from(view, end)[0] == isal_zlib.crc32(view[:end]), "its head", where)
    _check(not any(view[end + 4 : _aligned(end + _CRC.size)]), "its head's padding", where)
    _check(tar_size < 1 << 62, "the tar's size", where)
    parts = {}
    expected = _aligned(end + _CRC.size)
    for name, (at, length, crc) in zip(_PARTS, _PART.iter_unpack(view[_HEAD.size : end]), strict=True):
        _check(at == expected and length <= len(view) - at, f"the place of {name}", where)
        part = view[at : at + length]
        _check(isal_zlib.crc32(part) == crc, f"the checksum of {name}", where)
        expected = at + _aligned(length)
        _check(not any(view[at + length : expected]), f"the padding after {name}", where)
        dtype = COLUMNS.get(name) or ("<i8" if not name.endswith(".blob") else "u1")
        _check(length % (32 if name == "sha256" else np.dtype(dtype).itemsize) == 0, f"the length of {name}", where)
        parts[name] = part
    _check(expected == len(view), "its end", where)
    return parts, rows, tar_size


def _strings(parts: dict[str, memoryview], name: str, where: str) -> Strings:
    blob = parts[f"{name}.blob"].tobytes()
    offsets = np.frombuffer(parts[f"{name}.offsets"], "<i8")
    _check(_rises(offsets, len(blob)), f"the offsets of {name}", where)
    return Strings(blob, offsets)


def _xattr_sets(starts: NDArray[np.int64], texts: list[bytes], where: str) -> tuple[XattrSet, ...]:
    # The first set is the empty one, and every set has whole pairs.
    sound = _rises(starts, len(texts)) and len(starts) > 1 and starts[1] == 0 and not (starts % 2).any()
    _check(sound, "the xattr sets", where)
    bounds = starts.tolist()
    return tuple(tuple(zip(texts[a:b:2], texts[a + 1 : b : 2], strict=True)) for a, b in itertools.pairwise(bounds))


def _check_maps(maps: SparseMaps, where: str) -> None:
    sound = _rises(maps.starts, len(maps.offset)) and len(maps.length) == len(maps.offset)
    _check(sound and not ((maps.offset < 0) | (maps.length <= 0)).any(), "the sparse maps", where)


def _rises(bounds: NDArray[np.int64], end: int) -> bool:
    """Return whether ``bounds`` go from 0 to ``end`` and never fall."""
    return len(bounds) > 0 and bounds[0] == 0 and bounds[-1] == end and not (np.diff(bounds) < 0).any()


def _raw(column: NDArray[Any], dtype: str) -> memoryview:
    flat = np.ascontiguousarray(column, dtype).reshape(-1)
    return flat.view(np.uint8).data


def _aligned(size: int) -> int:
    return (size + _ALIGN - 1) // _ALIGN * _ALIGN


def _check(sound: bool | np.bool_, what: str, where: str) -> None:
    if not sound:
        raise _damaged(what, where)


def _damaged(what: str, where: str) -> InvalidImage:
    return InvalidImage(f"{where}: the index is damaged ({what}); remove it, and the layer is read again")
