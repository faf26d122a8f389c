r"""A tree as canonical text, one line per name: for goldens, comparisons and people.

The first line is ``layerkit-tree 1``; names follow in canonical order (parents first, siblings by their
bytes). Fields are separated by one space::

    /PATH directory MODE UID:GID MTIME [XATTR...]
    /PATH file      MODE UID:GID MTIME SIZE SHA256 [XATTR...]
    /PATH symlink   MODE UID:GID MTIME TARGET [XATTR...]
    /PATH fifo      MODE UID:GID MTIME [XATTR...]
    /PATH char      MODE UID:GID MTIME MAJOR:MINOR [XATTR...]     (also ``block``)
    /PATH link      /FIRST                                     another name of an inode

* PATH, FIRST, TARGET and xattr names and values are bytes; every byte that is not printable ASCII, and
  space, backslash (and ``=`` in an xattr's name) is ``\xNN`` with two lower-case hex digits. An empty
  TARGET is ``\-``.
* MODE is four octal digits or more, without the type.
* MTIME is SECONDS.NANOSECONDS, nine digits; both parts add up, so 1.5 s before 1970 is ``-2.500000000``.
* XATTR is NAME=VALUE, sorted by name.
* A hard link's attributes stand at the first of its names.

What follows from these lines is left out: link counts and inode numbers. So is how bytes are stored, as it
does not show: layers, offsets, holes, warnings. ``load(dump(tree)).digest() == tree.digest()`` always.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np

from layerkit.model import sparse
from layerkit.model.entry import Kind, XattrSet
from layerkit.model.errors import InvalidImage, show_path
from layerkit.model.strings import Strings
from layerkit.model.tree import Node, Tree

HEADER = "layerkit-tree 1"

_WORDS = {
    Kind.DIR: "directory", Kind.REG: "file", Kind.SYMLINK: "symlink", Kind.FIFO: "fifo", Kind.CHAR: "char",
    Kind.BLOCK: "block",
}  # fmt: skip
_KINDS = {word: kind for kind, word in _WORDS.items()}
_EMPTY = "\\-"
_PLAIN = re.compile(rb"[!-\[\]-~]+").fullmatch
_SPECIAL = re.compile(rb"[^!-\[\]-~]")
_SPECIAL_NAME = re.compile(rb"[^!-<>-\[\]-~]")
_ESCAPED = re.compile(rb"\\x([0-9a-f]{2})")
_TIME = re.compile(r"(-?(?:0|[1-9][0-9]*))\.([0-9]{9})").fullmatch
_NUMBER = re.compile(r"0|[1-9][0-9]*").fullmatch
_MODE = re.compile(r"[0-7]{4}").fullmatch
_SHA256 = re.compile(r"[0-9a-f]{64}").fullmatch


def dump(tree: Tree) -> Iterator[str]:
    """Yield the lines of ``tree``, without their line ends; all are ASCII."""
    yield HEADER
    sets = ["".join(f" {_escape(n, _SPECIAL_NAME)}={_escape(v)}" for n, v in pairs) for pairs in tree.xattr_sets]
    targets = [_escape(text) if text else _EMPTY for text in tree.targets]
    kinds, perms = tree.kind.tolist(), (tree.mode & 0o7777).tolist()
    uids, gids, sizes, xattrs = tree.uid.tolist(), tree.gid.tolist(), tree.size.tolist(), tree.xattr.tolist()
    mtimes, nanoseconds, links = tree.mtime.tolist(), tree.mtime_ns.tolist(), tree.target.tolist()
    digests = tree.sha256.tobytes().hex()
    paths: list[str] = []
    first: list[str] = []
    for name, parent, i in zip(tree.name.tolist(), tree.parent.tolist(), tree.inode.tolist(), strict=True):
        if parent < 0:
            path = "/"
        else:
            above = paths[parent] if parent else ""
            path = f"{above}/{name.decode() if _PLAIN(name) else _escape(name)}"
        paths.append(path)
        if i < len(first):
            yield f"{path} link {first[i]}"
            continue
        first.append(path)
        kind = kinds[i]
        head = f"{path} {_WORDS[kind]} {perms[i]:04o} {uids[i]}:{gids[i]} {mtimes[i]}.{nanoseconds[i]:09d}"
        if kind == Kind.REG:
            yield f"{head} {sizes[i]} {digests[64 * i : 64 * i + 64]}{sets[xattrs[i]]}"
        elif kind == Kind.SYMLINK:
            yield f"{head} {targets[links[i]]}{sets[xattrs[i]]}"
        elif kind in (Kind.CHAR, Kind.BLOCK):
            yield f"{head} {tree.major[i]}:{tree.minor[i]}{sets[xattrs[i]]}"
        else:
            yield head + sets[xattrs[i]]


def load(lines: Iterable[str]) -> Tree:
    """Return the tree that ``lines`` (with or without line ends) describe; its files have no data.

    Raises:
        InvalidImage: not what :func:`dump` writes; the message names the line.
    """
    reader = _Reader()
    for number, line in enumerate(lines, 1):
        try:
            if number == 1:
                if line.rstrip("\n") != HEADER:
                    raise ValueError(f"want {HEADER!r}, found {line[:40]!r}")
            else:
                reader.line(line.rstrip("\n"))
        except ValueError as error:
            raise InvalidImage(f"tree dump, line {number}: {error}") from error
    if not reader.parent:
        raise InvalidImage("tree dump: no root")
    try:
        tree = reader.tree()
    except OverflowError as error:
        raise InvalidImage(f"tree dump: {error}") from error
    tree.check()
    return tree


def diff(a: Tree, b: Tree) -> Iterator[str]:
    """Yield how ``b`` differs from ``a``, one line for each name and attribute, in no more than ASCII.

    ``+ /path kind`` and ``- /path kind`` are names of one tree only; ``/path: uid 0 -> 1000`` is an
    attribute; ``/path: link of`` says that names are grouped into inodes in another way. No line means
    that the digests are equal.
    """
    ours, theirs = _by_path(a), _by_path(b)
    for path in sorted(ours.keys() | theirs.keys(), key=lambda p: p.replace(b"/", b"\0")):
        where = "/" + _escape(path)
        old, new = ours.get(path), theirs.get(path)
        if old is None or new is None:
            sign, node = ("+", new) if old is None else ("-", old)
            assert node is not None
            yield f"{sign} {where} {_WORDS[Kind(node[0].mode >> 12)]}"
            continue
        for attribute, was, now in zip(_ATTRIBUTES, _shown(*old), _shown(*new), strict=True):
            if was != now:
                yield f"{where}: {attribute} {was} -> {now}"


_ATTRIBUTES = (
    "kind", "mode", "uid", "gid", "mtime", "size", "device", "target", "xattrs", "sha256", "link of",
)  # fmt: skip


def _by_path(tree: Tree) -> dict[bytes, tuple[Node, bytes]]:
    """Return each node with the first name of its inode."""
    first: dict[int, bytes] = {}
    return {node.path: (node, first.setdefault(node.inode, node.path)) for node in tree.nodes()}


def _shown(node: Node, first: bytes) -> tuple[str, ...]:
    return (
        _WORDS[Kind(node.mode >> 12)],
        f"{node.mode & 0o7777:04o}",
        str(node.uid),
        str(node.gid),
        f"{node.mtime}.{node.mtime_ns:09d}",
        str(node.size),
        f"{node.major}:{node.minor}",
        _escape(node.target) or _EMPTY,
        " ".join(f"{_escape(n, _SPECIAL_NAME)}={_escape(v)}" for n, v in node.xattrs) or "none",
        node.sha256.hex() or "none",
        "/" + _escape(first),
    )


class _Reader:
    """Columns that grow line by line."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.inodes: dict[str, int] = {}
        self.parent: list[int] = []
        self.name: list[bytes] = []
        self.inode: list[int] = []
        self.columns: list[tuple[int, ...]] = []
        self.sha256: list[bytes] = []
        self.targets: dict[bytes, int] = {}
        self.sets: dict[XattrSet, int] = {(): 0}

    def line(self, text: str) -> None:
        path, _, rest = text.partition(" ")
        word, _, rest = rest.partition(" ")
        row = len(self.parent)
        if path == "/":
            parent, name = -1, b""
        else:
            above, _, last = path.rpartition("/")
            if above not in self.rows:
                raise ValueError(f"{path}: its directory does not stand before it")
            parent, name = self.rows[above], _unescape(last)
            if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
                raise ValueError(f"not a name: {last!r}")
        if (row == 0) != (parent < 0):
            raise ValueError("the root comes first, and once")
        # Below the root, paths start with an empty part.
        if self.rows.setdefault(path if parent >= 0 else "", row) != row:
            raise ValueError(f"{path} comes twice")
        self.parent.append(parent)
        self.name.append(name)
        if word == "link":
            if rest not in self.inodes:
                raise ValueError(f"link to {rest}, which does not stand before it")
            self.inode.append(self.inodes[rest])
            return
        if word not in _KINDS:
            raise ValueError(f"unknown kind {word!r}")
        self.inode.append(len(self.columns))
        self.inodes[path] = len(self.columns)
        self._attributes(_KINDS[word], rest.split(" "))

    def _attributes(self, kind: Kind, fields: list[str]) -> None:
        mode, owner, time, *rest = fields
        uid, gid = owner.split(":")
        when = _TIME(time)
        if not _MODE(mode) or when is None:
            raise ValueError(f"not a mode and a time: {mode} {time}")
        size, target, major, minor, sha256 = 0, -1, 0, 0, bytes(32)
        if kind is Kind.REG:
            text, digest, *rest = rest
            size = _number(text, 63)
            if not _SHA256(digest):
                raise ValueError(f"not a sha256: {digest}")
            sha256 = bytes.fromhex(digest)
        elif kind is Kind.SYMLINK:
            text, *rest = rest
            link = b"" if text == _EMPTY else _unescape(text)
            target, size = self.targets.setdefault(link, len(self.targets)), len(link)
        elif kind in (Kind.CHAR, Kind.BLOCK):
            text, *rest = rest
            major, minor = (_number(part) for part in text.split(":"))
        pairs = [
            (_unescape(n, _SPECIAL_NAME), _unescape(v)) for n, _, v in (field.partition("=") for field in rest)
        ]
        if [n for n, _ in pairs] != sorted({n for n, _ in pairs}) or any("=" not in field for field in rest):
            raise ValueError("xattrs are NAME=VALUE, rising, each once")
        xattr = self.sets.setdefault(tuple(pairs), len(self.sets))
        self.sha256.append(sha256)
        self.columns.append((
            int(kind) << 12 | int(mode, 8), _number(uid), _number(gid), size, int(when[1]), int(when[2]),
            major, minor, target, xattr,
        ))  # fmt: skip

    def tree(self) -> Tree:
        m = len(self.columns)
        mode, uid, gid, size, mtime, mtime_ns, major, minor, target, xattr = zip(*self.columns, strict=True)
        modes = np.array(mode, np.uint32)
        parent, inode = np.array(self.parent, np.int32), np.array(self.inode, np.int32)
        is_dir = modes >> 12 == Kind.DIR
        below = np.flatnonzero(is_dir[inode])[1:]
        subdirectories = np.bincount(inode[parent[below]], minlength=m)
        tree = Tree(
            parent=parent,
            name=Strings.of(self.name),
            inode=inode,
            mode=modes,
            uid=np.array(uid, np.uint32),
            gid=np.array(gid, np.uint32),
            nlink=(np.bincount(inode, minlength=m) + np.where(is_dir, 1 + subdirectories, 0)).astype(np.uint32),
            size=np.array(size, np.int64),
            mtime=np.array(mtime, np.int64),
            mtime_ns=np.array(mtime_ns, np.uint32),
            major=np.array(major, np.uint32),
            minor=np.array(minor, np.uint32),
            target=np.array(target, np.int32),
            targets=Strings.of(self.targets),
            xattr=np.array(xattr, np.int32),
            xattr_sets=tuple(self.sets),
            layer=np.full(m, -1, np.int32),
            offset=np.full(m, -1, np.int64),
            sha256=np.frombuffer(b"".join(self.sha256), np.uint8).reshape(m, 32),
            sparse=np.full(m, -1, np.int32),
            sparse_maps=sparse.NONE,
            layers=(),
        )
        paths = [p.replace(b"/", b"\0") for p in tree.paths()]
        if paths != sorted(paths):
            raise InvalidImage("tree dump: the lines are not in canonical order")
        return tree


def _escape(text: bytes, special: re.Pattern[bytes] = _SPECIAL) -> str:
    return special.sub(lambda match: b"\\x%02x" % match[0][0], text).decode("ascii")


def _unescape(text: str, special: re.Pattern[bytes] = _SPECIAL) -> bytes:
    raw = _ESCAPED.sub(lambda match: bytes([int(match[1], 16)]), text.encode("ascii"))
    if _escape(raw, special) != text:
        raise ValueError(f"not escaped as it should be: {show_path(text[:80])}")
    return raw


def _number(text: str, bits: int = 32) -> int:
    if not _NUMBER(text) or len(text) > 20 or int(text) >= 1 << bits:
        raise ValueError(f"not a number: {show_path(text[:40])}")
    return int(text)
