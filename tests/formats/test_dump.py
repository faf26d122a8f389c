"""The canonical text of a tree: what it looks like, and that it loses nothing that shows."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import file, folder, tree_of

from layerkit.formats import dump
from layerkit.model.digest import Digest
from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import InvalidImage
from layerkit.model.index import Index
from layerkit.model.tree import Tree
from layerkit.model.trees.merge import merge

GOLDEN = Path(__file__).parent / "golden"
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")

GOLDEN_LAYERS = [
    [
        folder(b"", 0o755, mtime=1_700_000_000),
        folder(b"bin"),
        file(b"bin/su", b"su", perm=0o4755),
        file(b"bin/ping", b"ping", xattrs=((b"security.capability", CAPABILITY),)),
        folder(b"tmp", 0o1777, mtime=-2, mtime_ns=500_000_000),
        folder(b"etc"),
        file(b"etc/gone", b"gone"),
        file(b"etc/passwd", b"root:x:0:0::/root:/bin/sh\n", uid=0, gid=42),
        folder(b"etc-extra"),
        Entry(b"lib", Kind.SYMLINK, 0o777, link=b"usr/lib with space\\"),
        Entry(b"dev/null", Kind.CHAR, 0o666, major=1, minor=3),
        Entry(b"dev/sda", Kind.BLOCK, 0o660, gid=6, major=8),
        Entry(b"run/pipe", Kind.FIFO, 0o600, uid=4294967294, gid=65534),
    ],
    [
        Entry(b"etc/gone", Kind.WHITEOUT),
        Entry(b"bin/sudo", Kind.HARDLINK, link=b"bin/su"),
        file(b"etc/caf\xc3\xa9 \xff", b"", uid=1000, xattrs=((b"user.a=b", b"\0="), (b"user.empty", b""))),
    ],
]
GOLDEN_DIGEST = "sha256:be66879bff9ab87e7e58e427a6524c7ec6fe6032f34ca6e2077488373a411aae"


def golden_tree() -> Tree:
    return merge([Index.of(entries, Digest.of(b"%d" % i)) for i, entries in enumerate(GOLDEN_LAYERS)])


def test_golden_dump() -> None:
    tree = golden_tree()
    lines = list(dump.dump(tree))
    path = GOLDEN / "tree.dump"
    if os.environ.get("LAYERKIT_WRITE_GOLDENS"):
        path.write_text("\n".join(lines) + "\n")
    assert lines == path.read_text("ascii").splitlines()
    assert str(tree.digest()) == GOLDEN_DIGEST


def test_load_of_the_golden_is_the_tree() -> None:
    with (GOLDEN / "tree.dump").open() as lines:
        tree = dump.load(lines)
    assert str(tree.digest()) == GOLDEN_DIGEST
    assert tree.nlink.tolist() == golden_tree().nlink.tolist()


NAMES = st.binary(min_size=1, max_size=6).map(lambda b: b.replace(b"/", b"x").replace(b"\0", b"y")).filter(
    lambda b: b not in (b".", b"..")
)  # fmt: skip
XATTRS = st.dictionaries(st.binary(min_size=1, max_size=4), st.binary(max_size=4), max_size=2).map(
    lambda d: tuple(sorted(d.items()))
)
NUMBERS = st.sampled_from([0, 1, 65534, 2**32 - 2])


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    entries: list[Entry] = []
    folders, files = [b""], [b""]
    for name in draw(st.lists(NAMES, max_size=8, unique=True)):
        path = b"/".join(p for p in (draw(st.sampled_from(folders)), name) if p)
        kind = draw(st.sampled_from([*list(Kind)[:6], Kind.HARDLINK]))
        if kind is Kind.HARDLINK and len(files) > 1:
            entries.append(Entry(path, kind, link=draw(st.sampled_from(files[1:]))))
            continue
        if kind is Kind.HARDLINK:
            kind = Kind.REG
        (folders if kind is Kind.DIR else files).append(path)
        device = kind in (Kind.CHAR, Kind.BLOCK)
        entries.append(Entry(
            path, kind, draw(st.integers(0, 0o7777)), draw(NUMBERS), draw(NUMBERS),
            draw(st.integers(-(2**63), 2**63 - 1)), draw(st.integers(0, 999_999_999)),
            size=draw(st.integers(0, 2**63 - 1)) if kind is Kind.REG else 0,
            major=draw(NUMBERS) if device else 0, minor=draw(NUMBERS) if device else 0,
            link=draw(st.binary(max_size=5)) if kind is Kind.SYMLINK else b"",
            xattrs=draw(XATTRS), sha256=draw(st.binary(min_size=32, max_size=32)) if kind is Kind.REG else b"",
        ))  # fmt: skip
    return merge([Index.of(entries, Digest.of(b""))])


@settings(max_examples=200 * int(os.environ.get("LAYERKIT_TEST_FUZZ", "1")), deadline=None)
@given(trees())
def test_load_is_the_inverse_of_dump(tree: Tree) -> None:
    lines = list(dump.dump(tree))
    assert all(line.isascii() and line.isprintable() for line in lines)
    again = dump.load(lines)
    assert again.digest() == tree.digest()
    assert list(dump.dump(again)) == lines
    assert not list(dump.diff(tree, again))


@settings(max_examples=100 * int(os.environ.get("LAYERKIT_TEST_FUZZ", "1")), deadline=None)
@given(trees(), trees())
def test_diff_is_empty_exactly_for_equal_digests(a: Tree, b: Tree) -> None:
    assert bool(list(dump.diff(a, b))) == (a.digest() != b.digest())


def test_diff_names_paths_and_attributes() -> None:
    a = tree_of([file(b"d/x", b"1"), file(b"same"), Entry(b"old", Kind.FIFO)])
    b = tree_of([file(b"d/x", b"2", uid=1000, xattrs=((b"user.a", b" "),)), file(b"same"), folder(b"new")])
    x, y = (node.sha256.hex() for tree in (a, b) for node in tree.nodes() if node.path == b"d/x")
    assert list(dump.diff(a, b)) == [
        "/d/x: uid 0 -> 1000",
        "/d/x: xattrs none -> user.a=\\x20",
        f"/d/x: sha256 {x} -> {y}",
        "+ /new directory",
        "- /old fifo",
    ]


def test_diff_sees_another_grouping_of_hard_links() -> None:
    linked = tree_of([file(b"a"), Entry(b"b", Kind.HARDLINK, link=b"a")])
    apart = tree_of([file(b"a"), file(b"b")])
    assert list(dump.diff(linked, apart)) == ["/b: link of /a -> /b"]


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("layerkit-tree 1", "layerkit-tree 2", "line 1: want"),
        ("/bin directory", "/bin folder", "unknown kind"),
        ("/bin directory", "/b\\69n directory", "escaped"),
        ("/bin directory", "/bi\\x6e directory", "escaped"),
        ("/bin directory", "/bin\\x00 directory", "not a name"),
        ("/bin directory", "/.. directory", "not a name"),
        ("/bin directory", "/none/bin directory", "does not stand before it"),
        ("link /bin/su", "link /bin/sudo", "does not stand before it"),
        ("/bin directory 0755", "/bin directory 755", "not a mode"),
        ("0.000000000 1:3", "0.0 1:3", "not a mode and a time"),
        ("0:6", "0:4294967296", "not a number"),
        ("0:6", "0:06", "not a number"),
        ("user.empty=", "user.empty", "NAME=VALUE"),
        ("user.empty=", "user.a=", "rising"),
        ("/etc-extra directory", "/a directory", "canonical order"),
        ("/etc-extra directory", "/etc directory", "comes twice"),
    ],
)
def test_load_refuses_what_dump_does_not_write(old: str, new: str, why: str) -> None:
    text = (GOLDEN / "tree.dump").read_text()
    assert old in text
    with pytest.raises(InvalidImage, match=why):
        dump.load(text.replace(old, new, 1).splitlines())


def test_load_of_nothing_and_of_no_root() -> None:
    for lines in ([], [dump.HEADER], [dump.HEADER, "/a directory 0755 0:0 0.000000000"]):
        with pytest.raises(InvalidImage):
            dump.load(lines)


def test_a_tree_with_storage_dumps_like_one_without() -> None:
    tree = golden_tree()
    bare = replace(tree, layers=(), warnings=())
    assert list(dump.dump(tree)) == list(dump.dump(bare))
