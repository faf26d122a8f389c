"""What every image archive that is written has in common, wherever its bytes go.

The same puts in the same order give the same bytes: owner 0, times 0, no names of users. An archive is an OCI
layout; with ``docker=True`` it also holds the ``manifest.json`` that ``docker load`` reads, as docker's own
archives do since version 25: one archive serves both.
"""

from __future__ import annotations

import tarfile
import threading
from abc import abstractmethod
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from layerkit.formats.oci import docker
from layerkit.formats.oci import documents as oci
from layerkit.formats.strict_json import dumps
from layerkit.images.oci.blobs import verified
from layerkit.images.oci.listing import Listing
from layerkit.linux.durable import naming
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import UsageError
from layerkit.model.limits import Limits
from layerkit.model.ports import ImageSink

_BLOCK = 512
_RECORD = 20 * _BLOCK


class ImageTar(ImageSink):
    """A sink whose puts become members of a tar; aborts at the end of a ``with``."""

    def __init__(self, where: str, *, docker: bool, limits: Limits) -> None:
        """Start with nothing; ``where`` names the archive in messages."""
        self._where, self._docker, self._limits = where, docker, limits
        self._lock, self._open = threading.Lock(), True
        self._sizes: dict[Digest, int] = {}
        self._folders: set[str] = set()
        self._listing = Listing(where, limits)
        self._length = 0

    @abstractmethod
    def _write(self, pieces: Iterable[bytes | memoryview]) -> None:
        """Append ``pieces``: all of them, or none where that can be had."""

    @abstractmethod
    def _deliver(self) -> None:
        """Make the archive, whose last bytes were written, visible."""

    @abstractmethod
    def _drop(self) -> None:
        """Release everything; what was not delivered is gone. Called once."""

    def has_blob(self, digest: Digest) -> bool:
        """Return whether the blob was put."""
        return digest in self._sizes

    def put_blob(self, descriptor: Descriptor, chunks: Iterable[bytes | memoryview]) -> None:
        """Store a blob; see the port. Callable from several threads, one at a time."""
        digest = descriptor.digest
        what = f"{self._where}: blob {digest}"
        with self._lock:
            pieces = verified(chunks, descriptor, what)
            if digest in self._sizes:
                for _ in pieces:  # a second copy is verified and dropped
                    pass
                return
            for folder in ("blobs", f"blobs/{digest.algorithm}"):
                if folder not in self._folders:
                    self._member(folder, None)
                    self._folders.add(folder)
            self._member(blob_path(descriptor), pieces, descriptor.size)
            self._sizes[digest] = descriptor.size

    def _member(self, name: str, content: bytes | Iterable[bytes | memoryview] | None, size: int = 0) -> None:
        """Append a member; None is a folder."""
        info = tarfile.TarInfo(name)
        if content is None:
            info.type, info.mode = tarfile.DIRTYPE, 0o755
        if isinstance(content, bytes):
            size, content = len(content), (content,)
        info.size = size
        head = info.tobuf(tarfile.PAX_FORMAT)
        padding = bytes(-size % _BLOCK)

        def pieces() -> Iterable[bytes | memoryview]:
            yield head
            yield from content or ()
            if padding:
                yield padding

        self._write(pieces())
        self._length += len(head) + size + len(padding)

    def put_manifest(self, descriptor: Descriptor, data: bytes, name: str = "") -> None:
        """Store a manifest and list it in ``index.json``; see :class:`~layerkit.model.ports.ImageSink`."""
        self._listing.add(descriptor, data, name)
        self.put_blob(descriptor, [data])

    def commit(self) -> None:
        """Finish the archive and make it visible; see :class:`~layerkit.model.ports.ImageSink`.

        Raises:
            InvalidImage: a manifest names a blob that is missing; then nothing is written.
        """
        if not self._open:
            raise UsageError(f"{self._where}: written already")
        try:
            self._listing.check_complete(lambda entry: self._sizes.get(entry.digest))
            index = self._listing.index(None)
            listed = docker_manifest(self._listing, self._where, self._limits) if self._docker else b""
            self._member("index.json", index)
            if self._docker:
                self._member("manifest.json", listed)
            end = self._length + 2 * _BLOCK
            self._write([bytes(2 * _BLOCK + -end % _RECORD)])
            with naming(self._where):
                self._deliver()
        finally:
            self.abort()

    def abort(self) -> None:
        """Drop what was put and not committed; aborting twice is harmless."""
        if self._open:
            self._open = False
            self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


def docker_manifest(listing: Listing, where: str, limits: Limits) -> bytes:
    """Return the ``manifest.json`` for the images of ``listing``, one entry for each manifest.

    Raises:
        UsageError: an index, or an image with a layer that docker would take for something that it is not.
    """
    images: dict[Digest, dict[str, object]] = {}
    for entry, name, data in listing.put:
        what = f"{where}: manifest {entry.digest}"
        if entry.media_type not in oci.MANIFEST_TYPES:
            raise UsageError(f"{what}: a docker archive holds single images; choose one with --platform")
        manifest = oci.parse_manifest(data, what, media_type=entry.media_type, limits=limits)
        # An artifact stays in index.json: docker has no place for it.
        if is_artifact(manifest):
            continue
        for layer in manifest.layers:
            # manifest.json has no media types: docker unpacks whatever is there as a layer's tar.
            if not docker.is_layer(layer.media_type):
                raise UsageError(
                    f"{what}: docker cannot unpack its layer of the type {layer.media_type}; write an OCI archive"
                )
        tags: list[str] = [docker.tagged(name)] if name else []
        image = images.setdefault(
            entry.digest,
            {
                "Config": blob_path(manifest.config),
                "RepoTags": [],
                "Layers": [blob_path(layer) for layer in manifest.layers],
            },
        )
        image["RepoTags"] = [*image["RepoTags"], *tags]  # type: ignore[misc]
    return dumps(list(images.values()))


def is_artifact(manifest: oci.Manifest) -> bool:
    """Return whether a manifest is no image to run, also where it has an image's config, as cosign's have."""
    if manifest.config.media_type not in (oci.CONFIG, oci.DOCKER_CONFIG):
        return True
    return bool(manifest.layers) and not any(docker.is_layer(layer.media_type) for layer in manifest.layers)


def blob_path(entry: Descriptor) -> str:
    """Return the name of a blob's member."""
    return f"blobs/{entry.digest.algorithm}/{entry.digest.hex}"


__all__ = ["ImageTar", "blob_path", "docker_manifest", "is_artifact"]
