r"""containerd's filter syntax: ``selector ("," selector)*``, one filter per string, any of them may match.

A selector is ``field ("." field)*``, alone (the field is present) or with ``==``, ``!=`` or ``~=`` (a regular
expression) and a value. Fields and values may be quoted with ``"``; values of ``~=`` also with ``/`` or ``|``.
The grammar is that of containerd's package pkg/filters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from layerkit.model.errors import SnapshotError

Lookup = Callable[[tuple[str, ...]], str | None]
"""From a path of fields to the value, None where it is not present."""

_FIELD = re.compile(r"[A-Za-z0-9_]+")
_OPERATOR = re.compile(r"[=!~]+")
_VALUE = re.compile(r"[^\s,\"/|=!~.][^\s,]*")
_QUOTED = re.compile(r"([\"/|])((?:\\.|(?!\1)[^\\\n])*)\1", re.DOTALL)
_ESCAPE = re.compile(r"\\(x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|[0-7]{3}|.)", re.DOTALL)
_PLAIN = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\"}
_COMMA, _DOT = re.compile(","), re.compile(r"\.")
_REGEX_CHARACTERS = 4096


class _Selector(NamedTuple):
    path: tuple[str, ...]
    operator: str
    value: str
    pattern: re.Pattern[str] | None

    def matches(self, lookup: Lookup) -> bool:
        found = lookup(self.path)
        if self.operator == "":
            return found is not None
        if self.operator == "==":
            return found is not None and found == self.value
        if self.operator == "!=":
            # An absent field is the empty string here, as in the original.
            return (found or "") != self.value
        return self.pattern is not None and self.pattern.search(found or "") is not None


def matcher(texts: Sequence[str]) -> Callable[[Lookup], bool]:
    """Return what says whether one of these filters matches; no filter at all matches everything.

    Raises:
        SnapshotError: invalid_argument, with the place of the first thing that does not fit.
    """
    filters = [_Parser(text).selectors() for text in texts]
    return lambda lookup: not filters or any(all(s.matches(lookup) for s in every) for every in filters)


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def selectors(self) -> list[_Selector]:
        found = [self._selector()] if self._text else []
        while self._peek():
            if not self._take(_COMMA):
                raise self._error("want a comma or the end")
            found.append(self._selector())
        return found

    def _selector(self) -> _Selector:
        path = [self._word(_FIELD, '"', "a field")]
        while self._take(_DOT):
            path.append(self._word(_FIELD, '"', "a field"))
        if self._peek() in ("", ","):
            return _Selector(tuple(path), "", "", None)
        operator = self._take(_OPERATOR)
        if operator not in ("==", "!=", "~="):
            raise self._error("want ==, != or ~=")
        if operator != "~=" and self._peek() in ("/", "|"):
            raise self._error("only values of ~= may be quoted with / or |")
        value, pattern = self._word(_VALUE, '"/|', "a value"), None
        if operator == "~=":
            if len(value) > _REGEX_CHARACTERS:
                raise self._error(f"a pattern above {_REGEX_CHARACTERS} characters")
            try:
                pattern = re.compile(value)
            except re.error as error:
                raise self._error(f"not a regular expression: {error}") from None
        return _Selector(tuple(path), operator, value, pattern)

    def _word(self, plain: re.Pattern[str], quotes: str, what: str) -> str:
        if self._peek() not in tuple(quotes):
            found = self._take(plain)
            if not found:
                raise self._error(f"want {what}")
            return found
        quoted = _QUOTED.match(self._text, self._at)
        if quoted is None:
            raise self._error("a quote that does not end")
        self._at = quoted.end()
        return _ESCAPE.sub(lambda m: self._unescaped(m[1], quoted[1]), quoted[2])

    def _unescaped(self, code: str, quote: str) -> str:
        if code[0] in "xuU" and len(code) > 1:
            return chr(int(code[1:], 16))
        if code.isdigit() and len(code) == 3:
            return chr(int(code, 8))
        if code == quote:
            return code
        if code in _PLAIN:
            return _PLAIN[code]
        if quote != '"':  # of a regular expression, whose escapes stay
            return "\\" + code
        raise self._error(f"the escape \\{code} is none")

    def _take(self, pattern: re.Pattern[str]) -> str:
        self._peek()
        found = pattern.match(self._text, self._at)
        if found is None:
            return ""
        self._at = found.end()
        return found[0]

    def _peek(self) -> str:
        """Go on to the next character that is no space and return it, "" at the end."""
        self._at = len(self._text) - len(self._text[self._at :].lstrip())
        return self._text[self._at :][:1]

    def _error(self, what: str) -> SnapshotError:
        return SnapshotError("invalid_argument", f"filter {self._text!r}, at {self._at}: {what}")
