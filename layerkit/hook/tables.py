"""Tables of a settings file whose every member must be known, and of its type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from layerkit.model.errors import UsageError

_T = TypeVar("_T")
_MISSING: object = object()


class Table:
    """A table of the file whose every member must be known and of its type."""

    def __init__(self, values: Mapping[str, object], where: str, base: Path) -> None:
        """Read ``values``; ``where`` names them in errors, relative paths are below ``base``."""
        self.left, self.where, self._base = dict(values), where, base

    def get(self, name: str, kind: Callable[..., _T], default: object = _MISSING) -> _T:
        """Return the member ``name``, which must be of ``kind``; without a default it must be there."""
        value = self.left.pop(name, _MISSING)
        if value is _MISSING:
            if default is _MISSING:
                raise UsageError(f"{self.where}: {name} is missing")
            return default  # type: ignore[return-value]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):  # type: ignore[arg-type]
            raise UsageError(f"{self.where}: {name} = {value!r}: want a value of another type")
        return value  # type: ignore[return-value]

    def texts(self, name: str, default: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Return a list of texts."""
        found: list[object] = self.get(name, list, list(default))
        if not all(isinstance(each, str) for each in found):
            raise UsageError(f"{self.where}: {name} = {found!r}: want a list of texts")
        return tuple(str(each) for each in found)

    def number(self, name: str, default: int, *, least: int, most: int) -> int:
        """Return a whole number within bounds."""
        value = self.get(name, int, default)
        if not least <= value <= most:
            raise UsageError(f"{self.where}: {name} = {value}: want {least} to {most}")
        return value

    def seconds(self, name: str, default: float) -> float:
        """Return a number above 0."""
        value = self.left.pop(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e9:
            raise UsageError(f"{self.where}: {name} = {value!r}: want a number above 0")
        return float(value)

    def path(self, name: str, default: Path | None = None) -> Path | None:
        """Return a path; a relative one is below the folder of the file."""
        text = self.get(name, str, None)
        return default if text is None else self._base / Path(text).expanduser()

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """Return one of ``choices``, the first if it is not given."""
        value = self.get(name, str, choices[0])
        if value not in choices:
            raise UsageError(f"{self.where}: {name} = {value!r}: want {' or '.join(choices)}")
        return value

    def tables(self, name: str) -> list[object]:
        """Return a list of tables, not looked into yet; see :meth:`table`."""
        return self.get(name, list, [])

    def table(self, value: object, where: str) -> Table:
        """Return ``value`` as a table of its own, called ``where`` in errors."""
        if not isinstance(value, dict):
            raise UsageError(f"{self.where}, {where}: want a table")
        return Table(value, f"{self.where}, {where}", self._base)

    def done(self) -> None:
        """Raise if members are left that nobody asked for: a typing error must not become a default."""
        if self.left:
            raise UsageError(f"{self.where}: unknown name {min(self.left)!r}")


__all__ = ["Table"]
