"""What sinks have in common: the one commit or abort they end with, and the ``index.json`` of those for layouts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from layerkit.formats.oci import documents as oci
from layerkit.linux.durable import naming
from layerkit.model.descriptor import Descriptor
from layerkit.model.errors import InvalidImage, UsageError
from layerkit.model.limits import Limits
from layerkit.model.ports import ImageSink


class Sink(ImageSink):
    """A sink that can be written once."""

    _open = False  # until there is something to drop

    def __init__(self, where: str, limits: Limits) -> None:
        """``where`` names the place in messages."""
        self._where, self._limits = where, limits

    @abstractmethod
    def _commit(self) -> None:
        """Make what was put visible."""

    @abstractmethod
    def _drop(self) -> None:
        """Release everything; what was not committed is gone. Called once."""

    def commit(self) -> None:
        """See the port.

        Raises:
            InvalidImage: a manifest names a blob that is missing; then nothing is changed.
        """
        if not self._open:
            raise UsageError(f"{self._where}: written already")
        try:
            with naming(self._where):
                self._commit()
        finally:
            self.abort()

    def abort(self) -> None:
        """See the port."""
        if self._open:
            self._open = False
            self._drop()


class ListingSink(Sink):
    """A sink with an ``index.json``, which lists the manifests that were put, each with the name it is to have."""

    def __init__(self, where: str, limits: Limits) -> None:
        """Nothing is listed yet."""
        super().__init__(where, limits)
        self._listed: list[tuple[Descriptor, str, bytes]] = []

    def put_manifest(self, descriptor: Descriptor, data: bytes, name: str = "") -> None:
        """See the port.

        Raises:
            DigestMismatch: other bytes than ``descriptor`` promises.
            InvalidImage: malformed.
        """
        what = f"{self._where}: manifest {descriptor.digest}"
        oci.verify(data, descriptor, what)
        oci.references(data, descriptor.media_type, what, limits=self._limits)
        self._listed.append((descriptor, name, data))
        self.put_blob(descriptor, [data])

    def _check_complete(self, size_of: Callable[[Descriptor], int | None]) -> None:
        """Raise unless every blob that the manifests name is there; ``size_of`` looks one up.

        Raises:
            InvalidImage: one is missing or has another size.
        """
        for entry, _, data in self._listed:
            what = f"{self._where}: manifest {entry.digest}"
            for needed in oci.references(data, entry.media_type, what, limits=self._limits):
                size = size_of(needed)
                if size != needed.size:
                    found = "is missing" if size is None else f"has {size} bytes and not {needed.size}"
                    raise InvalidImage(f"{what}: would be incomplete: blob {needed.digest} {found}")

    def _index(self, old: bytes | None = None) -> bytes:
        """Return ``index.json`` with the manifests added to those of ``old``, unknown members kept.

        Raises:
            InvalidImage: ``old`` is malformed.
        """
        document, entries = None, list[Descriptor]()
        if old is not None:
            parsed = oci.parse_index(old, f"{self._where}: index.json", limits=self._limits)
            document, entries = parsed.document, list(parsed.manifests)
        for entry, name, _ in self._listed:
            oci.add_entry(entries, entry, name)
        return oci.index_json(entries, document)
