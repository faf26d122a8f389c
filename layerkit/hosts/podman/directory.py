"""META over containers-storage layers as a folder of stubs, for hosts without FUSE; one for each map."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from layerkit.hosts.mounts.owners import IdMaps
from layerkit.hosts.podman import layers as sl
from layerkit.hosts.podman.build import read_indexes
from layerkit.model.errors import UsageError

if TYPE_CHECKING:
    from layerkit.idmap import Mapping


def place(store: Path, layers: Sequence[sl.StorageLayer], namespace: str, maps: IdMaps) -> Path:
    """Return the folder of this META, made or not."""
    return store / "meta" / _key(layers, namespace, maps) / "root"


def _key(layers: Sequence[sl.StorageLayer], namespace: str, maps: IdMaps) -> str:
    text = f"{sl.tree_key(layers, namespace)} {maps.canonical} {maps.overflow}"
    return hashlib.sha256(text.encode()).hexdigest()


def build(store_root: Path, layers: Sequence[sl.StorageLayer], namespace: str, maps: IdMaps) -> None:
    """Write it unless it is there.

    Raises:
        LayerkitError: a folder that cannot be adopted, an owner outside the map, or a disk that refuses.
    """
    from layerkit.hosts.adopted.meta import Stacking, metadata_over_folders
    from layerkit.linux.folders.stubs import write_directory
    from layerkit.metaonly import Namespace
    from layerkit.model import limits as bounds
    from layerkit.model.trees.merge import merge
    from layerkit.store.local import LocalStore

    limits = bounds.from_environment()
    key = _key(layers, namespace, maps)
    with LocalStore.open(store_root, limits=limits) as store, store.hold(), store.meta_lock(key):
        if store.meta(key) is not None:
            return
        diff_ids, indexes = read_indexes(store, layers, limits)
        tree = merge(indexes, limits=limits)
        mapping = _mapping(maps) if maps.canonical else None
        meta = metadata_over_folders(tree, mapping, Namespace(namespace), Stacking.DATA_ONLY)
        with store.begin_meta(key) as writer:
            writer.root.mkdir()
            write_directory(meta, writer.root)
            writer.commit(
                {
                    "tree": f"sha256:{sl.tree_key(layers, namespace)}", "map": maps.canonical,
                    "rendering": "directory", "namespace": namespace, "names": len(tree),
                    "folders": [os.fspath(layer.path) for layer in layers],
                    "identities": [layer.identity for layer in layers], "diff_ids": diff_ids,
                }
            )  # fmt: skip


def _mapping(maps: IdMaps) -> Mapping:
    from layerkit.idmap import MAX_ID, IdMap, Mapping

    sides = list[tuple[IdMap, int | None]]()
    for extents, squash in ((maps.uid, maps.squash_uid), (maps.gid, maps.squash_gid)):
        if squash is not None:
            # A map that covers nothing of what occurs: all goes to the overflow id.
            sides.append((IdMap.of([(MAX_ID, squash, 1)]), squash))
        else:
            sides.append((IdMap.of(extents) if extents else IdMap.identity(), maps.overflow))
    (uid, overflow), (gid, other) = sides
    if overflow != other:
        raise UsageError("rendering=directory: users and groups squashed to different ids; use rendering=fuse")
    return Mapping(uid, gid, overflow)
