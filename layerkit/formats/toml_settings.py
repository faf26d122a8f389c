"""Settings in TOML, read into frozen values: every key must be known and of its type.

A table fills a dataclass whose fields are called as its keys, and typed: ``str``, ``bool``, ``int``, ``float``
(above 0), ``Path`` (relative ones are below the file's folder) or ``tuple[str, ...]``, each perhaps ``| None``.
Bounds and choices stand at the field: see :func:`whole` and :func:`one_of`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from layerkit.model.errors import UsageError

_T = TypeVar("_T")


def whole(default: int, least: int, most: int) -> Any:
    """Return a dataclass field for a whole number from ``least`` to ``most``."""
    return field(default=default, metadata={"bounds": (least, most)})


def one_of(*choices: str) -> Any:
    """Return a dataclass field for one of ``choices``; the first is the default."""
    return field(default=choices[0], metadata={"choices": choices})


def nearest(word: str, known: Iterable[str], alike: float = 0.6) -> str:
    """Return what an error about an unknown ``word`` says of the known one that is most like it.

    Args:
        word: as somebody wrote it.
        known: what it may have been meant to be.
        alike: from 0, which always finds one, to 1.
    """
    from difflib import get_close_matches

    near = get_close_matches(word, sorted(known), 1, alike)
    return f"; did you mean {near[0]}?" if near else ""


class Table:
    """A table of settings. What nobody asks for is an error: a typing error must not become a default."""

    def __init__(self, values: Mapping[str, object], where: str, base: Path) -> None:
        """Read ``values``; ``where`` names them in errors, relative paths are below ``base``."""
        self.where, self._left, self._base = where, dict(values), base
        self._asked: set[str] = set()

    @classmethod
    def load(cls, path: Path) -> Table:
        """Return what the file ``path`` holds.

        Raises:
            UsageError: not there, or not TOML.
        """
        try:
            return cls(tomllib.loads(path.read_text()), str(path), path.parent)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: {error}") from None

    def __bool__(self) -> bool:
        """Return whether there is anything left in it."""
        return bool(self._left)

    def take(self, name: str, kind: type[_T], default: _T) -> _T:
        """Return the value of ``name``, which must be of ``kind``."""
        self._asked.add(name)
        value = self._left.pop(name, default)
        if type(value) is not kind:
            raise UsageError(f"{self.where}: {name} = {value!r}: want a value of another type")
        return value

    def table(self, name: str) -> Table:
        """Return the table ``[name]``, empty if it is not there."""
        return Table(self.take(name, dict, {}), f"{self.where}, [{name}]", self._base)

    def tables(self, name: str) -> list[Table]:
        """Return the tables ``[[name]]``."""
        found = []
        for number, value in enumerate(self.take(name, list, []), 1):
            if not isinstance(value, dict):
                raise UsageError(f"{self.where}: {name}: want a table")
            found.append(Table(value, f"{self.where}, [[{name}]] {number}", self._base))
        return found

    def fill(self, kind: type[_T], names: Collection[str] = (), **given: object) -> _T:
        """Return a dataclass, and raise where a key is left over after that.

        Args:
            kind: the class.
            names: only these fields are keys; what is left over may then be asked for. Empty: all fields.
            given: values of fields that are no keys.

        Raises:
            UsageError: a key that is unknown or missing, or a value that cannot mean anything.
        """
        hints, every = get_type_hints(kind), fields(kind)  # type: ignore[arg-type]
        required = [each.name for each in every if each.default is each.default_factory is MISSING]
        for each in every:
            name = each.name
            if name in given or (names and name not in names):
                continue
            self._asked.add(name)
            if name in self._left:
                given[name] = self._value(name, hints[name], self._left.pop(name), each.metadata)
            elif name in required:
                together = " and ".join(required)
                raise UsageError(
                    f"{self.where}: {name} is missing"
                    + ("" if together == name else f"; {together} belong together")
                )
        if not names:
            self.done()
        try:
            return kind(**given)
        except UsageError as error:  # of a class that checks more itself
            raise UsageError(f"{self.where}: {error}") from None

    def done(self) -> None:
        """Raise if a key is left that nobody asked for."""
        if self._left:
            name = min(self._left)
            raise UsageError(f"{self.where}: unknown name {name!r}{nearest(name, self._asked, 0.0)}")

    def _value(self, name: str, hint: Any, value: object, metadata: Mapping[str, Any]) -> object:
        """Return a value as a field of the type ``hint`` holds it."""
        kind = next((each for each in get_args(hint) if each not in (NoneType, ...)), hint)
        said = f"{self.where}: {name} = {value!r}"
        if str in get_args(hint) and ... in get_args(hint):
            if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
                raise UsageError(f"{said}: want a list of texts")
            return tuple(value)
        if kind is float:
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e9:
                raise UsageError(f"{said}: want a number above 0")
            return float(value)
        if type(value) is not (str if kind is Path else kind):
            raise UsageError(f"{said}: want a value of another type")
        if "bounds" in metadata and not metadata["bounds"][0] <= value <= metadata["bounds"][1]:
            raise UsageError(f"{said}: want {metadata['bounds'][0]} to {metadata['bounds'][1]}")
        if "choices" in metadata and value not in metadata["choices"]:
            raise UsageError(f"{said}: want {' or '.join(metadata['choices'])}")
        return self._base / Path(value).expanduser() if kind is Path and isinstance(value, str) else value
