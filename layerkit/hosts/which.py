"""From a path in a mount to its image, layer and data, and who shares it; and back from a content or digest."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerkit.errors import NotFound, StoreError, UsageError, show_path
from layerkit.hosts import mount as mounter
from layerkit.hosts.adopt import LABEL as UNPACKED
from layerkit.hosts.records import SOURCE_PREFIX, Record
from layerkit.kernel import mounts
from layerkit.merge import merge
from layerkit.metaonly import data_path
from layerkit.model.digest import Digest
from layerkit.model.entry import Kind
from layerkit.model.index import Index
from layerkit.model.tree import Tree
from layerkit.stores.layout import DataBackend
from layerkit.stores.local import LocalStore

_SHORT = re.compile(r"/?:([A-Za-z0-9_-])/([A-Za-z0-9_-]{20})")
_HEX = re.compile(r"[0-9a-f]{8,128}")
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


@dataclass(frozen=True, slots=True)
class Place:
    """A place in an image.

    Attributes:
        image: its name, or its manifest's digest. manifest: that digest.
        layer: position from the bottom, 1 the lowest. diff_id, blob: of the layer; "" where nobody says.
        path: in the layer; "" for a whole layer or image.
        visible: whether the image shows it there; an upper layer may hide or replace it.
    """

    image: str
    manifest: str
    layer: int
    diff_id: str
    blob: str
    path: str
    visible: bool


@dataclass(frozen=True, slots=True)
class Sharer:
    """A mount that reads the same data, and so the same page cache."""

    target: str
    image: str
    map: str


@dataclass(frozen=True, slots=True)
class Which:
    """The answer.

    Attributes:
        asked: the question.
        kind: ``path``, ``content``, ``layer`` or ``image``.
        mount: target of the mount that a path lies in; map: the mount's.
        file: what it is, as ``regular file``. size: bytes.
        upper: for a writable mount: "" not in the upper, ``metadata`` copied up without data, ``data`` with it,
            ``made`` there, being in no layer.
        sha256: of the content; name: its short name under a data root.
        data: where the bytes lie on the host.
        place: where the mount takes a path from; None for what is in no layer.
        places: everywhere that the store knows the content, layer or image to be.
        sharers: other mounts that read the same data.
    """

    asked: str
    kind: str
    mount: str = ""
    map: str = ""
    file: str = ""
    size: int = 0
    upper: str = ""
    sha256: str = ""
    name: str = ""
    data: str = ""
    place: Place | None = None
    places: tuple[Place, ...] = ()
    sharers: tuple[Sharer, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as JSON values."""
        return asdict(self)


def which(asked: str, store: LocalStore) -> Which:
    """Answer for a path in one of the store's mounts, a content (digest, its beginning, short name) or a digest.

    Raises:
        NotFound: nothing is known of it.
        UsageError: neither a path in a mount of layerkit nor a name of a content.
    """
    content = _content_mask(asked)
    path = os.path.lexists(asked) and not asked.startswith(("sha256:", ":", "/:"))
    if path:
        return _of_path(Path(asked), store)
    if content is None:
        raise UsageError(
            f"{asked}: neither there as a path nor a name of content; want a path in a mount, sha256:HEX, the "
            "first 8 or more digits, or a short name as /:x/NAME"
        )
    found = _of_digest(asked, store)
    if found is not None:
        return found
    return _of_content(asked, content, store)


# --- paths


def _of_path(path: Path, store: LocalStore) -> Which:
    full = Path(os.path.realpath(path.parent)) / path.name if path.name not in ("", "..") else path.resolve()
    record, target = _record_of(full, store)
    relative = os.fsencode(full.relative_to(target)) if full != target else b""
    relative = b"" if relative == b"." else relative
    shown = full.lstat()
    image = layers_of(record, store)
    tree = merge([index for _, index in image.layers], limits=store.limits)
    row = find_row(tree, relative)
    upper = _in_upper(record, relative, row >= 0)
    answer = Which(
        asked=str(path),
        kind="path",
        mount=str(target),
        map=record.label.get("map", ""),
        file=_kind(shown.st_mode),
        size=shown.st_size,
        upper=upper,
    )
    if row < 0 or upper in ("made", "data"):
        where = str(Path(record.upper or "") / os.fsdecode(relative))
        return replace(answer, data=where if stat.S_ISREG(shown.st_mode) else "",
                        place=None if row < 0 else _place_of(image, tree, row, relative))  # fmt: skip
    inode = int(tree.inode[row])
    place = _place_of(image, tree, row, relative)
    if not (stat.S_ISREG(shown.st_mode) and tree.size[inode]):
        return replace(answer, place=place)
    at = place.layer - 1
    sha256 = tree.sha256[inode].tobytes()
    if record.label.get("backend") == UNPACKED:
        below = Path(record.label["folders"].split("\n")[at]) / os.fsdecode(tree.inode_path(inode))
        with below.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").digest()
        data = str(below)
    elif record.label.get("backend") == DataBackend.OBJECTS:
        data = str(store.object_file(sha256))
    else:
        diff_id = image.layers[at][0]
        data = _at(store, diff_id, int(tree.offset[inode]))
    return replace(
        answer,
        sha256=f"sha256:{sha256.hex()}",
        name="/" + data_path(sha256).decode(),
        data=data,
        place=place,
        places=_places(store, _exact(sha256)),
        sharers=_sharers(store, record, image.layers[at][0], sha256, data),
    )


def _record_of(path: Path, store: LocalStore) -> tuple[Record, Path]:
    mount = mounts.mount_of(path.parent if not path.is_dir() else path)
    if mount is None or not mount.source.startswith(SOURCE_PREFIX):
        what = f"it lies on {mount.fstype} at {mount.point}" if mount else "its mount is not in the mount table"
        raise UsageError(f"{path}: not in a mount of layerkit: {what}; `layerkit mounts` lists them")
    run = mounter.default_run(store.root)
    record = next((r for r in mounter.active(run) if r.source == mount.source), None)
    if record is None:
        raise NotFound(
            f"{mount.point}: a mount of layerkit over another store than {store.root}; name it with --store"
        )
    return record, Path(mount.point)


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers of a mount: (name of the index, index) bottom first, and what they are called outside."""

    name: str
    manifest: str
    layers: tuple[tuple[Digest, Index], ...]
    diff_ids: tuple[str, ...]
    blobs: tuple[str, ...]


def layers_of(record: Record, store: LocalStore) -> Layers:
    """Return the layers under a mount.

    Raises:
        StoreError: an index is gone.
        NotFound: the image is.
    """
    label = record.label
    if label.get("backend") == UNPACKED:
        names = [Digest.parse(text) for text in label["layers"].split(",") if text]
        diff_ids, blobs = (tuple(label.get(key, "").split(",")) for key in ("diff_ids", "blobs"))
        manifest = label.get("manifest", "")
        if len(diff_ids) != len(names):
            diff_ids = blobs = ("",) * len(names)
    else:
        image = store.stored_image(label["manifest"]).image
        names = list(image.diff_ids)
        diff_ids = tuple(map(str, names))
        blobs = tuple(str(layer.descriptor.digest) for layer in image.layers)
        manifest = str(image.descriptor.digest)
    return Layers(label.get("image", ""), manifest, tuple((n, _index(store, n)) for n in names), diff_ids, blobs)


def _index(store: LocalStore, diff_id: Digest) -> Index:
    index = store.load_index(diff_id)
    if index is None:
        raise StoreError(f"the index of layer {diff_id} is not in the store; mount the image anew")
    return index


def find_row(tree: Tree, path: bytes) -> int:
    """Return the row of ``path`` in a tree, -1 where it is not there."""
    row = 0
    for part in path.split(b"/") if path else []:
        below = np.flatnonzero(tree.parent == row)
        row = next((r for r in below.tolist() if tree.name[r] == part), -1)
        if row < 0:
            return -1
    return row


def _place_of(image: Layers, tree: Tree, row: int, path: bytes) -> Place:
    """Return the topmost layer that has an entry at ``path``; for a file with data, the one that has the data."""
    at = _source(tree, row, path, [index for _, index in image.layers])
    return Place(image.name, image.manifest, at + 1, image.diff_ids[at], image.blobs[at], show_path(path), True)


def _source(tree: Tree, row: int, path: bytes, indexes: Sequence[Index]) -> int:
    """Return which layer the entry at ``path`` comes from; one without bytes is of the topmost that has it."""
    at = int(tree.layer[tree.inode[row]])
    if at < 0:
        having = [i for i, index in enumerate(indexes) if _has_entry(index, path)]
        at = having[-1] if having else 0
    return at


def _has_entry(index: Index, path: bytes) -> bool:
    # Rows rise by their key, so a search finds the path.
    low, high = 0, len(index)
    key = path.replace(b"/", b"\0")
    while low < high:
        middle = (low + high) // 2
        if index.path[middle].replace(b"/", b"\0") < key:
            low = middle + 1
        else:
            high = middle
    while low < len(index) and index.path[low] == path:
        if index.kind[low] <= Kind.HARDLINK:
            return True
        low += 1
    return False


def _in_upper(record: Record, path: bytes, in_layer: bool) -> str:
    if record.upper is None:
        return ""
    full = os.path.join(os.fsencode(record.upper), path)
    try:
        st = os.lstat(full)
    except OSError:
        return ""
    if not in_layer:
        return "made"
    if not stat.S_ISREG(st.st_mode):
        return "metadata"
    names = os.listxattr(full, follow_symlinks=False)
    return "metadata" if f"{record.namespace}.overlay.metacopy" in names else "data"


def _kind(mode: int) -> str:
    names = {Kind.REG: "regular file", Kind.DIR: "folder", Kind.SYMLINK: "symbolic link", Kind.FIFO: "fifo",
             Kind.CHAR: "character device", Kind.BLOCK: "block device"}  # fmt: skip
    return names.get(Kind(mode >> 12), "file") if mode >> 12 in list(Kind) else "socket"


def _sharers(store: LocalStore, own: Record, layer: Digest, sha256: bytes, data: str) -> tuple[Sharer, ...]:
    found = []
    backend = own.label.get("backend")
    for record in mounter.active(mounter.default_run(store.root)):
        if record.id == own.id or record.label.get("backend") != backend:
            continue
        if backend == UNPACKED:
            same = any(data.startswith(folder + "/") for folder in record.label.get("folders", "").split("\n"))
        elif backend == DataBackend.OBJECTS:
            indexes = (store.load_index(d) for d in map(Digest.parse, _texts(record.label.get("layers", ""))))
            same = any(len(_rows(index, _exact(sha256))) for index in indexes if index is not None)
        else:
            same = str(layer) in _texts(record.label.get("layers", ""))
        if same:
            found.append(Sharer(record.target, record.label.get("image", ""), record.label.get("map", "")))
    return tuple(found)


def _texts(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


# --- contents and digests

Mask = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""(values, mask), uint8 (32,) each: the bits of a sha256 that are known."""


def _exact(sha256: bytes) -> Mask:
    return np.frombuffer(sha256, np.uint8), np.full(32, 255, np.uint8)


def _content_mask(text: str) -> Mask | None:
    """Return which bits of a digest ``text`` tells, None if it is no name of a content."""
    short = _SHORT.fullmatch(text)
    if short is not None:
        bits = "".join(f"{_ALPHABET.index(c):06b}" for c in short[1] + short[2])
        return _mask(bits)
    hexes = text.removeprefix("sha256:")
    if _HEX.fullmatch(hexes) and len(hexes) <= 64:
        return _mask("".join(f"{int(c, 16):04b}" for c in hexes))
    return None


def _mask(bits: str) -> Mask:
    known = "1" * len(bits)
    value, mask = (int(text.ljust(256, "0"), 2).to_bytes(32, "big") for text in (bits, known))
    return np.frombuffer(value, np.uint8), np.frombuffer(mask, np.uint8)


def _rows(index: Index, mask: Mask) -> NDArray[np.intp]:
    value, known = mask
    # One column tells nearly all rows apart, the others are looked at where it is equal.
    some = np.flatnonzero((index.sha256[:, 0] & known[0] == value[0]) & (index.kind == Kind.REG))
    same: NDArray[np.intp] = some[((index.sha256[some] & known) == value).all(axis=1)]
    return same


def _places(store: LocalStore, mask: Mask) -> tuple[Place, ...]:
    found: list[Place] = []
    hits: dict[Digest, list[bytes]] = {}
    for stored in store.images():
        image = stored.image
        name = stored.names[0] if stored.names else str(image.descriptor.digest)
        with_hits = []
        for layer in image.layers:
            if layer.diff_id not in hits:
                index = store.load_index(layer.diff_id)
                rows = [] if index is None else _rows(index, mask).tolist()
                hits[layer.diff_id] = [] if index is None else [index.path[row] for row in rows]
            with_hits.append(hits[layer.diff_id])
        if not any(with_hits):
            continue
        indexes = [_index(store, diff_id) for diff_id in image.diff_ids]
        tree = merge(indexes, limits=store.limits)
        for at, (layer, paths) in enumerate(zip(image.layers, with_hits, strict=True)):
            for path in paths:
                row = find_row(tree, path)
                visible = row >= 0 and _source(tree, row, path, indexes) == at
                found.append(
                    Place(name, str(image.descriptor.digest), at + 1, str(layer.diff_id),
                          str(layer.descriptor.digest), show_path(path), visible)
                )  # fmt: skip
    return tuple(found)


def _of_content(asked: str, mask: Mask, store: LocalStore) -> Which:
    places = _places(store, mask)
    contents = {}
    for place in places:
        index = _index(store, Digest.parse(place.diff_id))
        for row in _rows(index, mask).tolist():
            contents[index.sha256[row].tobytes()] = int(index.size[row])
    if not contents:
        raise NotFound(f"{asked}: no content, layer or image of {store.root} has this name")
    if len(contents) > 1:
        shown = ", ".join(sorted(sha256.hex()[:16] for sha256 in contents)[:5])
        raise UsageError(f"{asked}: {len(contents)} contents begin so ({shown}); give more digits")
    ((sha256, size),) = contents.items()
    try:
        data = str(store.object_file(sha256))
    except NotFound:
        data = _in_tar(store, places, sha256)
    return Which(
        asked=asked,
        kind="content",
        file="regular file",
        size=size,
        sha256=f"sha256:{sha256.hex()}",
        name="/" + data_path(sha256).decode(),
        data=data,
        places=places,
        sharers=_users(store, {place.diff_id for place in places}),
    )


def _in_tar(store: LocalStore, places: Iterable[Place], sha256: bytes) -> str:
    for place in places:
        diff_id = Digest.parse(place.diff_id)
        if store.has_layer(diff_id, DataBackend.TAR):
            index = _index(store, diff_id)
            row = int(_rows(index, _exact(sha256))[0])
            return _at(store, diff_id, int(index.offset[row]))
    return ""


def _at(store: LocalStore, diff_id: Digest, offset: int) -> str:
    return f"{store.tar_path(diff_id)} at {offset}" if offset >= 0 else "nowhere: the file is one hole"


def _of_digest(asked: str, store: LocalStore) -> Which | None:
    wanted = asked.removeprefix("sha256:")
    if not _HEX.fullmatch(wanted):
        return None
    images, layers = [], []
    for stored in store.images():
        image = stored.image
        name = stored.names[0] if stored.names else str(image.descriptor.digest)
        manifest = image.descriptor.digest
        if manifest.hex.startswith(wanted) or image.config_descriptor.digest.hex.startswith(wanted):
            images.append(Place(name, str(manifest), 0, "", "", "", True))
        for at, layer in enumerate(image.layers, 1):
            if layer.diff_id.hex.startswith(wanted) or layer.descriptor.digest.hex.startswith(wanted):
                layers.append(
                    Place(name, str(manifest), at, str(layer.diff_id), str(layer.descriptor.digest), "", True)
                )
    if images:
        sharers = tuple(
            Sharer(r.target, r.label.get("image", ""), r.label.get("map", ""))
            for r in mounter.active(mounter.default_run(store.root))
            if r.label.get("manifest") in {place.manifest for place in images}
        )
        return Which(asked=asked, kind="image", places=tuple(images), sharers=sharers)
    if layers:
        diff_ids = {place.diff_id for place in layers}
        if len(diff_ids) > 1:
            raise UsageError(f"{asked}: {len(diff_ids)} layers begin so; give more digits")
        diff_id = Digest.parse(diff_ids.pop())
        data = ""
        if store.has_layer(diff_id, DataBackend.TAR):
            data = str(store.tar_path(diff_id))
        return Which(
            asked=asked, kind="layer", data=data, places=tuple(layers), sharers=_users(store, {str(diff_id)})
        )  # fmt: skip
    return None


def _users(store: LocalStore, diff_ids: set[str]) -> tuple[Sharer, ...]:
    return tuple(
        Sharer(r.target, r.label.get("image", ""), r.label.get("map", ""))
        for r in mounter.active(mounter.default_run(store.root))
        if diff_ids.intersection(_texts(r.label.get("layers", "")))
    )


__all__ = ["Layers", "Place", "Sharer", "Which", "find_row", "layers_of", "which"]
