"""The merge against a model that shares nothing with it: a dict of paths, layers applied one by one."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merge_model import Broken, is_dir, last_of, model
from stacks import STACKS, indexes, sound_stack

from layerkit.model.digest import Digest
from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import UnsafeEntry
from layerkit.model.index import Index
from layerkit.model.tree import Tree
from layerkit.model.trees.merge import merge

EXAMPLES = 300 * int(os.environ.get("LAYERKIT_TEST_FUZZ", "1"))


def entries_of(tree: Tree) -> list[Entry]:
    """Return a layer that makes the same tree: what a squash would write."""
    out, names = [], dict[int, bytes]()
    for n in tree.nodes():
        first = names.setdefault(n.inode, n.path)
        if first != n.path:
            out.append(Entry(n.path, Kind.HARDLINK, link=first))
        else:
            out.append(Entry(
                n.path, Kind(n.mode >> 12), n.mode & 0o7777, n.uid, n.gid, n.mtime, n.mtime_ns,
                n.size if n.mode >> 12 == Kind.REG else 0, n.major, n.minor, n.target, n.xattrs, -1, n.sha256,
            ))  # fmt: skip
    return out


def compare(layers: list[list[Entry]]) -> None:
    try:
        want = model(layers)
    except Broken:
        with pytest.raises(UnsafeEntry):
            merge(indexes(layers))
        return
    tree = merge(indexes(layers))
    tree.check()
    nodes = {n.path: n for n in tree.nodes()}
    assert set(nodes) == set(want)
    assert [n.path for n in nodes.values()] == sorted(nodes, key=lambda p: p.split(b"/") if p else [])
    inode_of: dict[int, int] = {}
    for path, node in nodes.items():
        inode = want[path]
        e = inode.entry
        assert inode_of.setdefault(id(inode), node.inode) == node.inode
        assert (node.mode, node.uid, node.gid, node.mtime) == (e.perm | e.kind << 12, e.uid, e.gid, e.mtime), path
        assert (node.xattrs, node.major) == (e.xattrs, e.major)
        assert node.sha256 == e.sha256
        assert node.size == (len(e.link) if e.kind is Kind.SYMLINK else e.size)
        assert node.target == (e.link if e.kind is Kind.SYMLINK else b"")
        names = [p for p in want if want[p] is inode]
        below = [p for p in want if p and p.rpartition(b"/")[0] == path and is_dir(want[p])]
        assert node.nlink == (2 + len(below) if is_dir(inode) else len(names))
        holds = e.kind is Kind.REG and e.offset >= 0
        assert tree.layer[node.inode] == (inode.layer if holds else -1)
        assert tree.offset[node.inode] == (e.offset if e.kind is Kind.REG else -1)
        row = int(tree.sparse[node.inode])
        assert (None if row < 0 else tree.sparse_maps.extents(row)) == e.sparse
    assert len(inode_of) == tree.inodes
    warned = {path for path, inode in want.items() if inode.marks and inode.marks != ["root"]}
    assert len(tree.warnings) == len(warned)
    # Cut into layers or in one: the same root filesystem has the same digest.
    assert merge([Index.of(entries_of(tree), Digest.of(b""))]).digest() == tree.digest()


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STACKS)
def test_merge_equals_the_model(layers: list[list[Entry]]) -> None:
    compare(layers)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sound_stack())
def test_merge_of_sound_layers_equals_the_model(layers: list[list[Entry]]) -> None:
    compare(layers)


@settings(max_examples=EXAMPLES // 3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sound_stack(), st.randoms())
def test_order_in_the_tar_does_not_matter(layers: list[list[Entry]], random: object) -> None:
    unique = [last_of(layer) for layer in layers]
    want = merge(indexes(unique)).digest()
    for layer in unique:
        random.shuffle(layer)  # type: ignore[attr-defined]
    assert merge(indexes(unique)).digest() == want
