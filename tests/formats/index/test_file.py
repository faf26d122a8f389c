"""The index as a file: it comes back as it was, and damage anywhere is found."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isal import isal_zlib

from layerkit.formats.index import file as index_file
from layerkit.model.digest import Digest
from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import InvalidImage
from layerkit.model.index import Index, empty

DIFF_ID = Digest.of(b"a layer")


def sample() -> Index:
    entries = [
        Entry(b"", Kind.DIR, 0o755),
        Entry(b"a", Kind.REG, 0o4711, 1, 0xFFFFFFFE, -5, 999_999_999, 5, offset=512, sha256=b"\7" * 32),
        Entry(b"b", Kind.SYMLINK, link=b"\xff\n/target"),
        Entry(b"c", Kind.HARDLINK, link=b"a"),
        Entry(b"d", Kind.CHAR, major=1, minor=3, xattrs=((b"user.empty", b""), (b"user.x", b"\0=\n"))),
        Entry(b"e", Kind.WHITEOUT, 0),
        Entry(b"f", Kind.OPAQUE, 0),
        Entry(b"s", Kind.REG, size=9999, offset=2048, sha256=b"\1" * 32, sparse=((10, 20), (100, 1))),
        Entry(b"t", Kind.REG, size=50, sha256=b"\2" * 32, sparse=()),
        Entry(b"\xff\xfe", Kind.FIFO),
    ]
    index = Index.of(entries, DIFF_ID, 10240)
    object.__setattr__(index, "warnings", ("one", "zwei ü"))
    return index


def encoded(index: Index) -> bytes:
    return b"".join(index_file.encode(index))


def assert_equal(a: Index, b: Index) -> None:
    assert (a.diff_id, a.tar_size, a.warnings) == (b.diff_id, b.tar_size, b.warnings)
    assert list(a.entries()) == list(b.entries())
    for name in Index.__dataclass_fields__:
        if isinstance(getattr(a, name), np.ndarray):
            assert getattr(a, name).dtype == getattr(b, name).dtype, name


@pytest.mark.parametrize("index", [sample(), empty(DIFF_ID), empty(Digest.parse("sha512:" + "ab" * 64))])
def test_round_trip(index: Index) -> None:
    blob = encoded(index)
    assert_equal(index_file.decode(blob, "x"), index)
    assert encoded(index_file.decode(blob, "x")) == blob


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.binary(min_size=1, max_size=20).filter(lambda path: b"\0" not in path),
            st.sampled_from([Kind.DIR, Kind.FIFO]),
            st.integers(0, 0o7777),
            st.integers(0, 0xFFFFFFFE),
            st.integers(0, 0xFFFFFFFE),
            st.integers(-(1 << 60), 1 << 60),
            st.lists(st.tuples(st.binary(max_size=5), st.binary(max_size=9)), max_size=3),
        ).map(lambda row: Entry(*row[:6])._replace(xattrs=tuple(row[6]))),
        max_size=20,
    )
)
def test_round_trip_of_anything(entries: list[Entry]) -> None:
    index = Index.of(entries, DIFF_ID)
    assert_equal(index_file.decode(encoded(index), "x"), index)


def test_it_is_read_where_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "index"
    path.write_bytes(encoded(sample()))
    with path.open("rb") as f:
        buffer = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    index = index_file.decode(buffer, str(path))
    assert_equal(index, sample())
    assert not index.uid.flags.owndata and not index.uid.flags.writeable
    del index


def test_every_bit_counts() -> None:
    blob = encoded(sample())
    for at in range(len(blob)):
        damaged = bytearray(blob)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(InvalidImage, match="place"):
            index_file.decode(damaged, "in this place")


def test_every_length_counts() -> None:
    blob = encoded(sample())
    for end in [*range(0, len(blob), 37), len(blob) - 1]:
        with pytest.raises(InvalidImage):
            index_file.decode(blob[:end], "x")
    with pytest.raises(InvalidImage):
        index_file.decode(blob + b"\0", "x")


def test_another_version_says_so() -> None:
    blob = bytearray(encoded(sample()))
    blob[8:12] = struct.pack("<I", 99)
    with pytest.raises(InvalidImage, match="version 99"):
        index_file.decode(blob, "x")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("kind", 3), ("kind", 200), ("perm", 0o10000), ("link", 2), ("link", -2), ("xattr", 2), ("xattr", -1),
        ("sparse", 2),
        ("offset", 10241), ("offset", -2), ("size", -1), ("mtime_ns", 1_000_000_000),
    ],
)  # fmt: skip
def test_values_out_of_bounds_are_refused_even_under_a_right_checksum(column: str, value: int) -> None:
    index = sample()
    data = getattr(index, column).copy()
    data[1] = value
    object.__setattr__(index, column, data)
    with pytest.raises(InvalidImage, match="kind" if column == "kind" else column):
        index_file.decode(encoded(index), "x")


@pytest.mark.parametrize("part", [*index_file._PARTS])
def test_parts_of_the_wrong_length_are_refused_even_under_right_checksums(part: str) -> None:
    blob = bytearray(encoded(sample()))
    head, size = index_file._HEAD.size, index_file._PART.size
    at = head + index_file._PARTS.index(part) * size
    start, length, _crc = index_file._PART.unpack_from(blob, at)
    if not length:
        pytest.skip("an empty part")
    shorter = length - 1
    blob[start + shorter] = 0
    blob[at : at + size] = index_file._PART.pack(start, shorter, isal_zlib.crc32(blob[start : start + shorter]))
    end = head + len(index_file._PARTS) * size
    blob[end : end + 4] = struct.pack("<I", isal_zlib.crc32(blob[:end]))
    with pytest.raises(InvalidImage):
        index_file.decode(blob, "x")
