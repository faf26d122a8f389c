"""The page of ``analyze --html`` in a browser, used as a person would: clicks, keys, the search."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page
from programs import run_layerkit


@pytest.fixture(scope="module")
def report(tiny_image: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The page of the tiny image, and the same facts as JSON."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    done = run_layerkit("analyze", tiny_image, "--html", path, "--json", "--top", "100000")
    return path, json.loads(done.stdout)["images"][0]


@pytest.fixture
def page(report: tuple[Path, dict[str, Any]], tmp_path: Path) -> Iterator[Page]:
    with Page(tmp_path / "profile") as browser:
        browser.open(report[0].as_uri())
        yield browser
        assert browser.errors == []
        assert browser.requests == [report[0].as_uri()], "one self-contained page, and no network"


def test_the_sums_and_bars_are_the_numbers(page: Page, report: tuple[Path, dict[str, Any]]) -> None:
    facts = report[1]
    sums = page.eval("[...document.querySelectorAll('#sums div')].map(d => d.innerText)")
    assert any(f"{facts['efficiency_percent']} %" in text for text in sums)
    widths = page.eval("[...document.querySelectorAll('.bar')].map(b => [...b.children].map(c => c.offsetWidth))")
    assert len(widths) == len(facts["layers"])
    most = max(layer["file_bytes"] for layer in facts["layers"])
    whole = page.eval("document.querySelector('.bar').clientWidth")
    for found, layer in zip(widths, facts["layers"], strict=True):
        assert abs(sum(found) - whole * layer["file_bytes"] / most) <= 6
    cells = page.eval("[...document.querySelectorAll('#layers tbody tr')].length")
    assert cells == len(facts["layers"])


def test_the_map_goes_down_and_back_by_clicks_and_by_keys(page: Page, tmp_path: Path) -> None:
    crumbs = "document.querySelectorAll('#crumbs button').length"
    assert page.eval(crumbs) == 1
    area = page.eval(
        "[...document.querySelectorAll('#map > button')].reduce((a, b) => a + b.offsetWidth * b.offsetHeight, 0)"
    )
    assert area > 0.9 * page.eval("document.querySelector('#map').clientWidth * 400")
    folder = "document.querySelector('#map button.dir')"
    name = page.eval(f"{folder}.title.split('  ')[0]")
    page.click(folder, corner=True)  # the middle belongs to what is in it
    page.wait(f"{crumbs} > 1")
    assert page.eval("document.querySelector('#crumbs').lastElementChild.innerText").startswith(
        name.rsplit("/")[-1]
    )
    assert page.eval("document.activeElement === document.querySelector('#crumbs').lastElementChild")
    page.click("document.querySelector('#crumbs button')")
    page.wait(f"{crumbs} === 1")

    page.eval(f"{folder}.focus()")
    page.press("Enter")
    page.wait(f"{crumbs} > 1")

    picture = tmp_path / "page.png"
    page.screenshot(picture)
    width, height = struct.unpack(">II", picture.read_bytes()[16:24])
    assert width == 1280 and height > 500


def test_the_search_finds_paths_and_causes(page: Page, report: tuple[Path, dict[str, Any]]) -> None:
    paths = report[1]["paths"]
    rows = "[...document.querySelectorAll('#paths tbody tr')].map(r => r.lastElementChild.innerText)"
    assert page.eval(f"{rows}.length") == len(paths)
    wanted = paths[0]["path"].rsplit("/")[-1]
    page.click("document.querySelector('#search')")
    page.type(wanted.upper())
    hits = [path["path"] for path in paths if wanted.lower() in path["path"].lower()]
    page.wait(f"{rows}.length === {len(hits)}")
    assert sorted(page.eval(rows)) == sorted(hits)
    assert page.eval("document.querySelector('#found').innerText").startswith(f"{len(hits)} paths")

    page.eval("document.querySelector('#search').value = ''")
    page.type("owner")
    page.wait(f"{rows}.length === {sum(any('owner' in cause for cause in path['causes']) for path in paths)}")
