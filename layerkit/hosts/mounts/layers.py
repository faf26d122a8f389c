"""TODO."""

from __future__ import annotations

from layerkit.formats.meta.fuse_tree import TREE_FILE
from layerkit.hosts.mounts.spec import ErofsData, ErofsMeta, FolderData, FolderMeta, FuseMeta, Meta
from layerkit.idmap import Mapping
from layerkit.model.digest import Digest
from layerkit.model.facts import TreeFacts
from layerkit.store.layout import DataBackend
from layerkit.store.local import LocalStore
from layerkit.store.metas import MetaEntry
from layerkit.store.preparation import Rendering


def meta_layer(entry: MetaEntry, mapping: Mapping | None = None) -> Meta:
    """Return a META of the store as the mounter takes it; ``mapping`` is for one that is served."""
    if entry.info["rendering"] == Rendering.FUSE:
        return FuseMeta(entry.path / TREE_FILE, mapping or Mapping.identity())
    if entry.info["rendering"] == Rendering.EROFS:
        return ErofsMeta(entry.key, entry.image_file)
    return FolderMeta(entry.root)


def data_layers(store: LocalStore, backend: DataBackend, facts: TreeFacts) -> tuple[ErofsData | FolderData, ...]:
    """Return the data that the stubs of a tree point at; layers whose files are all hidden are left out."""
    if backend is DataBackend.OBJECTS:
        return (FolderData(store.objects_root),)
    digests = [Digest.parse(text) for text in facts.data_layers]
    return tuple(ErofsData(digest.hex, store.data_image(digest), store.tar_path(digest)) for digest in digests)
