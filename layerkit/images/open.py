"""Opening the source or sink that a reference stands for. What serves another kind of place is not imported."""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING, BinaryIO

from layerkit.images.reference import FILE_TRANSPORTS, Reference, known_transports, parse, with_choice
from layerkit.model.errors import InvalidImage, NotFound, UsageError
from layerkit.model.limits import DEFAULT, Limits

if TYPE_CHECKING:
    from layerkit.images.registry.options import RegistryOptions
    from layerkit.model.ports import ImageSink, ImageSource

TmpDir = str | os.PathLike[str] | None


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
        from layerkit.images.registry.client import RegistryClient
        from layerkit.images.registry.names import RegistryRef
        from layerkit.images.registry.source import RegistrySource

        where = RegistryRef.of(ref.path, ref.name if ref.name or ref.digest else "latest", ref.digest)
        return RegistrySource(RegistryClient(registry, limits=limits).repository(where), where, owned=True)
    if ref.transport not in (*FILE_TRANSPORTS, "path"):
        raise _not_here(ref)
    ref = with_choice(ref)
    if ref.transport == "oci" or (ref.transport == "path" and os.path.isdir(ref.path)):
        from layerkit.images.oci.source import LayoutSource

        if ref.path == "-":
            raise UsageError(f"{ref}: a folder cannot come on standard input; use oci-archive:-")
        return LayoutSource.in_folder(ref.path, ref.name, ref.digest, limits)
    return _in_archive(_open_file(ref.path, limits, tmp, stdin), ref, limits, tmp)


def _in_archive(file: BinaryIO, ref: Reference, limits: Limits, tmp: TmpDir) -> ImageSource:
    from layerkit.images.docker.archive import DockerArchiveSource, is_docker
    from layerkit.images.oci.outer_tar import OuterTar
    from layerkit.images.oci.source import LayoutSource, is_oci

    where = "standard input" if ref.path == "-" else ref.path or str(ref)
    archive = OuterTar(file, where, limits=limits, tmp=tmp)
    if ref.transport == "oci-archive" or (ref.transport == "path" and is_oci(archive)):
        return LayoutSource.in_tar(archive, ref.name, ref.digest, limits)
    if ref.transport == "docker-archive" or is_docker(archive):
        return DockerArchiveSource(archive, ref.name, limits=limits)
    archive.close()
    raise InvalidImage(
        f"{where}: a tar, but no image: it has neither 'oci-layout' and 'index.json' nor 'manifest.json'; "
        "a plain root filesystem is not an image"
    )


def _open_file(path: str, limits: Limits, tmp: TmpDir, stdin: BinaryIO | None) -> BinaryIO:
    from layerkit.images.oci.blobs import spool

    if path == "-":
        stream = stdin if stdin is not None else sys.stdin.buffer
        if stream.isatty():
            raise UsageError("standard input is a terminal; pipe an archive into it")
        pieces = iter(lambda: stream.read(1 << 20), b"")
        return spool(pieces, tmp, limits.layer_tar_bytes, "standard input")
    try:
        file = open(path, "rb", buffering=0)  # noqa: PTH123, SIM115
    except FileNotFoundError:
        raise NotFound(f"{path}: no such file or folder; a reference is one of {known_transports()}") from None
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
    registry: RegistryOptions | None = None,
    near: ImageSource | None = None,
    stdout: BinaryIO | None = None,
) -> ImageSink:
    """Open the place that ``ref`` names for writing; give its ``name`` to ``put_manifest``.

    A bare path is an OCI archive where it is a file or ends in ``.tar``, else a layout folder; ``-`` an OCI
    archive on standard output.

    Args:
        ref: a reference or its text.
        limits: bounds on what is read of a layout that is there already.
        registry: for ``docker://``; None takes the options of the environment.
        near: where blobs will come from.
        stdout: what ``-`` writes, default standard output.

    Raises:
        NotFound: the folder it is to lie in is absent.
        DaemonError: no docker daemon answers.
        UsageError: a transport that is not for writing here, or a target of another kind.
    """
    ref = parse(ref) if isinstance(ref, str) else ref
    if ref.transport == "docker":
        from layerkit.images.registry.client import RegistryClient
        from layerkit.images.registry.names import RegistryRef
        from layerkit.images.registry.sink import RegistrySink

        to = RegistryRef.of(ref.path, ref.name, ref.digest)
        # One registry moves blobs between its repositories by itself.
        neighbours = [near.repository_at(to.host)] if near else ()
        repository = RegistryClient(registry, limits=limits).repository(to)
        return RegistrySink(repository, to, mount_from=neighbours, owned=True)
    if ref.transport not in (*FILE_TRANSPORTS, "docker-daemon", "path"):
        raise _not_here(ref)
    if ref.digest is not None:
        raise UsageError(f"{ref}: the digest of a result cannot be chosen; give a tag instead")
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
    return ArchiveSink(target, docker=ref.transport == "docker-archive", limits=limits)


def _not_here(ref: Reference) -> UsageError:
    return UsageError(
        f"{ref}: {ref.transport}: is not a file, folder, daemon or registry; use one of {known_transports()}"
    )
