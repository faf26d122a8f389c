"""A metadata layer as the file that our FUSE server answers from (``formats.fuse_tree``).

No entry of it is a file of its own, so making one costs microseconds per entry, and one serves every map.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from layerkit.formats.meta import fuse_tree as f
from layerkit.metaonly import MetadataLayer, encode_devices
from layerkit.model.entry import Kind
from layerkit.model.errors import LimitExceeded

_INODE = np.dtype(
    [
        ("mode", "<u4"), ("uid", "<u4"), ("gid", "<u4"), ("nlink", "<u4"), ("size", "<i8"), ("mtime", "<i8"),
        ("mtime_ns", "<u4"), ("rdev", "<u4"), ("xattr", "<u4"), ("link", "<u4"), ("first", "<u4"),
        ("begin", "<u4"), ("count", "<u4"), ("pad", "<u4"),
    ]
)  # fmt: skip
_NAME = np.dtype([("inode", "<u4"), ("parent", "<u4"), ("start", "<u4")])
assert _INODE.itemsize == f.INODE.size and _NAME.itemsize == f.NAME.size


def write_tree(meta: MetadataLayer, out: BinaryIO, more: Mapping[str, Any] | None = None) -> int:
    """Write ``meta`` to ``out``; return the number of bytes.

    Args:
        meta: its owners are those of the image: the server maps them.
        out: opened for writing.
        more: JSON-able facts to keep in the head.

    Raises:
        LimitExceeded: more than 4 GiB of names.
    """
    tree = meta.tree
    n, m = len(tree), tree.inodes
    # Names of one directory side by side; they rise already, and a stable sort keeps that.
    order = np.argsort(tree.parent, kind="stable")
    place_of = np.empty(n, np.int64)
    place_of[order] = np.arange(n)
    texts = tree.name.take(order)
    if int(texts.offsets[-1]) >= f.NONE:
        raise LimitExceeded("bytes_of_names", int(texts.offsets[-1]), f.NONE, "tree")
    names = np.zeros(n + 1, _NAME)
    names["start"] = texts.offsets
    names["inode"][:n] = tree.inode[order]
    names["parent"][:n] = tree.inode[np.maximum(tree.parent[order], 0)]
    inodes = np.zeros(m, _INODE)
    for column in ("mode", "uid", "gid", "nlink", "size", "mtime", "mtime_ns", "xattr"):
        inodes[column] = getattr(tree, column)
    inodes["rdev"] = encode_devices(tree.major, tree.minor)
    inodes["first"] = place_of[tree.first_name()]
    parents = tree.parent[order][1:]
    begins = np.flatnonzero(np.r_[True, parents[1:] != parents[:-1]]) + 1 if n > 1 else np.zeros(0, np.int64)
    owners = tree.inode[parents[begins - 1]]
    inodes["begin"][owners] = begins
    inodes["count"][owners] = np.diff(np.r_[begins, n])
    inodes["link"], strings = _links(meta)
    facts = f.encode_facts(
        f.Facts(
            meta.namespace.value,
            tuple(np.unique(tree.uid).tolist()),
            tuple(np.unique(tree.gid).tolist()),
            dict(more or {}),
        )
    )
    tables = [
        inodes.tobytes(), names.tobytes(), texts.blob,
        f.encode_strings(strings) + f.encode_strings([f.encode_set(pairs) for pairs in tree.xattr_sets]),
    ]  # fmt: skip
    at = f.HEAD.size + len(facts)
    offsets = []
    for table in tables:
        offsets.append(at)
        at += len(table) + -len(table) % 8
    out.write(f.HEAD.pack(f.MAGIC, f.VERSION, len(facts), m, n, *offsets) + facts)
    for table in tables:
        out.write(table)
        out.write(bytes(-len(table) % 8))
    return at


def _links(meta: MetadataLayer) -> tuple[NDArray[np.int64], list[bytes]]:
    """Return for each inode the row of its target or redirect, and the strings."""
    tree = meta.tree
    rows = np.full(tree.inodes, f.NONE, np.int64)
    symlinks = tree.kind == Kind.SYMLINK
    rows[symlinks] = tree.target[symlinks]
    strings = tree.targets.tolist()
    stubs = np.flatnonzero(meta.is_stub)
    redirects = meta.redirect_list(stubs)
    if meta.places is not None:
        first = tree.first_name()[stubs].tolist()
        paths = tree.paths()
        own = np.array([b"/" + paths[row] == text for row, text in zip(first, redirects, strict=True)], np.bool_)
        redirects = [text for text, same in zip(redirects, own.tolist(), strict=True) if not same]
        stubs = stubs[~own] if len(own) else stubs
    rows[stubs] = len(strings) + np.arange(len(stubs))
    return rows, strings + redirects
