"""Decompression: what it accepts, where it stops, and that the magic bytes decide."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import subprocess

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from in_memory import Blob
from needs import need_tool

from layerkit.formats.compression.compress import compress
from layerkit.formats.compression.decompress import Compression, Decompressor, detect
from layerkit.model.errors import InvalidImage, LimitExceeded
from layerkit.model.limits import DEFAULT, Limits

FUZZ = int(os.environ.get("LAYERKIT_TEST_FUZZ", "1"))
DATA = bytes(range(256)) * 2000 + os.urandom(300_000) + bytes(200_000)
INCOMPRESSIBLE = os.urandom(400_000)
HALVES = DATA[:333_333], DATA[333_333:]
SKIPPABLE = b"\x5a\x2a\x4d\x18" + (7).to_bytes(4, "little") + b"skipped"


def zstd(data: bytes, *, checksum: bool = True, sized: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=checksum, write_content_size=sized).compress(data)


def unpacked(blob: bytes, *, step: int = 1 << 20, limits: Limits = DEFAULT, buffer: int = 1 << 16) -> bytes:
    source = Decompressor(Blob(blob, step), limits=limits)
    view, out = memoryview(bytearray(buffer)), []
    while n := source.readinto(view):
        out.append(bytes(view[:n]))
        assert n == buffer or not source.readinto(view), "only the last buffer may be short"
        if n < buffer:
            break
    assert source.compressed_bytes == len(blob)
    assert source.tar_bytes == sum(map(len, out))
    return b"".join(out)


GOOD: dict[str, bytes] = {
    "none": DATA,
    "gzip": gzip.compress(DATA, 1),
    "gzip, two members": gzip.compress(HALVES[0], 1) + gzip.compress(HALVES[1], 9),
    "gzip, an empty member": gzip.compress(b"") + gzip.compress(DATA, 1) + gzip.compress(b""),
    "gzip, zeros after it": gzip.compress(DATA, 1) + bytes(5000),
    "zstd": zstd(DATA),
    "zstd, no checksum, no size": zstd(DATA, checksum=False, sized=False),
    "zstd, two frames": zstd(HALVES[0]) + zstd(HALVES[1], checksum=False),
    "zstd, skippable frames": SKIPPABLE + zstd(HALVES[0]) + SKIPPABLE + zstd(b"") + zstd(HALVES[1]) + SKIPPABLE,
    "zstd, incompressible": zstd(INCOMPRESSIBLE),
}


@pytest.mark.parametrize("step", [1 << 20, 1 << 12, 977])
@pytest.mark.parametrize("name", GOOD)
def test_what_is_well_formed_comes_out_as_it_was(name: str, step: int) -> None:
    assert unpacked(GOOD[name], step=step) == (INCOMPRESSIBLE if "incompressible" in name else DATA)


@pytest.mark.parametrize("name", [name for name in GOOD if "zstd" in name and "incompressible" not in name])
def test_a_zstd_frame_cut_anywhere_is_refused(name: str) -> None:
    blob = GOOD[name]
    ends = {0}
    for cut in {*range(1, 60), *range(len(blob) - 60, len(blob)), *range(60, len(blob), 40_009)}:
        source = Decompressor(Blob(blob[:cut]))
        view = memoryview(bytearray(1 << 20))
        try:
            while source.readinto(view):
                pass
        except InvalidImage:
            continue
        ends.add(cut)
    # Only the places between two frames, and those too short to be known for zstd at all.
    frames = {0, 1, 2, 3}
    at = 0
    for part in (SKIPPABLE, zstd(HALVES[0]), SKIPPABLE, zstd(b""), zstd(HALVES[1])):
        at += len(part)
        frames.add(at)
    frames.add(len(zstd(HALVES[0])))
    assert ends <= frames


@pytest.mark.parametrize("cut", [1, 3, 4, 7, 8, 9, 100, 100_000])
def test_truncated_gzip_is_refused(cut: int) -> None:
    with pytest.raises(InvalidImage, match="ends early"):
        unpacked(GOOD["gzip"][:-cut])
    with pytest.raises(InvalidImage, match="ends early"):
        unpacked(GOOD["gzip, two members"][:-cut])


@pytest.mark.parametrize("junk", [b"x", b"\x1f", b"\x1f\x8b", b"garbage" * 100, b"\0\0x", b"PK\3\4" * 9])
@pytest.mark.parametrize("form", ["gzip", "zstd"])
def test_garbage_after_the_end_is_refused(form: str, junk: bytes) -> None:
    with pytest.raises(InvalidImage):
        unpacked(GOOD[form] + junk)


@pytest.mark.parametrize("form", ["gzip", "zstd"])
def test_damage_is_found(form: str) -> None:
    blob = bytearray(GOOD[form])
    blob[len(blob) // 2] ^= 0x10
    with pytest.raises(InvalidImage):
        unpacked(bytes(blob))


@settings(max_examples=100 * FUZZ, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", SKIPPABLE[:4], b""]))
def test_rubbish_behind_a_magic_is_an_error_or_data(rest: bytes, magic: bytes) -> None:
    try:
        unpacked(magic + rest)
    except InvalidImage as e:
        assert e.exit_code == 3


@pytest.mark.parametrize("form", ["gzip", "zstd"])
def test_bombs_end_early(form: str) -> None:
    zeros = bytes(30_000_000)
    bomb = gzip.compress(zeros, 9) if form == "gzip" else zstd(zeros)
    small = Limits(bomb_floor_bytes=1 << 20, compression_ratio=200)
    with pytest.raises(LimitExceeded) as e:
        unpacked(bomb, limits=small)
    assert e.value.limit == "compression_ratio"
    with pytest.raises(LimitExceeded) as e:
        unpacked(bomb, limits=Limits(layer_tar_bytes=1 << 22))
    assert e.value.limit == "layer_tar_bytes"
    # Below the floor the ratio says nothing.
    assert len(unpacked(bomb, limits=Limits(compression_ratio=2))) == len(zeros)


def test_a_window_beyond_zstds_own_bound_is_refused() -> None:
    # Magic, a frame header without size whose window is 2 GiB, an empty last block.
    with pytest.raises(InvalidImage):
        unpacked(b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([21 << 3]) + b"\x01\0\0")


@pytest.mark.parametrize(
    ("blob", "name"),
    [(lzma.compress(b"x"), "xz"), (bz2.compress(b"x"), "bzip2"), (b"\x04\x22\x4d\x18abcdef", "lz4")],
)
def test_other_compressions_are_named(blob: bytes, name: str) -> None:
    with pytest.raises(InvalidImage, match=name):
        Decompressor(Blob(blob))


def test_names_at_the_start_of_a_tar_are_not_taken_for_magic() -> None:
    assert detect(b"BZhome/file".ljust(100, b"\0")) is Compression.NONE
    assert detect(b"") is Compression.NONE
    assert detect(b"\x50") is Compression.NONE


@pytest.mark.parametrize("form", Compression)
def test_what_we_compress_is_deterministic_and_reads_back(form: Compression) -> None:
    chunks = [memoryview(DATA)[:7], memoryview(DATA)[7:400_000], memoryview(bytearray(DATA[400_000:]))]
    blob = b"".join(compress(chunks, form))
    assert blob == b"".join(compress(chunks, form))
    assert detect(blob) is form
    assert unpacked(blob) == DATA


@pytest.mark.parametrize(("form", "tool"), [(Compression.GZIP, "gzip"), (Compression.ZSTD, "zstd")])
def test_other_tools_read_what_we_compress(form: Compression, tool: str) -> None:
    need_tool(tool)
    blob = b"".join(compress([DATA], form))
    assert subprocess.run([tool, "-dc"], input=blob, capture_output=True, check=True).stdout == DATA
