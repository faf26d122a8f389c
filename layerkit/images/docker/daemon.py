"""The docker daemon as a place that images come from and go to, through the docker SDK.

Both ways are the archive of ``docker save`` and ``docker load`` as a stream. One that comes is kept in a nameless
file, because its list of images is its last part; one that goes is never kept here: every blob is sent while it is
made, and the daemon takes nothing of an archive that ends early.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Final, NoReturn

from layerkit.formats.oci import docker
from layerkit.formats.oci import documents as oci
from layerkit.images.docker.archive import DockerArchiveSource
from layerkit.images.oci.archive_sink import ImageTar, blob_path, is_artifact
from layerkit.images.oci.blobs import file_chunks, inflated, spool, verified
from layerkit.images.oci.outer_tar import OuterTar
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import DaemonError, LayerkitError, NotFound, RegistryError, UsageError
from layerkit.model.limits import DEFAULT, Limits

# Of silence: before the daemon sends the first byte of a large image it has written all of it to its own disk.
_TIMEOUT_SECONDS = 1800
_CONNECT_SECONDS = 30
_CHUNK_BYTES = 1 << 20
_CHUNKS_AHEAD = 4
_JOIN_SECONDS = 30
_DENIED = (401, 403)
_ZSTD_SINCE = (1, 42)
"""The API of Docker 23, the first that loads layers compressed with zstd."""


def _connect(where: str) -> Any:
    """Return a client of the daemon that ``DOCKER_HOST`` (and the rest of docker's variables) names.

    Raises:
        DaemonError: none answers.
    """
    import docker as sdk
    import requests

    try:
        client = sdk.from_env(timeout=_CONNECT_SECONDS)  # asks for its version
        client.api.timeout = _TIMEOUT_SECONDS
    except (sdk.errors.DockerException, requests.RequestException) as error:
        host = os.environ.get("DOCKER_HOST")
        at = f"DOCKER_HOST={host}" if host else "/var/run/docker.sock"
        raise DaemonError(
            f"{where}: no docker daemon answers at {at} ({_reason(error)}); start dockerd or set DOCKER_HOST, "
            "or use a file: docker-archive:FILE with `docker save` and `docker load`"
        ) from None
    return client


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdecimal())


def _reason(error: BaseException) -> str:
    """Return the innermost cause that says something: the SDK wraps a socket's error in four others."""
    text = str(error)
    for mark in ("PermissionError(", "FileNotFoundError(", "ConnectionRefusedError("):
        if mark in text:
            return text[text.index(mark) + len(mark) :].partition(")")[0].partition(", ")[2].strip("'\"")
    return text


def _raise(where: str, error: BaseException) -> NoReturn:
    """Raise the error of ours that stands for one of the SDK's."""
    import docker.errors

    if isinstance(error, LayerkitError):
        raise error
    if isinstance(error, docker.errors.ImageNotFound | docker.errors.NotFound):
        raise NotFound(f"{where}: the docker daemon has no such image; `docker images` lists what it has") from None
    if isinstance(error, docker.errors.APIError):
        status = error.status_code or 0
        if status in _DENIED:
            raise RegistryError(where, status, f"the docker daemon denies access: {error.explanation}") from None
        raise DaemonError(f"{where}: the docker daemon failed: {error.explanation or error}") from None
    raise DaemonError(f"{where}: the connection to the docker daemon broke: {error}") from None


def open_source(
    where: str,
    name: str,
    digest: Digest | None = None,
    *,
    limits: Limits = DEFAULT,
    tmp: str | os.PathLike[str] | None = None,
) -> DockerArchiveSource:
    """Return the image that the daemon calls ``name``: ``NAME[:TAG]``, or an id; spooled into ``tmp``, whole.

    ``digest``, instead of a tag, is that of the manifest in a registry that the daemon got the image from.

    Raises:
        NotFound: the daemon has no such image.
        DaemonError: no daemon, or it failed.
        RegistryError: it denies access.
    """
    import docker.errors
    import requests

    client = _connect(where)
    try:
        # Asked for by id, the daemon sends one image; by a name without a tag, all that have the name.
        found = client.api.inspect_image(f"{name}@{digest}" if digest else name)
        tag = _tag_of(name, found.get("RepoTags") or []) if not digest else ""
        pieces: Iterator[bytes] = client.api.get_image(tag or found["Id"], _CHUNK_BYTES)
        file = spool(pieces, tmp, limits.layer_tar_bytes, where)
    except (docker.errors.DockerException, requests.RequestException) as error:
        _raise(where, error)
    finally:
        client.close()
    return DockerArchiveSource(OuterTar(file, where, limits=limits, tmp=tmp), "@0", limits=limits)


def _tag_of(name: str, tags: list[str]) -> str:
    """Return which of an image's ``tags`` was asked for as ``name``, "" for none of them: it was an id."""
    wanted = docker.normal_name(name)
    return next((tag for tag in tags if docker.normal_name(tag) == wanted), "")


_CUT: Final = object()
"""In the queue: the archive is not to be finished."""
_END: Final = object()


class _Reader:
    """Pieces as a :class:`~layerkit.model.ports.BlobReader`."""

    def __init__(self, pieces: Iterable[bytes | memoryview]) -> None:
        self.rest = iter(pieces)
        self._piece = memoryview(b"")

    def readinto(self, buffer: memoryview, /) -> int:
        while not self._piece:
            found = next(self.rest, None)
            if found is None:
                return 0
            self._piece = memoryview(bytes(found))
        count = min(len(buffer), len(self._piece))
        buffer[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


class _Cut(Exception):
    """Ends the request in the middle, so that the daemon sees a broken archive."""


class DaemonSink(ImageTar):
    """A sink that loads an image into a docker daemon.

    The upload begins with the first put and runs beside the work, a few MiB behind it at most. It holds single
    images: what is attached to them has no place in a daemon.
    """

    keeps_attached = False

    def __init__(self, where: str, name: str, *, limits: Limits = DEFAULT) -> None:
        """Connect, so that a daemon that is not there shows before the work.

        Args:
            where: the reference, for messages.
            name: ``NAME[:TAG]``.
            limits: bounds.

        Raises:
            UsageError: a name that no docker takes.
            DaemonError: no daemon answers.
        """
        if not docker.is_name(name):
            raise UsageError(
                f"{where}: want docker-daemon:NAME[:TAG], NAME in lower case, as `docker tag` takes it"
            )
        super().__init__(where, docker=True, limits=limits)
        self._client = _connect(where)
        self._knows_zstd = _version(self._client.api.api_version) >= _ZSTD_SINCE
        self._queue: queue.Queue[object] = queue.Queue(_CHUNKS_AHEAD)
        self._thread: threading.Thread | None = None
        self._broken = False
        self._failure: BaseException | None = None
        self._refusal = ""
        self._loaded = False

    def put_blob(self, descriptor: Descriptor, chunks: Iterable[bytes | memoryview]) -> None:
        """See the port.

        A zstd layer for a daemon that does not know zstd is inflated, into a nameless file for its size.
        """
        if (
            not descriptor.media_type.endswith(("+zstd", ".zstd"))
            or self._knows_zstd
            or self.has_blob(descriptor.digest)
        ):
            super().put_blob(descriptor, chunks)
            return
        what = f"{self._where}: blob {descriptor.digest}"
        reader = _Reader(verified(chunks, descriptor, what))
        with spool(inflated(reader, "zstd", what, self._limits), None, self._limits.layer_tar_bytes, what) as tar:
            for _ in reader.rest:  # what follows the last frame, so that all of the blob is verified
                pass
            size = os.fstat(tar.fileno()).st_size
            with self._lock:
                # By this name the manifest.json looks for it; such a daemon looks at nothing else.
                self._member(blob_path(descriptor), file_chunks(tar.fileno(), size), size)
                self._sizes[descriptor.digest] = descriptor.size

    def put_manifest(self, descriptor: Descriptor, data: bytes, name: str = "") -> None:
        """See the port.

        Raises:
            UsageError: an index or an artifact.
        """
        what = f"{self._where}: manifest {descriptor.digest}"
        if descriptor.media_type not in oci.MANIFEST_TYPES:
            raise UsageError(f"{what}: a docker daemon accepts single images only; choose one with --platform")
        if is_artifact(oci.parse_manifest(data, what, media_type=descriptor.media_type, limits=self._limits)):
            raise UsageError(f"{what}: a docker daemon has no place for artifacts; write an OCI layout or archive")
        super().put_manifest(descriptor, data, name)

    def _write(self, pieces: Iterable[bytes | memoryview]) -> None:
        if self._broken:
            raise DaemonError(f"{self._where}: the upload has failed already")
        if self._thread is None:
            self._thread = threading.Thread(target=self._send, name="docker-load", daemon=True)
            self._thread.start()
            self._member("oci-layout", oci.LAYOUT_FILE)
        try:
            for piece in pieces:
                self._give(bytes(piece))
        except BaseException:
            self._broken = True  # a member is cut off: nothing can follow it
            raise

    def _give(self, piece: object) -> None:
        while self._thread is not None and self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put(piece, timeout=0.2)
                return
        self._outcome()
        raise DaemonError(f"{self._where}: the docker daemon ended the upload before its end")

    def _send(self) -> None:
        """Run the one request of the upload, in a thread of its own."""
        try:
            for line in self._client.api.load_image(self._pieces()):
                if isinstance(line, dict):
                    error = (
                        line.get("error") or (line.get("errorDetail") or {}).get("message") or line.get("message")
                    )
                    self._refusal = self._refusal or str(error or "")
            self._loaded = True
        except BaseException as error:
            self._failure = error

    def _pieces(self) -> Iterator[bytes]:
        while (piece := self._queue.get()) is not _END:
            if piece is _CUT:
                raise _Cut
            assert isinstance(piece, bytes)
            yield piece

    def _outcome(self) -> None:
        """Raise if the daemon did not take what was sent."""
        if self._refusal:
            raise DaemonError(f"{self._where}: the docker daemon refused the image: {self._refusal}")
        if self._failure is not None:
            _raise(self._where, self._failure)

    def _deliver(self) -> None:
        self._give(_END)
        assert self._thread is not None
        while self._thread.is_alive():  # in steps, so that an interrupt gets through
            self._thread.join(0.2)
        self._outcome()
        if not self._loaded:
            raise DaemonError(f"{self._where}: the upload was cut off")

    def _drop(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            with contextlib.suppress(queue.Empty):  # room for the mark, whatever is still in the queue
                while True:
                    self._queue.get_nowait()
            self._queue.put(_CUT)
            self._thread.join(_JOIN_SECONDS)
        self._client.close()
