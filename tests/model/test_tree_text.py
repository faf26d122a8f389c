"""The digest of a tree: what counts in it, told by the tree's text, and one that stays for good."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_text import tree_text
from trees import file, folder, tree_of

from layerkit.model.digest import Digest
from layerkit.model.entry import Entry, Kind
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


def test_golden_text() -> None:
    tree = golden_tree()
    lines = list(tree_text(tree))
    path = GOLDEN / "tree.txt"
    if os.environ.get("LAYERKIT_WRITE_GOLDENS"):
        path.write_text("\n".join(lines) + "\n")
    assert lines == path.read_text("ascii").splitlines()
    assert str(tree.digest()) == GOLDEN_DIGEST


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


@settings(max_examples=100 * int(os.environ.get("LAYERKIT_TEST_FUZZ", "1")), deadline=None)
@given(trees(), trees())
def test_texts_are_equal_exactly_for_equal_digests(a: Tree, b: Tree) -> None:
    ours, theirs = list(tree_text(a)), list(tree_text(b))
    assert all(line.isascii() and line.isprintable() for line in ours)
    assert (ours == theirs) == (a.digest() == b.digest())


def test_text_and_digest_see_another_grouping_of_hard_links() -> None:
    linked = tree_of([file(b"a"), Entry(b"b", Kind.HARDLINK, link=b"a")])
    apart = tree_of([file(b"a"), file(b"b")])
    assert "/b link /a" in tree_text(linked)
    assert not any(" link " in line for line in tree_text(apart))
    assert linked.digest() != apart.digest()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (file(b"x", b"1"), file(b"x", b"2")),
        (file(b"x"), file(b"x", uid=1000)),
        (file(b"x"), file(b"x", gid=1000)),
        (file(b"x"), file(b"x", mtime=1)),
        (file(b"x"), file(b"x", mtime_ns=1)),
        (file(b"x"), file(b"x", perm=0o600)),
        (file(b"x"), file(b"x", xattrs=((b"user.a", b" "),))),
        (file(b"x"), folder(b"x")),
        (file(b"x"), Entry(b"x", Kind.FIFO)),
        (Entry(b"x", Kind.SYMLINK, link=b"a"), Entry(b"x", Kind.SYMLINK, link=b"b")),
        (Entry(b"x", Kind.CHAR, major=1, minor=2), Entry(b"x", Kind.CHAR, major=2, minor=1)),
    ],
)
def test_each_attribute_shows_in_text_and_digest(one: Entry, other: Entry) -> None:
    a, b = (tree_of([entry, file(b"same")]) for entry in (one, other))
    assert a.digest() != b.digest()
    assert next(x for x, y in zip(tree_text(a), tree_text(b), strict=True) if x != y).startswith("/x ")


def test_how_a_tree_is_stored_shows_in_neither() -> None:
    tree = golden_tree()
    bare = replace(tree, layers=(), warnings=())
    assert list(tree_text(tree)) == list(tree_text(bare))
    assert tree.digest() == bare.digest()
