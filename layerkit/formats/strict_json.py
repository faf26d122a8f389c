"""JSON from strangers: bounded, unambiguous, and refused with the name of the document.

Two parsers that disagree about one document are two images under one digest, so whatever RFC 8259
section 4 leaves to the parser (repeated names) or Python adds to it (NaN) is refused here.
"""

from __future__ import annotations

import itertools
import json
import re
from typing import NoReturn

from layerkit.model.errors import InvalidImage, LimitExceeded
from layerkit.model.limits import DEFAULT, Limits

JsonObject = dict[str, object]

# The closing quote is optional, so that an unterminated string costs one pass and not one per quote.
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_NOT_BRACKETS = bytes(sorted(set(range(256)) - set(b"[]{}")))
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def check_depth(data: bytes, what: str, limits: Limits = DEFAULT) -> None:
    """Raise unless ``data`` nests no deeper than ``limits.json_depth``; linear in its length, no recursion.

    Raises:
        LimitExceeded: arrays and objects nest deeper.
    """
    brackets = _STRING.sub(b"", data).translate(_ONE_KIND, _NOT_BRACKETS)
    rest = brackets
    for _ in range(limits.json_depth):
        if not rest:
            return
        rest = rest.replace(b"[]", b"")  # takes away the innermost level everywhere at once
    if rest:
        # Too deep, or closed wrongly; the parser has the better words for the second.
        deepest = max(itertools.accumulate(1 if c == 0x5B else -1 for c in brackets))
        if deepest > limits.json_depth:
            raise LimitExceeded("json_depth", deepest, limits.json_depth, f"{what}: nesting of the JSON")


def loads(data: bytes, what: str, limits: Limits = DEFAULT) -> object:
    """Return the value of the JSON document ``data``; ``what`` names it in errors.

    Raises:
        InvalidImage: no JSON, not UTF-8, a name twice in one object, NaN or Infinity, half a surrogate pair.
        LimitExceeded: nested too deep.
    """
    check_depth(data, what, limits)

    def no_duplicates(pairs: list[tuple[str, object]]) -> JsonObject:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InvalidImage(
                f"{what}: the name {twice!r} occurs twice in one JSON object; readers would disagree"
            )
        return found

    def no_constants(text: str) -> NoReturn:
        raise InvalidImage(f"{what}: {text} is not JSON")

    try:
        value: object = json.loads(
            data.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=no_constants
        )
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise InvalidImage(f"{what}: not valid JSON: {error}") from None
    return value


def load_object(data: bytes, what: str, limits: Limits = DEFAULT) -> JsonObject:
    """Return the JSON object that ``data`` holds; as :func:`loads`, and nothing but an object is taken."""
    value = loads(data, what, limits)
    if not isinstance(value, dict):
        raise InvalidImage(f"{what}: want a JSON object, found {type(value).__name__}")
    return value


def dumps(value: object) -> bytes:
    """Return ``value`` as compact UTF-8 JSON, members in their order: equal values give equal bytes."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")
