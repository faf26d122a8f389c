"""The tar rendering, read back by the standard library and by GNU tar."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge import xattrs
from needs import need_root, need_tool
from trees import file, folder, tree_of

from layerkit.formats.meta.tar import write_tar
from layerkit.formats.tar.writer import END, blank_header, decimal_time, padding, record, seal, xattr_records
from layerkit.metaonly import METACOPY_VALUE, Namespace, data_path, metadata_layer
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import LossyResult
from layerkit.model.tree import Tree
from layerkit.unpack import index_layer

CAPABILITY = bytes.fromhex("0100000300300000000000000000000000000000") + bytes(4)
KINDS = {
    tarfile.REGTYPE: Kind.REG, tarfile.SYMTYPE: Kind.SYMLINK, tarfile.DIRTYPE: Kind.DIR, tarfile.CHRTYPE: Kind.CHAR,
    tarfile.BLKTYPE: Kind.BLOCK, tarfile.FIFOTYPE: Kind.FIFO, tarfile.LNKTYPE: Kind.HARDLINK,
}  # fmt: skip

EVERYTHING = [
    folder(b"", 0o755, uid=100000, gid=100000, mtime=1_700_000_000, mtime_ns=999_999_999),
    folder(b"d", 0o3751, uid=7, gid=8, mtime=-2, mtime_ns=500_000_000),
    file(b"d/f", b"hello", perm=0o640, uid=100001, gid=4294967294, mtime=1, mtime_ns=1),
    file(b"d/\xff\nx", b"hello", perm=0o000, mtime=1),
    file("d/naïve".encode(), b"hello", perm=0o000, mtime=-1, mtime_ns=999_999_999),
    file(b"d/empty", b"", perm=0o444, uid=5),
    file(b"d/setuid", b"s", perm=0o6755, uid=9, gid=9, xattrs=((b"security.capability", CAPABILITY),)),
    file(b"d/xattrs", b"s", xattrs=((b"user.binary", bytes(range(256))), (b"user.long", b"x" * 900))),
    Entry(b"d/link", Kind.SYMLINK, 0o777, uid=3, gid=4, mtime=9, mtime_ns=9, link=b"../" * 50 + b"nowhere"),
    Entry(b"d/odd", Kind.SYMLINK, 0o777, link=b"\xfe/x"),
    Entry(b"a-link", Kind.HARDLINK, link=b"d/f"),
    Entry(b"z/again", Kind.HARDLINK, link=b"d/setuid"),
    Entry(b"z/" + b"long" * 40 + b"/\xff", Kind.HARDLINK, link=b"d/odd"),
    file(b"z/" + b"long" * 40 + b"/" + b"name" * 60, b"hello"),
    Entry(b"dev/null", Kind.CHAR, 0o666, gid=5, major=1, minor=3, mtime=5),
    Entry(b"dev/disk", Kind.BLOCK, 0o660, uid=1 << 21, gid=(1 << 21) - 1, major=259, minor=70000),
    Entry(b"dev/fifo", Kind.FIFO, 0o1622, uid=1),
    Entry(b"huge", Kind.REG, size=(1 << 42) + 1, sha256=bytes(range(32)), mtime=1 << 33),
]


def tar_of(tree: Tree, namespace: Namespace = Namespace.TRUSTED) -> bytes:
    out = io.BytesIO()
    write_tar(metadata_layer(tree, namespace), out)
    return out.getvalue()


def members(data: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8", errors="surrogateescape") as archive:
        return archive.getmembers()


def as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def expected_xattrs(tree: Tree, path: bytes, namespace: Namespace = Namespace.TRUSTED) -> dict[bytes, bytes]:
    node = next(node for node in tree.nodes() if node.path == path)
    pairs = dict(node.xattrs)
    if node.mode >> 12 == Kind.REG and node.size:
        pairs[namespace.prefix + b"metacopy"] = METACOPY_VALUE
        pairs[namespace.prefix + b"redirect"] = b"/" + data_path(node.sha256)
    return pairs


def complaints(stderr: bytes) -> list[bytes]:
    """Return what GNU tar says beyond two remarks: it has no use for hdrcharset, and finds 1969 old."""
    known = (b"'hdrcharset'", b"implausibly old time stamp", b"in the future")
    return [line for line in stderr.splitlines() if not any(text in line for text in known)]


@pytest.mark.parametrize("namespace", Namespace)
def test_the_standard_library_reads_every_attribute(namespace: Namespace) -> None:
    tree = tree_of(EVERYTHING)
    found = members(tar_of(tree, namespace))
    assert [b"" if m.name == "." else as_bytes(m.name) for m in found] == tree.paths()
    first: dict[int, bytes] = {}
    for member, node in zip(found, tree.nodes(), strict=True):
        kind = KINDS[member.type]
        original = first.setdefault(node.inode, node.path)
        assert (member.mode, member.uid, member.gid) == (node.mode & 0o7777, node.uid, node.gid)
        assert (member.uname, member.gname) == ("", "")
        seconds = Fraction(member.pax_headers.get("mtime", str(member.mtime)))
        assert seconds == Fraction(node.mtime * 10**9 + node.mtime_ns, 10**9)
        if original != node.path:
            assert (kind, as_bytes(member.linkname)) == (Kind.HARDLINK, original)
            continue
        assert kind == node.mode >> 12
        assert member.size == (node.size if kind is Kind.REG else 0)
        assert (member.devmajor, member.devminor) == (node.major, node.minor)
        assert as_bytes(member.linkname) == node.target
        pairs = {
            as_bytes(key.removeprefix("SCHILY.xattr.")): as_bytes(value)
            for key, value in member.pax_headers.items()
            if key.startswith("SCHILY.xattr.")
        }
        assert pairs == expected_xattrs(tree, node.path, namespace)
        if kind is Kind.REG and node.size:
            runs: object = member.sparse  # pairs, whatever typeshed says
            assert runs == [(node.size, 0)]


def test_gnu_tar_lists_it_without_complaint() -> None:
    need_tool("tar")
    tree = tree_of(EVERYTHING)
    result = subprocess.run(["tar", "-t", "-v"], input=tar_of(tree), capture_output=True, check=True)
    assert complaints(result.stderr) == []
    assert len(result.stdout.splitlines()) == len(tree)


def test_our_own_reader_gives_the_tree_back() -> None:
    # Without the file of 4 TiB: the reader hashes holes, and bounds how many of them.
    tree = tree_of(EVERYTHING[:-1])
    data = tar_of(tree)

    descriptor = Descriptor("application/vnd.oci.image.layer.v1.tar", Digest.of(data), len(data))
    index = index_layer(io.BytesIO(data), descriptor, Digest.of(data))
    assert index.warnings == ()
    first: dict[int, bytes] = {}
    for entry, node in zip(index.entries(), tree.nodes(), strict=True):
        original = first.setdefault(node.inode, node.path)
        assert (entry.path, entry.perm, entry.uid, entry.gid) == (node.path, node.mode & 0o7777, node.uid, node.gid)
        assert (entry.mtime, entry.mtime_ns) == (node.mtime, node.mtime_ns)
        if original != node.path:
            assert (entry.kind, entry.link) == (Kind.HARDLINK, original)
            continue
        assert (entry.kind, entry.link) == (node.mode >> 12, node.target)
        assert (entry.major, entry.minor) == (node.major, node.minor)
        assert dict(entry.xattrs) == expected_xattrs(tree, node.path)
        if entry.kind is Kind.REG:
            assert (entry.size, entry.sparse) == (node.size, () if node.size else None)


def test_umoci_unpacks_all_but_the_overlay_xattrs(tmp_path: Path) -> None:
    """It drops ``trusted.overlay.*`` with a warning: a META goes through runtimes only as an artifact."""
    need_root()
    need_tool("umoci")
    tree = tree_of(EVERYTHING[:-1])
    (tmp_path / "meta.tar").write_bytes(tar_of(tree))
    for command in ("init --layout img", "new --image img:x", "raw add-layer --image img:x meta.tar",
                    "unpack --image img:x out"):  # fmt: skip
        subprocess.run(["umoci", *command.split()], cwd=tmp_path, check=True, capture_output=True)
    for node in tree.nodes():
        path = os.path.join(os.fsencode(tmp_path / "out/rootfs"), node.path)
        found = os.lstat(path)
        assert (found.st_mode, found.st_uid, found.st_gid) == (node.mode, node.uid, node.gid), node.path
        want = {key: value for key, value in expected_xattrs(tree, node.path).items() if b".overlay." not in key}
        if b"security.capability" in want:
            want[b"security.capability"] = bytes.fromhex("01000002") + CAPABILITY[4:20]
        assert {k: v for k, v in xattrs(path) if b".overlay." not in k} == want, node.path
        if not stat.S_ISDIR(found.st_mode):
            assert (found.st_size, found.st_mtime_ns) == (node.size, node.mtime * 10**9 + node.mtime_ns), node.path


def test_the_same_layer_is_the_same_bytes() -> None:
    tree = tree_of(EVERYTHING)
    assert tar_of(tree) == tar_of(tree_of(reversed(EVERYTHING)))


def test_more_entries_than_one_batch_with_links_across_them() -> None:
    entries = [file(b"%02d/f%05d" % (i % 50, i), b"%d" % i) for i in range(9000)]
    entries += [Entry(b"z/l%d" % i, Kind.HARDLINK, link=entries[i].path) for i in range(200)]
    tree = tree_of(entries)
    found = members(tar_of(tree))
    assert [as_bytes(m.name) for m in found[1:]] == tree.paths()[1:]
    assert {m.linkname for m in found if m.type == tarfile.LNKTYPE} == {e.path.decode() for e in entries[:200]}


def test_a_hard_link_repeats_the_capability_and_nothing_else() -> None:
    pairs = ((b"security.capability", CAPABILITY), (b"user.x", b"1"))
    tree = tree_of([file(b"a", b"x", xattrs=pairs), Entry(b"b", Kind.HARDLINK, link=b"a")])
    link = next(m for m in members(tar_of(tree)) if m.name == "b")
    assert set(link.pax_headers) == {"SCHILY.xattr.security.capability"}


def test_an_xattr_name_that_pax_cannot_write() -> None:
    with pytest.raises(LossyResult, match=r"^d/f: the xattr user\.a=b has '='"):
        tar_of(tree_of([file(b"d/f", b"x", xattrs=((b"user.a=b", b"v"),))]))


@given(st.binary(min_size=1, max_size=40), st.binary(max_size=11000))
def test_a_record_counts_itself(key: bytes, value: bytes) -> None:
    made = record(key, value)
    assert int(made.split(b" ")[0]) == len(made)
    assert made.endswith(b" " + key + b"=" + value + b"\n")


@pytest.mark.parametrize("length", [*range(1, 12), *range(85, 105), *range(985, 1005), *range(9985, 10005)])
def test_a_record_counts_itself_where_a_digit_is_added(length: int) -> None:
    assert int(record(b"k", b"v" * length).split(b" ")[0]) == len(record(b"k", b"v" * length))


@given(st.integers(-(1 << 62), 1 << 62), st.integers(0, 999_999_999))
def test_times_are_exact_decimals(seconds: int, nanoseconds: int) -> None:
    text = decimal_time(seconds, nanoseconds).decode()
    assert Fraction(text) == Fraction(seconds * 10**9 + nanoseconds, 10**9)
    assert not text.endswith(".") and ("." not in text or not text.endswith("0"))


part = st.binary(min_size=1, max_size=120).filter(
    lambda b: b"/" not in b and b"\0" not in b and b not in (b".", b"..")
)


@given(
    st.lists(part, min_size=1, max_size=4).map(b"/".join),
    st.sampled_from([Kind.REG, Kind.DIR, Kind.SYMLINK, Kind.HARDLINK, Kind.CHAR, Kind.FIFO]),
    st.integers(0, 0o7777),
    st.integers(0, (1 << 32) - 2),
    st.integers(0, 1 << 40),
    st.integers(-(1 << 40), 1 << 40),
    part,
    st.dictionaries(part.filter(lambda b: b"=" not in b), st.binary(max_size=600)),
)
def test_a_header_says_what_it_was_given(
    name: bytes, kind: Kind, perm: int, uid: int, size: int, mtime: int, link: bytes, pairs: dict[bytes, bytes]
) -> None:
    linked = kind in (Kind.SYMLINK, Kind.HARDLINK)
    size = size if kind is Kind.REG else 0
    given_xattrs = tuple(sorted((b"user." + key, value) for key, value in pairs.items()))
    link = link if linked else b""
    entry = Entry(name, kind, perm, uid, uid // 2, mtime, link=link)
    made = bytes(seal([blank_header(entry, size, xattr_records(given_xattrs, name))], [b""]))
    assert len(made) % 512 == 0
    # tarfile looks past the data for the next header, which need not be there for the first to be read.
    with tarfile.open(fileobj=io.BytesIO(made + END), encoding="utf-8", errors="surrogateescape") as archive:
        found = archive.next()
    assert found is not None
    assert as_bytes(found.name) == name.rstrip(b"/")
    assert (KINDS[found.type], found.mode, found.uid, found.gid) == (kind, perm, uid, uid // 2)
    assert (found.size, int(found.mtime)) == (size, mtime)
    assert as_bytes(found.linkname) == link
    read = {k: v for k, v in found.pax_headers.items() if k.startswith("SCHILY")}
    assert {as_bytes(k)[13:]: as_bytes(v) for k, v in read.items()} == dict(given_xattrs)


def test_padding_fills_blocks() -> None:
    assert [len(padding(n)) for n in (0, 1, 511, 512, 513)] == [0, 511, 1, 0, 511]
