"""From an image to what can be mounted: layers in the store, the tree, META for a map.

Everything here is done once and kept: a layer by its diff_id, the facts of a tree by the chain of its
layers, a META by (tree, map, rendering). A second run reads what is kept and no blob, so what only a first
run needs is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import numpy as np

from layerkit.formats.meta.fuse_tree import TREE_FILE
from layerkit.idmap import Mapping, reach
from layerkit.idmap import apply as apply_map
from layerkit.metaonly import MetadataLayer, Namespace, metadata_layer
from layerkit.model.digest import Digest
from layerkit.model.facts import TreeFacts
from layerkit.model.limits import Limits
from layerkit.model.ports import Progress
from layerkit.model.tree import Tree
from layerkit.store.local import LocalStore
from layerkit.store.metas import FORMAT_VERSION, MetaEntry, chain_key, meta_key


class Rendering(StrEnum):
    """The form of a META that is kept in the store."""

    EROFS = "erofs"
    DIRECTORY = "directory"
    FUSE = "fuse"
    """A file that a server of ours answers from: one for all maps, which it applies itself."""


def facts_of(tree: Tree) -> TreeFacts:
    """Return the facts of ``tree``, which has container ids."""
    found = reach(tree)
    uids, gids = set(found.uid.tolist()), set(found.gid.tolist())
    return TreeFacts.of(
        tree, tuple(sorted(uids.union(found.xattr_uids))), tuple(sorted(gids.union(found.xattr_gids)))
    )


class Preparation:
    """One image whose layers are in a store, on its way to a mount."""

    patches = True
    """Whether the META of a map is the image's own one with other owners patched in."""

    def __init__(
        self, store: LocalStore, diff_ids: Sequence[Digest], *, limits: Limits, strict: bool = False
    ) -> None:
        """Layers (bottom first) must be in the store already, see ``import_layers``."""
        self._store, self._diff_ids, self._limits, self._strict = store, diff_ids, limits, strict
        self._tree: Tree | None = None

    def tree(self) -> Tree:
        """Return the merged tree, with container ids."""
        if self._tree is None:
            from layerkit.model.trees.merge import merge

            indexes = []
            for diff_id in self._diff_ids:
                index = self._store.load_index(diff_id)
                assert index is not None, f"{diff_id} was not imported"
                indexes.append(index)
            self._tree = merge(indexes, limits=self._limits)
        return self._tree

    def facts(self) -> TreeFacts:
        """Return the facts of the tree: the kept ones, or those of the tree, which are kept from then on."""
        chain = chain_key(self._diff_ids)
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
        for kind, ids in (("uid", facts.uids), ("gid", facts.gids)):
            if not mapping.lookup(kind, np.array(ids, np.uint32))[1].all():
                apply_map(self.tree(), mapping)

    def meta(
        self,
        mapping: Mapping | None,
        rendering: Rendering,
        namespace: Namespace,
        *,
        progress: Progress | None = None,
    ) -> MetaEntry:
        """Return META for ``mapping`` (None: owners as they are in the image), made if it is not kept.

        What is served maps nothing in itself: ``mapping`` must be None for it.

        Raises:
            UnmappedId: the map does not cover an owner.
            UnsafeEntry: the image brings overlay xattrs, and the preparation is ``strict``.
            LossyResult: the rendering cannot express an entry.
        """
        facts = self.facts()
        if self._strict:
            self.metadata_layer(None, namespace)  # a kept one may have been made without it
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
            if mapping is not None and rendering is Rendering.EROFS and self.patches:
                self.check(mapping)
                return self._patch(key, self.meta(None, rendering, namespace), mapping, info)
            return self._write(key, self.metadata_layer(mapping, namespace), rendering, info, progress)

    def _key(self, tree: Digest, mapping: str, rendering: Rendering, namespace: Namespace) -> str:
        # Adopted folders have keys of their own: this is overridden.
        return meta_key(tree, mapping, rendering.value, namespace.value, FORMAT_VERSION)

    def metadata_layer(self, mapping: Mapping | None, namespace: Namespace) -> MetadataLayer:
        """Return the value that a META of this image renders."""
        tree = self.tree()
        if mapping is not None:
            tree = apply_map(tree, mapping)
        return metadata_layer(tree, namespace, strict=self._strict)

    def _patch(self, key: str, base: MetaEntry, mapping: Mapping, info: dict[str, object]) -> MetaEntry:
        from layerkit.formats.erofs.patch import Fixups, patch_meta

        with self._store.begin_meta(key) as writer:
            fixups = Fixups.decode(base.fixups_file.read_bytes())
            with base.image_file.open("rb") as old, writer.image_file.open("x+b") as new:
                patch_meta(old.fileno(), new.fileno(), fixups, mapping)
            return writer.commit(info)

    def _write(
        self,
        key: str,
        layer: MetadataLayer,
        rendering: Rendering,
        info: dict[str, object],
        progress: Progress | None,
    ) -> MetaEntry:
        with self._store.begin_meta(key) as writer:
            if rendering is Rendering.FUSE:
                from layerkit.formats.meta.fuse_tree import write_tree

                with (writer.path / TREE_FILE).open("xb") as file:
                    write_tree(layer, file)
            elif rendering is Rendering.DIRECTORY:
                from layerkit.linux.folders.writer import write_directory

                writer.root.mkdir()
                write_directory(layer, writer.root, progress=progress)
            else:
                from layerkit.formats.erofs.meta import build_meta

                with writer.image_file.open("xb") as file:
                    fixups = build_meta(layer, file)
                writer.fixups_file.write_bytes(fixups.encode())
            return writer.commit(info)
