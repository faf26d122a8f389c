"""Ports over bytes in memory: a blob that is read, and a sink that keeps what it is given."""

from __future__ import annotations

import io
from collections.abc import Iterable

from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.ports import BlobReader, ImageSink


class Blob(BlobReader):
    """Gives out at most ``step`` bytes at a time."""

    def __init__(self, data: bytes, step: int = 1 << 20) -> None:
        self._file, self._step = io.BytesIO(data), step

    @property
    def given(self) -> int:
        """How many bytes were read."""
        return self._file.tell()

    def readinto(self, buffer: memoryview, /) -> int:
        return self._file.readinto(buffer[: self._step])

    def close(self) -> None:
        self._file.close()


def described(blob: bytes) -> Descriptor:
    """Return the descriptor of a layer blob."""
    return Descriptor("application/vnd.oci.image.layer.v1.tar", Digest.of(blob), len(blob))


class MemorySink(ImageSink):
    """Keeps blobs and manifests, by digest."""

    def __init__(self) -> None:
        self.blobs: dict[Digest, bytes] = {}

    def has_blob(self, digest: Digest) -> bool:
        return digest in self.blobs

    def put_blob(self, descriptor: Descriptor, chunks: Iterable[bytes | memoryview]) -> None:
        self.blobs[descriptor.digest] = b"".join(bytes(chunk) for chunk in chunks)

    def put_manifest(self, descriptor: Descriptor, data: bytes, name: str = "") -> None:
        self.blobs[descriptor.digest] = data

    def commit(self) -> None: ...

    def abort(self) -> None: ...
