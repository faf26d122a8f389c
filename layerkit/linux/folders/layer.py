"""The index of a layer that a runtime has unpacked into a folder, read from the folder as it is.

One pass over the names (getdents, stat, xattrs), nothing is opened but folders, nothing is written, and no
file's bytes are read: the index has attributes, and no content digests. What overlayfs acts on becomes the
rows that a layer's tar would have had (Documentation/filesystems/overlayfs.rst, "whiteouts and opaque
directories"): a character device 0:0 and an empty file with ``overlay.whiteout`` are WHITEOUT rows, a folder
with ``overlay.opaque=y`` an OPAQUE one, in the ``trusted.`` namespace or in ``user.`` (layers that an ordinary
user unpacked). containers-storage with a mount program writes ``.wh.NAME`` files instead. The overlay's other
private xattrs are not content and are left out; ``overlay.overlay.X`` is content, and is shown as ``overlay.X``.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from layerkit.linux.folders.layer_walk import SOCKET, STAT_FIELDS, Marks, Walk
from layerkit.linux.folders.writer import FOLDER
from layerkit.model import sparse as sparse_maps
from layerkit.model.digest import Digest
from layerkit.model.entry import OPAQUE_NAME, WHITEOUT_PREFIX, Kind, XattrSet
from layerkit.model.errors import LossyResult
from layerkit.model.index import Index
from layerkit.model.limits import DEFAULT, Limits
from layerkit.model.ports import Progress
from layerkit.model.strings import Strings

_SECOND = 1_000_000_000


@dataclass(frozen=True, slots=True)
class LayerFolder:
    """A folder that a runtime unpacked a layer into.

    Attributes:
        path: the folder whose entries are the layer's.
        marks: how deletions are written in it.
        name: what the runtime calls the layer, for messages.
    """

    path: Path
    marks: Marks = Marks.OVERLAY
    name: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class FolderLayer:
    """A layer folder that was read.

    Attributes:
        index: its rows. ``sha256`` is all zeros and ``offset`` 0 for a file that is not empty: the bytes lie in
            the folder under the row's path. ``diff_id`` stands for the folder in the state that was read.
        state: digest of the folders in it (inode, times of change): see :func:`read_state`.
        metacopy: path of a file of the runtime's own metadata-only copy, None where there is none. Its data
            lies in another layer, so the folder is no place to read data from.
    """

    index: Index
    state: bytes
    metacopy: bytes | None


def index_layer_folder(
    folder: Path | int,
    *,
    diff_id: Digest | None = None,
    marks: Marks = Marks.OVERLAY,
    limits: Limits = DEFAULT,
    progress: Progress | None = None,
) -> FolderLayer:
    """Return the index of an unpacked layer.

    Args:
        folder: its path or a descriptor.
        diff_id: what the index is to call the layer; by default a digest of the folder's place and state.
        marks: how deletions are written.
        limits: bounds on entries and names.
        progress: called as ("reading a layer folder", entries, 0).

    Raises:
        LossyResult: another filesystem is mounted in it.
        InvalidImage: it holds directories that overlayfs has moved (``overlay.redirect``), which only the
            runtime's own mount can resolve.
        OSError: it cannot be read.
    """
    root = os.open(folder, FOLDER & ~os.O_NOFOLLOW) if not isinstance(folder, int) else os.dup(folder)
    try:
        # A thread of its own may have its own working folder, so that names are looked up in one step.
        with ThreadPoolExecutor(1, "layerkit-read") as pool:
            walk = pool.submit(Walk(root, marks, limits, progress).run).result()
        return _Rows(walk).layer(diff_id)
    finally:
        os.close(root)


class _Rows:
    """Turns what a walk found into the rows of an index."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk

    def layer(self, diff_id: Digest | None) -> FolderLayer:
        count = len(self.walk.names)
        stats = np.frombuffer(self.walk.stats, np.uint64).reshape(count, STAT_FIELDS)
        if (stats[:, 2] != self.walk.device).any():
            row = int(np.argmax(stats[:, 2] != self.walk.device))
            raise LossyResult(self.walk.names[row], "another filesystem is mounted here; unmount it first")
        order, paths = self._order()
        state = state_digest([(paths[row], *self._folder_facts(row, stats)) for row in self._folders_in(order)])
        index = self._index(stats, order, paths, diff_id or Digest.of(b"layerkit.folder\0" + state))
        return FolderLayer(index, state, self.walk.metacopy)

    def _folders_in(self, order: list[int]) -> list[int]:
        return [row for row in order if row in self.walk.folders]

    def _folder_facts(self, row: int, stats: NDArray[np.uint64]) -> tuple[int, int, int]:
        return int(stats[row, 1]), self.walk.mtimes[row], self.walk.ctimes[row]

    def _order(self) -> tuple[list[int], dict[int, bytes]]:
        """Return the rows in canonical order, and the path of each."""
        order, paths = [0], {0: b""}
        names, folders = self.walk.names, self.walk.folders
        stack = [iter(self._children(0))]
        above = [b""]
        while stack:
            for row in stack[-1]:
                name = names[row]
                path = paths[row] = above[-1] + name
                order.append(row)
                if row in folders:
                    stack.append(iter(self._children(row)))
                    above.append(path + b"/")
                    break
            else:
                stack.pop()
                above.pop()
        return order, paths

    def _children(self, row: int) -> list[int]:
        _, first, end = self.walk.folders[row]
        return sorted(range(first, end), key=self.walk.names.__getitem__)

    def _index(
        self, stats: NDArray[np.uint64], order: list[int], paths: dict[int, bytes], diff_id: Digest
    ) -> Index:
        kind = (stats[:, 0] >> np.uint64(12)).astype(np.uint8)
        links = self._hard_links(stats, kind, order, paths)
        sources, row_paths, row_kinds = list[int](), list[bytes](), list[int]()
        whiteouts, opaque, names = self.walk.whiteouts, self.walk.opaque, self.walk.names
        hidden = whiteouts | set(np.flatnonzero(kind == SOCKET).tolist())
        kinds = kind.tolist()
        late: list[tuple[bytes, int]] = []
        for row in order:
            path = paths[row]
            if row in hidden:
                if row in whiteouts and names[row] != OPAQUE_NAME:
                    if self.walk.aufs and names[row].startswith(WHITEOUT_PREFIX):
                        # Its row belongs where the name without the prefix stands.
                        above, _, name = path.rpartition(b"/")
                        bare = name[len(WHITEOUT_PREFIX) :]
                        late.append((above + b"/" + bare if above else bare, row))
                    else:
                        sources.append(row)
                        row_paths.append(path)
                        row_kinds.append(Kind.WHITEOUT)
                continue
            if row in opaque:
                sources.append(row)
                row_paths.append(path)
                row_kinds.append(Kind.OPAQUE)
            sources.append(row)
            row_paths.append(path)
            row_kinds.append(Kind.HARDLINK if row in links else kinds[row])
        if late:
            known = {path for path, one in zip(row_paths, row_kinds, strict=True) if one == Kind.WHITEOUT}
            for path, row in late:
                if path in known:
                    continue
                sources.append(row)
                row_paths.append(path)
                row_kinds.append(Kind.WHITEOUT)
            ordered = sorted(
                range(len(sources)),
                key=lambda i: (row_paths[i].replace(b"/", b"\0"), -row_kinds[i] if row_kinds[i] > 16 else 0),
            )
            sources = [sources[i] for i in ordered]
            row_paths = [row_paths[i] for i in ordered]
            row_kinds = [row_kinds[i] for i in ordered]
        return self._columns(stats, np.array(sources, np.int64), row_paths, row_kinds, links, diff_id)

    def _hard_links(
        self, stats: NDArray[np.uint64], kind: NDArray[np.uint8], order: list[int], paths: dict[int, bytes]
    ) -> dict[int, bytes]:
        """Return for every further name of an inode the path of its first one."""
        several = set(np.flatnonzero((stats[:, 3] > 1) & (kind != Kind.DIR)).tolist())
        if not several:
            return {}
        first: dict[int, bytes] = {}
        links: dict[int, bytes] = {}
        inodes = {row: int(stats[row, 1]) for row in several}
        for row in order:
            # Whiteouts share one inode on some filesystems; they are no links.
            if row in several and row not in self.walk.whiteouts:
                path = first.setdefault(inodes[row], paths[row])
                if path is not paths[row]:
                    links[row] = path
        return links

    def _columns(
        self,
        stats: NDArray[np.uint64],
        source: NDArray[np.int64],
        paths: list[bytes],
        row_kinds: list[int],
        links: dict[int, bytes],
        diff_id: Digest,
    ) -> Index:
        rows = source.tolist()
        kind = np.array(row_kinds, np.uint8)
        real = kind <= Kind.HARDLINK
        regular = kind == Kind.REG
        mtime = np.frombuffer(self.walk.mtimes, np.int64)[source] if rows else np.zeros(0, np.int64)
        texts: dict[bytes, int] = {}
        link = np.full(len(rows), -1, np.int32)
        for place in np.flatnonzero((kind == Kind.SYMLINK) | (kind == Kind.HARDLINK)).tolist():
            row = rows[place]
            target = links[row] if row in links else self.walk.targets[row]
            link[place] = texts.setdefault(target, len(texts))
        sets: dict[XattrSet, int] = {(): 0}
        xattr = np.zeros(len(rows), np.int32)
        own = self.walk.xattrs
        for place, row in enumerate(rows) if own else ():
            if row in own and real[place]:
                xattr[place] = sets.setdefault(own[row], len(sets))
        devices = np.zeros((len(rows), 2), np.uint32)
        for place in np.flatnonzero((kind == Kind.CHAR) | (kind == Kind.BLOCK)).tolist():
            number = self.walk.devices[rows[place]]
            devices[place] = os.major(number), os.minor(number)
        size = np.where(regular, stats[source, 6].astype(np.int64), 0)
        seconds, fraction = np.divmod(np.where(real, mtime, 0), _SECOND)
        return Index(
            diff_id=diff_id,
            tar_size=0,
            path=Strings.of(paths),
            kind=kind,
            perm=np.where(real, stats[source, 0] & np.uint64(0o7777), 0).astype(np.uint16),
            uid=np.where(real, stats[source, 4], 0).astype(np.uint32),
            gid=np.where(real, stats[source, 5], 0).astype(np.uint32),
            mtime=seconds,
            mtime_ns=fraction.astype(np.uint32),
            size=size,
            major=devices[:, 0],
            minor=devices[:, 1],
            link=link,
            links=Strings.of(texts),
            xattr=xattr,
            xattr_sets=tuple(sets),
            offset=np.where(size > 0, 0, -1).astype(np.int64),
            sha256=np.zeros((len(rows), 32), np.uint8),
            sparse=np.full(len(rows), -1, np.int32),
            sparse_maps=sparse_maps.NONE,
            warnings=tuple(self.walk.warnings[: self.walk.limits.warnings_kept_per_layer]),
        )


def state_digest(folders: list[tuple[bytes, int, int, int]]) -> bytes:
    """Return the sha256 of (path, inode, time of modification, time of change) of folders in order."""
    numbers = np.array([facts[1:] for facts in folders], np.int64)
    paths = b"\0".join(facts[0] for facts in folders)
    return Digest.of(paths + b"\0" + numbers.astype("<i8").tobytes()).hex.encode()[:64]


def read_state(root: int, index: Index) -> bytes | None:
    """Return the digest of the state that the folders of ``index`` are in now, None if one is gone.

    A name that comes, goes or is renamed changes the times of its folder, so this sees every such change
    with one system call for each folder. It does not see a file that was written to in place, which no runtime
    does to a layer: :func:`read_state` costs some 3 µs a folder, and looking at every file as much as a new index.

    Args:
        root: descriptor of the layer's folder.
        index: made from it earlier by :func:`index_layer_folder`.
    """
    facts = []
    rows = np.flatnonzero(index.kind == Kind.DIR)
    for path in index.path.take(rows).tolist():
        try:
            st = os.stat(path or b".", dir_fd=root, follow_symlinks=False)
        except OSError:
            return None
        facts.append((path, st.st_ino, st.st_mtime_ns, st.st_ctime_ns))
    return state_digest(facts)


__all__ = ["FolderLayer", "LayerFolder", "Marks", "index_layer_folder", "read_state", "state_digest"]
