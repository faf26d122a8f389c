"""Named hostile layers: each is refused with exit code 3, by each compression, and leaves nothing running."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Callable
from functools import partial

import pytest
import zstandard
from in_memory import Blob, described
from tar_blocks import (
    END,
    GNU,
    V7,
    base256,
    folder,
    hardlink,
    header,
    long,
    member,
    packed,
    padded,
    pax,
    symlink,
)  # fmt: skip
from work import grows

from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import InvalidImage, LayerkitError, LimitExceeded
from layerkit.model.index import Index
from layerkit.model.limits import DEFAULT, Limits
from layerkit.unpack import LayerReading, index_layer

pytestmark = pytest.mark.usefixtures("no_thread_is_left")

SMALL = Limits(
    layer_tar_bytes=64 << 20,
    bomb_floor_bytes=1 << 20,
    entries_per_layer=1000,
    metadata_bytes_per_layer=1 << 20,
    pax_header_bytes=1 << 20,
    sparse_extents_per_file=1000,
    sparse_hole_bytes_per_layer=1 << 20,
    file_bytes=1 << 30,
)


def read(tar: bytes, form: str = "none", limits: Limits = DEFAULT) -> Index:
    blob = packed(tar, form)
    return index_layer(Blob(blob), described(blob), Digest.of(tar), limits=limits)


def sparse10(body: bytes, real: bytes = b"4096", **fields: object) -> bytes:
    return pax(
        (b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.name", b"s"),
        (b"GNU.sparse.realsize", real),
    ) + member(b"s", body, **fields)  # fmt: skip


def sparse01(spec: bytes, data: bytes, real: bytes = b"4096", blocks: bytes | None = None) -> bytes:
    count = b"%d" % ((spec.count(b",") + 1) // 2) if blocks is None else blocks
    return pax(
        (b"GNU.sparse.size", real), (b"GNU.sparse.numblocks", count), (b"GNU.sparse.map", spec)
    ) + member(b"s", data)  # fmt: skip


def old_sparse(runs: list[tuple[int, int]], real: int, size: int, **fields: object) -> bytes:
    patch = {386: b"".join(b"%011o\0%011o\0" % run for run in runs[:4]), 483: b"%011o\0" % real}
    return header(b"s", b"S", size, magic=GNU, patch=patch | fields.pop("more", {})) + padded(bytes(size))  # type: ignore[operator]


def broken(block: bytes, at: int, text: bytes) -> bytes:
    """Return ``block`` with bytes changed under its old checksum."""
    return block[:at] + text + block[at + len(text) :]


BODY = b"hello"
F = member(b"f", BODY)

HOSTILE: dict[str, bytes] = {
    # names
    "climbs": member(b"../etc/passwd"),
    "climbs later": member(b"a/../../b"),
    "is ..": folder(b".."),
    "climbs by PAX": pax((b"path", b"x/../../y")) + F,
    "climbs by a long name": long(b"../" * 60 + b"y") + F,
    "no name": member(b""),
    "PAX path with a NUL": pax((b"path", b"a\0b")) + F,
    "PAX linkpath with a NUL": pax((b"linkpath", b"a\0b")) + symlink(b"s", b"x"),
    "long name with a NUL inside": long(b"a\0b") + F,
    "path of 5,000 bytes": pax((b"path", b"/".join([b"x" * 99] * 50))) + F,
    "path of 5,000 bytes, GNU": long(b"/".join([b"x" * 99] * 50)) + F,
    "name of 300": pax((b"path", b"d/" + b"n" * 300)) + F,
    "depth of 2,049": pax((b"path", b"d/" * 2048 + b"f")) + F,
    "symlink of 5,000 bytes": pax((b"linkpath", b"l" * 5000)) + symlink(b"s", b"x"),
    "symlink to nothing": symlink(b"s", b""),
    "a root that is a file": member(b"./"),
    "a root that is a symlink": symlink(b".", b"/etc"),
    # parents
    "a symlink as parent": symlink(b"a", b"/etc") + member(b"a/passwd"),
    "a symlink as parent, child first": member(b"a/passwd") + symlink(b"a", b"/etc"),
    "a parent swapped mid-layer": folder(b"a") + member(b"a/f") + symlink(b"a", b"/etc") + member(b"a/passwd"),
    "a parent swapped and swapped back": folder(b"a") + symlink(b"a", b"/") + member(b"a/f") + folder(b"a"),
    "a grandparent that is a file": member(b"a") + member(b"a/b/c"),
    "a hard link as parent": F + hardlink(b"a", b"f") + member(b"a/x"),
    "a device as parent": header(b"a", b"3", major=1, minor=3) + folder(b"a/x"),
    "a symlink as parent of a whiteout": symlink(b"a", b"/etc") + member(b"a/.wh.passwd"),
    "an opaque symlink": symlink(b"a", b"/etc") + member(b"a/.wh..wh..opq"),
    "the parent among like names": member(b"a") + member(b"a-b") + member(b"a.b/c") + member(b"a/b"),
    # links
    "a hard link out": hardlink(b"h", b"../../etc/shadow"),
    "a hard link to itself": hardlink(b"h", b"./h"),
    "a hard link to the root": hardlink(b"h", b"/"),
    "a hard link to nothing": hardlink(b"h", b""),
    "a hard link to a whiteout": member(b".wh.x") + hardlink(b"h", b".wh.x"),
    "a hard link through a whiteout": hardlink(b"h", b"a/.wh.b/c"),
    "a hard link to what is replaced": member(b"t", b"1") + hardlink(b"h", b"t") + member(b"t", b"2"),
    # whiteouts
    "a whiteout of .": member(b"a/.wh.."),
    "a whiteout of ..": member(b"a/.wh..."),
    "an empty whiteout": member(b"a/.wh."),
    "a whiteout folder": folder(b".wh.x"),
    "a whiteout symlink": symlink(b".wh.x", b"y"),
    "below a whiteout": member(b".wh.x/y"),
    "below an opaque marker": member(b"a/.wh..wh..opq/y"),
    # types
    "a socket": header(b"s", b"s"),
    "an unknown type": header(b"s", b"Z"),
    "a volume header": header(b"s", b"V", magic=GNU),
    "a multi-volume part": header(b"s", b"M", magic=GNU),
    "Solaris PAX": header(b"s", b"X", 0) + F,
    "a symlink with data": header(b"s", b"2", 512, link=b"x") + F,
    "a fifo with data": header(b"s", b"6", 512) + F,
    "a device with data": header(b"s", b"3", 512) + F,
    "a symlink with data by PAX": pax((b"size", b"512")) + symlink(b"s", b"x") + F,
    "a file named as a folder": header(b"d/", b"0"),
    "an old folder with data": member(b"d/", BODY, flag=b"\0", magic=V7),
    "device numbers beyond the kernel's": header(b"d", b"3", major=4096, minor=0),
    # numbers
    "a negative size": header(b"f", patch={124: base256(-512, 12)}) + F,
    "a huge size": header(b"f", patch={124: base256(1 << 62, 12)}) + F,
    "a size beyond 64 bits": header(b"f", patch={124: base256(1 << 80, 12)}) + F,
    "a size that is no number": header(b"f", patch={124: b"0000000019\0\0"}) + F,
    "a size with a sign": header(b"f", patch={124: b"-0000000005\0"}) + F,
    "a size beyond the archive": member(b"f", BODY, size=100_000),
    "PAX size beyond the archive": pax((b"size", b"100000")) + F,
    "negative PAX size": pax((b"size", b"-5")) + F,
    "huge PAX size": pax((b"size", b"9" * 30)) + F,
    "PAX size with a fraction": pax((b"size", b"5.0")) + F,
    "PAX size that hides the next entry": pax((b"size", b"4096")) + F + member(b"g"),
    "uid 2^32-1": header(b"f", uid=0xFFFFFFFF),
    "a negative uid": header(b"f", uid=-1),
    "PAX gid 2^32": pax((b"gid", b"4294967296")) + F,
    "a negative PAX uid": pax((b"uid", b"-1")) + F,
    "mtime beyond 64 bits": header(b"f", mtime=1 << 80),
    "PAX mtime beyond 64 bits": pax((b"mtime", b"1" + b"0" * 19)) + F,
    "PAX mtime of 1,000 digits": pax((b"mtime", b"1" * 1000)) + F,
    # headers
    "a wrong checksum": broken(F, 0, b"g"),
    "a wrong checksum on PAX": broken(pax((b"mtime", b"1")), 0, b"x") + F,
    "a wrong checksum later": F + broken(member(b"g"), 109, b"7"),
    "no checksum": broken(F, 148, bytes(8)),
    "a single zero block": F + bytes(512) + member(b"g"),
    "rubbish": os.urandom(2048),
    # PAX
    "100 MB of PAX claimed": header(b"p", b"x", 100 << 20) + F,
    "a PAX record without a length": header(b"p", b"x", 10) + padded(b"path=abcd\n") + F,
    "a PAX record of length 0": header(b"p", b"x", 9) + padded(b"0 path=a\n") + F,
    "a PAX record that is too long": header(b"p", b"x", 9) + padded(b"99 path=\n") + F,
    "a PAX record without =": header(b"p", b"x", 7) + padded(b"7 path\n") + F,
    "a PAX record without a keyword": header(b"p", b"x", 5) + padded(b"5 =a\n") + F,
    "a PAX length with 4,000 digits": header(b"p", b"x", 4010) + padded(b"1" * 4000 + b" path=a\n\n\n") + F,
    "two PAX headers in a row": pax((b"mtime", b"1")) + pax((b"mtime", b"2")) + F,
    "PAX without an entry": F + pax((b"mtime", b"1")),
    "a long name without an entry": F + long(b"x" * 200),
    "two long names": long(b"a") + long(b"b") + F,
    "a global PAX header with a path": pax((b"path", b"x"), flag=b"g") + F,
    "a global PAX header with a size": pax((b"size", b"0"), flag=b"g") + F,
    "a global PAX header before a file's own": pax((b"path", b"x")) + pax((b"uid", b"1"), flag=b"g") + F,
    "PAX and GNU names that differ": long(b"a") + pax((b"path", b"b")) + F,
    # xattrs
    "10^5 xattrs": pax(*((b"SCHILY.xattr.user.%d" % i, b"v") for i in range(100_000))) + F,
    "an xattr of 70,000 bytes": pax((b"SCHILY.xattr.user.x", b"v" * 70_000)) + F,
    "an xattr name of 300 bytes": pax((b"SCHILY.xattr.user." + b"n" * 300, b"v")) + F,
    "an xattr without a namespace": pax((b"SCHILY.xattr.selinux", b"v")) + F,
    "an xattr with no more than a namespace": pax((b"SCHILY.xattr.user.", b"v")) + F,
    "an xattr with a NUL": pax((b"SCHILY.xattr.user.a\0b", b"v")) + F,
    "an xattr that tools name differently": pax((b"SCHILY.xattr.user.a%3Db", b"v")) + F,
    "an xattr that is no base64": pax((b"LIBARCHIVE.xattr.user.a", b"???")) + F,
    "an ACL by name": pax((b"SCHILY.acl.access", b"user::r--,user:al:r--,group::r--,mask::r--,other::r--")) + F,
    "an ACL that is none": pax((b"SCHILY.acl.default", b"everybody may")) + folder(b"d"),
    # sparse
    "a sparse map that overlaps": sparse01(b"0,100,50,100", bytes(200)),
    "a sparse map that falls": sparse01(b"1000,100,0,100", bytes(200)),
    "a sparse map beyond the size": sparse01(b"4000,100", bytes(100)),
    "a sparse map beyond 64 bits": sparse01(b"%d,%d" % (1 << 63, 1 << 63), b""),
    "a sparse map with negative numbers": sparse01(b"-5,100", bytes(100)),
    "a sparse map with an odd value": sparse01(b"0,100,200", bytes(100), blocks=b"1"),
    "a sparse map that claims more runs": sparse01(b"0,100", bytes(100), blocks=b"2"),
    "a sparse map for less than the data": sparse01(b"0,100", bytes(200)),
    "a sparse map for more than the data": sparse01(b"0,300", bytes(200)),
    "a sparse map without a size": pax((b"GNU.sparse.map", b"0,1"), (b"GNU.sparse.numblocks", b"1")) + F,
    "an unknown sparse version": pax((b"GNU.sparse.major", b"2"), (b"GNU.sparse.minor", b"0")) + F,
    "a sparse folder": pax((b"GNU.sparse.size", b"9"), (b"GNU.sparse.map", b"0,1")) + folder(b"d"),
    "sparse runs without lengths": pax((b"GNU.sparse.size", b"9"), (b"GNU.sparse.offset", b"0"),
                                       (b"GNU.sparse.offset", b"5"), (b"GNU.sparse.numbytes", b"1")) + F,
    "a sparse map longer than the data": sparse10(b"9\n" * 10),
    "a sparse map of millions claimed": sparse10(padded(b"99999999\n")),
    "a sparse map without numbers": sparse10(b"x" * 512),
    "a sparse map without an end": sparse10(b"1" * 5000),
    "a sparse map of blanks": sparse10(padded(b"1\n\n\n")),
    "an old sparse map that overlaps": old_sparse([(0, 100), (50, 100)], 4096, 200),
    "an old sparse map beyond the size": old_sparse([(4000, 100)], 4096, 100),
    "an old sparse map with another sum": old_sparse([(0, 100)], 4096, 200),
    "an old sparse map cut off": header(b"s", b"S", 0, magic=GNU, patch={
        386: b"%011o\0%011o\0" % (0, 1) * 4, 482: b"\1", 483: b"%011o\0" % 9}),
    "an old sparse map that ends and goes on": header(b"s", b"S", 0, magic=GNU, patch={482: b"\1"}) + F,
    "an old sparse file in a ustar header": header(b"s", b"S", 0),
    "a sparse file of exabytes": sparse01(b"%d,1" % (1 << 60), b"x", real=b"%d" % ((1 << 60) + 1)),
}  # fmt: skip


@pytest.mark.parametrize("form", ["none", "gzip", "zstd"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_layers_are_refused(name: str, form: str) -> None:
    with pytest.raises(LayerkitError) as e:
        read(HOSTILE[name] + END, form)
    assert e.value.exit_code == 3, e.value
    assert "\n" not in str(e.value) and str(e.value).isprintable()


def many_folders(count: int) -> bytes:
    return b"".join(folder(b"d%d" % i) for i in range(count))


def millions_of_runs() -> bytes:
    return sparse01(b",".join(b"%d,1" % i for i in range(0, 6000, 2)), bytes(3000), real=b"6000")


BEYOND: dict[str, tuple[str, Callable[[], bytes]]] = {
    "entries": ("entries_per_layer", lambda: many_folders(1001)),
    "names": ("metadata_bytes_per_layer", lambda: b"".join(
        pax((b"path", b"/".join([b"%05d" % i * 50] * 12))) + F for i in range(500))),
    "xattrs": ("metadata_bytes_per_layer", lambda: b"".join(
        pax((b"SCHILY.xattr.user.x", b"%060000d" % i)) + member(b"%d" % i) for i in range(30))),
    "symlinks": ("metadata_bytes_per_layer", lambda: b"".join(
        pax((b"linkpath", b"%04000d" % i)) + symlink(b"%d" % i, b"x") for i in range(500))),
    "global records": ("pax_header_bytes", lambda: b"".join(
        pax((b"V.%d" % i, b"v" * 60_000), flag=b"g") for i in range(30)) + F),
    "sparse runs": ("sparse_extents_per_file", millions_of_runs),
    "holes": ("sparse_hole_bytes_per_layer", lambda: sparse01(b"0,1", b"x", real=b"%d" % (2 << 20))),
    "holes of many files": ("sparse_hole_bytes_per_layer", lambda: b"".join(
        sparse01(b"0,1", b"x", real=b"900000") for _ in range(3))),
    "a file": ("file_bytes", lambda: header(b"f", size=(1 << 30) + 1)),
    "the tar": ("layer_tar_bytes", lambda: member(b"f", bytes(65 << 20))),
}  # fmt: skip


@pytest.mark.parametrize("name", BEYOND)
def test_what_is_beyond_a_limit_says_which(name: str) -> None:
    limit, make = BEYOND[name]
    with pytest.raises(LimitExceeded) as e:
        read(make() + END, limits=SMALL)
    assert (e.value.limit, e.value.exit_code) == (limit, 3)
    assert f"LAYERKIT_LIMIT_{limit.upper()}" in str(e.value)


@pytest.mark.parametrize("form", ["gzip", "zstd"])
def test_bombs(form: str) -> None:
    size = 40 << 20
    tar = header(b"f", size=size) + bytes(size) + END
    blob = gzip.compress(tar, 9) if form == "gzip" else zstandard.ZstdCompressor().compress(tar)
    spooled = io.BytesIO()
    with pytest.raises(LimitExceeded) as e:
        LayerReading(Blob(blob), described(blob), None, limits=SMALL, data=spooled).finish(None)
    assert e.value.limit == "compression_ratio"
    most = max(SMALL.bomb_floor_bytes, SMALL.compression_ratio * len(blob))
    assert spooled.tell() <= most, "it ends at the bound"
    # The same data, were it not a bomb by the default floor, is a layer like any other.
    assert index_layer(Blob(blob), described(blob), None).size[0] == size


def test_the_largest_path_is_no_mistake() -> None:
    path = b"/".join([b"n" * 255] * 16)[:4095]
    assert read(pax((b"path", path)) + F + END).path.tolist() == [path]
    assert len(read(pax((b"path", b"d/" * 2047 + b"f")) + F + END)) == 1


WHOLE = (
    folder(b"d") + pax((b"mtime", b"1.5"), (b"path", b"d/" + b"p" * 150)) + member(b"x", b"1" * 1300)
    + long(b"d/" + b"l" * 150) + member(b"y", b"2" * 513, magic=GNU) + sparse10(padded(b"1\n0\n600\n") + b"3" * 600)
    + symlink(b"l", b"d") + hardlink(b"h", b"s")
)  # fmt: skip


@pytest.mark.parametrize("form", ["none", "gzip", "zstd"])
def test_truncated_at_every_block(form: str) -> None:
    """Cut at each 512 bytes: the digests tell, and without them the tar does, but for cuts between entries."""
    whole = WHOLE + END
    want = list(read(whole).entries())
    between = 0
    for end in range(0, len(WHOLE) + 1024, 512):
        cut = packed(whole[:end], form)
        with pytest.raises(LayerkitError) as e:
            index_layer(Blob(cut), described(cut), Digest.of(whole))
        assert e.value.exit_code == 3
        try:
            found = list(index_layer(Blob(cut), described(cut), None).entries())
        except InvalidImage:
            continue
        between += 1
        assert all(entry in want for entry in found)
    assert between == 7 + 1  # before and after each of six entries, and after one zero block


@pytest.mark.parametrize("end", [1, 100, 511, 513, 1023, 1500])
def test_truncated_within_a_block(end: int) -> None:
    with pytest.raises(InvalidImage):
        read(WHOLE[:end])


@pytest.mark.parametrize("form", ["none", "gzip", "zstd"])
def test_wrong_digests_and_sizes(form: str) -> None:
    tar = WHOLE + END
    blob = packed(tar, form)
    right, other = described(blob), Digest.of(b"other")
    for descriptor, diff_id in (
        (Descriptor("", other, len(blob)), Digest.of(tar)),
        (Descriptor("", right.digest, len(blob) - 1), Digest.of(tar)),
        (Descriptor("", right.digest, len(blob) + 1), Digest.of(tar)),
        (right, other),
    ):
        with pytest.raises(InvalidImage) as e:
            index_layer(Blob(blob), descriptor, diff_id)
        assert e.value.exit_code == 3


def test_a_million_entries_in_one_folder() -> None:
    """Quadratic work anywhere would take hours here."""

    def folder_of(count: int) -> bytes:
        block = bytearray(header(b"d/0000000", b"5", mode=0o755))
        total = int(block[148:154], 8)
        parts = []
        for i in range(count):
            name = b"%07d" % (i * 7919 % count)
            block[2:9] = name
            block[148:154] = b"%06o" % (total + sum(name) - 7 * 0x30)
            parts.append(bytes(block))
        return b"".join(parts) + END

    count = 1_000_000 if os.environ.get("LAYERKIT_TEST_FUZZ") else 200_000
    assert len(read(folder_of(count))) == count
    assert grows(lambda count: partial(read, folder_of(count)), 5000) < 2.5


def test_a_path_repeated_many_times_is_not_quadratic() -> None:
    def repeated(count: int) -> bytes:
        return b"".join(member(b"t%d" % (i % 500)) for i in range(count)) + hardlink(b"h", b"t1") + END

    index = read(repeated(20_000))
    assert len(index) == 501
    assert len(index.warnings) == DEFAULT.warnings_kept_per_layer + 1
    assert grows(lambda count: partial(read, repeated(count)), 5000) < 2.5


def test_a_hostile_name_cannot_hide_in_a_message() -> None:
    with pytest.raises(InvalidImage) as e:
        read(member(b"../\x1b[2J\n\xff\xc3") + END)
    assert "\\x1b[2J\\n\\xff\\xc3" in str(e.value)
