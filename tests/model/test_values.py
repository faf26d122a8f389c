"""The values that everything else is made of: strings, indexes, trees and what a tree must keep to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trees import file, folder, tree_of

from layerkit.model.descriptor import Platform
from layerkit.model.digest import Digest
from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import InvalidImage, UsageError
from layerkit.model.index import Index, empty, path_key
from layerkit.model.sparse import SparseMaps
from layerkit.model.strings import EMPTY, Strings
from layerkit.model.tree import Tree

TEXTS = st.lists(st.binary(max_size=6), max_size=12)


@given(TEXTS, st.data())
def test_strings_are_a_list_of_bytes(texts: list[bytes], data: st.DataObject) -> None:
    strings = Strings.of(texts)
    assert list(strings) == strings.tolist() == texts
    assert strings.lengths.tolist() == list(map(len, texts))
    assert [strings[i] for i in range(len(texts))] == texts
    assert [strings[-i - 1] for i in range(len(texts))] == texts[::-1]
    rows = data.draw(st.lists(st.integers(0, max(0, len(texts) - 1)), max_size=9 if texts else 0))
    assert strings.take(np.array(rows, np.int64)).tolist() == [texts[row] for row in rows]
    assert strings[1:7:2].tolist() == texts[1:7:2]
    assert strings == Strings.of(iter(texts))


def test_strings_end() -> None:
    assert EMPTY.tolist() == [] and Strings.of([]) == EMPTY
    assert Strings.of([b"ab", b"c"]) != Strings.of([b"a", b"bc"])
    assert (Strings.of([b"a"]) == [b"a"]) is False
    for row in (1, -2):
        with pytest.raises(IndexError):
            Strings.of([b"a"])[row]


def test_sparse_maps() -> None:
    maps = SparseMaps.of([[(0, 2), (5, 1)], [], [(7, 3)]])
    assert [maps.extents(i) for i in range(len(maps))] == [((0, 2), (5, 1)), (), ((7, 3),)]
    assert [maps.stored_bytes(i) for i in range(3)] == [3, 0, 3]


@given(st.lists(st.binary(max_size=8).map(lambda b: b.replace(b"\0", b"/")), max_size=20))
def test_path_key_keeps_subtrees_together(paths: list[bytes]) -> None:
    rows = sorted(set(paths), key=path_key)
    for path in rows:
        inside = [i for i, p in enumerate(rows) if p.startswith(path + b"/")]
        assert inside == list(range(rows.index(path) + 1, rows.index(path) + 1 + len(inside)))


def test_index_of_sorts_and_the_last_of_a_path_wins() -> None:
    rows = [
        file(b"a/c", b"old"), Entry(b"a", Kind.OPAQUE), file(b"a-b", sparse=((1, 1),)), folder(b"a"),
        Entry(b"s", Kind.SYMLINK, link=b"x"), file(b"a/c", b"new!", xattrs=((b"user.a", b"1"),)),
        Entry(b"a", Kind.WHITEOUT), Entry(b"l", Kind.HARDLINK, link=b"x"),
    ]  # fmt: skip
    index = Index.of(rows, Digest.of(b""))
    shown = [(e.path, e.kind) for e in index.entries()]
    assert shown == [
        (b"a", Kind.OPAQUE), (b"a", Kind.WHITEOUT), (b"a", Kind.DIR), (b"a/c", Kind.REG), (b"a-b", Kind.REG),
        (b"l", Kind.HARDLINK), (b"s", Kind.SYMLINK),
    ]  # fmt: skip
    assert list(index.entries())[3:5] == [rows[5], rows[2]]
    assert index.links.tolist() == [b"x"]
    assert index.xattr_sets == ((), ((b"user.a", b"1"),))
    assert Index.of(index.entries(), index.diff_id).path == index.path
    assert len(empty(Digest.of(b""))) == 0


def test_digests_and_platforms() -> None:
    digest = Digest.of(b"x")
    assert Digest.parse(str(digest)) == digest and digest.hasher().name == "sha256"
    for text in ("", "sha256:", "sha256:" + "A" * 64, "md5:" + "a" * 32, "sha256:" + "a" * 63, f"{digest}\n"):
        with pytest.raises(InvalidImage):
            Digest.parse(text)
    assert str(Platform.parse("linux/arm64/v8")) == "linux/arm64/v8"
    for text in ("linux", "linux/", "a/b/c/d"):
        with pytest.raises(UsageError):
            Platform.parse(text)


def sample() -> Tree:
    return tree_of([
        folder(b"d"), file(b"d/f", b"x"), Entry(b"d/l", Kind.HARDLINK, link=b"d/f"),
        Entry(b"s", Kind.SYMLINK, link=b"d"), Entry(b"t", Kind.SYMLINK, link=b"dd"),
        file(b"x", xattrs=((b"user.a", b"1"),)),
    ])  # fmt: skip


def changed(column: str, row: int, value: int) -> Callable[[Tree], Tree]:
    def change(tree: Tree) -> Tree:
        values = getattr(tree, column).copy()
        values[row] = value
        return replace(tree, **{column: values})

    change.__name__ = f"{column}[{row}]={value}"
    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (changed("parent", 0, 0), "no root"),
        (lambda t: replace(t, name=Strings.of([b"x", *t.name.tolist()[1:]])), "no root"),
        (changed("mode", 0, 0o100644), "root is not a directory"),
        (changed("parent", 2, 5), "a parent after its child"),
        (changed("parent", 2, 2), "a parent after its child"),
        (changed("parent", 2, -1), "a second root"),
        (changed("parent", 5, 4), "a parent that is no directory"),
        (changed("inode", 2, 3), "inodes not numbered by first name"),
        (changed("inode", 6, 4), "inodes not numbered by first name"),
        (changed("inode", 6, 6), "inodes not numbered by first name"),
        (changed("inode", 6, -1), "inodes not numbered by first name"),
        (changed("inode", 3, 1), "a directory with two names"),
        (changed("parent", 5, 1), "names of a directory"),
        (lambda t: replace(t, name=Strings.of([*t.name.tolist()[:-1], b"t"])), "names of a directory"),
        (lambda t: replace(t, name=Strings.of([*t.name.tolist()[:-1], b"a"])), "names of a directory"),
        (lambda t: replace(t, name=Strings.of([*t.name.tolist()[:-1], b"y/z"])), "a name that is no name"),
        (lambda t: replace(t, name=Strings.of([*t.name.tolist()[:-1], b""])), "a name that is no name"),
        (lambda t: replace(t, name=Strings.of(t.name.tolist()[:-1])), "column lengths"),
        (lambda t: replace(t, uid=t.uid[:-1]), "column lengths"),
        (changed("mtime_ns", 1, 1_000_000_000), "nanoseconds"),
        (changed("target", 3, 9), "a symlink target"),
        (changed("target", 3, -1), "a symlink target"),
        (changed("target", 2, 0), "a symlink target"),
        (changed("xattr", 5, 9), "an xattr set"),
        (lambda t: replace(t, xattr_sets=t.xattr_sets[1:]), "the empty xattr set"),
    ],
)
def test_check_finds_what_is_broken(change: Callable[[Tree], Tree], problem: str) -> None:
    sample().check()
    with pytest.raises(InvalidImage, match=problem):
        change(sample()).check()


@pytest.mark.parametrize(
    "change",
    [
        *(changed(column, 2, 7) for column in ("uid", "gid", "size", "mtime", "mtime_ns", "major", "minor")),
        changed("mode", 2, 0o100600),
        changed("xattr", 2, 1),
        changed("inode", 3, 3),
        lambda t: replace(t, sha256=t.sha256[::-1]),
        lambda t: replace(t, targets=Strings.of([b"dd", b"d"])),
        lambda t: replace(t, targets=Strings.of([b"dd", b""])),
        lambda t: replace(t, xattr_sets=((), ((b"user.b", b"1"),))),
        lambda t: replace(t, xattr_sets=((), ((b"user.a", b"2"),))),
        lambda t: replace(t, xattr_sets=((), ((b"user.a1", b""),))),
        lambda t: replace(t, name=Strings.of([*t.name.tolist()[:-2], b"tx", b""])),
        lambda t: replace(t, name=Strings.of([*t.name.tolist()[:-1], b"y"])),
    ],
)
def test_digest_changes_with_all_that_shows(change: Callable[[Tree], Tree]) -> None:
    assert change(sample()).digest() != sample().digest()


@pytest.mark.parametrize(
    "change",
    [
        changed("layer", 2, 0),
        changed("offset", 2, 512),
        changed("nlink", 2, 9),
        lambda t: replace(t, warnings=("odd",), layers=(Digest.of(b""),)),
        # Tables may hold what nothing uses, twice, or in another order.
        lambda t: replace(t, xattr_sets=(*t.xattr_sets, ((b"user.unused", b""),))),
        lambda t: replace(t, xattr=t.xattr * 2, xattr_sets=((), ((b"user.unused", b""),), t.xattr_sets[1])),
    ],
)
def test_digest_does_not_change_with_what_does_not_show(change: Callable[[Tree], Tree]) -> None:
    assert change(sample()).digest() == sample().digest()


def test_paths_and_nodes() -> None:
    tree = sample()
    assert [tree.path(row) for row in range(len(tree))] == tree.paths()
    assert [n.path for n in tree.nodes()] == tree.paths()
    assert tree.inode_path(int(tree.inode[3])) == b"d/f"
    assert [tree.path(row) for row in tree.first_name().tolist()] == [b"", b"d", b"d/f", b"s", b"t", b"x"]
