"""The house is as it says: what scripts/ can show of it."""

from __future__ import annotations

import sys

from programs import ROOT, run


def test_no_run_of_lines_stands_twice_in_the_tests() -> None:
    assert run(sys.executable, ROOT / "scripts/repeated_lines.py").stdout == ""
