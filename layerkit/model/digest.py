"""Content digests, parsed once (OCI image-spec, descriptor.md, "Digests")."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerkit.model.errors import DigestMismatch, InvalidImage

if TYPE_CHECKING:
    from hashlib import _Hash

_HEX_CHARS = {"sha256": 64, "sha512": 128}
_FORM = re.compile(r"(sha256|sha512):([0-9a-f]+)")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """An algorithm and a lower-case hex value; use :meth:`parse` on anything from outside."""

    algorithm: str
    hex: str

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Return the digest that ``text`` spells as ``algorithm:hex``.

        Raises:
            InvalidImage: another algorithm than sha256 or sha512, or a value of the wrong form.
        """
        match = _FORM.fullmatch(text) if isinstance(text, str) else None
        if match is None or len(match[2]) != _HEX_CHARS[match[1]]:
            raise InvalidImage(f"not a digest: {text!r} (want sha256:<64 hex digits>)")
        return cls(match[1], match[2])

    @classmethod
    def of(cls, data: bytes) -> Digest:
        """Return the sha256 digest of ``data``."""
        return cls("sha256", hashlib.sha256(data).hexdigest())

    def verify(self, data: bytes, what: str) -> None:
        """Raise unless ``data``, which ``what`` names, has this digest.

        Raises:
            DigestMismatch: it has another.
        """
        hasher = self.hasher()
        hasher.update(data)
        if hasher.hexdigest() != self.hex:
            raise DigestMismatch(what, f"{self.algorithm}:{hasher.hexdigest()}", str(self))

    def hasher(self) -> _Hash:
        """Return a new hash object of this digest's algorithm."""
        return hashlib.new(self.algorithm)

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"
