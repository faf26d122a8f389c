"""Where a content, a layer or an image occurs in a store; and the values that ``which`` answers with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerkit.hosts.mounts import mount as mounter
from layerkit.metaonly import data_path
from layerkit.model.digest import Digest
from layerkit.model.entry import Kind
from layerkit.model.errors import NotFound, StoreError, UsageError, show_path
from layerkit.model.index import Index
from layerkit.model.tree import Tree
from layerkit.model.trees.merge import merge
from layerkit.store.layout import DataBackend
from layerkit.store.local import LocalStore

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


def load_index(store: LocalStore, diff_id: Digest) -> Index:
    """Return the index of a layer.

    Raises:
        StoreError: it is not in the store any more.
    """
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


def source_layer(tree: Tree, row: int, path: bytes, indexes: Sequence[Index]) -> int:
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


def texts_of(text: str) -> list[str]:
    """Return the parts of a text with commas, as records of mounts have them."""
    return [part for part in text.split(",") if part]


Mask = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""(values, mask), uint8 (32,) each: the bits of a sha256 that are known."""


def exact(sha256: bytes) -> Mask:
    """Return the mask of a whole digest."""
    return np.frombuffer(sha256, np.uint8), np.full(32, 255, np.uint8)


def content_mask(text: str) -> Mask | None:
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


def rows_with(index: Index, mask: Mask) -> NDArray[np.intp]:
    """Return the rows of an index whose content fits ``mask``."""
    value, known = mask
    # One column tells nearly all rows apart, the others are looked at where it is equal.
    some = np.flatnonzero((index.sha256[:, 0] & known[0] == value[0]) & (index.kind == Kind.REG))
    same: NDArray[np.intp] = some[((index.sha256[some] & known) == value).all(axis=1)]
    return same


def places_of(store: LocalStore, mask: Mask) -> tuple[Place, ...]:
    """Return where the images of a store have the contents that fit ``mask``."""
    found: list[Place] = []
    hits: dict[Digest, list[bytes]] = {}
    for stored in store.images():
        image = stored.image
        name = stored.names[0] if stored.names else str(image.descriptor.digest)
        with_hits = []
        for layer in image.layers:
            if layer.diff_id not in hits:
                index = store.load_index(layer.diff_id)
                rows = [] if index is None else rows_with(index, mask).tolist()
                hits[layer.diff_id] = [] if index is None else [index.path[row] for row in rows]
            with_hits.append(hits[layer.diff_id])
        if not any(with_hits):
            continue
        indexes = [load_index(store, diff_id) for diff_id in image.diff_ids]
        tree = merge(indexes, limits=store.limits)
        for at, (layer, paths) in enumerate(zip(image.layers, with_hits, strict=True)):
            for path in paths:
                row = find_row(tree, path)
                visible = row >= 0 and source_layer(tree, row, path, indexes) == at
                found.append(
                    Place(name, str(image.descriptor.digest), at + 1, str(layer.diff_id),
                          str(layer.descriptor.digest), show_path(path), visible)
                )  # fmt: skip
    return tuple(found)


def which_content(asked: str, mask: Mask, store: LocalStore) -> Which:
    """Answer for a content of which ``mask`` is known.

    Raises:
        NotFound: no image has it.
        UsageError: several contents fit.
    """
    places = places_of(store, mask)
    contents = {}
    for place in places:
        index = load_index(store, Digest.parse(place.diff_id))
        for row in rows_with(index, mask).tolist():
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
            index = load_index(store, diff_id)
            row = int(rows_with(index, exact(sha256))[0])
            return place_in_tar(store, diff_id, int(index.offset[row]))
    return ""


def place_in_tar(store: LocalStore, diff_id: Digest, offset: int) -> str:
    """Return the place of a file in a layer's tar as text; ``offset`` in bytes, -1 for a file without bytes."""
    return f"{store.tar_path(diff_id)} at {offset}" if offset >= 0 else "nowhere: the file is one hole"


def which_digest(asked: str, store: LocalStore) -> Which | None:
    """Answer for (the beginning of) the digest of an image, config, layer or blob; None where it is none.

    Raises:
        UsageError: several layers fit.
    """
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
        if diff_ids.intersection(texts_of(r.label.get("layers", "")))
    )


__all__ = ["Mask", "Place", "Sharer", "Which", "content_mask", "exact", "find_row", "load_index", "place_in_tar",
           "places_of", "rows_with", "source_layer", "texts_of", "which_content", "which_digest"]  # fmt: skip
