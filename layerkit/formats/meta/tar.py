"""A metadata layer as a tar: what any unpacker that keeps xattrs turns into the folder form.

A stub is a PAX 1.0 sparse entry that is one hole, so 1,024 bytes of header and 512 of map stand for a file of
any size. Entries come in canonical order, a hard link after the first name of its inode; the same layer is
always the same bytes. ``formats.tar.writer`` says how values are written.
"""

from __future__ import annotations

from typing import BinaryIO

import numpy as np

from layerkit.formats.tar.header import BLOCK
from layerkit.formats.tar.writer import END, SPARSE_1_0, blank_header, record, seal, xattr_records
from layerkit.metaonly import METACOPY, METACOPY_VALUE, REDIRECT, REDIRECT_BYTES, MetadataLayer, redirects
from layerkit.model.acl_caps import CAPABILITY_NAME
from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import LossyResult
from layerkit.model.tree import Tree

_ROWS_AT_ONCE = 4096


def write_tar(meta: MetadataLayer, file: BinaryIO) -> None:
    """Write ``meta`` as an uncompressed tar.

    Raises:
        LossyResult: an xattr name that a tar cannot hold.
        OSError: as ``file`` says.
    """
    tree = meta.tree
    own_xattrs = _xattr_records(tree)
    # Unpackers that chown a hard link take the inode's capability away, and then set what its entry has.
    link_xattrs = [xattr_records(tuple(p for p in pairs if p[0] == CAPABILITY_NAME)) for pairs in tree.xattr_sets]
    metacopy = record(b"SCHILY.xattr." + meta.namespace.xattr(METACOPY), METACOPY_VALUE)
    example = record(b"SCHILY.xattr." + meta.namespace.xattr(REDIRECT), bytes(REDIRECT_BYTES))
    # Every redirect has the same length, so all but its own bytes is the same in every record.
    stub_tail = SPARSE_1_0 + metacopy + example[: -REDIRECT_BYTES - 1]
    first_name = tree.first_name()
    # Paths are kept of what later entries need them for: folders, and inodes with further names.
    folders: dict[int, bytes] = {-1: b""}
    linked = dict.fromkeys(np.flatnonzero(np.bincount(tree.inode) > 1).tolist(), b"")
    for start in range(0, len(tree), _ROWS_AT_ONCE):
        rows = np.arange(start, min(start + _ROWS_AT_ONCE, len(tree)))
        inodes = tree.inode[rows]
        is_first = first_name[inodes] == rows
        is_stub = (tree.kind[inodes] == Kind.REG) & (tree.size[inodes] > 0) & is_first
        data = redirects(tree.sha256[inodes[is_stub]]).tobytes()
        place = 0
        headers, maps = list[bytes](), list[bytes]()
        columns = (
            tree.parent[rows], inodes, is_first, tree.mode[inodes], tree.uid[inodes], tree.gid[inodes],
            tree.size[inodes], tree.mtime[inodes], tree.mtime_ns[inodes], tree.xattr[inodes],
        )  # fmt: skip
        for row, name, parent, inode, first, mode, uid, gid, size, sec, ns, xattr in zip(
            rows.tolist(),
            tree.name[start : start + len(rows)].tolist(),
            *(c.tolist() for c in columns),
            strict=True,
        ):
            kind, link, major, minor, body = mode >> 12, b"", 0, 0, b""
            path = folders[parent] + name
            records = own_xattrs[xattr]
            if inode in linked:
                if first:
                    linked[inode] = path
                else:
                    kind, link, records = Kind.HARDLINK, linked[inode], link_xattrs[xattr]
            if kind == Kind.DIR:
                folders[row] = path + b"/" if path else b""
            elif kind == Kind.REG:
                if size:
                    redirect = data[place : place + REDIRECT_BYTES]
                    place += REDIRECT_BYTES
                    records += b"%b%b\n%b" % (stub_tail, redirect, record(b"GNU.sparse.realsize", b"%d" % size))
                    # One run of no bytes at the end: GNU tar would make a file of 0 bytes from a map without.
                    body = (b"1\n%d\n0\n" % size).ljust(BLOCK, b"\0")
            elif kind == Kind.SYMLINK:
                link = tree.targets[int(tree.target[inode])]
            elif kind in (Kind.CHAR, Kind.BLOCK):
                major, minor = int(tree.major[inode]), int(tree.minor[inode])
            entry = Entry(path, kind, mode & 0o7777, uid, gid, sec, ns, 0, major, minor, link)
            headers.append(blank_header(entry, len(body), records))
            maps.append(body)
        file.write(seal(headers, maps))
    file.write(END)


def _xattr_records(tree: Tree) -> list[bytes]:
    records = []
    for row, pairs in enumerate(tree.xattr_sets):
        try:
            records.append(xattr_records(pairs))
        except LossyResult:
            xattr_records(pairs, tree.inode_path(int(np.argmax(tree.xattr == row))))
    return records
