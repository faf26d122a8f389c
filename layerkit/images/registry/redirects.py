"""Addresses that a registry sends: which of them are followed, and where secrets may go along."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urljoin, urlsplit

from layerkit.images.registry.names import is_private
from layerkit.model.errors import RegistryError, show_path

REDIRECTS = frozenset((301, 302, 303, 307, 308))
_DEFAULT_PORTS = {"https": 443, "http": 80}


def origin(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port: only where all are equal may credentials go."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)


def next_url(current: str, location: str, registry: str, what: str, status: int) -> str:
    """Return where ``location`` leads from ``current``, checked.

    Content is verified by digest whoever sends it; what must not happen is that secrets are sent in the
    clear, or that a stranger's registry makes this host talk to services of its own network.

    Args:
        current: the URL that was asked.
        location: the header's value.
        registry: host of the registry that the user named.
        what: names the request in errors.
        status: of the answer.

    Raises:
        RegistryError: no address, another scheme, without encryption after a request with it, or from a
            public registry to an address of this host or a private network.
    """

    def refuse(why: str) -> RegistryError:
        shown = show_path(location.partition("?")[0])[:200]
        return RegistryError(what, status, f"sends to {shown!r}, {why}; refused")

    try:
        given = urlsplit(location)
        if given.scheme and not given.hostname:
            raise refuse("which names no host")
        url = urljoin(current, location)
        parts, (_, host, _port) = urlsplit(url), origin(url)
    except ValueError:
        raise refuse("which is no address") from None
    if not location or not host or parts.scheme not in ("https", "http"):
        raise refuse("which is no address of http or https")
    if parts.username is not None or parts.password is not None:
        raise refuse("which holds a user name")
    here = urlsplit(current)
    if here.scheme == "https" and parts.scheme == "http":
        if host != (here.hostname or "").lower():
            raise refuse("which is not encrypted")
        # A registry behind a proxy that ends TLS takes its own address for http.
        return parts._replace(scheme="https", netloc=here.netloc).geturl()
    if host != (here.hostname or "").lower() and not is_private(registry) and _leads_inside(host):
        raise refuse("which is on this host or a private network")
    return url


def _leads_inside(host: str) -> bool:
    if is_private(host):
        return True
    try:
        found = socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)
    except (OSError, UnicodeError):
        return False  # behind a proxy names need not resolve here; the connection says what is wrong
    return any(not ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_global for entry in found)


__all__ = ["REDIRECTS", "next_url", "origin"]
