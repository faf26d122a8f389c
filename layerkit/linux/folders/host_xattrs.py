"""TODO."""

from __future__ import annotations

_KEPT = (b"user.", b"trusted.", b"security.", b"system.posix_acl_")


_OF_THE_HOST = (b"security.selinux", b"security.ima", b"security.evm", b"security.apparmor", b"trusted.SGI_")
"""Labels that the host gives by its own rules, and the second names under which xfs shows ACLs."""


def _belongs_to_image(key: bytes) -> bool:
    return key.startswith(_KEPT) and not key.startswith(_OF_THE_HOST)
