"""What lies under a mount: the record and the layers of one of ours, and the folders of anybody's overlay."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from layerkit.hosts.mounts import mount as mounter
from layerkit.hosts.mounts.records import SOURCE_PREFIX, UNPACKED, Record
from layerkit.linux import mounts
from layerkit.metaonly import METACOPY, Namespace
from layerkit.model.digest import Digest
from layerkit.model.errors import NotFound, StoreError
from layerkit.model.index import Index
from layerkit.model.tree import Tree
from layerkit.model.trees.merge import merge
from layerkit.store.local import LocalStore


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers under a mount, bottom first, and what they show together.

    Attributes:
        image, manifest: name and manifest digest of the image.
        indexes: one a layer; their ``diff_id`` is the store's name for the layer.
        diff_ids, blobs: what the layers are called outside; "" where nobody says.
        tree: of all layers. rows: its rows by path.
    """

    image: str
    manifest: str
    indexes: tuple[Index, ...]
    diff_ids: tuple[str, ...]
    blobs: tuple[str, ...]
    tree: Tree
    rows: dict[bytes, int]


def layers_of(record: Record, store: LocalStore) -> Layers:
    """Return the layers under a mount of ours over ``store``.

    Raises:
        StoreError: an index is gone.
        NotFound: the image is.
    """
    manifest = record.label.get("manifest", "")
    if record.backend == UNPACKED:
        names = [Digest.parse(text) for text in record.indexes]
        diff_ids, blobs = (tuple(record.label.get(key, "").split(",")) for key in ("diff_ids", "blobs"))
        if len(diff_ids) != len(names):
            diff_ids = blobs = ("",) * len(names)
    else:
        image = store.stored_image(manifest).image
        names = list(image.diff_ids)
        diff_ids, blobs = tuple(map(str, names)), tuple(str(layer.descriptor.digest) for layer in image.layers)
    indexes = tuple(load_index(store, name) for name in names)
    tree = merge(indexes, limits=store.limits)
    rows = {path: row for row, path in enumerate(tree.paths())}
    return Layers(record.image, manifest, indexes, diff_ids, blobs, tree, rows)


def load_index(store: LocalStore, diff_id: Digest) -> Index:
    """Return the index of a layer.

    Raises:
        StoreError: it is not in the store any more.
    """
    index = store.load_index(diff_id)
    if index is None:
        raise StoreError(f"the index of layer {diff_id} is not in the store; mount the image anew")
    return index


def record_of(mount: mounts.Mount, store: Path) -> Record | None:
    """Return the record of a mount of layerkit's, None for anybody else's.

    Raises:
        NotFound: it is one over another store than ``store``.
    """
    if not mount.source.startswith(SOURCE_PREFIX):
        return None
    record = next((r for r in mounter.active(mounter.default_run(store)) if r.source == mount.source), None)
    if record is None:
        raise NotFound(f"{mount.point}: a mount of layerkit over another store than {store}; name it with --store")
    return record


def in_upper(record: Record, path: bytes) -> tuple[os.stat_result, bool] | None:
    """Return what the mount's own upper has at ``path``, and whether it is metadata alone; None for nothing."""
    full = os.path.join(os.fsencode(record.upper or ""), path)
    try:
        return (os.lstat(full), is_stub(full, record.namespace)) if record.upper is not None else None
    except OSError:
        return None


def is_stub(path: bytes, namespace: str) -> bool:
    """Return whether the file at ``path`` has its data in another layer."""
    metacopy = os.fsdecode(Namespace(namespace).xattr(METACOPY))
    return metacopy in os.listxattr(path, follow_symlinks=False)
