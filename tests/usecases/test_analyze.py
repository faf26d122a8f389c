"""Where bytes go: each file in one class, the classes adding up, and a page that hostile names cannot leave."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import browser
import pytest
from needs import need_tool
from programs import run_layerkit
from trees import file, folder

from layerkit.cli.inspect import parse_limit
from layerkit.cli.render import analysis_page as report_html
from layerkit.model.descriptor import Descriptor, Platform
from layerkit.model.digest import Digest
from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import UsageError, show_path
from layerkit.model.image import Image, Layer
from layerkit.model.index import Index
from layerkit.usecases.analyze import AnalyzeReport, PathUse, analyze, layer_history, sharing

analyze_command = functools.partial(run_layerkit, "analyze")


def stack(*layers: list[Entry]) -> list[Index]:
    """Return indexes whose files each have a place of their own."""
    out = []
    for number, entries in enumerate(layers):
        placed = [e._replace(offset=512 * (i + 1)) if e.size else e for i, e in enumerate(entries)]
        out.append(Index.of(placed, Digest.of(b"%d" % number)))
    return out


def look(*layers: list[Entry]) -> AnalyzeReport:
    indexes = stack(*layers)
    blob = Descriptor("x", Digest.of(b""), 10)
    image = Image(
        "i", b"", blob, b"{}", blob, tuple(Layer(blob, i.diff_id) for i in indexes), Platform("linux", "x")
    )
    report = analyze("i", image, indexes)
    for layer in report.layers:
        assert layer.file_bytes == layer.new_bytes + layer.duplicated_bytes + layer.hidden_bytes
        assert sum(layer.causes.values()) == layer.duplicated_bytes
    assert sum(path.bytes for path in report.paths) == report.wasted_bytes
    return report


def gone(path: bytes) -> Entry:
    return Entry(path, Kind.WHITEOUT)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"uid": 7}, "owner"), ({"gid": 7}, "owner"), ({"perm": 0o600}, "mode"), ({"mtime": 1}, "times"),
        ({"mtime_ns": 1}, "times"), ({"xattrs": ((b"user.a", b""),)}, "xattr"), ({}, "identical"),
        ({"uid": 1, "perm": 0o600}, "owner+mode"),
    ],
)  # fmt: skip
def test_a_repeated_file_has_its_cause(change: dict[str, object], cause: str) -> None:
    report = look([file(b"a", b"x" * 100), file(b"b", b"bb")], [file(b"a", b"x" * 100, **change)])
    assert report.layers[1].causes == {cause: 100}
    assert [layer.new_bytes for layer in report.layers] == [102, 0]
    assert report.hidden_bytes == 0
    assert report.paths == (PathUse("a", 100, {cause: 100}, (2,)),)


def test_a_file_changed_twice_is_new_once() -> None:
    report = look([file(b"a", b"x" * 10)], [file(b"a", b"x" * 10, uid=1)], [file(b"a", b"x" * 10, uid=1, perm=0)])
    assert (report.duplicated_bytes, report.hidden_bytes, report.efficiency_percent) == (20, 0, 33.33)


def test_deleted_and_replaced_files_are_hidden() -> None:
    report = look([file(b"a", b"12"), file(b"b", b"345")], [gone(b"a"), file(b"b", b"6789")])
    assert [layer.hidden_bytes for layer in report.layers] == [5, 0]
    assert report.layers[1].new_bytes == 4


def test_what_is_changed_and_then_deleted_is_all_waste() -> None:
    report = look([file(b"a", b"12")], [file(b"a", b"12", uid=1)], [gone(b"a")])
    assert (report.hidden_bytes, report.duplicated_bytes, report.efficiency_percent) == (2, 2, 0.0)


def test_a_moved_file_is_duplicated_and_a_copied_one_is_new() -> None:
    moved = look([file(b"a", b"12")], [file(b"b", b"12"), gone(b"a")])
    assert moved.causes == {"moved": 2}
    copied = look([file(b"a", b"12")], [file(b"b", b"12")])
    assert copied.wasted_bytes == 0


def test_hard_links_and_holes_count_what_is_stored() -> None:
    sparse = file(b"s", b"x" * 1000)._replace(sparse=((0, 10), (500, 20)))
    report = look([file(b"a", b"12"), Entry(b"b", Kind.HARDLINK, link=b"a"), sparse, gone(b"zz")])
    assert report.file_bytes == report.layers[0].new_bytes == 32
    only_link_left = look([file(b"a", b"12"), Entry(b"b", Kind.HARDLINK, link=b"a")], [gone(b"a")])
    assert only_link_left.wasted_bytes == 0


def test_idle_whiteouts() -> None:
    report = look(
        [folder(b"d"), file(b"d/f", b"1"), gone(b"none")],
        [gone(b"d/f"), gone(b"d/g"), Entry(b"d", Kind.OPAQUE), Entry(b"e", Kind.OPAQUE), gone(b"d")],
    )
    assert [layer.idle_whiteouts for layer in report.layers] == [1, 2]


def test_sharing() -> None:
    base, one, two = stack([file(b"a", b"1234")], [file(b"b", b"xyz")], [file(b"c", b"xyz"), file(b"d", b"!")])
    shared = sharing([("one", [base, one]), ("two", [base, two])])
    assert (shared.file_bytes, shared.same_layer_bytes, shared.same_file_bytes) == (4 + 3 + 4 + 4, 4, 3)
    assert shared.distinct_bytes == 8
    assert shared.pairs == ((0, 1, 7),)


def test_history_is_taken_only_where_it_fits() -> None:
    steps = [{"created_by": "a"}, {"created_by": "b", "empty_layer": True}, {"comment": "c"}]
    assert layer_history(json.dumps({"history": steps}).encode(), 2) == ["a", "c"]
    assert layer_history(json.dumps({"history": steps}).encode(), 3) == []
    assert layer_history(b'{"history": "no"}', 1) == layer_history(b"{}", 1) == []


def test_limits_on_waste() -> None:
    assert [parse_limit(t) for t in ("50MB", "1.5 kB", "20MiB", "5%", "7", "1G")] == [
        5e7,
        1500,
        20 << 20,
        5,
        7,
        1e9,
    ]
    for text in ("", "-1", "5%%", "MB", "1 iB", "1e3", "٣"):
        with pytest.raises(UsageError):
            parse_limit(text)


HOSTILE = [
    b"</script><script>document.title='owned'</script>", b"<!--<script>", b"a\x00\x1b[31m\n\r\xe2\x80\xa8\xff\xfe",
    b"__proto__/constructor", b"<img src=x onerror=document.title='owned'>", b"'\"&amp;\\u003c@DATA@",
]  # fmt: skip


def hostile_report() -> AnalyzeReport:
    report = look([file(b"a", b"x" * 100)], [gone(b"a")])
    paths = tuple(PathUse(show_path(name), 10, {"hidden": 10}, (1,)) for name in HOSTILE)
    layer = replace(report.layers[0], history="</script><b>")
    return replace(report, name="</title><script>document.title='owned'</script>", paths=paths, layers=(layer,))


def test_hostile_names_stay_in_the_data_of_the_page() -> None:
    page = report_html(hostile_report())
    assert page.isascii()
    assert page.count("</script>") == 2
    assert "<img" not in page
    assert "<!--" not in page
    assert report_html(hostile_report()) == page
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    assert [path["path"] for path in data["paths"]] == [show_path(name) for name in HOSTILE]


def test_the_page_in_a_browser(tmp_path: Path) -> None:
    need_tool("chromium")
    page = tmp_path / "page.html"
    page.write_text(report_html(hostile_report()))
    dom = browser.dom(page, tmp_path / "profile")
    assert "<title>&lt;/title&gt;" in dom
    assert "<img" not in dom
    assert "6 paths waste 60 B" in dom
    assert dom.count('class="dir room') + dom.count('class="dir hidden-most') + dom.count('class="dir room hid') > 0
    assert "&lt;img src=x onerror" in dom


def test_the_command(tiny_image: Path, tmp_path: Path) -> None:
    page = tmp_path / "out/page.html"
    assert "No such file" in analyze_command(tiny_image, "--html", page, code=1).stderr
    page.parent.mkdir()
    found = json.loads(
        analyze_command(tiny_image, "--json", "--html", page, "--store", tmp_path / "s", code=0).stdout
    )
    assert found["schema"] == "layerkit.analyze.v2"
    image = found["images"][0]
    assert image["wasted_bytes"] == image["duplicated_bytes"] + image["hidden_bytes"]
    assert [p.name for p in page.parent.iterdir()] == ["page.html"]
    assert not (tmp_path / "s").exists()
    both = json.loads(analyze_command(tiny_image, tiny_image, "--json", code=0).stdout)
    assert both["sharing"]["same_layer_bytes"] >= both["sharing"]["distinct_bytes"] > 0
    assert "per" not in analyze_command(tiny_image, code=0).stderr
    over = analyze_command(tiny_image, "--fail-over", "0.000001%", code=1 if image["wasted_bytes"] else 0)
    assert "wasted" in over.stderr or not image["wasted_bytes"]
    analyze_command(tiny_image, "--fail-over", "100%", code=0)
    analyze_command(tiny_image, "--fail-over", "lots", code=2)
    analyze_command(tiny_image, tiny_image, "--html", page, code=2)
