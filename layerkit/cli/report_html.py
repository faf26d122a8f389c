"""An analysis as one HTML page that needs nothing but itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING

from layerkit.model.errors import show_path

if TYPE_CHECKING:
    from layerkit.usecases.waste.analyze import AnalyzeReport

PATHS_SHOWN = 50_000
"""The worst paths that a page holds: more of them only make it slow to open."""


def report_html(report: AnalyzeReport) -> str:
    """Return the page: no network, no other file, the same bytes for the same report.

    Every name in it comes from an image and may be made to break out of the page. The data is JSON in a
    script element that is never run, with all that HTML could take for markup escaped (WHATWG HTML, 4.12.1.3,
    restrictions for contents of script elements), and the page's script writes names as text only.
    """
    body = report.to_dict()
    body["name"] = show_path(report.name)
    body["paths"] = [path.to_dict() for path in report.paths[:PATHS_SHOWN]]
    body["paths_left_out"] = max(0, len(report.paths) - PATHS_SHOWN)
    return fill_page("report.html", body)


def fill_page(template: str, body: Mapping[str, object]) -> str:
    """Return the page ``template`` of this package with ``body`` as its data, which cannot break out of it."""
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=True)
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    page = resources.files("layerkit.cli").joinpath(template).read_text("utf-8")
    before, _, after = page.partition("@DATA@")
    return before + text + after


__all__ = ["PATHS_SHOWN", "fill_page", "report_html"]
