"""From an image to what can be mounted: layers in the store, the tree, META for a map.

Everything here is done once and kept: a layer by its diff_id, the facts of a tree by the chain of its
layers, a META by (tree, map, rendering). A second run reads what is kept and no blob, so what only a first
run needs is imported where it is used.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

import numpy as np

from layerkit.hosts.mountspec import ErofsData, ErofsMeta, FolderData, FolderMeta
from layerkit.idmap import Mapping, reach
from layerkit.idmap import apply as apply_map
from layerkit.idmap import check as check_map
from layerkit.limits import Limits
from layerkit.metaonly import MetadataLayer, Namespace, metadata_layer
from layerkit.model.digest import Digest
from layerkit.model.facts import TreeFacts
from layerkit.model.tree import Tree
from layerkit.ports import Progress
from layerkit.stores.layout import DataBackend
from layerkit.stores.local import LocalStore
from layerkit.stores.metas import MetaEntry, chain_key, meta_key

FORMAT_VERSION = 2
"""Of METAs: raised when the same tree and map would give other bytes."""


class Rendering(StrEnum):
    """The form of a META that is kept in the store."""

    EROFS = "erofs"
    DIRECTORY = "directory"


def facts_of(tree: Tree) -> TreeFacts:
    """Return the facts of ``tree``, which has container ids."""
    found = reach(tree)
    uids, gids = set(found.uid.tolist()), set(found.gid.tolist())
    return TreeFacts.of(
        tree, tuple(sorted(uids.union(found.xattr_uids))), tuple(sorted(gids.union(found.xattr_gids)))
    )


class Layers(Protocol):
    """What a preparation needs to know of an image."""

    @property
    def diff_ids(self) -> tuple[Digest, ...]:
        """Return the layers, bottom first."""
        ...


class Preparation:
    """One image whose layers are in a store, on its way to a mount."""

    patches = True
    """Whether the META of a map is the image's own one with other owners patched in."""

    def __init__(self, store: LocalStore, image: Layers, *, limits: Limits, strict: bool = False) -> None:
        """Layers must be in the store already, see ``importing``."""
        self._store, self._image, self._limits, self._strict = store, image, limits, strict
        self._tree: Tree | None = None

    def tree(self) -> Tree:
        """Return the merged tree, with container ids."""
        if self._tree is None:
            from layerkit.merge import merge

            indexes = []
            for diff_id in self._image.diff_ids:
                index = self._store.load_index(diff_id)
                assert index is not None, f"{diff_id} was not imported"
                indexes.append(index)
            self._tree = merge(indexes, limits=self._limits)
        return self._tree

    def facts(self) -> TreeFacts:
        """Return the facts of the tree: the kept ones, or those of the tree, which are kept from then on."""
        chain = chain_key(self._image.diff_ids)
        kept = self._store.tree_facts(chain)
        facts = None if kept is None else TreeFacts.from_dict(kept)
        if facts is None:
            facts = facts_of(self.tree())
            self._store.put_tree_facts(chain, facts.to_dict())
        return facts

    def check(self, mapping: Mapping) -> None:
        """Raise unless ``mapping`` covers every owner, as :func:`layerkit.idmap.apply` would.

        The kernel itself would show an owner outside the map as 65534 and say nothing.

        Raises:
            UnmappedId: the first owner that it does not cover.
        """
        facts = self.facts()
        for ids, id_map in ((facts.uids, mapping.uid), (facts.gids, mapping.gid)):
            if not id_map.lookup(np.array(ids, np.uint32))[1].all():
                check_map(self.tree(), mapping)

    def meta(
        self,
        mapping: Mapping | None,
        rendering: Rendering,
        namespace: Namespace,
        *,
        progress: Progress | None = None,
    ) -> MetaEntry:
        """Return META for ``mapping`` (None: owners as they are in the image), made if it is not kept.

        Raises:
            UnmappedId: the map does not cover an owner.
            LossyResult: the rendering cannot express an entry.
        """
        facts = self.facts()
        text = mapping.canonical() if mapping is not None else ""
        key = self._key(Digest.parse(facts.tree), text, rendering, namespace)
        with self._store.meta_lock(key):
            kept = self._store.meta(key)
            if kept is not None:
                return kept
            info: dict[str, object] = {
                "tree": facts.tree,
                "map": text,
                "rendering": rendering.value,
                "namespace": namespace.value,
                "names": facts.names,
            }
            base = None
            if mapping is not None and rendering is Rendering.EROFS and self.patches:
                base = self.meta(None, rendering, namespace)
            layer = self.metadata_layer(mapping, namespace)
            return self._write(key, layer, rendering, base, info, progress)

    def _key(self, tree: Digest, mapping: str, rendering: Rendering, namespace: Namespace) -> str:
        # A strict META of a tree without overlay xattrs is the same META; one of another tree is an error.
        return meta_key(tree, mapping, rendering.value, namespace.value, FORMAT_VERSION)

    def metadata_layer(self, mapping: Mapping | None, namespace: Namespace) -> MetadataLayer:
        """Return the value that a META of this image renders."""
        tree = self.tree()
        if mapping is not None:
            tree = apply_map(tree, mapping)
        return metadata_layer(tree, namespace, strict=self._strict)

    def _write(
        self,
        key: str,
        layer: MetadataLayer,
        rendering: Rendering,
        base: MetaEntry | None,
        info: dict[str, object],
        progress: Progress | None,
    ) -> MetaEntry:
        from layerkit.emit import directory, erofs

        with self._store.begin_meta(key) as writer:
            if rendering is Rendering.DIRECTORY:
                writer.root.mkdir()
                directory.write_directory(layer, writer.root, progress=progress)
            elif base is None:
                with writer.image_file.open("xb") as file:
                    fixups = erofs.build_meta(layer, file)
                writer.fixups_file.write_bytes(fixups.encode())
            else:
                fixups = erofs.Fixups.decode(base.fixups_file.read_bytes())
                with base.image_file.open("rb") as old, writer.image_file.open("xb") as new:
                    erofs.patch_meta(old.fileno(), new.fileno(), fixups, layer.tree)
            return writer.commit(info)


def meta_layer(entry: MetaEntry) -> ErofsMeta | FolderMeta:
    """Return a META of the store as the mounter takes it."""
    if entry.info["rendering"] == Rendering.EROFS:
        return ErofsMeta(entry.key, entry.image_file)
    return FolderMeta(entry.root)


def data_layers(store: LocalStore, backend: DataBackend, facts: TreeFacts) -> tuple[ErofsData | FolderData, ...]:
    """Return the data that the stubs of a tree point at; layers whose files are all hidden are left out."""
    if backend is DataBackend.OBJECTS:
        return (FolderData(store.objects_root),)
    digests = [Digest.parse(text) for text in facts.data_layers]
    return tuple(ErofsData(digest.hex, store.data_image(digest), store.tar_path(digest)) for digest in digests)
