"""References to images, as skopeo and podman spell them, and the sources and sinks they stand for."""

from __future__ import annotations

import errno
import os
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from layerkit.model.digest import Digest
from layerkit.model.errors import InvalidImage, NotFound, UsageError
from layerkit.model.limits import DEFAULT, Limits

if TYPE_CHECKING:
    from layerkit.images.registry.options import RegistryOptions
    from layerkit.model.ports import ImageSink, ImageSource

FILE_TRANSPORTS = ("oci", "oci-archive", "docker-archive")
TRANSPORTS = (*FILE_TRANSPORTS, "docker-daemon", "docker", "store")
# Names that skopeo gives a meaning; taken for files they would end in a puzzling "no such file".
_FOREIGN = ("containers-storage", "dir", "docker-image", "ostree", "sif", "tarball", "oci-dir", "docker-dir")
_DIGEST = re.compile(r"@(sha(?:256|512):[0-9a-fA-F]*)$")

TmpDir = str | os.PathLike[str] | None


@dataclass(frozen=True, slots=True)
class Reference:
    """Where an image lies or goes.

    Attributes:
        transport: one of :data:`TRANSPORTS`, or "path" for a bare file or folder whose kind is yet to be seen.
        path: of the folder or file ("-" for standard input or output); for ``docker`` HOST/NAME.
        name: which image there, a tag or name, "" where none was given.
        digest: which image, by the digest of its manifest.
    """

    transport: str
    path: str
    name: str = ""
    digest: Digest | None = None

    def __str__(self) -> str:
        choice = f"@{self.digest}" if self.digest else ""
        if self.transport == "path":
            return self.path + (f":{self.name}" if self.name else "") + choice
        if self.transport in ("store", "docker-daemon"):
            return f"{self.transport}:{self.name}{choice}"
        slashes = "//" if self.transport == "docker" else ""
        return f"{self.transport}:{slashes}{self.path}" + (f":{self.name}" if self.name else "") + choice


def parse(text: str) -> Reference:
    """Return what ``text`` refers to; nothing is looked at on disk.

    Raises:
        UsageError: no reference; the message says how one looks.
    """
    if not text or "\0" in text:
        raise UsageError("an empty reference; want for example oci:DIR:TAG, docker-archive:FILE or a path")
    transport, colon, rest = text.partition(":")
    if colon and transport in _FOREIGN:
        raise UsageError(f"{text}: the transport {transport!r} is not known here; use one of {_listing()}")
    if not colon or transport not in TRANSPORTS:
        return Reference("path", text)
    rest, digest = _split_digest(rest, text)
    if transport == "store":
        if not rest and digest is None:
            raise UsageError(f"{text}: want store:NAME; `layerkit store ls` lists the names")
        return Reference("store", "", rest, digest)
    if transport == "docker-daemon":
        if not rest and digest is None:
            raise UsageError(f"{text}: want docker-daemon:NAME[:TAG]")
        return Reference(transport, "", rest, digest)
    if transport == "docker":
        if not rest.startswith("//") or not rest[2:]:
            raise UsageError(f"{text}: want docker://HOST/NAME[:TAG|@DIGEST]")
        path, name = rest[2:], ""
        if ":" in path.rpartition("/")[2]:
            path, _, name = path.rpartition(":")
        return Reference(transport, path, name, digest)
    path, colon, name = rest.partition(":")
    if not path:
        raise UsageError(f"{text}: want {transport}:{'DIR' if transport == 'oci' else 'FILE'}[:NAME]")
    if colon and not name:
        raise UsageError(f"{text}: nothing after the last ':'; leave it out, or name an image")
    if name and digest is not None:
        raise UsageError(f"{text}: both a name and a digest; give one of them")
    if digest is not None and transport == "docker-archive":
        raise UsageError(
            f"{text}: a docker archive has no digests to choose by; use a name, or :@N for its image N"
        )
    return Reference(transport, path, name, digest)


def _split_digest(text: str, whole: str) -> tuple[str, Digest | None]:
    match = _DIGEST.search(text)
    if match is None:
        return text, None
    try:
        return text[: match.start()], Digest.parse(match[1])
    except InvalidImage as error:
        raise UsageError(f"{whole}: {error}") from None


def _listing() -> str:
    return ", ".join(f"{name}:" for name in TRANSPORTS) + " or a path"


def open_source(
    ref: Reference | str,
    *,
    limits: Limits = DEFAULT,
    tmp: TmpDir = None,
    stdin: BinaryIO | None = None,
    registry: RegistryOptions | None = None,
) -> ImageSource:
    """Open the place that ``ref`` names for reading; the image is chosen and read by ``.image()``.

    Args:
        ref: a reference or its text.
        limits: bounds on what is read.
        tmp: folder for spools (standard input, compressed archives), default the system's.
        stdin: what ``-`` reads, default standard input.
        registry: for ``docker://``; None takes the options of the environment.

    Raises:
        NotFound: nothing is there.
        RegistryError: a registry fails or refuses.
        InvalidImage: it is no image, or a malformed one.
        DaemonError: no docker daemon answers.
        UsageError: a transport that is not for reading here.
    """
    ref = parse(ref) if isinstance(ref, str) else ref
    if ref.transport == "docker-daemon":
        from layerkit.images.docker import daemon as docker_daemon

        return docker_daemon.open_source(str(ref), ref.name, ref.digest, limits=limits, tmp=tmp)
    if ref.transport == "docker":
        from layerkit.images import registry as registries

        return registries.open_source(ref.path, ref.name, ref.digest, options=registry, limits=limits)
    if ref.transport not in (*FILE_TRANSPORTS, "path"):
        raise _not_here(ref)
    ref = with_choice(ref)
    if ref.transport == "oci" or (ref.transport == "path" and os.path.isdir(ref.path)):
        from layerkit.images.oci.layout import open_layout

        if ref.path == "-":
            raise UsageError(f"{ref}: a folder cannot come on standard input; use oci-archive:-")
        return open_layout(ref.path, ref.name, ref.digest, limits=limits)
    return _in_archive(_open_file(ref.path, limits, tmp, stdin), ref, limits, tmp)


def _in_archive(file: BinaryIO, ref: Reference, limits: Limits, tmp: TmpDir) -> ImageSource:
    from layerkit.images.docker import archive as docker_archive
    from layerkit.images.oci import archive as oci_archive
    from layerkit.images.oci.outer_tar import OuterTar

    where = "standard input" if ref.path == "-" else ref.path or str(ref)
    archive = OuterTar(file, where, limits=limits, tmp=tmp)
    if ref.transport == "docker-archive":
        return docker_archive.DockerArchiveSource(archive, ref.name, limits=limits)
    if ref.transport == "oci-archive" or oci_archive.is_oci(archive):
        return oci_archive.source_in(archive, ref.name, ref.digest, limits=limits)
    if docker_archive.is_docker(archive):
        return docker_archive.DockerArchiveSource(archive, ref.name, limits=limits)
    archive.close()
    raise InvalidImage(
        f"{where}: a tar, but no image: it has neither 'oci-layout' and 'index.json' nor 'manifest.json'; "
        "a plain root filesystem is not an image"
    )


def with_choice(ref: Reference) -> Reference:
    """Return a bare path with the tag or digest after it taken off, where only that makes it exist."""
    if ref.transport != "path" or ref.path == "-" or os.path.lexists(ref.path):
        return ref
    path, digest = _split_digest(ref.path, ref.path)
    if digest is not None:
        return Reference("path", path, "", digest)
    at = ref.path.find(":")
    while at > 0:
        if os.path.lexists(ref.path[:at]):
            return Reference("path", ref.path[:at], ref.path[at + 1 :])
        at = ref.path.find(":", at + 1)
    return ref


def _open_file(path: str, limits: Limits, tmp: TmpDir, stdin: BinaryIO | None) -> BinaryIO:
    from layerkit.images.blobs import spool

    if path == "-":
        stream = stdin if stdin is not None else sys.stdin.buffer
        if stream.isatty():
            raise UsageError("-: standard input is a terminal; pipe an archive into it")
        pieces = iter(lambda: stream.read(1 << 20), b"")
        return spool(pieces, tmp, limits.layer_tar_bytes, "standard input")
    try:
        file = open(path, "rb", buffering=0)  # noqa: PTH123, SIM115
    except FileNotFoundError:
        raise NotFound(f"{path}: no such file or folder; a reference is one of {_listing()}") from None
    except IsADirectoryError:
        raise InvalidImage(f"{path}: a folder, not an archive; try oci:{path}") from None
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise InvalidImage(f"{path}: a socket or device, not an archive") from None
        raise
    if file.seekable():
        return file
    with file:  # a named pipe, or /dev/fd/N of a shell's <(...)
        return spool(iter(lambda: file.read(1 << 20), b""), tmp, limits.layer_tar_bytes, path)


def open_sink(
    ref: Reference | str,
    *,
    limits: Limits = DEFAULT,
    tmp: TmpDir = None,
    stdout: BinaryIO | None = None,
    registry: RegistryOptions | None = None,
    near: ImageSource | None = None,
) -> ImageSink:
    """Open the place that ``ref`` names for writing; give its ``name`` to ``put_manifest``.

    A bare path is an OCI archive where it is a file or ends in ``.tar``, else a layout folder; ``-`` an OCI
    archive on standard output.

    Args:
        ref: a reference or its text.
        limits: bounds on what is read of a layout that is there already.
        tmp: folder where an archive for standard output is kept until it is whole, default the system's.
        stdout: what ``-`` writes, default standard output.
        registry: for ``docker://``; None takes the options of the environment.
        near: where blobs will come from: one registry moves them between its repositories by itself.

    Raises:
        NotFound: the folder it is to lie in is absent.
        DaemonError: no docker daemon answers.
        UsageError: a transport that is not for writing here, or a target of another kind.
    """
    ref = parse(ref) if isinstance(ref, str) else ref
    if ref.transport == "docker":
        from layerkit.images import registry as registries

        return registries.open_sink(ref.path, ref.name, ref.digest, options=registry, near=near, limits=limits)
    if ref.transport not in (*FILE_TRANSPORTS, "docker-daemon", "path"):
        raise _not_here(ref)
    if ref.digest is not None:
        raise UsageError(f"{ref}: the digest of what is written cannot be chosen; name it by a tag")
    if ref.transport == "docker-daemon":
        from layerkit.images.docker.daemon import DaemonSink

        return DaemonSink(str(ref), ref.name, limits=limits)
    folder = ref.transport == "oci"
    if ref.transport == "path" and ref.path != "-":
        folder = os.path.isdir(ref.path) or not (os.path.exists(ref.path) or ref.path.endswith(".tar"))
    if folder:
        from layerkit.images.oci.layout_sink import LayoutSink

        if ref.path == "-":
            raise UsageError(f"{ref}: a folder cannot go to standard output; use oci-archive:-")
        return LayoutSink(ref.path, limits=limits)
    from layerkit.images.oci.archive_sink import ArchiveSink

    target: str | BinaryIO = ref.path
    if ref.path == "-":
        target = stdout if stdout is not None else sys.stdout.buffer
        if target.isatty():
            raise UsageError("-: standard output is a terminal; redirect it to a file or a pipe")
    return ArchiveSink(target, docker=ref.transport == "docker-archive", limits=limits, tmp=tmp)


def _not_here(ref: Reference) -> UsageError:
    return UsageError(f"{ref}: {ref.transport}: is not a file, folder, daemon or registry; use one of {_listing()}")


__all__ = ["TRANSPORTS", "Reference", "open_sink", "open_source", "parse", "with_choice"]
