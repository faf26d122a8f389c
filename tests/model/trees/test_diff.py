"""The law of the diff: the layers and the diff on top of them show the new tree."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerkit.model.digest import Digest
from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import LossyResult
from layerkit.model.index import Index
from layerkit.model.trees.diff import LayerDiff, diff
from layerkit.model.trees.merge import merge

EXAMPLES = 200 * int(os.environ.get("LAYERKIT_TEST_FUZZ", "1"))
ZERO = Digest.of(b"")


def layer(*entries: Entry) -> Index:
    return Index.of(entries, ZERO)


def file(path: bytes, content: bytes = b"x", **more: object) -> Entry:
    return Entry(
        path, Kind.REG, size=len(content), sha256=hashlib.sha256(content).digest(),
        offset=512 if content else -1, **more,  # type: ignore[arg-type]
    )  # fmt: skip


def rows(made: LayerDiff) -> list[tuple[bytes, Kind]]:
    return [(entry.path, entry.kind) for entry in made.index.entries()]


@st.composite
def stacks(draw: st.DrawFn) -> list[Index]:
    """One tree: some paths, each of a kind that suits those above it; then hard links."""
    paths = draw(st.sets(st.lists(st.sampled_from([b"a", b"b", b"c"]), min_size=1, max_size=3).map(b"/".join)))
    entries: dict[bytes, Entry] = {b"": Entry(b"", Kind.DIR, perm=draw(st.sampled_from([0o755, 0o700])))}
    for path in sorted(paths, key=lambda p: p.split(b"/")):
        above = path.rpartition(b"/")[0]
        if above not in entries or entries[above].kind is not Kind.DIR:
            continue
        common: dict[str, Any] = {"uid": draw(st.integers(0, 1)), "mtime": draw(st.integers(0, 1))}
        xattrs = draw(st.sampled_from([(), ((b"user.a", b"1"),), ((b"user.a", b"2"),)]))
        which = draw(st.integers(0, 5))
        plain = [name for name, e in entries.items() if e.kind is not Kind.DIR and e.kind is not Kind.HARDLINK]
        if which == 0:
            entries[path] = Entry(
                path, Kind.SYMLINK, perm=0o777, link=draw(st.sampled_from([b"x", b"y"])), **common
            )
        elif which == 1 and plain:
            entries[path] = Entry(path, Kind.HARDLINK, link=draw(st.sampled_from(plain)))
        elif which == 2:
            entries[path] = Entry(path, Kind.CHAR, major=1, minor=draw(st.integers(3, 5)), **common)
        elif which == 3:
            entries[path] = file(path, draw(st.sampled_from([b"", b"one", b"two"])), xattrs=xattrs, **common)
        else:
            entries[path] = Entry(path, Kind.DIR, perm=0o755, xattrs=xattrs, **common)
    return [layer(*entries.values())]


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(stacks(), stacks())
def test_the_layers_with_the_diff_show_the_new_tree(old: list[Index], new: list[Index]) -> None:
    before, after = merge(old), merge(new)
    change = diff(before, after).index
    assert merge([*old, change]).digest() == after.digest()
    assert len(diff(after, after).index) == 0
    # And once more, on top of a stack of two with whiteouts in it.
    assert merge([*old, change, diff(after, before).index]).digest() == before.digest()


def test_only_what_changed_is_in_it() -> None:
    old = merge([layer(Entry(b"", Kind.DIR), Entry(b"d", Kind.DIR), file(b"d/a"), file(b"d/b"), file(b"e"))])
    new = merge([layer(Entry(b"", Kind.DIR), Entry(b"d", Kind.DIR), file(b"d/a"), file(b"d/b", uid=3), file(b"f"))])
    want = [(b"d", Kind.DIR), (b"d/b", Kind.REG), (b"e", Kind.WHITEOUT), (b"f", Kind.REG)]
    assert rows(diff(old, new)) == want
    assert rows(diff(old, new, root=True)) == [(b"", Kind.DIR), *want]
    assert diff(old, new, root=True).carried == 2
    assert rows(diff(old, old, root=True)) == []


def test_folders_above_are_listed_as_runtimes_that_unpack_each_layer_alone_need_them() -> None:
    folders = [Entry(b"", Kind.DIR), Entry(b"d", Kind.DIR, perm=0o700, uid=7), Entry(b"d/e", Kind.DIR, perm=0o711)]
    old = merge([layer(*folders, file(b"d/e/f"), file(b"d/e/g"))])
    made = diff(old, merge([layer(*folders, file(b"d/e/f"))]))
    index, carried = made.index, made.carried
    assert rows(made) == [(b"d", Kind.DIR), (b"d/e", Kind.DIR), (b"d/e/g", Kind.WHITEOUT)]
    assert (index.perm[0], index.uid[0], index.perm[1], carried) == (0o700, 7, 0o711, 2)


def test_a_folder_that_goes_takes_what_is_below_with_it() -> None:
    old = merge([layer(Entry(b"", Kind.DIR), Entry(b"d", Kind.DIR), Entry(b"d/e", Kind.DIR), file(b"d/e/f"))])
    gone = merge([layer(Entry(b"", Kind.DIR))])
    assert rows(diff(old, gone)) == [(b"d", Kind.WHITEOUT)]
    assert rows(diff(old, merge([layer(Entry(b"", Kind.DIR), file(b"d"))]))) == [(b"d", Kind.REG)]


def test_of_an_inode_that_was_cut_in_two_one_half_stays() -> None:
    link = Entry(b"b", Kind.HARDLINK, link=b"a")
    old = merge([layer(Entry(b"", Kind.DIR), file(b"a"), link)])
    new = merge([layer(Entry(b"", Kind.DIR), file(b"a"), file(b"b"))])
    assert rows(diff(old, new)) == [(b"b", Kind.REG)]
    assert rows(diff(new, old)) == [(b"a", Kind.REG), (b"b", Kind.HARDLINK)]


def test_a_name_that_would_be_a_whiteout_is_refused() -> None:
    old, new = merge([layer(Entry(b"", Kind.DIR))]), merge([layer(Entry(b"", Kind.DIR), file(b"d"))])
    with pytest.raises(LossyResult, match="begins with"):
        diff(old, merge([layer(Entry(b"", Kind.DIR), file(b".wh.d"))]))
    assert len(diff(old, new).index) == 1


def test_a_hard_link_says_what_its_inode_is() -> None:
    # docker gives each entry's owner and mode to what it has just linked.
    capability = ((b"security.capability", b"x"), (b"user.a", b"1"))
    link = Entry(b"b", Kind.HARDLINK, link=b"a")
    new = merge([layer(Entry(b"", Kind.DIR), file(b"a", uid=7, perm=0o4750, xattrs=capability), link)])
    index = diff(merge([]), new).index
    row = [entry.path for entry in index.entries()].index(b"b")
    made = index.entry(row)
    assert (made.kind, made.uid, made.perm, made.xattrs) == (Kind.HARDLINK, 7, 0o4750, capability[:1])
