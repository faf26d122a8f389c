"""The plan keeps the root filesystem, by two judges: the digest of the merge, and the independent model."""

from __future__ import annotations

import os
from collections import defaultdict

import merge_model
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stacks import gone, link, stack, stored
from trees import file, folder

from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import UsageError
from layerkit.model.index import Index
from layerkit.model.trees.merge import merge
from layerkit.usecases.waste import Action, Plan, plan

EXAMPLES = 80 * int(os.environ.get("LAYERKIT_TEST_FUZZ", "1"))


def planned(*layers: list[Entry], keep_base: int = 0) -> tuple[Plan, list[list[Entry] | None]]:
    """Return the plan and each layer's entries without offsets; None for a layer that is kept."""
    before = stored(list(layers))
    result = plan(before, keep_base)
    check(before, result, keep_base)
    return result, [
        None if x.action is Action.KEEP else [e._replace(offset=-1) for e in x.index.entries()]
        for x in result.layers
    ]  # fmt: skip


def shown(layers: list[Index]) -> dict[bytes, tuple[object, ...]]:
    """Return what the model shows of ``layers``: for each path all attributes and the paths of its inode."""
    files = merge_model.model([list(index.entries()) for index in layers])
    names: dict[int, list[bytes]] = defaultdict(list)
    for path, inode in files.items():
        names[id(inode)].append(path)
    return {
        path: (
            inode.entry._replace(path=b"", offset=0, sparse=None, link=inode.entry.link),
            sorted(names[id(inode)]),
        )
        for path, inode in files.items()
    }


def check(before: list[Index], result: Plan, keep_base: int) -> None:
    """State the laws of a plan."""
    assert merge(result.indexes).digest() == merge(before).digest() == result.tree
    assert result.bytes_after <= result.bytes_before
    for old, new in zip(before, result.layers, strict=True):
        if new.place < keep_base:
            assert new.action is Action.KEEP
        if new.action is Action.KEEP:
            assert new.index is old
            continue
        assert (len(new.index) == 0) == (new.action is Action.DROP)
        read = []
        for row, entry in enumerate(new.index.entries()):
            at = int(new.content[row])
            assert (at >= 0) == (entry.kind is Kind.REG and entry.size > 0)
            if at >= 0:
                source = old.entry(at)
                assert (source.sha256, source.size, source.offset, source.sparse) == (
                    entry.sha256, entry.size, entry.offset, entry.sparse,
                )  # fmt: skip
                read.append(at)
        # No content is written twice, or it would not shrink.
        assert len(read) == len(set(read))
    # What is optimized is optimal: there is nothing left to take out.
    if keep_base == 0:
        again = plan(result.indexes)
        assert again.bytes_after == again.bytes_before == result.bytes_after
        assert not again.changes


def test_metadata_is_pushed_down() -> None:
    data = b"x" * 100
    for change in ({"uid": 7}, {"perm": 0o4755}, {"mtime": 9}, {"xattrs": ((b"user.a", b"1"),)}):
        result, (low, high) = planned([file(b"a", data)], [file(b"a", data, **change)])
        assert low == [file(b"a", data, **change)]
        assert high == []
        assert [x.action for x in result.layers] == [Action.REWRITE, Action.DROP]
        assert (result.bytes_before, result.bytes_after) == (200, 100)


def test_a_chown_of_a_folder_goes_down_with_its_files() -> None:
    _, (low, high) = planned(
        [folder(b"d"), file(b"d/a", b"1"), folder(b"e")], [folder(b"d", uid=5), file(b"d/a", b"1", uid=5)]
    )
    assert low is not None
    assert {e.path: e.uid for e in low} == {b"d": 5, b"d/a": 5, b"e": 0}
    assert high == []


def test_hidden_entries_and_their_whiteouts_go() -> None:
    result, (low, high) = planned([folder(b"d"), file(b"d/a", b"1"), file(b"b", b"2")], [gone(b"d/a")])
    assert low is not None
    assert [e.path for e in low] == [b"b", b"d"]
    assert high == []
    assert result.bytes_after == 1


def test_a_moved_file_is_placed_where_its_content_is() -> None:
    _, (low, high) = planned([file(b"a", b"12")], [gone(b"a"), file(b"b", b"12", uid=3)])
    assert low is not None
    assert [(e.path, e.uid) for e in low] == [(b"b", 3)]
    assert high == []


def test_a_copy_stays_where_it_is() -> None:
    result, layers = planned([file(b"a", b"12")], [file(b"b", b"12")])
    assert layers == [None, None]
    assert not result.changes


def test_layers_that_need_no_change_are_kept() -> None:
    _, layers = planned(
        [folder(b"d"), file(b"d/base", b"b")],
        [folder(b"d", mtime=1), file(b"d/a", b"1")],
        [folder(b"d", mtime=2), file(b"d/a", b"1", uid=1)],
    )
    assert layers[0] is None
    assert layers[2] == []


def test_the_base_is_never_touched() -> None:
    data = b"x" * 10
    _, layers = planned([file(b"a", data), file(b"b", data)], [file(b"a", data, uid=1), gone(b"b")], keep_base=1)
    assert layers == [None, None]
    _, layers = planned(
        [file(b"a", data)], [file(b"a", data, uid=1)], [file(b"a", data, uid=2)], [gone(b"a")], keep_base=1
    )
    assert layers == [None, [], [], None]


def test_hard_links_stay_one_inode() -> None:
    _, (low, high) = planned(
        [file(b"a", b"12"), link(b"b", b"a")], [file(b"a", b"12", uid=1), link(b"b", b"a")]
    )  # fmt: skip
    assert low is not None
    assert low == [file(b"a", b"12", uid=1), link(b"b", b"a")._replace(perm=0o644, uid=1)]
    assert high == []
    # chown of one name alone breaks the link on an overlay: two inodes, and the content is needed twice.
    result, _ = planned([file(b"a", b"12"), link(b"b", b"a")], [file(b"b", b"12", uid=1)])
    assert result.bytes_after == 4


def test_a_link_into_a_lower_layer_pins_it() -> None:
    result, _ = planned([file(b"a", b"12")], [link(b"b", b"a")], [file(b"c", b"3")], [file(b"c", b"3", uid=1)])
    assert result.pinned == 2
    assert [x.action for x in result.layers] == [Action.KEEP, Action.KEEP, Action.REWRITE, Action.DROP]


def test_a_base_that_is_not_there() -> None:
    for base in (-1, 2):
        with pytest.raises(UsageError, match="keep-base"):
            plan(stored([[]]), base)


def test_what_a_kept_layer_would_hide_does_not_stay() -> None:
    result, _ = planned([file(b"a", b"123")], [file(b"a")], [file(b"a", b"123")])
    assert result.bytes_after == 3


def test_a_file_does_not_go_below_a_kept_layer_that_has_a_folder_there() -> None:
    stack = [[file(b"p", b"x")], [file(b"p/empty"), file(b"z", b"z")], [gone(b"p"), file(b"p", b"x")]]
    result, layers = planned(*stack)
    assert layers[0] == []
    assert result.bytes_after == 2


def test_folders_are_listed_in_every_layer_that_has_something_in_them() -> None:
    _, layers = planned(
        [folder(b"d", 0o700), file(b"d/a", b"1"), file(b"d/x", b"x"), folder(b"d/e"), file(b"d/e/k", b"k")],
        [folder(b"d", 0o700), file(b"d/b", b"2"), file(b"d/y", b"y")],
        [folder(b"d", 0o700, uid=5), file(b"d/a", b"1", uid=5), file(b"d/b", b"2", uid=5), gone(b"d/e/k")],
    )
    for layer in layers[:2]:
        assert layer is not None
        assert folder(b"d", 0o700, uid=5) in layer
    assert layers[2] == []
    # Also above a whiteout: with a kept base the marker's folders are listed.
    _, layers = planned(
        [folder(b"d", 0o700), file(b"d/a", b"1"), file(b"d/b", b"1")],
        [gone(b"d/b"), file(b"z", b"z")], [gone(b"z")],
        keep_base=1,
    )  # fmt: skip
    assert layers[1] is not None
    assert [(e.path, e.kind, e.perm) for e in layers[1]] == [
        (b"d", Kind.DIR, 0o700), (b"d/b", Kind.WHITEOUT, 0),
    ]  # fmt: skip


def test_a_folder_stays_above_a_kept_layer_that_does_not_list_it() -> None:
    _, layers = planned(
        [folder(b"d"), file(b"d/a", b"1")], [file(b"d/b", b"2")],
        [folder(b"d", uid=5), file(b"d/a", b"1", uid=5)],
    )  # fmt: skip
    assert layers[1] is None
    assert layers[2] == [folder(b"d", uid=5)]


def test_a_folder_that_only_hidden_files_made_stays() -> None:
    _, layers = planned([file(b"d/a", b"1")], [gone(b"d/a")])
    assert layers == [[folder(b"d")], []]


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(stack(), st.integers(0, 3))
def test_any_stack_keeps_its_root_filesystem(layers: list[list[Entry]], keep: int) -> None:
    before = stored(layers)
    keep = min(keep, len(before))
    result = plan(before, keep)
    check(before, result, keep)
    assert shown(result.indexes) == shown(before)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(stack())
def test_without_links_between_layers_no_content_is_left_that_is_not_shown(layers: list[list[Entry]]) -> None:
    before = stored(layers)
    result = plan(before)
    if result.pinned:
        return
    tree = merge(before)
    shown: dict[bytes, int] = defaultdict(int)
    for inode in range(tree.inodes):
        if tree.offset[inode] >= 0:
            row = int(tree.sparse[inode])
            size = int(tree.size[inode]) if row < 0 else tree.sparse_maps.stored_bytes(row)
            shown[tree.sha256[inode].tobytes()] += size
    if not any(len(x.sparse_maps) for x in before):
        assert result.bytes_after == sum(shown.values())
