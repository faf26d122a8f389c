"""What docs/architecture.md and docs/glossary.md say is so."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from programs import ROOT

PAGE = (ROOT / "docs/architecture.md").read_text("utf-8")


def test_the_picture_of_the_rooms_is_what_the_imports_say() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/draw_rooms.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+(?:\.py|/))`", PAGE))))
def test_each_file_that_the_page_names_is_there(name: str) -> None:
    assert (ROOT / "layerkit" / name).exists() or (ROOT / name).exists()


def test_each_exception_to_a_floor_is_absent() -> None:
    """No import is ignored, and every room is listed."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    contracts = text[text.index("[tool.importlinter]") :]
    assert "ignore_imports" not in contracts
    assert "exhaustive = true" in contracts
    assert "acyclic_siblings" in contracts
