"""Credentials for registries: containers-auth.json(5) and docker's config.json with its helpers.

What is secret is never part of a ``repr``, a message or a log.
"""

from __future__ import annotations

import base64
import binascii
import os
from dataclasses import dataclass, field
from pathlib import Path

from layerkit.formats.strict_json import JsonObject, load_object
from layerkit.images.registry.names import DOCKER_HUB
from layerkit.model.errors import InvalidImage, RegistryError, UsageError

_FILE_BYTES = 4 << 20
_DOCKER_HUB_KEYS = (
    DOCKER_HUB, "https://index.docker.io/v1/", "index.docker.io", "https://index.docker.io/v2/",
    "registry-1.docker.io",
)  # fmt: skip
_TOKEN_USER = "<token>"


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who to be at a registry; either a name and password, or a token.

    Attributes:
        username: "" where there is only a token.
        password: of the user.
        identity_token: exchanged for access tokens at the token server (OAuth2 refresh token).
        registry_token: sent to the registry as it is.
    """

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        """Return the value of an ``Authorization`` header of the Basic scheme (RFC 7617)."""
        pair = f"{self.username}:{self.password}".encode()
        return "Basic " + base64.b64encode(pair).decode("ascii")

    @property
    def secrets(self) -> tuple[str, ...]:
        """Return every text that must not be shown."""
        texts = (self.password, self.identity_token, self.registry_token, self.basic.removeprefix("Basic "))
        return tuple(text for text in texts if text)


def find(host: str, repository: str, *, authfile: Path | None = None) -> Credentials | None:
    """Return the credentials for a repository, None to be anonymous.

    Args:
        host: as :class:`~layerkit.images.registry.names.RegistryRef` has it.
        repository: in it; entries for a longer prefix of HOST/REPOSITORY win.
        authfile: the only file to look at; None looks in those of podman, then docker's.

    Raises:
        UsageError: ``authfile`` is not there or not readable, or a file is malformed.
        RegistryError: a credential helper failed.
    """
    for path in [authfile] if authfile is not None else _places():
        try:
            if path.stat().st_size > _FILE_BYTES:
                raise UsageError(f"{path}: too large for a file of credentials")
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            if authfile is not None:
                raise UsageError(f"{path}: {error.strerror}; --authfile names the file of podman login") from None
            continue
        if not data.strip():
            continue
        try:
            found = _in_file(load_object(data, str(path)), host, repository, str(path))
        except InvalidImage as error:
            raise UsageError(str(error)) from None
        if found is not None:
            return found
    return None


def _places() -> list[Path]:
    home = Path.home()
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    first = Path(runtime) if runtime else Path(f"/run/user/{os.getuid()}")
    docker = os.environ.get("DOCKER_CONFIG")
    return [
        first / "containers/auth.json",
        Path(f"/run/containers/{os.getuid()}/auth.json"),
        Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "containers/auth.json",
        (Path(docker) if docker else home / ".docker") / "config.json",
    ]


def _in_file(document: JsonObject, host: str, repository: str, where: str) -> Credentials | None:
    helpers, auths = document.get("credHelpers"), document.get("auths")
    hosts = _DOCKER_HUB_KEYS if host == DOCKER_HUB else (host,)
    if isinstance(helpers, dict):
        for key in hosts:
            if isinstance(helpers.get(key), str):
                return _ask_helper(str(helpers[key]), key)
    if isinstance(auths, dict):
        # The longest prefix wins: HOST/a/b/c, HOST/a/b, HOST/a, HOST, and docker's URLs of it.
        parts = repository.split("/")
        keys = [f"{host}/{'/'.join(parts[:n])}" for n in range(len(parts), 0, -1)]
        for each in hosts:
            keys += [each, f"https://{each}", f"https://{each}/", f"https://{each}/v1/", f"https://{each}/v2/"]
        for key in keys:
            entry = auths.get(key)
            if isinstance(entry, dict):
                found = _entry(entry, f"{where}: auths[{key!r}]")
                if found is not None:
                    return found
    default = document.get("credsStore")
    if isinstance(default, str) and default:
        for key in hosts:
            found = _ask_helper(default, key)
            if found is not None:
                return found
    return None


def _entry(entry: JsonObject, where: str) -> Credentials | None:
    def text(name: str) -> str:
        value = entry.get(name)
        return value if isinstance(value, str) else ""

    user, password = text("username"), text("password")
    if text("auth"):
        try:
            user, colon, password = base64.b64decode(text("auth"), validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            colon = ""
        if not colon:
            raise UsageError(f"{where}: auth is not the base64 of USER:PASSWORD; log in again")
        password = password.rstrip("\0")  # docker once wrote it padded
    if text("identitytoken") or text("registrytoken"):
        return Credentials(user, "", text("identitytoken"), text("registrytoken"))
    return Credentials(user, password) if user else None


def _ask_helper(name: str, key: str) -> Credentials | None:
    """Return what the program ``docker-credential-NAME`` has for ``key``, by docker's own SDK."""
    from docker.auth import AuthConfig
    from docker.errors import DockerException

    try:
        # AuthConfig knows the protocol, its environment, and how a helper says that it has nothing.
        found = AuthConfig({"credsStore": name}).resolve_authconfig(key)
    except DockerException as error:
        # The SDK's message may hold what the helper printed.
        raise RegistryError(
            key,
            0,
            f"the credential helper docker-credential-{name} failed ({type(error).__name__}); run it by hand",
        ) from None
    if not found:
        return None
    if found.get("IdentityToken"):
        return Credentials(identity_token=str(found["IdentityToken"]))
    user = str(found.get("Username") or "")
    return Credentials(user, str(found.get("Password") or "")) if user and user != _TOKEN_USER else None
