"""What registries answer, in words: errors, warnings, and no secret in either."""

from __future__ import annotations

import logging
import re
import ssl

import httpx2

from layerkit.formats.strict_json import load_object
from layerkit.model.errors import LayerkitError, RegistryError, show_path

_TEMPORARY = frozenset((408, 429, 500, 502, 503, 504))
_NOT_SEEN_YET = "MANIFEST_BLOB_UNKNOWN"
"""A manifest is sent when its blobs are there. One that others send too is gone for a moment in some registries:
docker-registry empties the file that leads to a blob before it writes the same into it again."""
_ERROR_BYTES = 64 << 10
_ERROR_CHARS = 300
_SHORTEST_SECRET = 3
_MAX_WARNINGS = 100
# distribution-spec 1.1, "Warnings": code 299, the agent "-", and a quoted text.
_WARNING = re.compile(r'299 - "((?:[^"\\]|\\.)*)"')

_log = logging.getLogger("layerkit.registry")


class Words:
    """Puts what happened into words; knows every secret that was used, and shows none."""

    def __init__(self) -> None:
        """No secret is known yet."""
        self._secrets: set[str] = set()
        self._warned: set[str] = set()

    def keep_secret(self, text: str) -> None:
        """Never show ``text``."""
        if len(text) >= _SHORTEST_SECRET:
            self._secrets.add(text)

    def redact(self, text: str) -> str:
        """Return ``text`` without any secret that this transport has used."""
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        return text

    def show(self, url: str) -> str:
        """Return a URL for messages: without its query, which may be signed, and without secrets."""
        bare = url.partition("?")[0].partition("#")[0]
        scheme, slashes, rest = bare.partition("://")
        host, slash, path = rest.partition("/")
        return show_path(self.redact(scheme + slashes + host.rpartition("@")[2] + slash + path))[:_ERROR_CHARS]

    def error(self, response: httpx2.Response, what: str) -> RegistryError:
        """Return the error that an answer is; its body is read and it is closed."""
        status = response.status_code
        try:
            errors = _errors(read_body(response, _ERROR_BYTES, what))
        except (httpx2.TransportError, LayerkitError):
            errors = []
        said = show_path(self.redact("; ".join(errors[:5])))[:_ERROR_CHARS]
        message = {
            401: "the registry wants other credentials; log in with `skopeo login`, or give --authfile",
            403: "the registry denies this to the credentials in use",
            404: "the registry has no such thing",
            413: "the registry takes no blob of this size",
            429: "the registry is asked too often; wait, or log in, as accounts often have higher limits",
        }.get(status, "the registry failed" if status >= 500 else "the registry refused")
        temporary = status in _TEMPORARY or any(each.startswith(_NOT_SEEN_YET) for each in errors)
        return RegistryError(what, status, message + (f": {said}" if said else ""), temporary=temporary)

    def warnings(self, response: httpx2.Response, host: str) -> None:
        """Log what a registry warns of, each text once."""
        for value in response.headers.get_list("warning")[:_MAX_WARNINGS]:
            for match in _WARNING.finditer(value[:8192]):
                text = show_path(self.redact(re.sub(r"\\(.)", r"\1", match[1])))[:_ERROR_CHARS]
                if text not in self._warned and len(self._warned) < _MAX_WARNINGS:
                    self._warned.add(text)
                    _log.warning("%s warns: %s", host, text)

    def fault(self, error: httpx2.TransportError, what: str, url: str) -> RegistryError:
        """Return the error for a connection that failed; ``url`` or host is where to."""
        where = self.show(url)
        bad_cert = cause_of(error, ssl.SSLCertVerificationError)
        if isinstance(bad_cert, ssl.SSLCertVerificationError):
            hint = "put its CA into certs.d (or --cert-dir), or use --tls-verify=false if you trust the network"
            return RegistryError(what, 0, f"{where}: its certificate: {bad_cert.verify_message}; {hint}")
        if cause_of(error, ssl.SSLError) is not None and isinstance(error, httpx2.ConnectError):
            hint = "if it serves plain HTTP, use --tls-verify=false"
            return RegistryError(what, 0, f"{where}: no TLS connection ({_reason(error)}); {hint}")
        if isinstance(error, httpx2.UnsupportedProtocol):
            return RegistryError(what, 0, f"{where}: neither http nor https")
        kinds: dict[type[httpx2.TransportError], str] = {
            httpx2.ConnectTimeout: "no connection in time",
            httpx2.ReadTimeout: "silent for too long",
            httpx2.WriteTimeout: "takes no data any more",
        }
        reason = kinds.get(type(error)) or self.redact(_reason(error))
        return RegistryError(what, 0, f"{where}: {reason}", temporary=True)


def read_body(response: httpx2.Response, most: int, what: str) -> bytes:
    """Return a whole body and close the response.

    Raises:
        RegistryError: there are more than ``most`` bytes.
    """
    out = bytearray()
    try:
        for piece in response.iter_raw(1 << 16):
            out += piece
            if len(out) > most:
                raise RegistryError(what, response.status_code, f"sent more than {most} bytes")
    finally:
        response.close()
    return bytes(out)


def _errors(data: bytes) -> list[str]:
    """Return the codes and messages in an error body (distribution-spec, "Error codes")."""
    errors = load_object(data, "error").get("errors")
    return [
        ": ".join(str(each[name]) for name in ("code", "message") if each.get(name))
        for each in (errors if isinstance(errors, list) else ())
        if isinstance(each, dict)
    ]


def cause_of(error: BaseException, kind: type[BaseException]) -> BaseException | None:
    """Return the first error of ``kind`` that ``error`` was raised from."""
    seen: BaseException | None = error
    for _ in range(20):
        if seen is None or isinstance(seen, kind):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def _reason(error: BaseException) -> str:
    return show_path(str(error) or type(error).__name__)[:_ERROR_CHARS]


__all__ = ["Words", "cause_of", "read_body"]
