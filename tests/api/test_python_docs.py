"""The code in docs/python.md, run as a reader would."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from needs import need_root
from programs import ROOT

PAGE = ROOT / "docs/python.md"


def test_every_block_runs(
    tiny_archive: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    need_root()  # one block mounts
    shutil.copyfile(tiny_archive(), tmp_path / "app.tar")
    (tmp_path / "mnt").mkdir()
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 6
    scope: dict[str, Any] = {"__name__": "page"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), scope)
    printed = capsys.readouterr().out
    assert "is its name from now on" in printed and "stopped at " in printed
    assert sorted(os.listdir(tmp_path)) == ["app.tar", "flat.tar", "layout", "mnt", "rootfs", "small.tar", "store"]
    assert os.listdir(tmp_path / "mnt") == []
