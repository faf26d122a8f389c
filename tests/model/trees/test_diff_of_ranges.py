"""One layer in place of several: random stacks, judged by the model of the merge tests, which shares no code."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merge_model import Files, Inode, apply_layer, is_dir, last_of, model
from stacks import indexes, sound_stack

from layerkit.model.entry import Entry, Kind
from layerkit.model.trees.diff import diff
from layerkit.model.trees.merge import merge

EXAMPLES = 150 * int(os.environ.get("LAYERKIT_TEST_FUZZ", "1"))


def shown(files: Files) -> dict[bytes, tuple[object, ...]]:
    """Return what of each path can be seen, and all names of its inode."""
    names: dict[int, list[bytes]] = {}
    for path, inode in files.items():
        names.setdefault(id(inode), []).append(path)

    def attributes(inode: Inode) -> tuple[object, ...]:
        e = inode.entry
        return e.kind, e.perm, e.uid, e.gid, e.mtime, e.mtime_ns, e.size, e.major, e.link, e.xattrs, e.sha256

    return {path: (*attributes(i), is_dir(i) or sorted(names[id(i)])) for path, i in files.items()}


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sound_stack(), st.data())
def test_any_range_of_layers_becomes_one_with_the_same_tree(layers: list[list[Entry]], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(layers) - 1))
    last = data.draw(st.integers(first, len(layers) - 1))
    read = indexes(layers)
    made = diff(merge(read[:first]), merge(read[: last + 1]), root=True).index
    rows = list(made.entries())
    if not first:
        assert all(e.kind < Kind.WHITEOUT for e in rows)
    assert merge([*read[:first], made, *read[last + 1 :]]).digest() == merge(read).digest()
    files = model(layers[:first])
    # A runtime that unpacks each layer alone needs every folder above what the layer holds, and whole links.
    there = {e.path for e in rows if e.kind is Kind.DIR}
    for e in rows:
        assert not e.path or e.path.rpartition(b"/")[0] in there, e.path
        assert e.kind is not Kind.WHITEOUT or e.path in files, "a whiteout of nothing"
        assert e.kind is not Kind.HARDLINK or any(o.path == e.link and o.kind != Kind.HARDLINK for o in rows)
    apply_layer(files, last_of(rows), first)
    for number in range(last + 1, len(layers)):
        apply_layer(files, last_of(layers[number]), number)
    assert shown(files) == shown(model(layers))


@settings(max_examples=EXAMPLES // 5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sound_stack())
def test_nothing_is_repeated(layers: list[list[Entry]]) -> None:
    tree = merge(indexes(layers))
    assert len(diff(tree, tree, root=True).index) == 0


def test_hard_links_that_part_or_meet() -> None:
    sha = b"\1" * 32
    one = [Entry(b"a", Kind.REG, sha256=sha), Entry(b"b", Kind.HARDLINK, link=b"a")]
    two = [Entry(b"a", Kind.REG, sha256=sha), Entry(b"b", Kind.REG, sha256=sha)]
    for lower, upper in ((one, two), (two, one)):
        stack = indexes([lower, upper])
        made = diff(merge(stack[:1]), merge(stack), root=True).index
        assert merge([stack[0], made]).digest() == merge(stack).digest()
        assert any(e.path == b"b" for e in made.entries())
