"""What is shown on a terminal: nothing but what it prints, and nothing that harms in a shell."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import typer.main
from rich.emoji import Emoji

from layerkit.cli import main, render
from layerkit.model.errors import show_lines, show_path
from layerkit.model.reports import RemapReport


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (b"a/b", "a/b"), ("\u00fc".encode(), "\u00fc"), (b"\xff\xc3", r"\xff\xc3"), ("x\udcff", r"x\xff"),
        ("\ud800", r"\ud800"), (b"\x1b[0m\n", r"\x1b[0m\n"), ("\u202e", r"\u202e"), ("a b", "a b"),
    ],
)  # fmt: skip
def test_paths_become_printable(path: bytes | str, text: str) -> None:
    assert show_path(path) == text
    assert show_path(show_path(path)) == text


def test_lines_stay_lines() -> None:
    assert show_lines("\na\tb\nc\r") == "\na\\tb\nc\\r"


def test_fields_and_tables_show_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "a\x1b]0;b\x07\r\u202ec\n[red]x"
    render.fields([("name", evil), ("several", ("one", "two"))])
    render.table("", ["HEAD"], [(evil,), (["one", "two"],)])
    render.line(evil)
    render.note(evil)
    shown = capsys.readouterr()
    want = r"a\x1b]0;b\x07\r\u202ec\n[red]x"
    assert shown.out.startswith(f"name     {want}\nseveral  one\n         two\n")
    assert shown.out.count(want) == 3
    assert (shown.out + shown.err).replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("ref", "shown"),
    [
        ("store:app:1", "store:app:1"),
        ("store:a;reboot", "'store:a;reboot'"),
        ("store:$(reboot)", "'store:$(reboot)'"),
        ("store:a\x1b[31m", "store:sha256:00"),
        ("store:a\nreboot", "store:sha256:00"),
    ],
)
def test_the_next_command_can_be_pasted(capsys: pytest.CaptureFixture[str], ref: str, shown: str) -> None:
    some: dict[str, Any] = {f.name: "" for f in dataclasses.fields(RemapReport) if f.default is dataclasses.MISSING}
    report = RemapReport(**{**some, "manifest": "sha256:00", "next_ref": ref, "map_flags": "--uid-map 0:1:2"})
    render.next_mount(report, render.Output())
    assert capsys.readouterr().err == f"\nnext: layerkit mount {shown} TARGET --uid-map 0:1:2\n"


def test_every_command_has_json_and_an_example() -> None:
    def leaves(command: Any, name: str) -> list[tuple[str, Any]]:
        below = getattr(command, "commands", None)
        return [leaf for n, each in below.items() for leaf in leaves(each, n)] if below else [(name, command)]

    found = leaves(typer.main.get_command(main.app()), "layerkit")
    assert len(found) > 30
    # Those run until they are stopped, or answer with nothing but their exit code.
    silent = {"serve", "proxy", "retry"}
    assert [n for n, c in found if n not in silent and "--json" not in {o for p in c.params for o in p.opts}] == []
    assert [n for n, c in found if "Example" not in (c.help or "")] == []


def test_help_has_no_word_that_becomes_a_picture() -> None:
    # typer lets rich put emoji for :names:, and `folders:TOP:` was one.
    def texts(command: Any) -> list[str]:
        own = [command.help or "", *(getattr(p, "help", "") or "" for p in command.params)]
        return own + [text for each in getattr(command, "commands", {}).values() for text in texts(each)]

    found = texts(typer.main.get_command(main.app()))
    assert len(found) > 200
    assert [text for text in found if Emoji.replace(text) != text] == []


def test_an_archive_on_standard_output_has_it_to_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for dst, holds in (("-", True), ("oci-archive:-", True), ("oci:layout:v1", False), (None, False)):
        out = render.Output(json=True, dst=dst)
        assert out.holds_archive == holds
        assert out.told("some", {"a": b"\xff"})
        shown = capsys.readouterr()
        document = '{\n  "schema": "layerkit.some.v1",\n  "a": "\\\\xff"\n}\n'
        assert (shown.out, shown.err) == (("", document) if holds else (document, ""))
    assert not render.Output().told("some", {})
    render.Output().warn(["odd", "odd"])
    render.Output(quiet=True).warn(["odd"])
    assert capsys.readouterr().err == "warning: odd\n"
