"""The tar reader against stdlib tarfile and GNU tar, and in what both of them leave open."""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from needs import need_root, need_tool
from tar_blocks import (
    END,
    GNU,
    USTAR,
    V7,
    base256,
    folder,
    hardlink,
    header,
    long,
    member,
    padded,
    pax,
    sha256,
    signed,
    symlink,
)  # fmt: skip

from layerkit.formats.tar.acl import from_text
from layerkit.formats.tar.reader import TarReader, read_tar
from layerkit.model.digest import Digest
from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import InvalidImage, LayerkitError, LimitExceeded, LossyResult, UnsafeEntry
from layerkit.model.index import Index
from layerkit.model.limits import Limits

FUZZ = int(os.environ.get("LAYERKIT_TEST_FUZZ", "1"))


def entries(*parts: bytes, end: bytes = END) -> list[Entry]:
    return list(read_tar(b"".join(parts) + end).entries())


def only(*parts: bytes) -> Entry:
    (entry,) = entries(*parts)
    return entry


def in_chunks(tar: bytes, size: int) -> Index:
    """Read with a ring of two reused buffers, so that a reader that holds on to one reads rubbish."""
    reader = TarReader("layer")
    buffers = bytearray(size), bytearray(size)

    def chunks() -> Iterator[tuple[bytearray, int]]:
        for i, at in enumerate(range(0, len(tar), size)):
            part = tar[at : at + size]
            buffer = buffers[i % 2]
            buffer[:] = b"\xaa" * size
            buffer[: len(part)] = part
            yield buffer, len(part)

    reader.read(chunks())
    return reader.index(Digest.of(tar))


# --- single headers -----------------------------------------------------------------------------------------


def test_a_plain_file_has_all_its_attributes() -> None:
    tar = member(b"dir/f", b"hello", mode=0o104755, uid=1000, gid=2000, mtime=1234567890)
    assert only(tar) == Entry(
        b"dir/f", Kind.REG, 0o4755, 1000, 2000, 1234567890, 0, 5, offset=512, sha256=sha256(b"hello")
    )


def test_an_empty_file_has_no_place_but_a_digest() -> None:
    e = only(member(b"f"))
    assert (e.size, e.offset, e.sha256) == (0, -1, sha256(b""))


@pytest.mark.parametrize(
    ("flag", "kind"),
    [(b"0", Kind.REG), (b"\0", Kind.REG), (b"7", Kind.REG), (b"5", Kind.DIR), (b"6", Kind.FIFO)],
)
def test_types(flag: bytes, kind: Kind) -> None:
    e = only(member(b"f", flag=flag, mode=0o1644))
    assert (e.kind, e.perm) == (kind, 0o1644)


@pytest.mark.parametrize(("flag", "kind"), [(b"3", Kind.CHAR), (b"4", Kind.BLOCK)])
def test_devices(flag: bytes, kind: Kind) -> None:
    e = only(header(b"dev/x", flag, major=8, minor=1048575))
    assert (e.kind, e.major, e.minor) == (kind, 8, 1048575)


def test_a_symlink_keeps_its_target_as_written() -> None:
    assert only(symlink(b"a", b"../../x//./y/")).link == b"../../x//./y/"


def test_a_hard_link_may_come_before_its_target_and_is_normalised() -> None:
    found = entries(hardlink(b"a", b"./x/../f"), member(b"f", b"data"))
    assert [(e.path, e.kind, e.link) for e in found] == [
        (b"a", Kind.HARDLINK, b"f"),
        (b"f", Kind.REG, b""),
    ]


def test_sizes_on_links_and_folders_are_remarks() -> None:
    # GNU tar, Go and Python agree here: no data follows.
    found = entries(
        header(b"l", b"1", 700, link=b"f"), header(b"d", b"5", 700), member(b"f", b"data"),
    )  # fmt: skip
    assert [e.path for e in found] == [b"d", b"f", b"l"]


def test_old_folders_are_files_with_a_slash() -> None:
    assert only(header(b"d/", b"\0", magic=V7)).kind is Kind.DIR
    assert only(header(b"d/", b"0", magic=V7)).kind is Kind.DIR
    assert only(header(b"d/", b"\0", magic=USTAR)).kind is Kind.DIR
    with pytest.raises(UnsafeEntry, match="slash"):
        entries(header(b"d/", b"0", magic=USTAR))


def test_prefix_belongs_to_ustar_alone() -> None:
    assert only(header(b"f", prefix=b"a/b")).path == b"a/b/f"
    # GNU tar keeps times where the prefix would be.
    assert only(header(b"f", prefix=b"14000000000", magic=GNU)).path == b"f"
    star = header(b"f", patch={345: b"p" * 131, 476: b"00000000001 00000000002 ", 508: b"tar\0"})
    assert only(star).path == b"p" * 131 + b"/f"


def test_base256_numbers_and_negative_times() -> None:
    e = only(header(b"f", uid=3_000_000, gid=0xFFFFFFFE, mtime=-12345))
    assert (e.uid, e.gid, e.mtime, e.mtime_ns) == (3_000_000, 0xFFFFFFFE, -12345, 0)


@pytest.mark.parametrize(
    "field", [b"0000017\0", b"0000017 ", b"    17 \0", b"17\0\0\0\0\0\0", b"17      ", b"00000017", b"000017 \0"]
)
def test_octal_in_all_its_forms(field: bytes) -> None:
    assert only(header(b"f", patch={108: field})).uid == 0o17


@pytest.mark.parametrize(
    "field", [b"0000018\0", b"+000017\0", b"1_7\0\0\0\0\0", b"17 17\0\0\0", b"\0000017\0", b"0x17\0\0\0\0"]
)
def test_what_is_no_octal_is_refused(field: bytes) -> None:
    with pytest.raises(UnsafeEntry, match="uid"):
        entries(header(b"f", patch={108: field}))


def test_unused_fields_are_zero() -> None:
    e = only(header(b"f", patch={100: bytes(8), 108: b" " * 8, 136: bytes(12)}))
    assert (e.perm, e.uid, e.mtime) == (0, 0, 0)


@pytest.mark.parametrize("value", [0xFFFFFFFF, -1, 1 << 40])
def test_ids_out_of_range_are_refused(value: int) -> None:
    with pytest.raises(UnsafeEntry, match="uid"):
        entries(header(b"f", patch={108: base256(value, 8)}))


def test_checksums_over_signed_bytes_are_accepted() -> None:
    block = header("\xff\xfe\xfd".encode("latin-1"))
    assert signed(block, as_signed_bytes=True) != block
    assert only(signed(block, as_signed_bytes=True)).path == b"\xff\xfe\xfd"


# --- names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (b"./a", b"a"), (b"/a", b"a"), (b"//a//b", b"a/b"), (b"a/./b", b"a/b"), (b"a/../b", b"b"), (b"././a", b"a"),
        (b".a/..b/...", b".a/..b/..."), (b"\xff\n\x01 \xc3", b"\xff\n\x01 \xc3"), (b"a/b/../../c", b"c"),
        (b"x.wh.y", b"x.wh.y"), (b"a.wh./b", b"a.wh./b"),
    ],
)  # fmt: skip
def test_names_are_cleaned(name: bytes, path: bytes) -> None:
    assert only(member(name)).path == path


@pytest.mark.parametrize("name", [b"./", b"/", b".", b"a/..", b"./."])
def test_the_root_has_the_empty_path(name: bytes) -> None:
    e = only(header(name, b"5", mode=0o711))
    assert (e.path, e.kind, e.perm) == (b"", Kind.DIR, 0o711)


def test_whiteouts() -> None:
    found = entries(
        member(b"a/.wh.x"), member(b"a/.wh..wh..opq"), member(b".wh.y"), member(b"y"), member(b"a/x.wh.z"),
        member(b".wh..wh..opq"),
    )  # fmt: skip
    assert [(e.path, e.kind) for e in found] == [
        (b"", Kind.OPAQUE), (b"a", Kind.OPAQUE), (b"a/x", Kind.WHITEOUT), (b"a/x.wh.z", Kind.REG),
        (b"y", Kind.WHITEOUT), (b"y", Kind.REG),
    ]  # fmt: skip


def test_what_aufs_left_is_dropped_and_said() -> None:
    index = read_tar(folder(b".wh..wh.plnk") + member(b".wh..wh.plnk/1.2", b"x") + member(b".wh..wh.aufs") + END)
    assert len(index) == 0
    assert len(index.warnings) == 3 and all("AUFS" in w for w in index.warnings)


def test_a_whiteout_may_be_a_hard_link_as_aufs_had_it() -> None:
    assert [e.kind for e in entries(member(b".wh.a"), hardlink(b".wh.b", b".wh.a"))] == [Kind.WHITEOUT] * 2


# --- PAX ------------------------------------------------------------------------------------------------------


def test_pax_overrides_the_header() -> None:
    e = only(
        pax(
            (b"path", b"p" * 200 + b"/n"), (b"uid", b"70000"), (b"gid", b"4294967294"), (b"mtime", b"12.5"),
            (b"size", b"3"), (b"atime", b"1"), (b"VENDOR.x", b"\0\n="),
        ),
        header(b"short", b"0", 0) + padded(b"abc"),
    )  # fmt: skip
    assert e == Entry(
        b"p" * 200 + b"/n",
        Kind.REG,
        0o644,
        70000,
        4294967294,
        12,
        500_000_000,
        3,
        offset=e.offset,
        sha256=sha256(b"abc"),
    )


def test_pax_linkpath() -> None:
    assert only(pax((b"linkpath", b"t" * 300)), symlink(b"a", b"short")).link == b"t" * 300


@pytest.mark.parametrize(
    ("text", "time"),
    [
        (b"1", (1, 0)),
        (b"1.", (1, 0)),
        (b"-1", (-1, 0)),
        (b"-1.5", (-2, 500_000_000)),
        (b"-0.000000001", (-1, 999_999_999)),
        (b"1700000000.123456789", (1700000000, 123456789)),
        (b"0.1", (0, 100_000_000)),
        (b"9007199254740993.000000001", (9007199254740993, 1)),
        (b"1.1234567899", (1, 123456789)),
        (b"-0.0", (0, 0)),
    ],
)
def test_times_are_exact(text: bytes, time: tuple[int, int]) -> None:
    e = only(pax((b"mtime", text)), member())
    assert (e.mtime, e.mtime_ns) == time


TIMES = [b"1700000000.123456789", b"1700000000", b"1700000000.12345678", b"1700000000.1234567", b"1", b"-7.25"]


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (1, 0, 2), (0,), (1, 0)])
@pytest.mark.parametrize("other", TIMES)
@pytest.mark.parametrize("mtime", TIMES)
def test_headers_of_nothing_but_times(mtime: bytes, other: bytes, order: tuple[int, ...]) -> None:
    records = [(b"mtime", mtime), (b"atime", other), (b"ctime", other)]
    e = only(pax(*(records[i] for i in order)), member())
    whole, _, fraction = mtime.partition(b".")
    want = int(whole) * 10**9 + (-1 if whole < b"0" else 1) * int(fraction.ljust(9, b"0"))
    assert e.mtime * 10**9 + e.mtime_ns == want


@pytest.mark.parametrize("at", [0, 30, 60])
@pytest.mark.parametrize("length", [b"29", b"31", b"03", b"60", b"90"])
def test_headers_of_nothing_but_times_with_a_wrong_length(at: int, length: bytes) -> None:
    time = b"1700000000.123456789"
    body = b"".join(b"30 %s=%s\n" % (key, time) for key in (b"mtime", b"atime", b"ctime"))
    body = body[:at] + length + body[at + 2 :]
    if (at, length) in ((0, b"90"), (30, b"60")):  # one record with newlines in it
        return
    with pytest.raises(InvalidImage):
        entries(header(b"p", b"x", len(body)) + padded(body), member())


NAMES = [b"d/" + b"n" * 150, b"e", b"p path=q", b"30 mtime=1700000000.123456789", b"n" * 60 + b"/" + b"m" * 240]


@pytest.mark.parametrize("order", ["pmac", "macp", "mp", "pm", "p", "apc", "mpac", "pap"])
@pytest.mark.parametrize("name", NAMES)
def test_headers_of_nothing_but_times_and_a_name(name: bytes, order: str) -> None:
    time = b"1700000000.123456789"
    records = {"p": (b"path", name), "m": (b"mtime", time), "a": (b"atime", time), "c": (b"ctime", time)}
    # The last of two names counts.
    chosen = [(b"path", b"first") if (at, order) == (0, "pap") else records[c] for at, c in enumerate(order)]
    e = only(pax(*chosen), member())
    assert e.path == name
    assert (e.mtime, e.mtime_ns) == ((1700000000, 123456789) if "m" in order else (0, 0))


@pytest.mark.parametrize("records", [(b"path=ab", b"mtime=1700000000"), (b"mtime=1700000000", b"path=ab")])
@pytest.mark.parametrize("wrong", [-1, 1, 20, 300])
def test_a_name_with_a_wrong_length(records: tuple[bytes, bytes], wrong: int) -> None:
    lengths = {b"path=ab": 11, b"mtime=1700000000": 20}
    body = b"".join(b"%d %s\n" % (lengths[r] + wrong * r.startswith(b"path"), r) for r in records)
    if records[0] == b"path=ab" and wrong == 20:  # a name with a newline and all of the time in it
        assert only(header(b"p", b"x", len(body)) + padded(body), member()).path == b"ab\n20 mtime=1700000000"
        return
    with pytest.raises(InvalidImage):
        entries(header(b"p", b"x", len(body)) + padded(body), member())


@pytest.mark.parametrize("text", [b"x", b"1.x", b"1e3", b".5", b"--1", b"+1", b"1 ", b"nan", b"9" * 20])
def test_times_that_are_none_are_refused(text: bytes) -> None:
    with pytest.raises(InvalidImage, match="mtime"):
        entries(pax((b"mtime", text)), member())


def test_an_empty_pax_value_deletes_but_is_a_value_for_xattrs() -> None:
    e = only(
        pax((b"mtime", b"9.5"), flag=b"g"),
        pax((b"mtime", b""), (b"path", b""), (b"SCHILY.xattr.user.empty", b"")),
        member(b"f", mtime=7),
    )
    assert (e.path, e.mtime, e.mtime_ns, e.xattrs) == (b"f", 7, 0, ((b"user.empty", b""),))


def test_xattrs_keep_raw_bytes_and_are_sorted() -> None:
    e = only(
        pax(
            (b"SCHILY.xattr.user.b", b"\0\n=\xff"), (b"SCHILY.xattr.security.capability", b"\1" * 20),
            (b"LIBARCHIVE.xattr.user.b", b"aWdub3JlZA"), (b"LIBARCHIVE.xattr.user.%61%2F", b"aGk"),
        ),
        member(),
    )  # fmt: skip
    assert e.xattrs == ((b"security.capability", b"\1" * 20), (b"user.a/", b"hi"), (b"user.b", b"\0\n=\xff"))


def test_xattr_sets_are_shared() -> None:
    index = read_tar(
        b"".join(pax((b"SCHILY.xattr.user.x", b"%d" % (i % 3))) + member(b"f%d" % i) for i in range(30)) + END
    )
    assert len(index.xattr_sets) == 4 and index.xattr_sets[0] == ()


def test_globals_hold_until_they_are_replaced() -> None:
    found = entries(
        pax((b"uid", b"7"), (b"comment", b"c"), flag=b"g"), member(b"a"), pax((b"uid", b"8")), member(b"b"),
        member(b"c"), pax((b"uid", b""), flag=b"g"), member(b"d", uid=9),
    )  # fmt: skip
    assert [e.uid for e in found] == [7, 8, 7, 9]


def test_gnu_long_names() -> None:
    e = only(long(b"n" * 150), long(b"l" * 180, b"K"), symlink(b"n" * 99, b"l" * 99))
    assert (e.path, e.link) == (b"n" * 150, b"l" * 180)


def test_a_long_name_and_a_pax_name_must_agree() -> None:
    assert only(long(b"same"), pax((b"path", b"same")), member(b"x")).path == b"same"
    with pytest.raises(InvalidImage, match="differ"):
        entries(long(b"one"), pax((b"path", b"two")), member(b"x"))


def test_acl_text_becomes_the_kernels_form() -> None:
    text = b"user::rw-,user:1000:r--,group::r--,group:lp:rw-:7,mask::rw-,other::---"
    e = only(pax((b"SCHILY.acl.access", text)), member())
    want = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", *entry)
        for entry in (
            (1, 6, 0xFFFFFFFF),
            (2, 4, 1000),
            (4, 4, 0xFFFFFFFF),
            (8, 6, 7),
            (0x10, 6, 0xFFFFFFFF),
            (0x20, 0, 0xFFFFFFFF),
        )
    )
    assert e.xattrs == ((b"system.posix_acl_access", want),)


def test_an_acl_with_names_is_not_guessed() -> None:
    with pytest.raises(LossyResult, match="alice"):
        entries(
            pax((b"SCHILY.acl.access", b"user::rw-,user:alice:r--,group::r--,mask::r--,other::---")), member(b"f")
        )


def test_an_acl_that_says_the_mode_is_none() -> None:
    assert only(pax((b"SCHILY.acl.access", b"user::rw-,group::r--,other::r--")), member()).xattrs == ()


@pytest.mark.parametrize(
    "text",
    [b"user::rw-", b"user::rw-,group::r--,other::r--,user:1:r--", b"x::r,user::r,group::r,other::r", b"user::q"],
)
def test_broken_acls_are_refused(text: bytes) -> None:
    with pytest.raises(ValueError):
        from_text(text)


# --- sparse ---------------------------------------------------------------------------------------------------

LOGICAL = b"\0" * 1000 + b"A" * 600 + b"\0" * 500 + b"B" * 100 + b"\0" * 50
RUNS = ((1000, 600), (2100, 100))
STORED = b"A" * 600 + b"B" * 100


def sparse_forms() -> dict[str, bytes]:
    old = header(b"s", b"S", len(STORED), magic=GNU, patch={
        386: b"".join(b"%011o\0%011o\0" % run for run in (*RUNS, (2250, 0))), 483: b"%011o\0" % len(LOGICAL),
    })  # fmt: skip
    many = [(i, 1) for i in range(0, 200, 2)]
    long_first = header(b"s", b"S", 100, magic=GNU, patch={
        386: b"".join(b"%011o\0%011o\0" % run for run in many[:4]), 482: b"\1", 483: b"%011o\0" % 199,
    })  # fmt: skip
    extra = b""
    for at in range(4, 100, 21):
        rows = many[at : at + 21]
        extra += (
            b"".join(b"%011o\0%011o\0" % run for run in rows).ljust(504, b"\0")
            + (b"\1" if at + 21 < 100 else b"\0")
            + bytes(7)
        )
    pairs = b",".join(b"%d,%d" % run for run in RUNS)
    lines = padded(b"2\n" + b"".join(b"%d\n%d\n" % run for run in RUNS))
    size = b"%d" % len(LOGICAL)
    return {
        "old": old + padded(STORED),
        "old-extended": long_first + extra + padded(b"x" * 100),
        "0.0": pax(
            (b"GNU.sparse.size", size),
            (b"GNU.sparse.numblocks", b"2"),
            (b"GNU.sparse.offset", b"1000"),
            (b"GNU.sparse.numbytes", b"600"),
            (b"GNU.sparse.offset", b"2100"),
            (b"GNU.sparse.numbytes", b"100"),
        )
        + member(b"s", STORED),
        "0.1": pax(
            (b"GNU.sparse.size", size),
            (b"GNU.sparse.numblocks", b"2"),
            (b"GNU.sparse.name", b"s"),
            (b"GNU.sparse.map", pairs),
        )
        + member(b"GNUSparseFile.1/s", STORED),
        "1.0": pax(
            (b"GNU.sparse.major", b"1"),
            (b"GNU.sparse.minor", b"0"),
            (b"GNU.sparse.name", b"s"),
            (b"GNU.sparse.realsize", size),
        )
        + member(b"GNUSparseFile.1/s", lines + STORED),
    }


@pytest.mark.parametrize("form", sparse_forms())
def test_sparse_files(form: str) -> None:
    tar = sparse_forms()[form] + member(b"t", b"after") + END
    e, after = read_tar(tar).entries()
    logical: bytes = LOGICAL
    runs: tuple[tuple[int, int], ...] = RUNS
    if form == "old-extended":
        logical = b"x\0" * 99 + b"x"
        runs = tuple((i, 1) for i in range(0, 200, 2))
    assert (e.path, e.kind, e.size, e.sha256, e.sparse) == (b"s", Kind.REG, len(logical), sha256(logical), runs)
    stored = tar[e.offset : e.offset + sum(n for _, n in runs)]
    assert stored == b"".join(logical[a : a + n] for a, n in runs)
    assert after.sha256 == sha256(b"after")


def test_a_file_that_is_all_hole_has_runs_but_none_of_them() -> None:
    tar = pax(
        (b"GNU.sparse.major", b"1"),
        (b"GNU.sparse.minor", b"0"),
        (b"GNU.sparse.name", b"s"),
        (b"GNU.sparse.realsize", b"5000"),
    ) + member(b"x", padded(b"1\n5000\n0\n"))
    e = only(tar)
    assert (e.size, e.sparse, e.offset, e.sha256) == (5000, (), -1, sha256(bytes(5000)))


def test_a_map_without_holes_is_a_plain_file() -> None:
    tar = pax(
        (b"GNU.sparse.size", b"4"), (b"GNU.sparse.numblocks", b"2"), (b"GNU.sparse.map", b"0,2,2,2"),
    ) + member(b"s", b"abcd")  # fmt: skip
    assert (only(tar).sparse, only(tar).sha256) == (None, sha256(b"abcd"))


# --- the archive as a whole -----------------------------------------------------------------------------------


def test_rows_are_in_canonical_order_and_of_duplicates_the_last_counts() -> None:
    index = read_tar(
        member(b"a-b")
        + folder(b"a/")
        + member(b"a/c", b"1")
        + member(b"a!")
        + member(b"a/c", b"22")
        + folder(b"a")
        + END
    )
    assert index.path.tolist() == [b"a", b"a/c", b"a!", b"a-b"]
    assert index.entry(1).size == 2
    assert index.warnings == ("a/c: 2 times in the layer, the last one counts",)


def test_equal_to_the_reference_construction() -> None:
    parts = [
        folder(b"d"),
        member(b"d/x", b"1"),
        symlink(b"d/l", b"x"),
        hardlink(b"h", b"d/x"),
        member(b".wh.q"),
        member(b"d/x", b"2", uid=5),
    ]
    with pytest.raises(UnsafeEntry, match="hard links name it"):
        entries(*parts)
    index = read_tar(b"".join(parts[:-1]) + END)
    again = Index.of(index.entries(), index.diff_id, index.tar_size)
    assert list(again.entries()) == list(index.entries())


def test_warnings_are_bounded() -> None:
    reader = TarReader("layer", Limits(warnings_kept_per_layer=3))
    tar = b"".join(member(b".wh..wh.%d" % i) for i in range(10)) + END
    reader.read([(tar, len(tar))])
    warnings = reader.index(Digest.of(tar)).warnings
    assert len(warnings) == 4 and warnings[-1] == "and 7 more warnings"


@pytest.mark.parametrize("end", [END, bytes(512), bytes(10240), END + b"anything after it", b""])
def test_ends_of_archive(end: bytes) -> None:
    assert len(entries(member(b"f", b"x"), end=end)) == 1


def test_an_empty_archive_is_valid() -> None:
    assert len(read_tar(END)) == 0
    index = read_tar(b"")
    assert len(index) == 0 and "empty" in index.warnings[0]


def test_a_lone_zero_block_is_refused() -> None:
    with pytest.raises(InvalidImage, match="single zero block"):
        entries(member(b"a"), bytes(512), member(b"b"))


@pytest.mark.parametrize("size", [512, 1024, 4096, 512 * 13])
def test_chunks_may_end_anywhere(size: int) -> None:
    tar = b"".join(
        [
            *sparse_forms().values(),
            member(b"big", os.urandom(5000)),
            long(b"nn/" * 700 + b"n"),
            member(b"x", b"1" * 512),
            pax((b"path", b"p" * 200), (b"SCHILY.xattr.user.x", b"v" * 3000)),
            member(b"y", b"2" * 700),
            member(b"z"),
            END,
            b"junk",
        ]
    )
    assert list(in_chunks(tar, size).entries()) == list(read_tar(tar).entries())


def test_many_entries_cross_batches() -> None:
    tar = (
        b"".join(pax((b"mtime", b"%d.25" % i)) + member(b"d/%05d" % i, b"%d" % i) for i in range(9999, -1, -1))
        + END
    )
    found = in_chunks(tar, 1 << 16)
    assert found.path.tolist() == [b"d/%05d" % i for i in range(10000)]
    assert found.mtime.tolist() == list(range(10000)) and set(found.mtime_ns.tolist()) == {250_000_000}
    assert found.sha256[7].tobytes() == sha256(b"7")


def test_a_batch_of_large_headers_is_decoded_early() -> None:
    value = b"v" * 60_000
    tar = (
        b"".join(
            pax((b"SCHILY.xattr.user.x", value + b"%d" % (i % 2)), *((b"V.%d" % k, value) for k in range(9)))
            + member(b"f%04d" % i)
            for i in range(120)
        )
        + END
    )
    found = read_tar(tar)
    assert len(found) == 120 and len(found.xattr_sets) == 3


# --- oracles ---------------------------------------------------------------------------------------------------


Seen = tuple[Kind, int, int, int, int, bytes, tuple[int, int], bytes]


def seen_by_tarfile(tar: bytes) -> dict[bytes, Seen]:
    kinds = {
        tarfile.DIRTYPE: Kind.DIR,
        tarfile.SYMTYPE: Kind.SYMLINK,
        tarfile.LNKTYPE: Kind.HARDLINK,
        tarfile.FIFOTYPE: Kind.FIFO,
        tarfile.CHRTYPE: Kind.CHAR,
        tarfile.BLKTYPE: Kind.BLOCK,
    }
    found = {}
    with tarfile.open(fileobj=io.BytesIO(tar), encoding="utf-8", errors="surrogateescape") as archive:
        for m in archive:
            path = os.fsencode(m.name).strip(b"/")
            kind = kinds.get(m.type, Kind.REG)
            file = archive.extractfile(m) if kind is Kind.REG else None
            found[path] = (
                kind, m.mode & 0o7777, m.uid, m.gid, m.size if kind is Kind.REG else 0,
                os.fsencode(m.linkname) if kind in (Kind.SYMLINK, Kind.HARDLINK) else b"",
                (m.devmajor, m.devminor) if kind in (Kind.CHAR, Kind.BLOCK) else (0, 0),
                b"" if file is None else sha256(file.read()),
            )  # fmt: skip
    return found


def seen_by_us(index: Index) -> dict[bytes, Seen]:
    return {
        e.path: (e.kind, e.perm, e.uid, e.gid, e.size, e.link, (e.major, e.minor), e.sha256)
        for e in index.entries()
    }


part = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=60
).filter(lambda text: text not in (".", "..") and not text.startswith(".wh.") and len(text.encode()) <= 255)
paths = st.lists(part, min_size=1, max_size=4).map("/".join)


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    fmt = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    names = draw(st.lists(paths, unique=True, max_size=8))
    # Names that lie below each other would have to be folders: keep those apart.
    names = [n for n in names if not any(o != n and (o + "/").startswith(n + "/") for o in names)]
    out = io.BytesIO()
    big = fmt != tarfile.USTAR_FORMAT
    ids = st.integers(0, 0xFFFFFFFE if big else 0o7777777)
    with tarfile.open(fileobj=out, mode="w", format=fmt, encoding="utf-8") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.type = draw(
                st.sampled_from(
                    [
                        tarfile.REGTYPE,
                        tarfile.AREGTYPE,
                        tarfile.DIRTYPE,
                        tarfile.SYMTYPE,
                        tarfile.FIFOTYPE,
                        tarfile.CHRTYPE,
                        tarfile.BLKTYPE,
                        tarfile.CONTTYPE,
                    ]
                )
            )
            info.mode = draw(st.integers(0, 0o7777))
            info.uid, info.gid = draw(ids), draw(ids)
            info.mtime = draw(st.integers(-(1 << 35) if fmt == tarfile.GNU_FORMAT else 0, (1 << 33) - 1))
            data = b""
            if info.isreg():
                data = draw(st.binary(max_size=1500))
                info.size = len(data)
            elif info.issym():
                info.linkname = draw(paths)
            elif info.isdev():
                info.devmajor, info.devminor = draw(st.integers(0, 4095)), draw(st.integers(0, 1048575))
            try:
                archive.addfile(info, io.BytesIO(data))
            except ValueError:  # what ustar cannot hold
                assert fmt == tarfile.USTAR_FORMAT
    return out.getvalue()


@settings(max_examples=150 * FUZZ, deadline=None, suppress_health_check=list(HealthCheck))
@given(archives())
def test_what_tarfile_reads_we_read(tar: bytes) -> None:
    # tarfile strips what looks like trailing slashes and nothing else; the generator makes no others.
    index = read_tar(tar)
    assert seen_by_us(index) == seen_by_tarfile(tar)
    assert list(in_chunks(tar, 1024).entries()) == list(index.entries())


@settings(max_examples=300 * FUZZ, deadline=None, suppress_health_check=list(HealthCheck))
@given(archives(), st.data())
def test_a_damaged_archive_is_an_error_of_ours_or_reads_as_an_index(tar: bytes, data: st.DataObject) -> None:
    damaged = bytearray(tar)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(tar) - 1))] = data.draw(st.integers(0, 255))
    try:
        index = read_tar(bytes(damaged[: data.draw(st.integers(0, len(tar)))]))
    except LayerkitError as e:
        assert e.exit_code == 3
    else:
        assert list(Index.of(index.entries(), index.diff_id, index.tar_size).entries()) == list(index.entries())


@pytest.fixture
def real_tree(tmp_path: Path) -> Path:
    """Return a folder with what GNU tar can store: links, holes, devices, xattrs, ACLs, odd names and times."""
    need_root()
    need_tool("tar", "setfacl", "setfattr")
    root = tmp_path / "root"
    (root / "d" / ("n" * 120) / ("m" * 120)).mkdir(parents=True)
    (root / "d" / "f").write_bytes(b"hello")
    (root / "d" / "suid").write_bytes(b"x")
    (root / "d" / "suid").chmod(0o4711)
    (root / "d" / ("n" * 120) / ("m" * 120) / "deep").write_bytes(b"deep" * 1000)
    os.link(root / "d" / "f", root / "linked")
    (root / "sym").symlink_to("t" * 150)
    os.mkfifo(root / "fifo")
    os.mknod(root / "null", 0o20666, os.makedev(1, 3))
    (root / "d" / os.fsdecode(b"\xff\xfe bad \n utf-8")).write_bytes(b"")
    with (root / "holes").open("wb") as f:
        for i in range(40):
            f.seek(i * 65536)
            f.write(b"%04d" % i * 1024)
        f.truncate(5_000_000)
    with (root / "hole").open("wb") as f:
        f.truncate(300_000)
    os.utime(root / "d" / "f", ns=(0, -1_500_000_001))
    os.utime(root / "sym", ns=(0, 1_700_000_000_123_456_789), follow_symlinks=False)
    os.chown(root / "d" / "suid", 3_000_000, 70_000)
    (root / "d" / "suid").chmod(0o6711)
    os.setxattr(root / "d" / "f", "user.raw", b"\0\n=\xff")
    os.setxattr(root / "d" / "f", "trusted.empty", b"")
    subprocess.run(["setfacl", "-m", "u:1234:rwx,g:77:r", root / "d" / "f"], check=True)
    subprocess.run(["setfacl", "-d", "-m", "u:99:rx", root / "d"], check=True)
    return root


@pytest.mark.parametrize("form", ["v7", "ustar", "gnu", "oldgnu", "pax-0.0", "pax-0.1", "pax-1.0"])
def test_what_gnu_tar_writes_we_read(real_tree: Path, form: str) -> None:
    if form in ("v7", "ustar"):
        # What these formats cannot hold at all.
        for path in ("sym", "null", "fifo") if form == "v7" else ("sym",):
            (real_tree / path).unlink()
        shutil.rmtree(real_tree / "d" / ("n" * 120))
        os.chown(real_tree / "d" / "suid", 1, 2)
        os.utime(real_tree / "d" / "f", ns=(0, 0))
    args = [f"--format={form.partition('-')[0]}", "--sparse", "--sort=name"]
    if form.startswith("pax"):
        args += [f"--sparse-version={form[4:]}", "--xattrs", "--xattrs-include=*", "--acls"]
    elif form in ("v7", "ustar"):
        args.remove("--sparse")
    tar = subprocess.run(
        ["tar", *args, "-cf", "-", "-C", real_tree, "."], stdout=subprocess.PIPE, check=True
    ).stdout
    index = read_tar(tar)
    found = {e.path: e for e in index.entries()}
    on_disk = {b""} | {
        os.fsencode(Path(folder_) / name)[len(os.fsencode(real_tree)) + 1 :]
        for folder_, folders, files in os.walk(real_tree)
        for name in folders + files
    }
    assert set(found) == on_disk
    for name, e in found.items():
        place = os.path.join(os.fsencode(real_tree), name)
        stat = os.lstat(place)
        if e.kind is Kind.HARDLINK:
            assert os.path.samefile(place, os.path.join(os.fsencode(real_tree), e.link))
            continue
        assert (e.kind << 12 | e.perm, e.uid, e.gid) == (stat.st_mode, stat.st_uid, stat.st_gid), name
        exact = stat.st_mtime_ns if form.startswith("pax") else stat.st_mtime_ns // 10**9 * 10**9
        assert e.mtime * 10**9 + e.mtime_ns == exact, name
        if e.kind is Kind.REG:
            content = Path(os.fsdecode(place)).read_bytes()
            assert (e.size, e.sha256) == (len(content), sha256(content)), name
            if e.sparse is None:
                assert tar[e.offset : e.offset + e.size] == content or not content
            else:
                assert (
                    b"".join(content[a : a + n] for a, n in e.sparse)
                    == tar[e.offset :][: sum(n for _, n in e.sparse)]
                )
        elif e.kind is Kind.SYMLINK:
            assert e.link == os.readlink(place)
        elif e.kind is Kind.CHAR:
            assert (e.major, e.minor) == (1, 3)
        if form.startswith("pax"):
            have = {
                n: os.getxattr(place, n, follow_symlinks=False) for n in os.listxattr(place, follow_symlinks=False)
            }
            assert dict(e.xattrs) == {os.fsencode(n): v for n, v in have.items()}, name
    if "--sparse" in args:
        assert found[b"holes"].sparse is not None and len(found[b"holes"].sparse) == 40
        assert found[b"hole"].sparse == ()


def test_limits_are_bounds_not_hints() -> None:
    tar = pax((b"SCHILY.xattr.user.x", b"v" * 100)) + member(b"a/b/c", b"x" * 100) + END

    def read(**bounds: int) -> Index:
        reader = TarReader("layer", Limits(**bounds))
        reader.read([(tar, len(tar))])
        return reader.index(Digest.of(tar))

    for name, bound in {
        "file_bytes": 100, "path_bytes": 5, "name_bytes": 1, "path_depth": 3, "entries_per_layer": 1,
        "xattr_value_bytes": 100, "xattr_name_bytes": 6, "xattrs_per_entry": 1, "pax_header_bytes": 200,
        "metadata_bytes_per_layer": 111,
    }.items():  # fmt: skip
        read(**{name: bound})
        with pytest.raises(LimitExceeded) as e:
            read(**{name: 99 if name in ("pax_header_bytes", "metadata_bytes_per_layer") else bound - 1})
        assert e.value.limit == name
