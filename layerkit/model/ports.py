"""What the use cases ask of the outside world: each seam whole, no code but the answer "nothing"."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from layerkit.model.descriptor import Descriptor, Platform
    from layerkit.model.digest import Digest
    from layerkit.model.image import Image

Progress = Callable[[str, int, int], None]
"""Called as (what, bytes done, bytes in all or 0); may raise ``Cancelled`` to stop the work."""

ReadRange = Callable[[int, int], bytes]
"""Called as (start, length): a part of a blob, NOT verified, as a part has no digest of its own."""


class BlobReader(Protocol):
    """A blob's bytes in order, NOT verified: whoever reads them hashes them."""

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill ``buffer`` from its start; return the bytes written, 0 at the end of the blob."""
        ...

    def close(self) -> None:
        """Release what the reader holds."""
        ...


class ImageSource(Protocol):
    """A place that holds images: a layout, an archive, a daemon, a registry, the local store.

    Adapters inherit from it: what a place has no answer for is answered here, with nothing.

    Attributes:
        where: the reference or path, for messages.
    """

    where: str

    def image(self, platform: Platform | None = None) -> Image:
        """Return the image that the reference names, manifest and config verified.

        Raises:
            NotFound: no such image, or none for ``platform``.
            InvalidImage: malformed JSON, a wrong digest or size.
        """
        ...

    def open_blob(self, descriptor: Descriptor) -> BlobReader:
        """Open a blob for reading from its start; several may be open at once, from several threads.

        Raises:
            NotFound, InvalidImage: it is not there.
            DigestMismatch: it is known to have another length.
        """
        ...

    def fetch(self, entry: Descriptor, most: int) -> bytes:
        """Return a small blob or a manifest, of at most ``most`` bytes, perhaps NOT verified."""
        ...

    def chosen(self) -> Sequence[Descriptor]:
        """Return the manifests or indexes that the reference selects: one, or one per platform.

        Nothing where the place has no indexes, only images of one platform each.

        Raises:
            NotFound: no such name, or several without a choice.
        """
        return ()

    def referrers(self, subject: Digest, artifact_type: str = "") -> list[tuple[Descriptor, bytes]]:
        """Return the manifests that are attached to ``subject``, verified, in the place's order."""
        return []

    def attached_by_name(self, subject: Digest) -> list[tuple[Descriptor, str]]:
        """Return what is attached to ``subject`` by a name made from its digest (cosign), with these names."""
        return []

    def ranges(self, descriptor: Descriptor) -> ReadRange | None:
        """Return what reads parts of a blob, None where the place gives none."""
        return None

    def repository_at(self, registry: str) -> str:
        """Return the repository of the host ``registry`` that the blobs lie in, "" if they lie elsewhere."""
        return ""

    def bytes_read(self) -> int:
        """Return how many bytes came over the network so far."""
        return 0

    def close(self) -> None:
        """Release files, connections and temporary data."""
        ...


class ImageSink(Protocol):
    """A place that takes blobs and manifests. Nothing is visible there before :meth:`commit`.

    What is not committed at the end of a ``with`` block is dropped.

    Attributes:
        parallel: how many blobs may be put at once, from several threads.
        keeps_attached: whether it has room for artifacts beside an image.
        mounted: blobs that the place had elsewhere, so that no byte of them was read.
    """

    parallel: int = 1
    keeps_attached: bool = True
    mounted: Collection[Digest] = ()

    def has_blob(self, digest: Digest) -> bool:
        """Return whether the blob was put, or is there already."""
        ...

    def has_attached(self, subject: Digest, artifact_type: str) -> bool:
        """Return whether the place says that something of this type is attached to ``subject`` in it already."""
        return False

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
        """Drop all that was put and not committed, and leave the place as it was; aborting twice is harmless."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()


class DataSink(Protocol):
    """Where the uncompressed bytes of a layer go while it is indexed (the store's tar backend)."""

    def write(self, chunk: memoryview, /) -> int:
        """Take the next bytes of the tar; the buffer is reused afterwards."""
        ...
