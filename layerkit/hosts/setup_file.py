"""A settings file of another program that gets lines of ours, edited as text so that comments and order stay."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerkit.linux.durable import whole_file
from layerkit.model.errors import UsageError


@dataclass(frozen=True, slots=True)
class Change:
    """What a setup does to the file.

    Attributes:
        path: the file.
        text: what it is to hold; "" if it is to go.
        notes: what else in it matters, for a person.
    """

    path: Path
    text: str
    notes: tuple[str, ...] = ()

    def apply(self) -> bool:
        """Write the change, whole or not at all; return whether anything was to be done."""
        if read(self.path) == self.text:
            return False
        if not self.text:
            self.path.unlink(missing_ok=True)
            return True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path) as file:
            file.write(self.text.encode())
            if self.path.exists():
                os.fchmod(file.fileno(), self.path.stat().st_mode & 0o777)
        return True


def read(path: Path) -> str:
    """Return what the file holds, "" if it is not there."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def parse(text: str, path: Path, reader: str) -> dict[str, Any]:
    """Return the settings in ``text``, of the file ``path`` that the program ``reader`` reads.

    Raises:
        UsageError: it is no TOML.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: {error}; {reader} cannot read it either") from None
