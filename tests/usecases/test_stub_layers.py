"""Layers of stubs: what becomes one, where its data is looked for, and that it is the same file again."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import stacks
from hypothesis import HealthCheck, given, settings
from trees import file, folder

from layerkit.metaonly import METACOPY_VALUE
from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import InvalidImage, UnsafeEntry, UsageError
from layerkit.model.index import Index
from layerkit.model.trees.merge import merge
from layerkit.usecases import stub_layers as stubs
from layerkit.usecases.waste import Action

EXAMPLES = 80 * int(os.environ.get("LAYERKIT_TEST_FUZZ", "1"))
BIG, OTHER = b"x" * 3000, b"y" * 3000
METACOPY, REDIRECT = b"trusted.overlay.metacopy", b"trusted.overlay.redirect"


def planned(*layers: list[Entry], keep_base: int = 0) -> list[dict[bytes, bytes]]:
    """Return for each layer its stubs with their redirects."""
    before = stacks.stored(list(layers))
    return [redirects(layer.index) for layer in stubs.plan_stubs(before, keep_base).layers]


def redirects(index: Index) -> dict[bytes, bytes]:
    found = {}
    for entry in index.entries():
        pairs = dict(entry.xattrs)
        if METACOPY in pairs:
            assert pairs[METACOPY] == METACOPY_VALUE
            assert (entry.sparse, entry.offset) == ((), -1)
            found[entry.path] = pairs.get(REDIRECT, b"")
    return found


def test_a_chown_becomes_stubs_over_the_same_paths() -> None:
    first = [folder(b"d"), file(b"d/a", BIG), file(b"d/b", OTHER), file(b"small", b"1")]
    second = [file(b"d/a", BIG, uid=5), file(b"d/b", BIG, uid=5), file(b"small", b"1", uid=5)]
    # d/b has another content now, which is that of d/a.
    assert planned(first, second) == [{}, {b"d/a": b"", b"d/b": b"/d/a"}]
    assert planned(first, second, keep_base=2) == [{}, {}]
    assert planned([*first, *second]) == [{}]


def test_a_move_points_to_where_the_file_was() -> None:
    old = [file(b"old", BIG)]
    assert planned(old, [stacks.gone(b"old"), file(b"new", BIG)]) == [{}, {b"new": b"/old"}]
    # Once it is gone there is nothing to point at.
    assert planned(old, [stacks.gone(b"old")], [file(b"new", BIG)]) == [{}, {}, {}]
    # Stubs over stubs: the kernel goes on until it finds data.
    twice = [file(b"old", BIG, uid=1)], [file(b"old", BIG, uid=2)]
    assert planned(old, *twice) == [{}, {b"old": b""}, {b"old": b""}]


def test_links_and_opaque_folders_need_a_redirect() -> None:
    first = [folder(b"d"), file(b"d/a", BIG), stacks.link(b"d/b", b"d/a")]
    again = [file(b"d/a", BIG, uid=5), stacks.link(b"d/b", b"d/a")]
    assert planned(first, again) == [{}, {b"d/a": b"/d/a"}]
    opaque = [folder(b"d"), Entry(b"d", Kind.OPAQUE), file(b"d/a", BIG, uid=5)]
    assert planned(first, opaque) == [{}, {b"d/a": b"/d/a"}]
    # Unpackers do not agree on which of the two comes first.
    assert planned(first, [stacks.gone(b"d/a"), file(b"d/a", BIG, uid=5)]) == [{}, {}]


def test_what_cannot_be_is_refused() -> None:
    first = [file(b"a", BIG)]
    with pytest.raises(UsageError, match="keep-base"):
        stubs.plan_stubs(stacks.stored([first]), 2)
    foreign = file(b"a", BIG, uid=1)._replace(xattrs=((METACOPY, b""),))
    with pytest.raises(UnsafeEntry, match=r"trusted\.overlay\.metacopy of its own"):
        stubs.plan_stubs(stacks.stored([first, [foreign]]))
    lost = stubs.as_stubs(stacks.stored([first])[0], {0: b""})
    with pytest.raises(InvalidImage, match="no such data"):
        stubs.filled(lost, merge([]))


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(stacks.stack())
def test_any_stack_keeps_its_root_filesystem(layers: list[list[Entry]]) -> None:
    before = stacks.stored(layers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stubs, "_LEAST_BYTES", 1)
        plan = stubs.plan_stubs(before)
    assert plan.bytes_after <= plan.bytes_before
    whole: list[Index] = []
    for old, new in zip(before, plan.layers, strict=True):
        if new.action is Action.KEEP:
            assert new.index is old
            whole.append(old)
            continue
        made = redirects(new.index)
        assert made
        # The sha256 of a stub's own zeros must not help.
        zeros = new.index.sha256.copy()
        zeros[[row for row, path in enumerate(new.index.path) if path in made]] = 0
        whole.append(stubs.filled(replace(new.index, sha256=zeros), merge(whole)))
    assert merge(whole).digest() == merge(before).digest() == plan.tree
