"""The OCI rules of merging, one named case each; the names of others' errors stand in the comments."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from trees import file, folder

from layerkit.model.digest import Digest
from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import InvalidImage, LimitExceeded, UnsafeEntry
from layerkit.model.index import Index
from layerkit.model.limits import DEFAULT
from layerkit.model.tree import Node, Tree
from layerkit.model.trees.merge import merge

XATTRS = ((b"user.a", b"1"),)
OTHER_XATTRS = ((b"user.b", b"2"),)


def white(path: bytes) -> Entry:
    return Entry(path, Kind.WHITEOUT)


def opaque(path: bytes) -> Entry:
    return Entry(path, Kind.OPAQUE)


def link(path: bytes, target: bytes, **more: object) -> Entry:
    return Entry(path, Kind.HARDLINK, link=target, **more)  # type: ignore[arg-type]


def layer(number: int, entries: list[Entry]) -> Index:
    return Index.of(entries, Digest.of(b"%d" % number))


def merged(*layers: list[Entry]) -> Tree:
    tree = merge([layer(i, entries) for i, entries in enumerate(layers)])
    tree.check()
    return tree


def nodes(*layers: list[Entry]) -> dict[bytes, Node]:
    return {node.path: node for node in merged(*layers).nodes()}


def names(*layers: list[Entry]) -> list[bytes]:
    return list(nodes(*layers))[1:]


def test_no_layers_give_a_root() -> None:
    tree = merged()
    (root,) = tree.nodes()
    assert (root.path, root.mode, root.uid, root.nlink, root.mtime) == (b"", 0o040755, 0, 2, 0)
    assert tree.warnings == ()
    assert tree.digest() == merged([], []).digest()


def test_the_roots_own_entry_counts() -> None:
    tree = nodes([folder(b"", 0o700, uid=5)], [file(b"x")])
    assert (tree[b""].mode, tree[b""].uid) == (0o040700, 5)


@pytest.mark.parametrize("reverse", [False, True])
def test_whiteout_and_entry_of_one_name_in_one_layer(reverse: bool) -> None:
    # Three well-known tools drop the entry when the whiteout comes after it, or before it.
    upper = [white(b"d/foo"), file(b"d/foo", b"new"), white(b"d/bar")]
    tree = nodes([folder(b"d"), file(b"d/foo", b"old"), file(b"d/bar")], upper[::-1] if reverse else upper)
    assert list(tree) == [b"", b"d", b"d/foo"]
    assert tree[b"d/foo"].size == 3


@pytest.mark.parametrize("reverse", [False, True])
def test_opaque_after_its_siblings(reverse: bool) -> None:
    upper = [opaque(b"d"), folder(b"d", 0o700), file(b"d/new"), file(b"d/sub/new")]
    lower = [folder(b"d"), file(b"d/old"), folder(b"d/sub", 0o711), file(b"d/sub/old")]
    tree = nodes(lower, upper[::-1] if reverse else upper)
    assert list(tree) == [b"", b"d", b"d/new", b"d/sub", b"d/sub/new"]
    # d/sub was hidden with everything else below d, so it is made anew.
    assert tree[b"d/sub"].mode & 0o7777 == 0o755


def test_opaque_keeps_the_lower_directorys_attributes_without_an_entry() -> None:
    tree = nodes([folder(b"d", 0o750, uid=7, xattrs=XATTRS), file(b"d/old")], [opaque(b"d")])
    assert list(tree) == [b"", b"d"]
    assert (tree[b"d"].mode, tree[b"d"].uid, tree[b"d"].xattrs) == (0o040750, 7, XATTRS)


def test_opaque_of_the_root_hides_all_below() -> None:
    assert names([folder(b"", 0o700), file(b"a"), file(b"b/c")], [opaque(b""), file(b"new")]) == [b"new"]


def test_opaque_and_whiteout_over_nothing_or_a_file_change_nothing() -> None:
    assert names(
        [file(b"f")], [opaque(b"f"), opaque(b"none"), white(b"none"), white(b"none/x"), white(b"f/x")]
    ) == [b"f"]


def test_whiteout_hides_the_subtree_and_only_that() -> None:
    lower = [folder(b"d"), file(b"d/x"), file(b"d-x"), file(b"dx"), file(b"e/.wh"), file(b"e/a.wh.b")]
    assert names(lower, [white(b"d")]) == [b"d-x", b"dx", b"e", b"e/.wh", b"e/a.wh.b"]


def test_whiteouts_act_on_all_lower_layers_and_on_no_upper_one() -> None:
    assert names([file(b"d/a")], [file(b"d/b")], [white(b"d")], [file(b"d/c")]) == [b"d", b"d/c"]


def test_a_removed_directory_that_comes_back_is_new() -> None:
    tree = nodes([folder(b"d", 0o700), file(b"d/x")], [white(b"d"), folder(b"d", 0o711)])
    assert (list(tree), tree[b"d"].mode) == ([b"", b"d"], 0o040711)


def test_directory_over_directory_replaces_attributes_only() -> None:
    lower = [folder(b"d", 0o700, uid=1, mtime=5, xattrs=XATTRS), file(b"d/x")]
    tree = nodes(lower, [folder(b"d", 0o750, gid=2, mtime=-1, mtime_ns=5, xattrs=OTHER_XATTRS)])
    d = tree[b"d"]
    assert (d.mode, d.uid, d.gid, d.mtime, d.mtime_ns) == (0o040750, 0, 2, -1, 5)
    assert d.xattrs == OTHER_XATTRS
    assert b"d/x" in tree


def test_an_upper_directory_without_xattrs_clears_them() -> None:
    tree = merged([folder(b"d", xattrs=XATTRS)], [folder(b"d")])
    assert tree.xattr_sets == ((),)


@pytest.mark.parametrize(
    "upper", [file(b"d"), Entry(b"d", Kind.SYMLINK, link=b"/"), Entry(b"d", Kind.FIFO), Entry(b"d", Kind.CHAR)]
)
def test_non_directory_over_directory_removes_all_below(upper: Entry) -> None:
    assert names([folder(b"d"), file(b"d/x"), file(b"d/y/z")], [upper]) == [b"d"]
    # And what it removed does not come back when a directory takes its place.
    assert names([folder(b"d"), file(b"d/x")], [upper], [folder(b"d"), file(b"d/new")]) == [b"d", b"d/new"]


def test_directory_over_symlink_replaces_it() -> None:
    # The old trick: writing through a link of a lower layer.
    tree = nodes([Entry(b"d", Kind.SYMLINK, link=b"/etc")], [folder(b"d"), file(b"d/passwd")])
    assert (tree[b"d"].mode >> 12, list(tree)) == (Kind.DIR, [b"", b"d", b"d/passwd"])


def test_entries_below_a_lower_symlink_make_a_directory() -> None:
    tree = merged([Entry(b"d", Kind.SYMLINK, link=b"/etc"), file(b"e")], [file(b"d/passwd")])
    assert [n.path for n in tree.nodes()] == [b"", b"d", b"d/passwd", b"e"]
    assert tree.mode[1] == 0o040755
    (warning,) = tree.warnings
    assert warning.startswith("d: a lower layer has no directory here")


def test_a_made_directory_stays_when_its_reason_is_removed_again() -> None:
    lower = [[file(b"d", b"file")], [file(b"d/x")], [white(b"d/x")]]
    assert nodes(*lower)[b"d"].mode == 0o040755


def test_missing_parents_are_made_and_said() -> None:
    tree = merged([file(b"a/b/c", mtime=9)])
    a, b = list(tree.nodes())[1:3]
    assert (a.path, a.mode, a.uid, a.gid, a.mtime, a.nlink) == (b"a", 0o040755, 0, 0, 0, 3)
    assert b.path == b"a/b"
    assert [w.partition(":")[0] for w in tree.warnings] == ["a", "a/b"]


def test_missing_parents_that_a_lower_layer_has_are_kept() -> None:
    tree = merged([folder(b"a", 0o700, uid=3)], [file(b"a/b")])
    assert (tree.mode[1], tree.uid[1], tree.warnings) == (0o040700, 3, ())


def test_missing_parents_between_similar_names() -> None:
    # a plain sort puts a-b between a and a/c; equal lengths must not pass for equal names.
    tree = merged([folder(b"a"), file(b"a/b"), file(b"b/c"), file(b"a-b/c"), file(b"ab/c/d"), file(b"ac/c/d")])
    assert [n.path for n in tree.nodes()][1:] == [
        b"a", b"a/b", b"a-b", b"a-b/c", b"ab", b"ab/c", b"ab/c/d", b"ac", b"ac/c", b"ac/c/d", b"b", b"b/c",
    ]  # fmt: skip


@pytest.mark.parametrize("above", [file(b"d"), Entry(b"d", Kind.SYMLINK, link=b"/etc"), link(b"d", b"f")])
@pytest.mark.parametrize("below", [file(b"d/x"), file(b"d/x/y"), white(b"d/x"), opaque(b"d"), opaque(b"d/x")])
def test_below_a_non_directory_of_the_same_layer(above: Entry, below: Entry) -> None:
    with pytest.raises(UnsafeEntry, match="no directory in the same layer"):
        merged([file(b"f")], [above, below, file(b"f")])
    # Also where other rows of the same path stand between the two.
    with pytest.raises(UnsafeEntry, match="no directory in the same layer"):
        merged([file(b"f")], [above, below, file(b"f"), white(b"d")])


def test_hard_links_within_a_layer_in_any_order_and_in_chains() -> None:
    # A link before its target; links owned by nobody; a chain.
    layers = [link(b"a", b"m", uid=9), link(b"b", b"a"), file(b"m", b"data", uid=1, offset=512), link(b"z", b"b")]
    for entries in (layers, layers[::-1]):
        tree = merged(entries)
        assert tree.inode.tolist() == [0, 1, 1, 1, 1]
        assert (tree.nlink[1], tree.uid[1], tree.size[1], tree.offset[1]) == (4, 1, 4, 512)


def test_hard_link_to_a_lower_layer() -> None:
    tree = merged([file(b"old", b"data", offset=512)], [link(b"new", b"old")])
    assert (tree.inode.tolist(), tree.layer.tolist(), tree.nlink.tolist()) == ([0, 1, 1], [-1, 0], [2, 2])


def test_hard_link_prefers_its_own_layer() -> None:
    tree = nodes([file(b"t", b"lower")], [link(b"a", b"t"), file(b"t", b"up")])
    assert (tree[b"a"].size, tree[b"a"].inode) == (2, tree[b"t"].inode)


def test_hard_link_to_a_lower_hard_link() -> None:
    tree = merged([file(b"a"), link(b"b", b"a")], [white(b"a")], [link(b"c", b"b")])
    assert (tree.inode.tolist(), tree.nlink[1]) == ([0, 1, 1], 2)


def test_replacing_one_name_leaves_the_inode_to_the_other() -> None:
    for first, second in ((file(b"a", b"old"), link(b"b", b"a")), (link(b"a", b"b"), file(b"b", b"old"))):
        tree = nodes([first, second], [file(b"a", b"newer")])
        assert (tree[b"a"].size, tree[b"a"].nlink, tree[b"b"].size, tree[b"b"].nlink) == (5, 1, 3, 1)
        assert nodes([first, second], [white(b"a")])[b"b"].size == 3


def test_listing_one_name_again_makes_a_new_inode() -> None:
    same = file(b"a", b"data")
    tree = nodes([same, link(b"b", b"a")], [same])
    assert tree[b"a"].inode != tree[b"b"].inode


def test_hard_link_to_a_symlink_is_its_inode() -> None:
    tree = nodes([Entry(b"s", Kind.SYMLINK, link=b"/x"), link(b"t", b"s")])
    assert (tree[b"t"].target, tree[b"t"].nlink, tree[b"t"].size) == (b"/x", 2, 2)


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ([[link(b"a", b"none")]], "a: hard link to none, which is not there"),
        ([[link(b"a", b"d"), folder(b"d")]], "a: hard link to d, which is a directory"),
        ([[folder(b"d")], [link(b"a", b"d")]], "a: hard link to d, which is a directory"),
        ([[link(b"a", b"")]], "a: hard link to /, which is a directory"),
        ([[link(b"a", b"a")]], "a: hard link to a, which leads back"),
        ([[file(b"a")], [link(b"a", b"a")]], "a: hard link to a, which leads back"),
        ([[link(b"a", b"b"), link(b"b", b"a")]], "a: hard link to b, which leads back"),
        ([[link(b"a", b"b"), link(b"b", b"c"), link(b"c", b"a"), link(b"x", b"c")]], "leads back"),
        ([[file(b"f")], [white(b"f"), link(b"a", b"f")]], "a: hard link to f, which is not there"),
        ([[file(b"d/f")], [white(b"d"), link(b"a", b"d/f")]], "hard link to d/f, which is not there"),
        ([[file(b"d/f")], [opaque(b"d"), link(b"a", b"d/f")]], "hard link to d/f, which is not there"),
        ([[file(b"d/f")], [file(b"d")], [link(b"a", b"d/f")]], "hard link to d/f, which is not there"),
        ([[file(b"d")], [file(b"d/f")], [link(b"a", b"d")]], "a: hard link to d, which is not there"),
        ([[link(b"a", b"late")], [file(b"late")]], "a: hard link to late, which is not there"),
        ([[link(b"a", b"none")], [white(b"a")]], "a: hard link to none, which is not there"),
    ],
)
def test_hard_links_to_nothing_are_refused_and_both_names_told(layers: list[list[Entry]], why: str) -> None:
    with pytest.raises(UnsafeEntry, match=why):
        merged(*layers)


def test_a_later_whiteout_does_not_hide_the_target_of_an_earlier_link() -> None:
    tree = merged([file(b"b/t", b"data")], [link(b"a", b"b/t")], [white(b"b/t")])
    assert [n.path for n in tree.nodes() if n.size] == [b"a"]


def test_inodes_are_numbered_by_first_name() -> None:
    tree = merged([file(b"z"), link(b"a", b"z"), file(b"m")])
    assert tree.inode.tolist() == [0, 1, 2, 1]


def test_directory_link_counts() -> None:
    tree = nodes([folder(b"d/a"), folder(b"d/b/c"), file(b"d/f")])
    assert {p: n.nlink for p, n in tree.items()} == {b"": 3, b"d": 4, b"d/a": 2, b"d/b": 3, b"d/b/c": 2, b"d/f": 1}


def test_content_is_a_reference_to_the_layer() -> None:
    sparse = file(b"s", offset=1024)._replace(size=10, sparse=((2, 3), (9, 1)))
    hidden = sparse._replace(path=b"h", sparse=((0, 1),))
    tree = merged([file(b"a", b"x", offset=512), hidden], [sparse, file(b"e", b""), white(b"h")])
    assert tree.layers == (Digest.of(b"0"), Digest.of(b"1"))
    assert tree.layer.tolist() == [-1, 0, -1, 1]
    assert tree.offset.tolist() == [-1, 512, -1, 1024]
    assert tree.sparse.tolist() == [-1, -1, -1, 0]
    assert (len(tree.sparse_maps), tree.sparse_maps.extents(0)) == (1, ((2, 3), (9, 1)))


def test_tables_hold_what_shows_in_order_of_first_use() -> None:
    lower = [
        Entry(b"hidden", Kind.SYMLINK, link=b"gone", xattrs=((b"user.gone", b""),)),
        Entry(b"y", Kind.SYMLINK, link=b"2", xattrs=OTHER_XATTRS),
    ]
    upper = [
        white(b"hidden"),
        Entry(b"a", Kind.SYMLINK, link=b"1", xattrs=XATTRS),
        Entry(b"b", Kind.SYMLINK, link=b"2"),
    ]
    tree = merged(lower, upper)
    assert tree.targets.tolist() == [b"1", b"2"]
    assert tree.xattr_sets == ((), XATTRS, OTHER_XATTRS)
    flat = [*upper[1:], lower[1]]
    assert tree.digest() == merged(flat).digest()


def test_warnings_are_carried_and_bounded() -> None:
    index = replace(layer(0, [file(b"d%d/x" % i) for i in range(9)]), warnings=tuple("abcdef"))
    tree = merge([index], limits=replace(DEFAULT, warnings_kept_per_layer=3))
    assert tree.warnings[:3] == ("a", "b", "c")
    assert (len(tree.warnings), tree.warnings[-1]) == (7, "6 more directories were made")


def test_non_utf8_names_come_through() -> None:
    assert names([file(b"d/\xff\xfe"), file(b"d/\xc3\xa9\n"), folder(b"d")]) == [
        b"d",
        b"d/\xc3\xa9\n",
        b"d/\xff\xfe",
    ]


@pytest.mark.parametrize("path", [b"..", b"a/../b", b".", b"a/./b", b"a//b", b"/a", b"a/", b"a\0b"])
def test_paths_that_an_index_never_has(path: bytes) -> None:
    with pytest.raises(UnsafeEntry):
        merged([file(path)])


@pytest.mark.parametrize("entry", [white(b""), file(b""), Entry(b"", Kind.SYMLINK, link=b"/")])
def test_the_root_stays_a_directory(entry: Entry) -> None:
    with pytest.raises(UnsafeEntry, match="root"):
        merged([folder(b"")], [entry])


def test_unknown_kind() -> None:
    index = layer(0, [file(b"a")])
    with pytest.raises(InvalidImage, match="a: kind 3 does not exist"):
        merge([replace(index, kind=np.array([3], np.uint8))])


def test_limits() -> None:
    three = [layer(i, [file(b"%d/x" % i)]) for i in range(3)]
    for limits in (replace(DEFAULT, layers_per_image=2), replace(DEFAULT, entries_per_image=2)):
        with pytest.raises(LimitExceeded):
            merge(three, limits=limits)
    # Directories that no layer lists count as well.
    with pytest.raises(LimitExceeded, match="entries_per_image"):
        merge([layer(0, [file(b"/".join([b"d"] * 50))])], limits=replace(DEFAULT, entries_per_image=40))
    with pytest.raises(LimitExceeded, match="path_depth"):
        merge([layer(0, [file(b"/".join([b"d"] * 50))])], limits=replace(DEFAULT, path_depth=40))
