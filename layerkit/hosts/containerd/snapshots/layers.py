"""The lower layers of a snapshot: META made once for a chain, mapped by the kernel where it can, and mounted.

Three kinds of layers meet here: folders that containerd unpacked, chains that lie in layerkit's store (META over
data), and what was committed from a snapshot with mapped owners, which is a folder of host ids over mapped layers.

META over folders that containerd unpacked names their files by path, one over layers in the store by content, and
one over both does both. It is made when the first snapshot asks for it, from indexes that are made once for each
folder (``hosts.adopt_index``) or lie in the store.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Mapping as Labels
from dataclasses import dataclass, replace
from functools import cached_property, partial
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import numpy as np

from layerkit.formats.index import file as index_file
from layerkit.formats.overlay_options import OverlayOptions
from layerkit.hosts.containerd.snapshots.catalog import Catalog, Row
from layerkit.hosts.containerd.snapshots.chains import StoreChains
from layerkit.hosts.mounts.spec import MountLayer
from layerkit.idmap import IdMap, Mapping, reach
from layerkit.idmap import apply as apply_map
from layerkit.linux import mounts
from layerkit.linux import syscalls as sc
from layerkit.linux.durable import is_staging, remove, staging_beside, sync_path, whole_file
from layerkit.linux.folders.reader import index_layer_folder
from layerkit.linux.folders.writer import write_directory
from layerkit.linux.probe import Features
from layerkit.metaonly import metadata_layer, redirects
from layerkit.model.digest import Digest
from layerkit.model.errors import SnapshotError, UsageError, show_path
from layerkit.model.index import Index
from layerkit.model.limits import Limits
from layerkit.model.strings import Strings
from layerkit.model.tree import Tree
from layerkit.model.trees.merge import merge

UID_LABEL = "containerd.io/snapshot/uidmapping"
GID_LABEL = "containerd.io/snapshot/gidmapping"
FILES = "+f"
"""The folder of a snapshot's files, in ``snapshots/ID``.

Redirects into such a folder start with this name, which images do not have at their top, so overlayfs finds no
beginning of one in META: with ``metacopy=on`` it looks there first, and a folder of that name would be EIO. No
colon in it: containerd itself puts the upper among the lower layers where it mounts a snapshot to make a diff.
"""
WORK = "work"


@dataclass(frozen=True, slots=True)
class Stack:
    """The layers under a snapshot.

    Attributes:
        above: ids of snapshots whose folders are mounted as they are, top first.
        below: ids of snapshots whose folders are mounted with mapped owners, top first; none without ``map``.
        chain: diff_ids, bottom first, of what lies in layerkit's store beneath them.
        chain_id: of ``chain``. image: the stored image that keeps it.
        map: canonical id map of ``below`` and ``chain``, or "".
    """

    above: tuple[int, ...] = ()
    below: tuple[int, ...] = ()
    chain: tuple[str, ...] = ()
    chain_id: str = ""
    image: str = ""
    map: str = ""

    @property
    def diff_ids(self) -> list[Digest]:
        """Return the chain as digests."""
        return list(map(Digest.parse, self.chain))


def stack_of(lineage: Iterable[Row], map_text: str) -> Stack:
    """Return the layers for a snapshot over ``lineage`` (its parent first) with the map that it asks for.

    Raises:
        SnapshotError: invalid_argument, the parent was made under another map.
    """
    rows = list(lineage)
    for row in rows:
        if row.map and map_text and row.map != map_text:
            raise SnapshotError(
                "invalid_argument",
                f"its parent {row.key!r} was made under the id map {row.map}, so it cannot be mapped by {map_text}",
            )
        map_text = map_text or row.map
    above, below = list[int](), list[int]()
    for row in rows:
        if row.chain:
            return Stack(tuple(above), tuple(below), row.chain, row.ref, row.image, map_text)
        (above if row.map or not map_text else below).append(row.id)
    return Stack(tuple(above), tuple(below), map=map_text)


def mapping_of(labels: Labels[str, str]) -> Mapping | None:
    """Return the id map that labels ask for, None for none.

    The values are ``container:host:count``, several separated by commas (one from containerd before 2.3).

    Raises:
        SnapshotError: invalid_argument.
    """
    texts = {name: labels.get(name, "") for name in (UID_LABEL, GID_LABEL)}
    if not any(texts.values()):
        return None
    if not all(texts.values()):
        raise SnapshotError("invalid_argument", f"of {UID_LABEL} and {GID_LABEL} one is missing: give both")
    try:
        uid, gid = (IdMap.parse([text], what=f"label {name}") for name, text in texts.items())
    except UsageError as error:
        raise SnapshotError("invalid_argument", str(error)) from error
    return Mapping(uid, gid)


@dataclass(frozen=True, slots=True)
class Mount:
    """A call of mount(2) that containerd is to make; options as in fstab(5)."""

    type: str
    source: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lowers:
    """The lower layers of an overlay, by paths that are mounted now.

    Attributes:
        normal: top first. data: the data-only ones.
        metacopy: copy up only metadata on chmod and chown; needs layers in which stubs may point at data.
    """

    normal: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    metacopy: bool = False


def mounts_of(folder: Path, lowers: Lowers, *, writable: bool) -> list[Mount]:
    """Return how to mount the snapshot whose folder is ``folder``: an active one ``writable``, a view not.

    Raises:
        SnapshotError: failed_precondition, more layers than a mount can name.
    """
    files = os.fspath(folder / FILES)
    if not lowers.normal or (not writable and len(lowers.normal) == 1 and not lowers.data):
        source = os.path.realpath(lowers.normal[0]) if lowers.normal else files
        return [Mount("bind", source, ("rw" if writable else "ro", "rbind"))]
    # Without an upper an absolute redirect needs no metacopy, and must not walk META first.
    metacopy = lowers.metacopy and (writable or len(lowers.normal) > 1)
    # Each is said, because a host may have set another default for all overlays.
    said = {"index": "off", "nfs_export": "off", "metacopy": "on" if metacopy else "off"}
    if not metacopy:
        # A layer that is committed must hold its files whole, and folders under their own names.
        said["redirect_dir"] = "off"
    upper, work = (files, os.fspath(folder / WORK)) if writable else ("", "")
    options = OverlayOptions(lowers.normal, lowers.data, upper, work, tuple(said.items()))
    # containerd makes long lists of plain layers shorter itself; it cannot with data-only ones.
    if options.data and not options.fits:
        raise SnapshotError(
            "failed_precondition",
            f"its mount options take {options.size} bytes and mount(2) takes {PAGESIZE}: merge some of the image's "
            "layers (`layerkit flatten`), or choose a shorter --root and --run",
        )
    return [Mount("overlay", "overlay", options.texts)]


def short(number: int) -> str:
    """Return a number in base 36."""
    return np.base_repr(number, 36).lower()


class Places:
    """The mounts below the snapshotter's run folder, made once, shared by every snapshot that needs them.

    ``RUN/m/N`` is the mount point of place number N, ``RUN/l/ID`` leads to the files of snapshot ID, ``RUN/d/ID``
    to its folder: names so short that the options of a stack of 100 layers fit into the one page that mount(2)
    takes. The mount table is the truth: what a killed snapshotter left mounted is used again, and what is gone (a
    reboot) is mounted again when somebody asks for it. May be used from several threads.
    """

    def __init__(self, run: Path, catalog: Catalog) -> None:
        """Make the run folder's parts if they are not there; nothing is mounted yet."""
        self.run, self._catalog = run, catalog
        self._lock = threading.RLock()
        self._held: Counter[str] = Counter()
        self._making: dict[str, threading.Lock] = {}
        run.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in ("m", "l", "d"):
            (run / name).mkdir(mode=0o700, exist_ok=True)

    def link(self, kind: str, identity: int, target: Path) -> str:
        """Return a short name (``l`` or ``d``) for a folder of snapshot ``identity``."""
        name = self.run / kind / short(identity)
        try:
            name.symlink_to(target)
        except FileExistsError:
            if os.readlink(name) != os.fspath(target):
                new = name.with_name(f"{name.name}.new")
                new.unlink(missing_ok=True)
                new.symlink_to(target)
                new.replace(name)
        return str(name)

    def unlink(self, identity: int) -> None:
        """Remove the short names of a snapshot."""
        for kind in ("l", "d"):
            (self.run / kind / short(identity)).unlink(missing_ok=True)

    @contextlib.contextmanager
    def held(self, whats: list[str]) -> Iterator[None]:
        """Keep :meth:`sweep` from these places while they are mounted and written down."""
        with self._lock:
            self._held.update(whats)
        try:
            yield
        finally:
            with self._lock:
                self._held.subtract(whats)
                self._held += Counter()  # drops those that are zero

    def alone(self, what: str) -> threading.Lock:
        """Return the lock of whoever makes ``what``."""
        with self._lock:
            return self._making.setdefault(what, threading.Lock())

    def mounted(self, what: str, make: Callable[[], int]) -> Path:
        """Return the place for ``what``; if nothing is mounted there, attach the mount that ``make`` returns.

        Raises:
            OSError: the system refuses it.
        """
        place = self.run / "m" / short(self._catalog.place(what))
        if mounts.is_mount(place):
            return place
        with self.alone(what):
            if not mounts.is_mount(place):
                with sc.closing(make()) as fd:
                    place.mkdir(mode=0o700, exist_ok=True)
                    # What a container may do over this is decided by the flags of its own overlay.
                    mounts.attach(fd, place, attributes=sc.MOUNT_ATTR_NOEXEC)
        return place

    def sweep(self, needed: Callable[[], set[str]]) -> list[str]:
        """Unmount every place that is neither held nor ``needed``; return what for.

        Lazily: an overlay that a container still uses keeps its layers until it is unmounted itself.
        """
        gone = []
        with self._lock:
            keep = needed() | set(self._held)
            places = self._catalog.places()
            numbers = {short(number) for what, number in places.items() if what in keep}
            for entry in sorted((self.run / "m").iterdir()):
                if entry.name not in numbers:
                    while mounts.is_mount(entry):
                        mounts.detach(entry, lazy=True)
                    with contextlib.suppress(OSError):
                        entry.rmdir()
            for what in places:
                if what not in keep:
                    self._catalog.drop_place(what)
                    self._making.pop(what, None)
                    gone.append(what)
        return gone


class Layers:
    """What snapshots stand on; may be used from several threads."""

    def __init__(self, root: Path, catalog: Catalog, places: Places, chains: StoreChains, limits: Limits) -> None:
        """Keep METAs in ``root/meta`` and indexes in ``root/index``."""
        self._root, self._catalog, self._places = root, catalog, places
        self._chains, self._limits, self._features = chains, limits, Features(root)
        self._covered: set[tuple[str, str]] = set()
        for name in ("meta", "index"):
            (root / name).mkdir(mode=0o700, exist_ok=True)

    @cached_property
    def idmap(self) -> bool:
        """Whether the kernel maps the owners of one META for every map."""
        return self._features.erofs_idmap if self._features.erofs else self._features.store_idmap

    def folder(self, identity: int) -> Path:
        """Return the folder of a snapshot."""
        return self._root / "snapshots" / str(identity)

    # What a stack needs

    def places_of(self, stack: Stack) -> list[str]:
        """Return what must stay mounted for a snapshot on ``stack``."""
        base = _base(stack)
        mapped = [f"{kind}:{base}:{stack.map}" for kind in ("map", "own") if stack.map]
        return [*map(_data_place, stack.chain), base, *mapped] if base else []

    def places_kept(self, row: Row) -> list[str]:
        """Return what a committed snapshot keeps, so that its next use is quick."""
        return [*map(_data_place, row.chain), f"meta:{row.ref if row.chain else f'#{row.id}'}"]

    def lowers(self, stack: Stack) -> Lowers:
        """Return the layers of ``stack``, each mounted; hold :meth:`places_of` meanwhile.

        Raises:
            UnmappedId: the map leaves an owner of the layers out.
            SnapshotError: failed_precondition, layers in the store are gone.
            UnsupportedHost: this kernel cannot mount them.
        """
        above = [self._places.link("l", identity, self.folder(identity) / FILES) for identity in stack.above]
        base = _base(stack)
        if not base:
            return Lowers(tuple(above))
        mapping = Mapping.parse_canonical(stack.map) if stack.map else None
        by_kernel = mapping is not None and mapping.fits_kernel and self.idmap
        own = mapping if not by_kernel else None
        what = base if own is None else f"own:{base}:{stack.map}"
        with self._places.alone(what):
            note = self._note(what, stack, own)
            if by_kernel and mapping is not None:
                self._check(note, stack, mapping)
        meta = Path(note["folder"] or self._places.mounted(what, MountLayer(Path(note["image"])).mount))
        if by_kernel and mapping is not None:
            make = partial(mounts.idmapped_clone, meta, mapping.uid.extents, mapping.gid.extents)
            meta = self._places.mounted(f"map:{base}:{stack.map}", make)
        data = [self._places.link("d", identity, self.folder(identity)) for identity in stack.below]
        data += [self._data(each) for each in note["data"]]
        return Lowers((*above, str(meta)), tuple(data), metacopy=bool(stack.map) and note["metacopy"])

    def _data(self, data: list[str]) -> str:
        if len(data) == 1:
            return data[0]
        key, image, tar = data
        return str(self._places.mounted(f"data:{key}", MountLayer(Path(image), key, Path(tar)).mount))

    # META

    def _note(self, what: str, stack: Stack, mapping: Mapping | None) -> dict[str, Any]:
        """Return where META for ``what`` lies, made if it is not there."""
        note = self._catalog.note(what)
        if note is None or not os.path.exists(note["image"] or note["folder"]):
            note = self._of_store(stack, mapping) if not stack.below else self._of_folders(what, stack, mapping)
            self._catalog.keep_note(what, note)
        return note

    def _of_store(self, stack: Stack, mapping: Mapping | None) -> dict[str, Any]:
        meta, data = self._chains.layers(stack.image, stack.diff_ids, mapping)
        kept = [[str(d.path)] if d.is_folder else [d.key, str(d.path), str(d.tar)] for d in data]
        # What lies under the names of contents is in no image (``metaonly`` refuses such names).
        return _place_of(meta) | {"data": kept, "metacopy": True, "ids": None}

    def _of_folders(self, what: str, stack: Stack, mapping: Mapping | None) -> dict[str, Any]:
        from layerkit.formats.erofs.meta import build_meta

        tree = self._tree(stack)
        data = self._of_store(stack, None)["data"] if stack.chain else []
        found = reach(tree)
        ids = [
            sorted({*found.uid.tolist(), *found.xattr_uids}), sorted({*found.gid.tolist(), *found.xattr_gids})
        ]  # fmt: skip
        places = _places(tree, len(stack.chain))
        layer = metadata_layer(tree if mapping is None else apply_map(tree, mapping), places=places)
        target = self._root / "meta" / str(self._catalog.place(what))
        remove(target)
        with staging_beside(target) as staging:
            if self._features.erofs:
                with staging.new.open("xb") as file:
                    build_meta(layer, file)
                sync_path(staging.new)
            else:
                write_directory(layer, staging.new)
            staging.publish(target.name)
        sync_path(target.parent)
        top = {tree.name[row] for row in np.flatnonzero(tree.parent == 0).tolist()}
        meta = MountLayer(target, "meta" if self._features.erofs else "")
        return _place_of(meta) | {"data": data, "metacopy": os.fsencode(FILES) not in top, "ids": ids}

    def _tree(self, stack: Stack) -> Tree:
        indexes = []
        for diff_id in stack.diff_ids:
            index = self._chains.store.load_index(diff_id)
            if index is None:
                raise SnapshotError("failed_precondition", f"layer {diff_id} is no longer in layerkit's store")
            indexes.append(index)
        indexes += [self.index(identity) for identity in reversed(stack.below)]
        return merge(indexes, limits=self._limits)

    def index(self, identity: int) -> Index:
        """Return the index of a committed snapshot's folder, read once and kept.

        Raises:
            LayerkitError: the folder holds what no layer can.
        """
        path = self._root / "index" / str(identity)
        with self._places.alone(f"index:{identity}"):
            try:
                return index_file.decode(path.read_bytes(), str(path))
            except FileNotFoundError:
                pass
            found = index_layer_folder(self.folder(identity) / FILES, limits=self._limits)
            if found.metacopy is not None:
                raise SnapshotError(
                    "failed_precondition",
                    f"snapshot folder {identity}: {show_path(found.metacopy)} has its data in a layer below "
                    "(it was committed from a mount with metacopy=on), so its owners cannot be mapped again",
                )
            index = replace(found.index, diff_id=Digest.of(f"{self._root}/{identity}".encode()))
            with whole_file(path) as file:
                file.writelines(index_file.encode(index))
            return index

    def _check(self, note: dict[str, Any], stack: Stack, mapping: Mapping) -> None:
        """Refuse a map that leaves an owner out: the kernel would show it as 65534 and say nothing."""
        known = (_base(stack), stack.map)
        if known in self._covered:
            return
        if note["ids"] is None:
            self._chains.check(stack.image, stack.diff_ids, mapping)
        else:
            for ids, id_map in zip(note["ids"], (mapping.uid, mapping.gid), strict=True):
                if not id_map.lookup(np.array(ids, np.uint32))[1].all():
                    apply_map(self._tree(stack), mapping)
        self._covered.add(known)

    # What is no longer needed

    def collect(self, alive: set[int]) -> list[str]:
        """Remove METAs without a place and indexes without a snapshot, those that a kill left half-made too."""
        numbers = {str(number) for number in self._catalog.places().values()}
        gone = []
        for folder, known in (("meta", numbers), ("index", {str(identity) for identity in alive})):
            for path in sorted((self._root / folder).iterdir()):
                busy = is_staging(path.name) and path.name.split(".")[1] in known
                if path.name not in known and not busy:
                    remove(path)
                    gone.append(f"{folder}/{path.name}")
        return gone


def _base(stack: Stack) -> str:
    """Return the place of META with the image's own owners, "" for a stack of folders as they are."""
    if stack.below:
        return f"meta:#{stack.below[0]}"
    return f"meta:{stack.chain_id}" if stack.chain else ""


def _data_place(diff_id: str) -> str:
    return f"data:{Digest.parse(diff_id).hex}"


def _place_of(meta: MountLayer) -> dict[str, Any]:
    """Return the part of a note that says where META lies: ``image`` or ``folder``."""
    path = str(meta.path)
    return {"image": "", "folder": path} if meta.is_folder else {"image": path, "folder": ""}


def _places(tree: Tree, stored: int) -> Strings:
    """Return for each inode where its data lies: by content in the lowest ``stored`` layers, by path above."""
    prefix = os.fsencode(f"/{FILES}/")
    paths, first = tree.paths(), tree.first_name().tolist()
    by_content = ((tree.layer >= 0) & (tree.layer < stored) & (tree.size > 0)).tolist()
    contents = iter(redirects(tree.sha256[np.array(by_content, np.bool_)]))
    has_data = (tree.layer >= 0).tolist()
    return Strings.of(
        [
            next(contents).tobytes() if stored_there else prefix + paths[first[inode]] if has_data[inode] else b""
            for inode, stored_there in enumerate(by_content)
        ]
    )
