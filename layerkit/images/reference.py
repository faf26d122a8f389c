"""References to images, as skopeo and podman spell them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from layerkit.model.digest import Digest
from layerkit.model.errors import InvalidImage, UsageError

FILE_TRANSPORTS = ("oci", "oci-archive", "docker-archive")
TRANSPORTS = (*FILE_TRANSPORTS, "docker-daemon", "docker", "store")
# Names that skopeo gives a meaning; taken for files they would end in a puzzling "no such file".
_FOREIGN = ("containers-storage", "dir", "docker-image", "ostree", "sif", "tarball", "oci-dir", "docker-dir")
# Those with names alone, without a path: how one looks.
_NAMED = {"store": "store:NAME; `layerkit store ls` lists the names", "docker-daemon": "docker-daemon:NAME[:TAG]"}
_DIGEST = re.compile(r"@(sha(?:256|512):[0-9a-fA-F]*)$")


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
        if self.transport in _NAMED:
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
        raise UsageError(f"{text}: the transport {transport!r} is not known here; use one of {known_transports()}")
    if not colon or transport not in TRANSPORTS:
        return Reference("path", text)
    rest, digest = _split_digest(rest, text)
    if transport in _NAMED:
        if not rest and digest is None:
            raise UsageError(f"{text}: want {_NAMED[transport]}")
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


def known_transports() -> str:
    """Return what a reference may begin with, for messages."""
    return ", ".join(f"{name}:" for name in TRANSPORTS) + " or a path"


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
