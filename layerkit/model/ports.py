"""What the use cases ask of the outside world: Protocols only, no code that does anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # an index brings numpy, which a copy has no need for
    from layerkit.model.descriptor import Descriptor, Platform
    from layerkit.model.digest import Digest
    from layerkit.model.image import Image
    from layerkit.model.index import Index

Progress = Callable[[str, int, int], None]
"""Called as (what, bytes done, bytes in all or 0); may raise ``Cancelled`` to stop the work."""


class BlobReader(Protocol):
    """A blob's bytes in order, NOT verified: whoever reads them hashes them."""

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill ``buffer`` from its start; return the bytes written, 0 at the end of the blob."""
        ...

    def close(self) -> None:
        """Release what the reader holds."""
        ...


class ImageSource(Protocol):
    """A place that holds images: a layout, an archive, a registry, the local store."""

    def image(self, platform: Platform | None = None) -> Image:
        """Return the image that the reference names, manifest and config verified.

        Raises:
            NotFound: no such image, or none for ``platform``.
            InvalidImage: malformed JSON, a wrong digest or size.
        """
        ...

    def open_blob(self, descriptor: Descriptor) -> BlobReader:
        """Open a blob for reading from its start; several may be open at once, from several threads."""
        ...

    def close(self) -> None:
        """Release files and temporary data."""
        ...


class ImageSink(Protocol):
    """A place that takes blobs and manifests. Nothing is visible there before :meth:`commit`."""

    def has_blob(self, digest: Digest) -> bool:
        """Return whether the blob is there already."""
        ...

    def put_blob(self, descriptor: Descriptor, chunks: Iterable[bytes | memoryview]) -> None:
        """Store a blob, verified against ``descriptor``'s digest and size while it is written.

        Raises:
            DigestMismatch: the bytes are not what ``descriptor`` promises; nothing is kept.
        """
        ...

    def put_manifest(self, descriptor: Descriptor, data: bytes, name: str = "") -> None:
        """Store a manifest or index and list it (under ``name`` where given) in the top index."""
        ...

    def commit(self) -> None:
        """Make all that was put visible, durably and at once."""
        ...

    def abort(self) -> None:
        """Drop all that was put and leave the place as it was."""
        ...


class DataSink(Protocol):
    """Where the uncompressed bytes of a layer go while it is indexed (the store's tar backend)."""

    def write(self, chunk: memoryview, /) -> int:
        """Take the next bytes of the tar; the buffer is reused afterwards."""
        ...


class IndexCache(Protocol):
    """Where indexes are kept by diff_id."""

    def load_index(self, diff_id: Digest) -> Index | None:
        """Return the index of a layer if it is kept, checked for damage."""
        ...
