"""Answers to what a registry asks for: Basic, and Bearer tokens with their scopes and expiry.

docker's token authentication (distribution, docs/spec/auth/token.md and oauth.md). The state machine knows
no HTTP: it is given a function that posts or gets, so that one transport does all the talking.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from urllib.parse import urlsplit

from layerkit.formats.strict_json import JsonObject
from layerkit.images.registry.credentials import Credentials
from layerkit.model.errors import RegistryError

_WORD = re.compile(r'"([^"]*)"|([^\s,"=]+)|([=,])')
_HEADER_CHARS = 8192
_DEFAULT_LIFE_SECONDS = 60
_LONGEST_LIFE_SECONDS = 3600
_LEEWAY_SECONDS = 10
_TOKEN_CHARS = 64 << 10
_CLIENT_ID = "layerkit"


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge of a ``WWW-Authenticate`` header (RFC 9110, 11.6.1); ``scheme`` in lower case."""

    scheme: str
    parameters: Mapping[str, str]


def parse_challenges(values: list[str]) -> list[Challenge]:
    """Return the challenges in the values of ``WWW-Authenticate`` headers; what is malformed is left out."""
    found: list[Challenge] = []
    for value in values:
        words = [m.groups() for m in _WORD.finditer(value[:_HEADER_CHARS])]
        parameters: dict[str, str] = {}
        at = 0
        while at < len(words):
            _, word, _ = words[at]
            follows = words[at + 1][2] if at + 1 < len(words) else ""
            if word is None:
                at += 1
            elif follows == "=" and at + 2 < len(words):
                quoted, plain, _ = words[at + 2]
                if found:
                    parameters[word.lower()] = quoted if quoted is not None else plain or ""
                at += 3
            else:
                parameters = {}
                found.append(Challenge(word.lower(), parameters))
                at += 1
    return found


def scope(repository: str, *actions: str) -> str:
    """Return the scope for ``actions`` on a repository."""
    return f"repository:{repository}:{','.join(actions)}"


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What to ask a token server.

    Attributes:
        url: of the server.
        fields: of the query, or of the form where ``post``; pairs, since scopes repeat.
        authorization: value of the header, "" for none.
        post: OAuth2 with a refresh token, instead of a plain GET.
    """

    url: str
    fields: tuple[tuple[str, str], ...] = field(repr=False)
    authorization: str = field(repr=False)
    post: bool = False


@dataclass(slots=True)
class _Token:
    value: str = field(repr=False)
    expires: float


AskToken = Callable[[TokenRequest], JsonObject]
"""Sends a request to a token server and returns its answer; raises RegistryError."""


class Authenticator:
    """What one registry was found to want, and the tokens that it has given; used from several threads."""

    def __init__(
        self, host: str, credentials: Callable[[], Credentials | None], ask: AskToken, *, secure: bool = True,
        on_secret: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """Answer for ``host``.

        Args:
            host: in messages.
            credentials: looks them up; called once.
            ask: sends a request to a token server.
            secure: whether the connection is encrypted; if so the token server's must be as well.
            on_secret: told every text that must not be shown.
        """
        self._host, self._find, self._ask, self._secure = host, credentials, ask, secure
        self._on_secret, self._lock = on_secret, threading.Lock()
        self._looked, self._found = False, None  # type: tuple[bool, Credentials | None]
        self._challenge: Challenge | None = None
        self._tokens: dict[frozenset[str], _Token] = {}

    def header(self, scopes: frozenset[str]) -> str:
        """Return the ``Authorization`` to send without having been asked, "" for none."""
        with self._lock:
            if self._challenge is None:
                return ""
            if self._challenge.scheme == "basic":
                held = self._credentials()
                return held.basic if held else ""
            token = self._tokens.get(scopes)
            if token is None or token.expires <= monotonic():
                return f"Bearer {self._new_token(scopes).value}"
            return f"Bearer {token.value}"

    def answer(self, challenges: list[Challenge], scopes: frozenset[str], sent: str) -> str:
        """Return the ``Authorization`` that answers a 401, "" if there is no better one than was ``sent``.

        Raises:
            RegistryError: no credentials for Basic, or the token server refuses.
        """
        with self._lock:
            for challenge in challenges:
                if challenge.scheme == "bearer" and "realm" in challenge.parameters:
                    self._challenge = challenge
                    held = self._tokens.get(scopes)
                    if held is not None and f"Bearer {held.value}" != sent and held.expires > monotonic():
                        return f"Bearer {held.value}"  # another thread has it already
                    return f"Bearer {self._new_token(scopes).value}"
            for challenge in challenges:
                if challenge.scheme == "basic":
                    self._challenge = challenge
                    credentials = self._credentials()
                    if credentials is None or not credentials.username:
                        raise RegistryError(
                            self._host, 401, "wants a login and there are no credentials for it; log in with "
                            f"`skopeo login {self._host}`, or give --authfile",
                        )  # fmt: skip
                    return "" if credentials.basic == sent else credentials.basic
        return ""

    def _credentials(self) -> Credentials | None:
        if not self._looked:
            self._found, self._looked = self._find(), True
            for text in self._found.secrets if self._found else ():
                self._on_secret(text)
        return self._found

    def _new_token(self, scopes: frozenset[str]) -> _Token:
        assert self._challenge is not None
        credentials = self._credentials()
        if credentials is not None and credentials.registry_token:
            return _Token(credentials.registry_token, float("inf"))
        said = self._challenge.parameters
        realm = said["realm"]
        self._check_realm(realm)
        wanted = scopes or frozenset(said.get("scope", "").split())
        fields = [("service", said["service"])] if "service" in said else []
        if credentials is not None and credentials.identity_token:
            fields += [("grant_type", "refresh_token"), ("refresh_token", credentials.identity_token)]
            fields += [("client_id", _CLIENT_ID), ("scope", " ".join(sorted(wanted)))]
            answer = self._ask(TokenRequest(realm, tuple(fields), "", post=True))
        else:
            fields += [("scope", text) for text in sorted(wanted)]
            if credentials is not None:
                fields.append(("account", credentials.username))
            answer = self._ask(TokenRequest(realm, tuple(fields), credentials.basic if credentials else ""))
        token = self._token(answer)
        self._tokens[scopes] = token
        return token

    def _check_realm(self, realm: str) -> None:
        try:
            parts = urlsplit(realm)
            good = parts.scheme in ("https", "http") and bool(parts.hostname) and not parts.username
        except ValueError:
            good = False
        if not good:
            raise RegistryError(self._host, 401, "names a token server without an https URL; nothing was sent")
        if self._secure and parts.scheme != "https":
            raise RegistryError(
                self._host, 401, f"names a token server without encryption ({parts.hostname}); nothing was sent"
            )

    def _token(self, answer: JsonObject) -> _Token:
        value = answer.get("token") or answer.get("access_token")
        if not isinstance(value, str) or not value or len(value) > _TOKEN_CHARS or not _printable(value):
            raise RegistryError(self._host, 401, "its token server gave no token; check the registry's settings")
        self._on_secret(value)
        life = answer.get("expires_in")
        seconds = min(life if type(life) is int and life > 0 else _DEFAULT_LIFE_SECONDS, _LONGEST_LIFE_SECONDS)
        return _Token(value, monotonic() + max(seconds - _LEEWAY_SECONDS, seconds / 2))


def _printable(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text
