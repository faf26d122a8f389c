"""Reports as HTML pages that need nothing but themselves: no network, no other file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from layerkit.model.errors import show_path

if TYPE_CHECKING:
    from layerkit.usecases.analyze import AnalyzeReport

PATHS_SHOWN = 50_000
"""The worst paths that a page holds: more of them only make it slow to open."""


def analysis(report: AnalyzeReport) -> str:
    """Return the page of an analysis, the same bytes for the same report."""
    body = report.to_dict()
    body["name"] = show_path(report.name)
    body["paths"] = [path.to_dict() for path in report.paths[:PATHS_SHOWN]]
    body["paths_left_out"] = max(0, len(report.paths) - PATHS_SHOWN)
    return page("report.html", body)


def page(template: str, body: Mapping[str, object]) -> str:
    """Return the page ``template`` of this package with ``body`` as its data, which cannot break out of it.

    Every name in it comes from an image and may be made to do so. The data is JSON in a script element that is
    never run, with all that HTML could take for markup escaped (WHATWG HTML, 4.12.1.3, restrictions for contents of
    script elements), and the page's script writes names as text only.
    """
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=True)
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    html = resources.files("layerkit.cli").joinpath(template).read_text("utf-8")
    before, _, after = html.partition("@DATA@")
    return before + text + after


def write(path: Path, text: str) -> None:
    """Write a page, so that it is there whole or not at all."""
    from layerkit.linux.durable import whole_file

    with whole_file(path) as file:
        file.write(text.encode("ascii"))
