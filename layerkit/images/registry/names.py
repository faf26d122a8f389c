"""Names in registries: host, repository, tag, digest (distribution-spec, "Pulling manifests")."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from layerkit.model.digest import Digest
from layerkit.model.errors import InvalidImage, UsageError

DOCKER_HUB = "docker.io"
_DOCKER_HUB_API = "registry-1.docker.io"
_DOCKER_HUB_ALIASES = frozenset((DOCKER_HUB, "index.docker.io", _DOCKER_HUB_API, "registry.hub.docker.com"))

_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
REPOSITORY = re.compile(rf"{_PART}(?:/{_PART})*")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_NAME_CHARS = 255


@dataclass(frozen=True, slots=True)
class RegistryRef:
    """An image in a registry.

    Attributes:
        host: as people write it, ``HOST[:PORT]``, lower case; Docker Hub is always ``docker.io``.
        repository: the name in it.
        tag: "" where none was given.
        digest: of the manifest; where both are given the digest decides.
    """

    host: str
    repository: str
    tag: str = ""
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> RegistryRef:
        """Return what ``[HOST/]NAME[:TAG][@DIGEST]`` names, as docker and podman read it.

        Raises:
            UsageError: not such a name.
        """
        name, at, digest_text = text.partition("@")
        digest = None
        if at:
            try:
                digest = Digest.parse(digest_text)
            except InvalidImage as error:
                raise UsageError(f"docker://{text}: {error}") from None
        tag = ""
        if ":" in name.rpartition("/")[2]:
            name, _, tag = name.rpartition(":")
            if not TAG.fullmatch(tag):
                raise UsageError(f"docker://{text}: tag {tag!r}: want up to 128 letters, digits, '_', '.' or '-'")
        first, slash, rest = name.partition("/")
        if slash and ("." in first or ":" in first or first.lower() == "localhost" or first != first.lower()):
            host, repository = parse_host(first, text), rest
        else:
            host, repository = DOCKER_HUB, name
        if host == DOCKER_HUB and "/" not in repository:
            repository = f"library/{repository}"
        if not REPOSITORY.fullmatch(repository) or len(host) + len(repository) >= _NAME_CHARS:
            raise UsageError(
                f"docker://{text}: repository {repository!r}: want lower-case letters, digits, and single "
                "'.', '_', '-' or '/' between them"
            )
        return cls(host, repository, tag, digest)

    @classmethod
    def of(cls, path: str, tag: str = "", digest: Digest | None = None) -> RegistryRef:
        """Return the reference of ``[HOST/]NAME`` with ``tag`` and ``digest`` apart; as :meth:`parse`."""
        return cls.parse(path + (f":{tag}" if tag else "") + (f"@{digest}" if digest else ""))

    @property
    def name(self) -> str:
        """Return ``HOST/REPOSITORY``."""
        return f"{self.host}/{self.repository}"

    def __str__(self) -> str:
        return self.name + (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")


def parse_host(text: str, where: str = "") -> str:
    """Return the registry that ``HOST[:PORT]`` names, in the one form that layerkit compares.

    Raises:
        UsageError: no host, or a port that is none.
    """
    if not _HOST.fullmatch(text):
        raise UsageError(f"docker://{where or text}: {text!r} is not a registry; want HOST or HOST:PORT")
    host = text.lower()
    port = host.rpartition(":")[2] if re.search(r":[0-9]+$", host) else ""
    if port and not 0 < int(port) < 65536:
        raise UsageError(f"docker://{where or text}: port {port} is outside 1 to 65535")
    return DOCKER_HUB if host in _DOCKER_HUB_ALIASES else host


def api_host(host: str) -> str:
    """Return the host that serves the API of the registry called ``host``."""
    return _DOCKER_HUB_API if host == DOCKER_HUB else host


def is_private(host: str) -> bool:
    """Return whether ``HOST[:PORT]`` is, by its name, on this host or a private network."""
    bare = re.sub(r":[0-9]+$", "", host).strip("[]").lower()
    try:
        return not ipaddress.ip_address(bare).is_global
    except ValueError:
        return bare == "localhost" or bare.endswith((".localhost", ".local", ".internal")) or "." not in bare


def fallback_tag(subject: Digest) -> str:
    """Return the tag that lists what refers to ``subject`` where a registry has no referrers API.

    distribution-spec 1.1, "Referrers tag schema": at most 32 characters of algorithm and 64 of digest.
    """
    return f"{subject.algorithm[:32]}-{subject.hex[:64]}"
