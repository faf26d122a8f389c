"""What mounts have in the page cache as one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Mapping

from layerkit.cli.report_html import fill_page


def cache_html(body: Mapping[str, object]) -> str:
    """Return the page: no network, no other file; ``body`` is ``CacheReport.to_dict()``.

    Names in it come from images: the page's script writes them as text only (see ``report_html``).
    """
    return fill_page("cache.html", body)


__all__ = ["cache_html"]
