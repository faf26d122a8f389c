"""Renders a metadata layer as an uncompressed EROFS image with 4 KiB blocks.

The image is, in this order: the superblock; the shared xattrs; the inodes of directories, symlinks and odd
cases one after the other (*loose*), the root first; all other inodes as arrays of equal records, one array
per shape; blocks of directories and of symlinks that found no room beside their inode. Nothing in the
layout depends on owners, so that :mod:`~layerkit.formats.erofs.patch` can write other ones in their place.

Every distinct pair of xattr name and value is stored once in the shared area and named by its id from the
inodes. Pairs that hold owner ids are the exception: they are distinct per xattr set, whatever their value,
because an id map may make two values equal and the layout must not depend on the map.

Only stubs have content, and theirs is one null chunk: a hole over the whole file, never read because the
overlay takes the bytes from elsewhere (``fs/erofs/data.c``, chunk-based files).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from layerkit.formats.erofs import dirs
from layerkit.formats.erofs import format as f
from layerkit.formats.erofs.patch import Fixups, XattrFixup
from layerkit.metaonly import METACOPY, METACOPY_VALUE, REDIRECT, MetadataLayer, encode_devices
from layerkit.model.acl_caps import ID_NAMES
from layerkit.model.entry import Kind
from layerkit.model.errors import LossyResult
from layerkit.model.strings import offsets_of
from layerkit.model.tree import Tree

_BLOCK = 1 << f.META_BLOCK_BITS
_CHUNK_BITS = f.META_BLOCK_BITS + f.MAX_CHUNK_BITS
_CLASS_ALIGN = 128
"""The usual stub is one record of 128 bytes: so aligned, none spans two blocks."""

_INODES_AT_ONCE = 1 << 15
_LIST_MAX = 65536
"""What listxattr(2) can return at most (``XATTR_LIST_MAX``)."""

_OURS = 2
"""A stub brings two xattrs of its own: a shared one (metacopy) and an inline one (redirect)."""


def build_meta(meta: MetadataLayer, file: BinaryIO) -> Fixups:
    """Write ``meta`` as an EROFS image to ``file`` (some 160 to 200 bytes per name), in one pass without seeking.

    The same metadata layer gives the same bytes. Inode numbers depend on the tree, never on owners.

    Returns:
        What :func:`~layerkit.formats.erofs.patch.patch_meta` needs to make the image of an id map from this one.

    Raises:
        LossyResult: an entry that EROFS cannot express, by path.
    """
    image = _Image(meta)
    for piece in image.pieces():
        file.write(piece)
    return image.fixups()


class _Image:
    """The layout of one image, fixed when constructed, and its bytes in order."""

    def __init__(self, meta: MetadataLayer) -> None:
        self.meta, self.tree, self.is_stub = meta, meta.tree, meta.is_stub
        tree = self.tree
        self.kind = tree.kind
        _check(tree, self.kind, self.is_stub)
        self.devices = _devices(tree, self.kind)
        self.redirect, shared = meta.namespace.xattr(REDIRECT), meta.namespace.xattr(METACOPY)
        own, common = f.split_xattr_name(self.redirect), f.split_xattr_name(shared)
        assert own is not None and common is not None
        self.own, self.own_bytes = own, meta.redirect_bytes
        self.own_value_at = f.XATTR_ENTRY_BYTES + len(own[1])
        self.xattrs = _plan_xattrs(tree, (shared, METACOPY_VALUE), len(self.redirect) + len(shared) + 2)
        self.filters = self.xattrs.filters()
        self.stub_filters = self.xattrs.filters((own, common))
        self.shared = self.xattrs.shared
        self.inline_bytes = np.array([len(b) for b in self.xattrs.inline], np.int64)
        self.body = self._body_bytes()
        self.dirs = dirs.plan(tree.name, tree.parent, (self.kind == Kind.DIR)[tree.inode], f.META_BLOCK_BITS)
        self.dir_inodes = tree.inode[self.dirs.owner]
        self.size = tree.size.copy()
        self.size[self.dir_inodes] = self.dirs.sizes
        self._lay_out()

    def _body_bytes(self) -> NDArray[np.int64]:
        """Return int64 (m,): the bytes of each inode's inline xattr area."""
        plain = 4 * self.shared + self.inline_bytes
        plain += np.where(plain > 0, f.XATTR_BODY_BYTES, 0)
        body = plain[self.tree.xattr]
        bare = body == 0
        entry = -(-(self.own_value_at + self.own_bytes) // 4) * 4
        body[self.is_stub] += 4 + np.where(self.own_bytes > 0, entry, 0)[self.is_stub]
        body[self.is_stub & bare] += f.XATTR_BODY_BYTES
        return body

    def _lay_out(self) -> None:
        tree, kind = self.tree, self.kind
        self.inodes_at = _BLOCK + f.align(len(self.xattrs.area), _BLOCK)
        # Nids count from the block before, so that no inode has number 0, which readdir(3) takes for a hole.
        self.meta_block = self.inodes_at // _BLOCK - 1
        odd = (kind == Kind.DIR) | (kind == Kind.SYMLINK) | (self.inline_bytes > 0)[tree.xattr]
        self.loose = np.flatnonzero(odd)
        self.position = np.zeros(tree.inodes, np.int64)
        self.chunks = np.where(self.is_stub, -(-tree.size >> _CHUNK_BITS), 0)
        end = self._place_loose()
        own = np.where(self.is_stub, self.own_bytes, 0)
        key = np.where(odd, -1, ((self.shared[tree.xattr] * 2 + self.is_stub) << 24 | self.chunks) << 12 | own)
        self.classes: list[tuple[NDArray[np.int64], int, int]] = []
        for shape in np.unique(key[~odd]).tolist():
            rows = np.flatnonzero(key == shape)
            start = f.align(end, _CLASS_ALIGN)
            nchunks = shape >> 12 & 0xFFFFFF
            size = f.align(f.EXTENDED_INODE_BYTES + int(self.body[rows[0]]) + 4 * nchunks, f.SLOT_BYTES)
            self.position[rows] = start + size * np.arange(len(rows))
            end = start + size * len(rows)
            self.classes.append((rows, size, nchunks))
        self.inodes_end = end
        self.blocks_at = f.align(end, _BLOCK) // _BLOCK
        self._place_blocks()
        self.nid = ((self.position - self.meta_block * _BLOCK) // f.SLOT_BYTES).astype(np.uint32)

    def _place_loose(self) -> int:
        """Give every loose inode its place, and its tail one beside it where it fits; return the end.

        A tail may not cross a block (``fs/erofs/data.c``). One that would moves, with its inode, to the next
        block, unless a block of its own wastes less.
        """
        rows = self.loose
        tails = np.zeros(self.tree.inodes, np.int64)
        tails[self.kind == Kind.SYMLINK] = self.tree.size[self.kind == Kind.SYMLINK]
        tails[self.dir_inodes] = self.dirs.tail
        heads = f.EXTENDED_INODE_BYTES + self.body[rows]
        chunks = 4 * self.chunks[rows]
        at = self.inodes_at
        places, inline = [], []
        for head, tail, more in zip(heads.tolist(), tails[rows].tolist(), chunks.tolist(), strict=True):
            used = (at + head) % _BLOCK
            fits = used + tail <= _BLOCK
            if tail and not fits:
                # The next place for the inode at which the tail begins a block or lies in the first one.
                skip = -at % _BLOCK
                if head % _BLOCK + tail <= _BLOCK and skip <= _BLOCK - tail:
                    at, fits = at + skip, True
            places.append(at)
            inline.append(fits)
            at += head + more + (tail if fits else 0)
            at += -at % f.SLOT_BYTES
        self.position[rows] = places
        self.inline = np.zeros(self.tree.inodes, bool)
        self.inline[rows] = inline
        self.inline &= tails > 0
        return at

    def _place_blocks(self) -> None:
        """Give every block that lies apart from its inode its address."""
        tree = self.tree
        apart = np.ones(len(self.dirs.block_first) - 1, bool)
        apart[(self.dirs.dir_first[1:] - 1)[self.inline[self.dir_inodes]]] = False
        self.dir_blocks = np.flatnonzero(apart)
        self.long_links = np.flatnonzero((self.kind == Kind.SYMLINK) & ~self.inline)
        self.block = np.zeros(tree.inodes, np.int64)
        self.block[self.dir_inodes] = self.blocks_at + offsets_of(apart)[self.dirs.dir_first[:-1]]
        links_at = self.blocks_at + len(self.dir_blocks)
        self.block[self.long_links] = links_at + np.arange(len(self.long_links))
        self.blocks = links_at + len(self.long_links)
        if self.blocks > f.NULL_BLOCK or self.inodes_end // f.SLOT_BYTES > f.NULL_BLOCK:
            raise LossyResult(b"", f"an image of {self.blocks} blocks; EROFS numbers no more than 2^32")

    def pieces(self) -> Iterator[bytes | bytearray | memoryview]:
        """Yield the image's bytes in order."""
        head = f.Superblock(
            block_bits=f.META_BLOCK_BITS, compat=f.Compat.MTIME | f.Compat.XATTR_FILTER, root_nid=int(self.nid[0]),
            inodes=self.tree.inodes, blocks=self.blocks, meta_block=self.meta_block, xattr_block=1,
            uuid=_uuid(self.tree, self.redirect),
        )  # fmt: skip
        yield head.encode(_BLOCK)
        yield self.xattrs.area + bytes(-len(self.xattrs.area) % _BLOCK)
        file_type = np.zeros(16, np.uint8)
        file_type[list(f.FILE_TYPE)] = list(f.FILE_TYPE.values())
        self._name_nid = self.nid[self.tree.inode]
        self._name_type = file_type[self.kind][self.tree.inode]
        end = self.inodes_at
        for last, piece in self._loose_pieces():
            yield piece
            end = last
        for rows, size, nchunks in self.classes:
            start = int(self.position[rows[0]])
            yield bytes(start - end)
            end = start + size * len(rows)
            for at in range(0, len(rows), _INODES_AT_ONCE):
                yield self._records(rows[at : at + _INODES_AT_ONCE], size, nchunks)
        yield bytes(-end % _BLOCK)
        for block in self.dirs.blocks(self.dir_blocks, self._name_nid, self._name_type):
            yield block.ljust(_BLOCK, b"\0")
        for link in self.long_links.tolist():
            yield self.tree.targets[int(self.tree.target[link])].ljust(_BLOCK, b"\0")

    def _headers(self, rows: NDArray[np.int64], out: NDArray[np.void]) -> None:
        """Fill the fields of an inode in ``out`` for the inodes ``rows``."""
        tree = self.tree
        layout = np.where(
            self.inline[rows], f.inode_format(f.Layout.FLAT_INLINE), f.inode_format(f.Layout.FLAT_PLAIN)
        )
        stub = self.is_stub[rows]
        layout[stub] = f.inode_format(f.Layout.CHUNK_BASED)
        out["format"] = layout
        out["xattr_icount"] = f.xattr_icount(self.body[rows])
        out["mode"] = tree.mode[rows]
        out["size"] = self.size[rows]
        out["u"] = np.where(stub, f.MAX_CHUNK_BITS, self.block[rows] | self.devices[rows])
        out["ino"] = rows + 1
        out["uid"] = tree.uid[rows]
        out["gid"] = tree.gid[rows]
        out["mtime"] = tree.mtime[rows]
        out["mtime_ns"] = tree.mtime_ns[rows]
        out["nlink"] = tree.nlink[rows]

    def _records(self, rows: NDArray[np.int64], size: int, nchunks: int) -> memoryview:
        """Return the records of inodes of one shape."""
        head = f.EXTENDED_INODE_BYTES
        fields: dict[str, tuple[int, object]] = {}
        sets = self.tree.xattr[rows]
        stub = bool(self.is_stub[rows[0]])
        shared = int(self.shared[sets[0]])
        body = int(self.body[rows[0]])
        own_bytes = int(self.own_bytes[rows[0]]) if stub else 0
        own = f.xattr_entry(*self.own, bytes(own_bytes)) if own_bytes else b""
        if body:
            fields["filter"] = (head, "<u4")
            fields["count"] = (head + 4, "u1")
            fields["ids"] = (head + f.XATTR_BODY_BYTES, ("<u4", (shared + stub,)))
        if stub:
            fields["own"] = (head + body - len(own), ("u1", (len(own),)))
            fields["chunks"] = (head + body, ("<u4", (nchunks,)))
        out = np.zeros(len(rows), f.extended_inode(size, fields))
        self._headers(rows, out)
        if body:
            out["filter"] = (self.stub_filters if stub else self.filters)[sets]
            out["count"] = shared + stub
            ids = out["ids"]
            if stub:
                ids[:, 0] = self.xattrs.extra_id
            if shared:
                ids[:, int(stub) :] = self.xattrs.ids[self.xattrs.starts[sets][:, None] + np.arange(shared)]
        if stub:
            if own:
                entry = out["own"]
                entry[:] = np.frombuffer(own, np.uint8)
                entry[:, self.own_value_at : self.own_value_at + own_bytes] = self.meta.redirects_of(rows)
            out["chunks"] = f.NULL_BLOCK
        return out.view(np.uint8).data

    def _loose_pieces(self) -> Iterator[tuple[int, bytearray]]:
        """Yield (place of its end, bytes) for the loose inodes with their tails, piece by piece."""
        chosen = self.dirs.dir_first[1:] - 1
        tails = self.dirs.blocks(chosen[self.inline[self.dir_inodes]], self._name_nid, self._name_type)
        rows = self.loose
        for at in range(0, len(rows), _INODES_AT_ONCE):
            part = rows[at : at + _INODES_AT_ONCE]
            yield self._loose_piece(part, rows[at + len(part)] if at + len(part) < len(rows) else -1, tails)

    def _loose_piece(self, rows: NDArray[np.int64], after: int, tails: Iterator[bytes]) -> tuple[int, bytearray]:
        """Return (place of its end, bytes) for the inodes ``rows``, up to the inode ``after``."""
        start = int(self.position[rows[0]])
        heads = np.zeros(len(rows), f.EXTENDED)
        self._headers(rows, heads)
        raw = heads.tobytes()
        out = bytearray()
        kinds, sets, inline = self.kind[rows].tolist(), self.tree.xattr[rows].tolist(), self.inline[rows].tolist()
        has_body = (self.body[rows] > 0).tolist()
        links = self.tree.target[rows].tolist()
        targets = self.tree.targets
        for i, place in enumerate((self.position[rows] - start).tolist()):
            if place != len(out):
                out += bytes(place - len(out))
            out += raw[i * f.EXTENDED_INODE_BYTES : (i + 1) * f.EXTENDED_INODE_BYTES]
            if has_body[i]:
                out += self._loose_body(int(rows[i]), sets[i])
            if inline[i]:
                out += next(tails) if kinds[i] == Kind.DIR else targets[links[i]]
        end = int(self.position[after]) if after >= 0 else start + f.align(len(out), f.SLOT_BYTES)
        return end, out + bytes(end - start - len(out))

    def _loose_body(self, row: int, xattr_set: int) -> bytes:
        """Return the inline xattr area of one loose inode, and its chunks if it is a stub."""
        stub = bool(self.is_stub[row])
        plan = self.xattrs
        ids = plan.ids[plan.starts[xattr_set] : plan.starts[xattr_set + 1]].tolist()
        filters = self.filters
        own = b""
        if stub:
            ids.insert(0, plan.extra_id)
            filters = self.stub_filters
            if self.own_bytes[row]:
                own = f.xattr_entry(*self.own, self.meta.redirects_of(np.array([row])).tobytes())
            own += b"\xff" * (4 * int(self.chunks[row]))
        head = int(filters[xattr_set]).to_bytes(4, "little") + bytes((len(ids),)) + bytes(7)
        return head + np.array(ids, "<u4").tobytes() + plan.inline[xattr_set] + own

    def fixups(self) -> Fixups:
        """Return where the owners are, inodes in the order of the file."""
        rows = np.concatenate([self.loose, *(rows for rows, _, _ in self.classes)]).astype(np.uint32)
        return Fixups(
            image_bytes=self.blocks * _BLOCK,
            meta_bytes=self.meta_block * _BLOCK,
            rows=rows,
            nids=self.nid[rows],
            xattrs=self.xattrs.fixups,
            sets=len(self.tree.xattr_sets),
        )


def _check(tree: Tree, kind: NDArray[np.uint8], is_stub: NDArray[np.bool_]) -> None:
    known = np.isin(kind, np.array(list(f.FILE_TYPE), np.uint8))
    link = kind == Kind.SYMLINK
    lengths = np.where(link, tree.targets.lengths[tree.target] if len(tree.targets) else 0, tree.size)
    problems = {
        "a kind of file that EROFS does not have": ~known,
        "a regular file with data that is no stub": (kind == Kind.REG) & ~is_stub & (tree.size > 0),
        "a symlink without a target, or with one beyond 4095 bytes": link & ((lengths < 1) | (lengths >= _BLOCK)),
        "a symlink whose size is not the length of its target": link & (lengths != tree.size),
        "a directory, device or fifo with a size": ~link & (kind != Kind.REG) & (tree.size != 0),
    }  # fmt: skip
    for problem, found in problems.items():
        tree.refuse(found, problem)
    too_long = tree.name.lengths > f.NAME_MAX
    if too_long.any():
        row = int(np.argmax(too_long))
        raise LossyResult(tree.path(row), f"a name of {tree.name.lengths[row]} bytes; EROFS holds {f.NAME_MAX}")


def _devices(tree: Tree, kind: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Return uint32 (m,): device numbers as they are stored, 0 for all that is no device."""
    device = (kind == Kind.CHAR) | (kind == Kind.BLOCK)
    beyond = device & ((tree.major >= 1 << 12) | (tree.minor >= 1 << 20))
    tree.refuse(beyond, lambda i: f"device {tree.major[i]}:{tree.minor[i]}; EROFS holds 4095:1048575 at most")
    return np.where(device, encode_devices(tree.major, tree.minor), np.uint32(0))


def _uuid(tree: Tree, redirect: bytes) -> bytes:
    """Return a UUID (version 8, RFC 9562) of all that the image holds but owners.

    Overlayfs tells layers apart by UUID, so it must not be zero; and an upper directory made over one map
    must fit the META of another, so it must not depend on the map.
    """
    h = hashlib.sha256(b"layerkit.erofs.v1\0" + redirect + b"\0")
    for strings in (tree.name, tree.targets):
        h.update(np.ascontiguousarray(strings.offsets, "<i8").data)
        h.update(strings.blob)
    for column, dtype in (
        (tree.parent, "<i4"), (tree.inode, "<i4"), (tree.mode, "<u4"), (tree.size, "<i8"), (tree.mtime, "<i8"),
        (tree.mtime_ns, "<u4"), (tree.major, "<u4"), (tree.minor, "<u4"), (tree.target, "<i4"),
        (tree.xattr, "<i4"), (tree.sha256, "u1"),
    ):  # fmt: skip
        h.update(np.ascontiguousarray(column, dtype).data)
    for pairs in tree.xattr_sets:
        h.update(repr([(name, b"" if name in ID_NAMES else value) for name, value in pairs]).encode())
    return f.uuid8(h.digest())


@dataclass(frozen=True, slots=True, eq=False)
class _Xattrs:
    """The xattrs of an image.

    Attributes:
        area: the shared area.
        extra_id: id of the pair that all stubs have.
        starts: int64 (sets + 1,): row of ``ids`` where those of a set begin.
        ids: uint32: shared xattr ids, set by set.
        inline: by set, the entries that found no room among the shared ids; b"" nearly always.
        names: by set, its (index, name) pairs, for the name filter.
        fixups: where the values with ids are, the area being the second block.
    """

    area: bytes
    extra_id: int
    starts: NDArray[np.int64]
    ids: NDArray[np.uint32]
    inline: tuple[bytes, ...]
    names: tuple[tuple[tuple[int, bytes], ...], ...]
    fixups: tuple[XattrFixup, ...]

    @property
    def shared(self) -> NDArray[np.int64]:
        """Return int64 (sets,): the number of shared ids of each set."""
        return np.diff(self.starts)

    def filters(self, more: Sequence[tuple[int, bytes]] = ()) -> NDArray[np.uint32]:
        """Return uint32 (sets,): the name filter of each set, with the names ``more`` added."""
        return np.array([f.name_filter((*names, *more)) for names in self.names], np.uint32)


def _plan_xattrs(tree: Tree, extra: tuple[bytes, bytes], extra_bytes: int) -> _Xattrs:
    """Return where the xattrs of ``tree`` go; sets that no inode has are left out.

    ``extra`` is the pair that all stubs share, ``extra_bytes`` the longest list of names that they add.
    """
    area = bytearray()
    common = f.split_xattr_name(extra[0])
    assert common is not None
    extra_id = _add(area, common, extra[1])[0]
    seen: dict[object, int] = {extra: extra_id}
    used = np.zeros(len(tree.xattr_sets), bool)
    used[tree.xattr] = True
    starts, ids, inlines, fixups = [0], list[int](), list[bytes](), list[XattrFixup]()
    all_names = []
    for row, pairs in enumerate(tree.xattr_sets):
        names, inline = [], bytearray()
        if used[row]:
            total = sum(len(name) + 1 for name, _ in pairs) + extra_bytes
            if total > _LIST_MAX:
                what = f"names of xattrs that take {total} bytes; listxattr(2) returns no more than {_LIST_MAX}"
                raise LossyResult(_path(tree, row), what)
            # Ids first: so they are always shared, and patching never looks into inodes.
            ordered = sorted(pairs, key=lambda pair: pair[0] not in ID_NAMES)
            for place, (name, value) in enumerate(ordered):
                parts = f.split_xattr_name(name)
                if parts is None or len(value) > f.XATTR_VALUE_MAX:
                    raise LossyResult(_path(tree, row), _why(name, value))
                names.append(parts)
                if place >= f.XATTR_SHARED_MAX - _OURS:
                    inline += f.xattr_entry(*parts, value)
                    continue
                key: object = (row, name) if name in ID_NAMES else (name, value)
                if key not in seen:
                    seen[key], offset = _add(area, parts, value)
                    if name in ID_NAMES:
                        fixups.append(XattrFixup(_BLOCK + offset, len(value), row, ID_NAMES.index(name)))
                ids.append(seen[key])
            if len(inline) > f.XATTR_BODY_MAX - 4096:
                raise LossyResult(_path(tree, row), "more xattrs than an EROFS inode holds (some 256 KiB)")
        starts.append(len(ids))
        inlines.append(bytes(inline))
        all_names.append(tuple(names))
    return _Xattrs(
        bytes(area), extra_id, np.array(starts, np.int64), np.array(ids, np.uint32), tuple(inlines),
        tuple(all_names), tuple(fixups),
    )  # fmt: skip


def _add(area: bytearray, parts: tuple[int, bytes], value: bytes) -> tuple[int, int]:
    """Append an entry; return its shared id and the offset of its value in the area."""
    at = len(area)
    area += f.xattr_entry(*parts, value)
    return at // 4, at + f.XATTR_ENTRY_BYTES + len(parts[1])


def _path(tree: Tree, row: int) -> bytes:
    return tree.inode_path(int(np.argmax(tree.xattr == row)))


def _why(name: bytes, value: bytes) -> str:
    shown = name.decode("utf-8", "backslashreplace")
    if len(value) > f.XATTR_VALUE_MAX:
        return f"xattr {shown!r} of {len(value)} bytes; EROFS holds {f.XATTR_VALUE_MAX}"
    return (
        f"xattr {shown!r}: EROFS holds user., trusted., security. and POSIX ACL names of up to {f.NAME_MAX} bytes"
    )
