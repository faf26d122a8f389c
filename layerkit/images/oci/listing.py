"""What the sinks for layouts have in common: which manifests are listed, and whether all they name is there."""

from __future__ import annotations

from collections.abc import Callable

from layerkit.formats.oci import documents as oci
from layerkit.model.descriptor import Descriptor
from layerkit.model.errors import InvalidImage
from layerkit.model.limits import Limits


class Listing:
    """Manifests that were put, in order, each with the name it is to have."""

    def __init__(self, where: str, limits: Limits) -> None:
        """``where`` names the layout in messages."""
        self._where, self._limits = where, limits
        self.put: list[tuple[Descriptor, str, bytes]] = []

    def add(self, entry: Descriptor, data: bytes, name: str) -> None:
        """Take a manifest or index, checked against ``entry`` and well formed.

        Raises:
            DigestMismatch: other bytes than ``entry`` promises.
            InvalidImage: malformed.
        """
        what = f"{self._where}: manifest {entry.digest}"
        oci.verify(data, entry, what)
        oci.references(data, entry.media_type, what, limits=self._limits)
        self.put.append((entry, name, data))

    def check_complete(self, size_of: Callable[[Descriptor], int | None]) -> None:
        """Raise unless every blob that the manifests name is there; ``size_of`` looks one up.

        Raises:
            InvalidImage: one is missing or has another size.
        """
        for entry, _, data in self.put:
            what = f"{self._where}: manifest {entry.digest}"
            for needed in oci.references(data, entry.media_type, what, limits=self._limits):
                size = size_of(needed)
                if size != needed.size:
                    found = "is missing" if size is None else f"has {size} bytes and not {needed.size}"
                    raise InvalidImage(f"{what}: would be incomplete: blob {needed.digest} {found}")

    def index(self, old: bytes | None) -> bytes:
        """Return ``index.json`` with the manifests added to those of ``old``, unknown members kept.

        Raises:
            InvalidImage: ``old`` is malformed.
        """
        if old is None:
            document, entries = None, []
        else:
            parsed = oci.parse_index(old, f"{self._where}: index.json", limits=self._limits)
            document, entries = parsed.document, list(parsed.manifests)
        for entry, name, _ in self.put:
            oci.add_entry(entries, entry, name)
        return oci.index_json(entries, document)


__all__ = ["Listing"]
