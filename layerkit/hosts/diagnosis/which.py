"""From a path in a mount to its image, layer and data, and who shares it; and back from a content or a digest."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import stat
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from layerkit.hosts.diagnosis.mounted import in_upper, layers_of, load_index, record_of
from layerkit.hosts.mounts import mount as mounter
from layerkit.hosts.mounts.records import UNPACKED, Record
from layerkit.linux import mounts
from layerkit.metaonly import data_path
from layerkit.model.digest import Digest
from layerkit.model.entry import Kind
from layerkit.model.errors import NotFound, UsageError, show_path
from layerkit.model.index import Index, path_key
from layerkit.model.reports import Report
from layerkit.model.tree import Tree
from layerkit.model.trees.merge import merge
from layerkit.store.layout import DataBackend
from layerkit.store.local import LocalStore

_SHORT = re.compile(r"/?:([A-Za-z0-9_-])/([A-Za-z0-9_-]{20})")
_HEX = re.compile(r"[0-9a-f]{8,128}")
_KINDS: dict[int, str] = {
    Kind.REG: "regular file", Kind.DIR: "folder", Kind.SYMLINK: "symbolic link", Kind.FIFO: "fifo",
    Kind.CHAR: "character device", Kind.BLOCK: "block device",
}  # fmt: skip
Mask = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""(values, mask), uint8 (32,) each: the bits of a sha256 that are known."""


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
class Which(Report):
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

    def of_content(self, sha256: bytes, data: str, places: tuple[Place, ...], sharers: tuple[Sharer, ...]) -> Which:
        """Return the answer with what is known of a content."""
        name = "/" + data_path(sha256).decode()
        return replace(self, sha256=f"sha256:{sha256.hex()}", name=name, data=data, places=places, sharers=sharers)


def which(asked: str, store: LocalStore) -> Which:
    """Answer for a path in one of the store's mounts, a content (digest, its beginning, short name) or a digest.

    Raises:
        NotFound: nothing is known of it.
        UsageError: neither a path in a mount of layerkit nor a name of a content.
    """
    if os.path.lexists(asked) and not asked.startswith(("sha256:", ":", "/:")):
        return _of_path(Path(asked), store)
    mask = _content_mask(asked)
    if mask is None:
        raise UsageError(
            f"{asked}: neither there as a path nor a name of content; want a path in a mount, sha256:HEX, the "
            "first 8 or more digits, or a short name as /:x/NAME"
        )
    return _of_digest(asked, store) or _of_content(asked, mask, store)


# A path


def _of_path(path: Path, store: LocalStore) -> Which:
    full = Path(os.path.realpath(path.parent)) / path.name if path.name not in ("", "..") else path.resolve()
    mount = mounts.mount_of(full.parent if not full.is_dir() else full)
    record = record_of(mount, store.root) if mount is not None else None
    if mount is None or record is None:
        what = f"it lies on {mount.fstype} at {mount.point}" if mount else "its mount is not in the mount table"
        raise UsageError(f"{full}: not in a mount of layerkit: {what}; `layerkit mounts` lists them")
    relative = os.fsencode(full.relative_to(mount.point)) if str(full) != mount.point else b""
    shown = full.lstat()
    image = layers_of(record, store)
    tree, row = image.tree, image.rows.get(relative, -1)
    answer = Which(
        asked=str(path), kind="path", mount=mount.point, map=record.map, size=shown.st_size,
        file=_KINDS.get(shown.st_mode >> 12, "socket"),
        upper=_upper_state(record, relative, row >= 0),
    )  # fmt: skip
    if row >= 0:
        # Of the topmost layer that has an entry there; of a file with data, the one that has the data.
        at = _source_layer(tree, row, relative, image.indexes)
        digests = image.manifest, at + 1, image.diff_ids[at], image.blobs[at]
        answer = replace(answer, place=Place(image.image, *digests, show_path(relative), True))
    regular = stat.S_ISREG(shown.st_mode)
    if answer.place is None or answer.upper in ("made", "data"):
        return replace(answer, data=f"{record.upper}/{os.fsdecode(relative)}" if regular else "")
    inode = int(tree.inode[row])
    if not (regular and tree.size[inode]):
        return answer
    layer = answer.place.layer - 1
    sha256 = tree.sha256[inode].tobytes()
    if record.backend == UNPACKED:
        data = f"{record.folders[layer]}/{os.fsdecode(tree.inode_path(inode))}"
        with Path(data).open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").digest()
    elif record.backend == DataBackend.OBJECTS:
        data = str(store.object_file(sha256))
    else:
        data = _in_tar(store, image.indexes[layer].diff_id, int(tree.offset[inode]))

    def shares(other: Record) -> bool:
        if other.id == record.id or other.backend != record.backend:
            return False
        if other.backend == UNPACKED:
            return any(data.startswith(folder + "/") for folder in other.folders)
        if other.backend == DataBackend.TAR:
            return str(image.indexes[layer].diff_id) in other.indexes
        indexes = (store.load_index(Digest.parse(text)) for text in other.indexes)
        return any(len(_rows_with(index, _mask(sha256))) for index in indexes if index is not None)

    return answer.of_content(sha256, data, _places_of(store, _mask(sha256)), _sharers(store, shares))


def _upper_state(record: Record, path: bytes, in_layer: bool) -> str:
    found = in_upper(record, path)
    if found is None:
        return ""
    shown, stub = found
    if not in_layer:
        return "made"
    return "metadata" if stub or not stat.S_ISREG(shown.st_mode) else "data"


def _source_layer(tree: Tree, row: int, path: bytes, indexes: Sequence[Index]) -> int:
    """Return which layer the entry at ``path`` comes from; one without bytes is of the topmost that has it."""
    at = int(tree.layer[tree.inode[row]])
    if at >= 0:
        return at
    return max((number for number, index in enumerate(indexes) if _has_entry(index, path)), default=0)


def _has_entry(index: Index, path: bytes) -> bool:
    # Marks of a deletion come before the entry of the same path.
    first, end = (cut(index.path, path_key(path), key=path_key) for cut in (bisect_left, bisect_right))
    return bool((index.kind[first:end] <= Kind.HARDLINK).any())


def _in_tar(store: LocalStore, diff_id: Digest, offset: int) -> str:
    """Return the place of a file in a layer's tar; ``offset`` in bytes, -1 for a file without bytes."""
    return f"{store.tar_path(diff_id)} at {offset}" if offset >= 0 else "nowhere: the file is one hole"


def _sharers(store: LocalStore, shares: Callable[[Record], bool]) -> tuple[Sharer, ...]:
    records = mounter.active(mounter.default_run(store.root))
    return tuple(Sharer(r.target, r.image, r.map) for r in records if shares(r))


# A content


def _content_mask(text: str) -> Mask | None:
    """Return which bits of a digest ``text`` tells, None if it is no name of a content."""
    short = _SHORT.fullmatch(text)
    if short is not None:
        return _mask(base64.urlsafe_b64decode((short[1] + short[2]).ljust(44, "A"))[:32], 126)
    digits = text.removeprefix("sha256:")
    if _HEX.fullmatch(digits) and len(digits) <= 64:
        return _mask(bytes.fromhex(digits.ljust(64, "0")), 4 * len(digits))
    return None


def _mask(value: bytes, bits: int = 256) -> Mask:
    known = ((1 << bits) - 1 << 256 - bits).to_bytes(32, "big")
    return np.frombuffer(value, np.uint8), np.frombuffer(known, np.uint8)


def _rows_with(index: Index, mask: Mask) -> NDArray[np.intp]:
    value, known = mask
    # One column tells nearly all rows apart, the others are looked at where it is equal.
    some = np.flatnonzero((index.sha256[:, 0] & known[0] == value[0]) & (index.kind == Kind.REG))
    same: NDArray[np.intp] = some[((index.sha256[some] & known) == value).all(axis=1)]
    return same


def _places_of(store: LocalStore, mask: Mask) -> tuple[Place, ...]:
    """Return where the images of a store have the contents that fit ``mask``."""
    found: list[Place] = []
    hits: dict[Digest, list[bytes]] = {}
    for stored in store.images():
        image, manifest = stored.image, str(stored.image.descriptor.digest)
        for diff_id in image.diff_ids:
            if diff_id not in hits:
                index = store.load_index(diff_id)
                hits[diff_id] = [] if index is None else index.path.take(_rows_with(index, mask)).tolist()
        if not any(hits[diff_id] for diff_id in image.diff_ids):
            continue
        indexes = [load_index(store, diff_id) for diff_id in image.diff_ids]
        tree = merge(indexes, limits=store.limits)
        shown = {path: row for row, path in enumerate(tree.paths())}
        name = (*stored.names, manifest)[0]
        for at, layer in enumerate(image.layers):
            digests = str(layer.diff_id), str(layer.descriptor.digest)
            for path in hits[layer.diff_id]:
                visible = path in shown and _source_layer(tree, shown[path], path, indexes) == at
                found.append(Place(name, manifest, at + 1, *digests, show_path(path), visible))
    return tuple(found)


def _of_content(asked: str, mask: Mask, store: LocalStore) -> Which:
    places = _places_of(store, mask)
    contents: dict[bytes, int] = {}
    in_tar = ""
    for diff_id in map(Digest.parse, dict.fromkeys(place.diff_id for place in places)):
        index = load_index(store, diff_id)
        for row in _rows_with(index, mask).tolist():
            contents[index.sha256[row].tobytes()] = int(index.size[row])
            if not in_tar and store.has_layer(diff_id, DataBackend.TAR):
                in_tar = _in_tar(store, diff_id, int(index.offset[row]))
    if not contents:
        raise NotFound(f"{asked}: no content, layer or image of {store.root} has this name")
    if len(contents) > 1:
        shown = ", ".join(sorted(sha256.hex()[:16] for sha256 in contents)[:5])
        raise UsageError(f"{asked}: {len(contents)} contents begin so ({shown}); give more digits")
    ((sha256, size),) = contents.items()
    try:
        data = str(store.object_file(sha256))
    except NotFound:
        data = in_tar
    answer = Which(asked=asked, kind="content", file="regular file", size=size)
    return answer.of_content(sha256, data, places, _users(store, {place.diff_id for place in places}))


def _users(store: LocalStore, diff_ids: set[str]) -> tuple[Sharer, ...]:
    return _sharers(store, lambda record: not diff_ids.isdisjoint(record.indexes))


# The digest of an image, config, layer or blob


def _of_digest(asked: str, store: LocalStore) -> Which | None:
    """Answer for the (beginning of a) digest of an image, config, layer or blob; None where it is none."""
    wanted = asked.removeprefix("sha256:")
    if not _HEX.fullmatch(wanted):
        return None
    images, layers = [], []
    for stored in store.images():
        image, manifest = stored.image, stored.image.descriptor.digest
        called = stored.names[0] if stored.names else str(manifest)
        if manifest.hex.startswith(wanted) or image.config_descriptor.digest.hex.startswith(wanted):
            images.append(Place(called, str(manifest), 0, "", "", "", True))
        for at, layer in enumerate(image.layers, 1):
            diff_id, blob = layer.diff_id, layer.descriptor.digest
            if diff_id.hex.startswith(wanted) or blob.hex.startswith(wanted):
                layers.append(Place(called, str(manifest), at, str(diff_id), str(blob), "", True))
    if images:
        manifests = {place.manifest for place in images}
        users = _sharers(store, lambda record: record.label.get("manifest") in manifests)
        return Which(asked=asked, kind="image", places=tuple(images), sharers=users)
    diff_ids = {place.diff_id for place in layers}
    if len(diff_ids) > 1:
        raise UsageError(f"{asked}: {len(diff_ids)} layers begin so; give more digits")
    if not diff_ids:
        return None
    name = Digest.parse(layers[0].diff_id)
    data = str(store.tar_path(name)) if store.has_layer(name, DataBackend.TAR) else ""
    return Which(asked=asked, kind="layer", data=data, places=tuple(layers), sharers=_users(store, diff_ids))
