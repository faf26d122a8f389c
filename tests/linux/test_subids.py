"""Subordinate ids: what /etc/subuid says, and the map that it makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerkit.linux.userns import subid_map
from layerkit.model.errors import UsageError


def test_subid_file(tmp_path: Path) -> None:
    file = tmp_path / "subuid"
    file.write_text("# comment\nother:1:5\nann:100000:65536\nroot:7:1\nann:300000:10\n0:9:2\nann:5:0\n")
    assert subid_map("ann", path=file).canonical() == "0:100000:65536,65536:300000:10"
    # By name or by number, whichever the file has.
    for name in ("root", "0"):
        assert subid_map(name, "gid", file).canonical() == "0:7:1,1:9:2"
    for name in ("nobody-here", "an", "# comment", ""):
        with pytest.raises(UsageError, match="no range for"):
            subid_map(name, path=file)


@pytest.mark.parametrize("line", ["ann:1", "ann:x:1", "ann:1:2:3", "ann:-1:5", "ann:4294967290:10"])
def test_malformed_subid_lines(tmp_path: Path, line: str) -> None:
    file = tmp_path / "subuid"
    file.write_text(f"bob:::\n{line}\n")
    with pytest.raises(UsageError, match="subuid"):
        subid_map("ann", path=file)


def test_missing_subid_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--gid-map"):
        subid_map("ann", "gid", tmp_path / "none")


def test_after_the_user_itself(tmp_path: Path) -> None:
    file = tmp_path / "subgid"
    file.write_text("ann:100000:10\nann:300000:5\n")
    assert subid_map("ann", "gid", file, first=1).canonical() == "1:100000:10,11:300000:5"
