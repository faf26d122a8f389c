"""A tree as text, one line per name: all that shows of it, for goldens and comparisons.

Bytes that are not printable ASCII, spaces, backslashes, and ``=`` in an xattr's name are ``\\xNN``. The attributes
of a hard link stand at the first of its names. Link counts, inode numbers and how bytes are stored are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from layerkit.model.entry import Kind
from layerkit.model.tree import Tree

_WORDS = {Kind.DIR: "directory", Kind.REG: "file"}


def tree_text(tree: Tree) -> Iterator[str]:
    """Yield the lines of ``tree``, without their line ends; all are ASCII."""
    yield "layerkit-tree 1"
    first: dict[int, str] = {}
    for node in tree.nodes():
        path = "/" + _escape(node.path)
        if first.setdefault(node.inode, path) != path:
            yield f"{path} link {first[node.inode]}"
            continue
        kind = Kind(node.mode >> 12)
        words = [path, _WORDS.get(kind, kind.name.lower()), f"{node.mode & 0o7777:04o}", f"{node.uid}:{node.gid}"]
        words.append(f"{node.mtime}.{node.mtime_ns:09d}")
        if kind is Kind.REG:
            words += [str(node.size), node.sha256.hex()]
        elif kind is Kind.SYMLINK:
            words.append(_escape(node.target) or "\\-")
        elif kind in (Kind.CHAR, Kind.BLOCK):
            words.append(f"{node.major}:{node.minor}")
        yield " ".join(words + [f"{_escape(name, b'=')}={_escape(value)}" for name, value in node.xattrs])


def _escape(text: bytes, more: bytes = b"") -> str:
    return re.sub(rb"[^!-\[\]-~]|[%b]" % (more or b" "), lambda m: b"\\x%02x" % m[0][0], text).decode("ascii")
