"""The mount options of overlayfs as text: one parser and one writer. Pure.

Rules: Documentation/filesystems/overlayfs.rst and ``fs/overlayfs/params.c``. Commas divide options and colons
layers, ``::`` goes before each data-only layer; a backslash takes the meaning from the character after it.
/proc/PID/mountinfo shows options as they were given, with some bytes in octal (proc_pid_mountinfo(5)).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from mmap import PAGESIZE

from layerkit.model.errors import UsageError

LAYER_KEYS = frozenset({"lowerdir", "lowerdir+", "datadir", "datadir+", "upperdir", "workdir"})
"""The options that name layers."""

FEATURE_KEYS = frozenset({"metacopy", "redirect_dir", "index", "xino", "userxattr", "nfs_export", "uuid", "verity"})
"""Those that say how layers are read and copied up."""

_OCTAL = re.compile(r"\\([0-7]{3})")
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_SPECIAL = re.compile(r"[\\:,]")


@dataclass(frozen=True, slots=True)
class OverlayOptions:
    """What an overlay is made of.

    Attributes:
        lower: the normal layers, top first. data: the data-only ones below them.
        upper, work: of a writable mount, else "".
        more: all else in order, as (key, value or None for a flag).
    """

    lower: tuple[str, ...]
    data: tuple[str, ...] = ()
    upper: str = ""
    work: str = ""
    more: tuple[tuple[str, str | None], ...] = ()

    @classmethod
    def parse(cls, text: str) -> OverlayOptions:
        """Return what ``text``, as mount(8) takes it after ``-o``, names; nothing that it says is refused."""
        return cls._of(_split(text, ","))

    @classmethod
    def shown(cls, text: str) -> OverlayOptions:
        """Return the options of an overlay that the last field of its line in mountinfo shows."""
        return cls._of([_OCTAL.sub(lambda m: chr(int(m[1], 8)), word) for word in _split(text, ",")])

    @classmethod
    def _of(cls, words: Sequence[str]) -> OverlayOptions:
        lower, data, places = list[str](), list[str](), {"upperdir": "", "workdir": ""}
        more: list[tuple[str, str | None]] = []
        for word in words:
            key, given, value = word.partition("=")
            if key == "lowerdir":
                lower, data = map(list, parse_layers(value))
            elif key == "lowerdir+":  # one layer each, as it is
                lower.append(value)
            elif key == "datadir+":
                data.append(value)
            elif key in places:
                places[key] = _unescaped(value)
            elif word:
                more.append((key, value.strip('"') if given else None))
        return cls(tuple(lower), tuple(data), places["upperdir"], places["workdir"], tuple(more))

    @property
    def texts(self) -> tuple[str, ...]:
        """Return the options, each as mount(8) takes it."""
        layers = ":".join(map(_escaped, self.lower)) + "".join(f"::{_escaped(path)}" for path in self.data)
        texts = [*(key if value is None else f"{key}={value}" for key, value in self.more), f"lowerdir={layers}"]
        if self.upper:
            texts += [f"upperdir={_escaped(self.upper)}", f"workdir={_escaped(self.work)}"]
        return tuple(texts)

    def __str__(self) -> str:
        return ",".join(self.texts)

    @property
    def size(self) -> int:
        """Return the bytes that mount(2) has to take, the NUL at the end with them."""
        return len(os.fsencode(str(self))) + 1

    @property
    def fits(self) -> bool:
        """Return whether mount(2) takes so many: a page."""
        return self.size <= PAGESIZE


def parse_layers(text: str, what: str = "") -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the (normal, data-only) layers of ``DIR[:DIR…][::DATA…]``, top first.

    Args:
        text: as the option ``lowerdir`` has it.
        what: names it in errors; without, an empty name is passed over.

    Raises:
        UsageError: ``what`` is given, and a name is empty.
    """
    parts = [_unescaped(part) for part in _split(text, ":")]
    at = parts.index("") if "" in parts else len(parts)
    if what and (not parts[0] or not parts[-1] or ("", "") in pairwise(parts)):
        raise UsageError(f"{what} {text!r}: want DIR[:DIR…], and perhaps ::DATA")
    return tuple(parts[:at]), tuple(part for part in parts[at:] if part)


def _split(text: str, separator: str) -> list[str]:
    """Split at ``separator`` unless a backslash stands before it, or it is in a value in double quotes."""
    parts, start, at, quoted = list[str](), 0, 0, False
    while at < len(text):
        if text[at] == '"' and (quoted or text[at - 1 : at] == "="):
            quoted = not quoted
        elif text[at] == "\\":
            at += 1
        elif text[at] == separator and not quoted:
            parts.append(text[start:at])
            start = at + 1
        at += 1
    return [*parts, text[start:]]


def _escaped(path: str) -> str:
    return _SPECIAL.sub(r"\\\g<0>", path)


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(r"\1", text)
