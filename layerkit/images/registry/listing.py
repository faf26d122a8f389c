"""Lists that come in pages: tags, catalog, referrers (distribution-spec, "Listing Tags")."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from layerkit.formats.strict_json import JsonObject, load_object
from layerkit.images.registry.hosts import base_url
from layerkit.images.registry.redirects import next_url, origin
from layerkit.images.registry.transport import Ask, Transport
from layerkit.images.registry.words import read_body
from layerkit.model.errors import NotFound, RegistryError
from layerkit.model.limits import Limits

_NEXT = re.compile(
    r'<([^>]*)>\s*(?:;\s*[A-Za-z]+\s*=\s*(?:"[^"]*"|[^;,"]*)\s*)*?;\s*rel\s*=\s*"?next"?', re.IGNORECASE
)
_MAX_PAGES = 10_000


class NoSuchList(NotFound):
    """The registry does not offer the list."""


def pages(transport: Transport, ask: Ask, limits: Limits) -> Iterator[JsonObject]:
    """Yield the documents of a list, page by page.

    Args:
        transport: of the client.
        ask: for the first page; statuses in ``ok`` that are not 200 mean that there is no list.
        limits: bounds on a page.

    Raises:
        NoSuchList: the registry does not have it.
        RegistryError: a page that leads away from the registry, or in a circle.
    """
    seen: set[str] = set()
    for _ in range(_MAX_PAGES):
        response = transport.send(ask)
        if response.status_code != 200:
            response.close()
            raise NoSuchList(f"{ask.what}: the registry has no such list")
        here, link = str(response.url), response.headers.get("link", "")
        data = read_body(response, limits.manifest_bytes, ask.what)
        transport.traffic.add(bytes_read=len(data))
        yield load_object(data, ask.what, limits)
        match = _NEXT.search(link[:8192])
        if match is None:
            return
        url = next_url(here, match[1], ask.endpoint.host, ask.what, 200)
        if origin(url) != origin(base_url(ask.endpoint, transport.scheme(ask.endpoint))):
            raise RegistryError(
                ask.what, 200, f"its next page is on another host ({transport.words.show(url)}); refused"
            )
        if url in seen:
            raise RegistryError(ask.what, 200, "its pages go in a circle")
        seen.add(url)
        ask = replace(ask, url=url, params=())
    raise RegistryError(ask.what, 200, f"more than {_MAX_PAGES} pages")


def texts(value: object) -> Iterator[str]:
    """Yield the texts in a list that a registry has sent, whatever else is in it."""
    return (text for text in value if isinstance(text, str)) if isinstance(value, list) else iter(())


__all__ = ["NoSuchList", "pages", "texts"]
