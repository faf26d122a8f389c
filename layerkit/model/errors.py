"""The only exception tree of layerkit, and the exit code that each class stands for.

A message says what was found, where, and what to do. Paths are bytes inside layerkit; messages show
them with :func:`show_path`, so a hostile name can neither break a terminal nor hide itself.
"""

from __future__ import annotations

from typing import ClassVar


def show_path(path: bytes | str) -> str:
    r"""Return ``path`` as printable text: UTF-8 where it is valid, ``\xNN`` for every other byte."""
    text = path if isinstance(path, str) else path.decode("utf-8", "surrogateescape")
    return text if text.isprintable() else "".join(map(_show, text))


def show_lines(text: str) -> str:
    """Return ``text`` printable line by line: for what is made of several lines on purpose."""
    return "\n".join(show_path(line) for line in text.split("\n"))


def _show(char: str) -> str:
    if char.isprintable():
        return char
    if "\udc80" <= char <= "\udcff":  # how PEP 383 holds a byte that is no UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")


class LayerkitError(Exception):
    """Base of every error that layerkit raises on purpose."""

    exit_code: ClassVar[int] = 1


class UsageError(LayerkitError):
    """The caller asked for something that cannot mean anything: a bad map, flag or reference."""

    exit_code: ClassVar[int] = 2


class InvalidImage(LayerkitError):
    """The image, layer, index or archive is malformed."""

    exit_code: ClassVar[int] = 3


class LimitExceeded(InvalidImage):
    """An input goes beyond a bound of ``limits.py``; ``limit`` names the bound."""

    def __init__(self, limit: str, found: int, allowed: int, where: str) -> None:
        """Say which ``limit`` was passed by what, and how to raise it."""
        self.limit, self.found, self.allowed = limit, found, allowed
        super().__init__(
            f"{where}: {found} is above the limit of {allowed} ({limit}); "
            f"if you trust the image, raise it with LAYERKIT_LIMIT_{limit.upper()}"
        )


class UnsafeEntry(InvalidImage):
    """An entry of a layer that must not be applied."""

    def __init__(self, layer: str, path: bytes, why: str) -> None:
        """Name the ``layer`` (a digest or a file), the ``path`` in it, and ``why`` it is refused."""
        self.layer, self.path, self.why = layer, path, why
        super().__init__(f"{layer}: {show_path(path) or '/'}: {why}")


class DigestMismatch(InvalidImage):
    """Bytes that do not have the digest (or the size) that was promised for them."""

    def __init__(self, what: str, got: str, want: str) -> None:
        """Name the object, the digest or size ``got`` and the one ``want``-ed."""
        self.what, self.got, self.want = what, got, want
        super().__init__(f"{what}: got {got}, want {want}; the data is damaged or not what it claims to be")


class UnmappedId(LayerkitError):
    """An owner that the id map does not cover."""

    exit_code: ClassVar[int] = 3

    def __init__(self, path: bytes, kind: str, value: int, ranges: str) -> None:
        """``kind`` is ``uid`` or ``gid`` (with its place, as ``uid in ACL``); ``ranges`` the map's."""
        self.path, self.kind, self.value, self.ranges = path, kind, value, ranges
        super().__init__(
            f"{show_path(path) or '/'}: {kind} {value} is outside the map ({ranges}); "
            "widen the map, or name an id for such owners with --overflow-id"
        )


class LossyResult(LayerkitError):
    """The chosen rendering cannot express an entry exactly."""

    exit_code: ClassVar[int] = 3

    def __init__(self, path: bytes, what: str) -> None:
        """Name the ``path`` and ``what`` would be lost."""
        self.path = path
        super().__init__(f"{show_path(path) or '/'}: {what}")


class UnsupportedHost(LayerkitError):
    """The host lacks a feature; ``hint`` says what would help."""

    def __init__(self, feature: str, hint: str = "") -> None:
        """Name the ``feature`` that is missing and the way round it."""
        self.feature, self.hint = feature, hint
        super().__init__(f"this host does not offer {feature}" + (f"; {hint}" if hint else ""))


class DaemonError(LayerkitError):
    """A docker daemon cannot be reached, or refused or failed."""


class StoreError(LayerkitError):
    """The local store is damaged, of another version, or in use in a way that forbids the request."""


class NotFound(LayerkitError):
    """A reference, digest or mount that names nothing."""


class SnapshotError(LayerkitError):
    """A request that the snapshotter refuses; ``status`` is containerd's word for why (its package errdefs)."""

    def __init__(self, status: str, message: str) -> None:
        """``status``: not_found, already_exists, failed_precondition or invalid_argument."""
        self.status = status
        super().__init__(message)


class RegistryError(LayerkitError):
    """A registry refused or failed; ``temporary`` says whether trying again can help."""

    exit_code: ClassVar[int] = 4

    def __init__(self, ref: str, status: int, message: str, *, temporary: bool = False) -> None:
        """``status`` is the HTTP status, 0 where the connection itself failed."""
        self.ref, self.status, self.temporary = ref, status, temporary
        super().__init__(f"{ref}: {message}" + (f" (HTTP {status})" if status else ""))


class PartialFailure(LayerkitError):
    """Part of a batch failed; the message lists which."""

    exit_code: ClassVar[int] = 5


class Cancelled(BaseException):
    """The caller or the user stopped the work; nothing half-made is left.

    It is no error: like ``KeyboardInterrupt`` it passes what catches ``LayerkitError`` or ``Exception``, so nothing
    can take it for a fault and go on.
    """

    exit_code: ClassVar[int] = 130
