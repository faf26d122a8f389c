"""Where things lie in the checkout."""

from __future__ import annotations

from pathlib import Path

KIT = Path(__file__).resolve().parent
"""Modules and programs that tests share; on the path of every test."""

ROOT = KIT.parents[1]
"""The checkout."""
