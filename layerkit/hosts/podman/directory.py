"""META over containers-storage layers as a folder of stubs, for hosts without FUSE; one for each map."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from layerkit.hosts.podman import layers as sl
from layerkit.hosts.podman.build import read_indexes
from layerkit.hosts.podman.mount_options import shift_text
from layerkit.idmap import Mapping
from layerkit.metaonly import Namespace


def place(store: Path, layers: Sequence[sl.StorageLayer], namespace: Namespace, mapping: Mapping) -> Path:
    """Return the folder of this META, made or not."""
    return store / "meta" / _key(layers, namespace, mapping) / "root"


def _key(layers: Sequence[sl.StorageLayer], namespace: Namespace, mapping: Mapping) -> str:
    text = f"{sl.tree_key(layers, namespace)} {shift_text(mapping)} {mapping.overflow}"
    return hashlib.sha256(text.encode()).hexdigest()


def build(store_root: Path, layers: Sequence[sl.StorageLayer], namespace: Namespace, mapping: Mapping) -> None:
    """Write it unless it is there.

    Raises:
        LayerkitError: a folder that cannot be adopted, an owner outside the map, or a disk that refuses.
    """
    from layerkit.hosts.adopted.meta import Stacking, metadata_over_folders
    from layerkit.linux.folders.stubs import write_directory
    from layerkit.model import limits as bounds
    from layerkit.model.trees.merge import merge
    from layerkit.store.local import LocalStore

    limits = bounds.from_environment()
    key = _key(layers, namespace, mapping)
    with LocalStore.open(store_root, limits=limits) as store, store.hold(), store.meta_lock(key):
        if store.meta(key) is not None:
            return
        diff_ids, indexes = read_indexes(store, layers, limits)
        tree = merge(indexes, limits=limits)
        shift = shift_text(mapping)
        meta = metadata_over_folders(tree, mapping if shift else None, namespace, Stacking.DATA_ONLY)
        with store.begin_meta(key) as writer:
            writer.root.mkdir()
            write_directory(meta, writer.root)
            writer.commit(
                {
                    "tree": f"sha256:{sl.tree_key(layers, namespace)}", "map": shift,
                    "rendering": "directory", "namespace": namespace, "names": len(tree),
                    "folders": [os.fspath(layer.path) for layer in layers],
                    "identities": [layer.identity for layer in layers], "diff_ids": diff_ids,
                }
            )  # fmt: skip
