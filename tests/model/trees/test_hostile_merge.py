"""Layers made to hurt the merge: huge flat directories, deep paths, links that fan out or chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from work import grows

from layerkit.model import sparse
from layerkit.model.digest import Digest
from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import LimitExceeded, UnsafeEntry
from layerkit.model.index import Index
from layerkit.model.limits import DEFAULT
from layerkit.model.strings import Strings
from layerkit.model.trees.merge import merge

DEPTH = 2000


def plain(paths: list[bytes], kinds: Sequence[int], links: list[bytes] | None = None) -> Index:
    """Return an index of sorted paths without the cost of a million Entry values."""
    n = len(paths)
    zeros = np.zeros(n, np.uint32)
    return Index(
        diff_id=Digest.of(b""), tar_size=0, path=Strings.of(paths), kind=np.array(kinds, np.uint8),
        perm=np.full(n, 0o755, np.uint16), uid=zeros, gid=zeros, mtime=np.zeros(n, np.int64), mtime_ns=zeros,
        size=np.zeros(n, np.int64), major=zeros, minor=zeros,
        link=np.full(n, -1, np.int32) if links is None else np.arange(n, dtype=np.int32),
        links=Strings.of(links or []), xattr=np.zeros(n, np.int32), xattr_sets=((),),
        offset=np.full(n, -1, np.int64), sha256=np.zeros((n, 32), np.uint8), sparse=np.full(n, -1, np.int32),
        sparse_maps=sparse.NONE,
    )  # fmt: skip


def deep(part: bytes, depth: int = DEPTH) -> bytes:
    return b"/".join([part] * depth)


def test_a_million_entries_in_one_directory() -> None:
    def folder_of(count: int) -> Index:
        return plain([b"d", *(b"d/%07d" % i for i in range(count))], [Kind.DIR] + [Kind.REG] * count)

    count = 1_000_000
    tree = merge([folder_of(count)])
    assert (len(tree), tree.nlink[1]) == (count + 2, 2)
    assert grows(lambda count: partial(merge, [folder_of(count)]), 50_000) < 2.5


def test_a_path_of_two_thousand_parts() -> None:
    path = deep(b"d")
    tree = merge([Index.of([Entry(path, Kind.REG)], Digest.of(b""))])
    tree.check()
    assert len(tree) == DEPTH + 1
    assert tree.path(DEPTH) == path
    index, gone = (
        Index.of([entry], Digest.of(b"")) for entry in (Entry(path, Kind.REG), Entry(b"d", Kind.WHITEOUT))
    )
    assert len(merge([index, gone])) == 1


def test_deep_paths_with_markers_at_every_level() -> None:
    parts = [deep(b"d", i) for i in range(1, DEPTH + 1)]
    lower = plain(parts, [Kind.DIR] * DEPTH)
    upper = plain(parts[::2], [Kind.OPAQUE] * len(parts[::2]))
    assert len(merge([lower, upper])) == 2
    link = Index.of([Entry(b"link", Kind.HARDLINK, link=parts[-1] + b"/f")], Digest.of(b""))
    file = Index.of([Entry(parts[-1] + b"/f", Kind.REG)], Digest.of(b""))
    tree = merge([lower, file, link])
    assert tree.nlink[tree.inode[-1]] == 2
    with pytest.raises(UnsafeEntry, match="not there"):
        merge([lower, file, upper, link])


def test_deep_paths_cannot_multiply_without_bound() -> None:
    # 300 names of 4 kB stand for 600,000 directories.
    def names(count: int) -> Index:
        return Index.of([Entry(b"%03d/" % i + deep(b"d"), Kind.REG) for i in range(count)], Digest.of(b""))

    index = names(300)
    with pytest.raises(LimitExceeded, match="entries_per_image"):
        merge([index], limits=replace(DEFAULT, entries_per_image=100_000))
    assert len(merge([index])) == 300 * (DEPTH + 1) + 1
    assert grows(lambda count: partial(merge, [names(count)]), 30) < 2.5


def test_a_deeper_path_than_the_limit() -> None:
    with pytest.raises(LimitExceeded, match="path_depth"):
        merge([Index.of([Entry(deep(b"d", 40_000), Kind.REG)], Digest.of(b""))])


def test_a_chain_of_hard_links_and_its_cycle() -> None:
    def chain(count: int) -> Index:
        paths = [b"%06d" % i for i in range(count)]
        return plain([*paths, b"end"], [Kind.HARDLINK] * count + [Kind.REG], [*paths[1:], b"end", b""])

    def cycle(count: int) -> Index:
        paths = [b"%06d" % i for i in range(count)]
        return plain(paths, [Kind.HARDLINK] * count, [*paths[1:], paths[0]])

    def refused(count: int) -> None:
        with pytest.raises(UnsafeEntry, match="leads back"):
            merge([cycle(count)])

    count = 50_000
    tree = merge([chain(count)])
    assert (tree.inodes, int(tree.nlink[1])) == (2, count + 1)
    refused(count)
    assert grows(lambda count: partial(merge, [chain(count)]), 5000) < 2.5
    assert grows(lambda count: partial(refused, count), 5000) < 2.5


def test_many_links_to_lower_layers() -> None:
    count = 20_000
    paths = [b"%06d" % i for i in range(count)]
    links = plain([b"x" + p for p in paths], [Kind.HARDLINK] * count, paths)
    tree = merge([plain(paths, [Kind.REG] * count), *[plain([], [])] * 50, links])
    assert (tree.inodes, len(tree)) == (count + 1, 2 * count + 1)
    # Each empty layer between costs what it costs alone, whatever the number of links.
    files = plain(paths, [Kind.REG] * count)
    assert grows(lambda layers: partial(merge, [files, *[plain([], [])] * layers, links]), 50) < 1.5


@pytest.mark.parametrize("target", [b"../etc/passwd", b"none", b"d", b"a", b"/etc/passwd", b""])
def test_hard_link_to_outside_nothing_or_itself(target: bytes) -> None:
    entries = [Entry(b"d", Kind.DIR), Entry(b"a", Kind.HARDLINK, link=target)]
    with pytest.raises(UnsafeEntry) as caught:
        merge([Index.of(entries, Digest.of(b""))])
    assert caught.value.path == b"a"
    assert f"hard link to {target.decode() or '/'}" in str(caught.value)
