"""Indexes of layers in a repository of their own, where others that work on the same registry find them.

A tag for each layer, made of its ``diff_id`` and the format's version, leads to a manifest with one blob. What is
found is verified by digest, checked like a layer from a stranger, and marked as unproven: a claim of whoever may
write to that repository (docs/adr/0014, 0015). Nothing here may stop the work: without it a layer is read again.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from layerkit.formats.oci import documents as oci
from layerkit.formats.oci import index_artifact
from layerkit.model.digest import Digest
from layerkit.model.errors import LayerkitError, NotFound, RegistryError
from layerkit.model.limits import Limits

if TYPE_CHECKING:
    from layerkit.images.registry.client import Repository
    from layerkit.model.index import Index

_log = logging.getLogger("layerkit.hook.shared")
_BLOB_BYTES = 1 << 30
_refused: set[str] = set()


class SharedIndexes:
    """The indexes in one repository."""

    def __init__(self, repository: Repository, limits: Limits) -> None:
        """Nothing is asked yet."""
        self.repository, self._limits = repository, limits

    def has(self, diff_id: Digest) -> bool:
        """Return whether there is an index of this layer; no if the registry does not say."""
        try:
            return self.repository.has_manifest(index_artifact.shared_tag(diff_id))
        except RegistryError as error:
            _log.debug("%s: %s", self.repository, error)
            return False

    def load(self, diff_id: Digest) -> Index | None:
        """Return the index of this layer, marked as unproven; None if there is none that can be used."""
        tag = index_artifact.shared_tag(diff_id)
        what = f"{self.repository}:{tag}"
        try:
            _, data = self.repository.manifest(tag)
            blob = index_artifact.parse_shared(data, diff_id, what, limits=self._limits)
            return index_artifact.decode(
                self.repository.blob(blob, _BLOB_BYTES), diff_id, what, origin=str(self.repository),
                limits=self._limits,
            )  # fmt: skip
        except NotFound:
            return None
        except LayerkitError as error:
            # Damaged, or not ours: the layer itself says what is right.
            _log.warning("a shared index is not used", extra={"error": str(error)})
            return None

    def save(self, index: Index) -> bool:
        """Publish the index of a layer that was read; return whether others will find it."""
        if str(self.repository) in _refused:
            return False
        blob, data = index_artifact.encode(index)
        try:
            for descriptor, content in ((oci.EMPTY_DESCRIPTOR, oci.EMPTY_JSON), (blob, data)):
                if self.repository.blob_size(descriptor.digest) is None:
                    self.repository.put_blob(descriptor, [content])
            manifest, entry = index_artifact.build_shared(blob)
            self.repository.put_manifest(manifest, entry.media_type, index_artifact.shared_tag(index.diff_id))
        except RegistryError as error:
            self.give_up(error)
            return False
        return True

    def give_up(self, error: RegistryError) -> None:
        """Take note that the registry did not take something; where that will not change, it is not asked again."""
        _log.warning("indexes are not shared", extra={"error": str(error)})
        if not error.temporary:
            _refused.add(str(self.repository))


__all__ = ["SharedIndexes"]
