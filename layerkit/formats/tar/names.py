"""Names of tar members: made relative and clean, whiteouts told apart.

Layers are not extracted by path, so nothing here can escape anywhere; but what the runtimes refuse, or
would place outside the root, must not be applied quietly either.
"""

from __future__ import annotations

import numpy as np

from layerkit.model.entry import OPAQUE_NAME, WHITEOUT_PREFIX, Kind
from layerkit.model.errors import UnsafeEntry
from layerkit.model.limits import Limits

_AUFS_PREFIX = b".wh..wh."
_NUL_TO_SLASH = bytes((0x2F,)) + bytes(range(1, 256))


def normalise(name: bytes, layer: str) -> bytes:
    """Return ``name`` relative, without empty, ``.`` and ``..`` parts; b"" is the root.

    ``a/../b`` is ``b`` by the letters alone, as in Go's ``path.Clean``, which the runtimes use.

    Raises:
        UnsafeEntry: no name at all, a NUL in it, or parts that climb above the root.
    """
    if not name:
        raise UnsafeEntry(layer, name, "an entry without a name")
    if b"\0" in name:
        raise UnsafeEntry(layer, name, "a NUL in a name")
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            if not parts:
                raise UnsafeEntry(layer, name, "the name climbs above the root")
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)


def normalise_all(names: list[bytes], layer: str, limits: Limits) -> list[bytes]:
    """Return :func:`normalise` of each of ``names``, with their lengths checked.

    Raises:
        UnsafeEntry: see :func:`normalise`.
        LimitExceeded: a name, path or depth beyond ``limits``.
    """
    if not names:
        return []
    joined = b"\0" + b"\0".join(names) + b"\0"
    odd = joined.count(b"\0") != len(names) + 1 or b"\0\0" in joined
    if not odd:
        # What nearly all writers make is settled for thousands of names at once.
        joined = joined.replace(b"\0./", b"\0").replace(b"/\0", b"\0")
        slashed = joined.translate(_NUL_TO_SLASH)
        odd = b"//" in slashed or b"/./" in slashed or b"/../" in slashed
    if odd:
        clean = [normalise(name, layer) for name in names]
        joined = b"\0" + b"\0".join(clean) + b"\0"
        slashed = joined.translate(_NUL_TO_SLASH)
    else:
        clean = joined[1:-1].split(b"\0")
    _check_lengths(joined, slashed, clean, layer, limits)
    return clean


def _check_lengths(joined: bytes, slashed: bytes, paths: list[bytes], layer: str, limits: Limits) -> None:
    part = int(np.diff(np.flatnonzero(np.frombuffer(slashed, np.uint8) == 0x2F)).max()) - 1
    limits.check("name_bytes", part, f"{layer}: bytes of a file name")
    path = int(np.diff(np.flatnonzero(np.frombuffer(joined, np.uint8) == 0)).max()) - 1
    limits.check("path_bytes", path, f"{layer}: bytes of a path")
    if path >= limits.path_depth:
        limits.check("path_depth", max(p.count(b"/") for p in paths) + 1, f"{layer}: folders of a path")


def target(name: bytes, path: bytes, layer: str, limits: Limits) -> bytes:
    """Return the normalised target ``name`` of the hard link ``path``.

    Raises:
        UnsafeEntry: one that climbs, names the root, the link itself or a whiteout.
        LimitExceeded: too long.
    """
    if not name:
        raise UnsafeEntry(layer, path, "a hard link without a target")
    try:
        clean = normalise(name, layer)
    except UnsafeEntry as e:
        raise UnsafeEntry(layer, path, f"a hard link to {name[:80]!r}: {e.why}") from e
    limits.check("link_target_bytes", len(clean), f"{layer}: bytes of a hard link's target")
    if clean in (b"", path):
        raise UnsafeEntry(layer, path, "a hard link to itself" if clean else "a hard link to the root folder")
    if any(part.startswith(WHITEOUT_PREFIX) for part in clean.split(b"/")):
        raise UnsafeEntry(layer, path, f"a hard link to the whiteout {clean!r}")
    return clean


def whiteout(path: bytes, kind: Kind, layer: str) -> tuple[bytes, Kind] | None:
    """Return what the entry ``path``, which has ``.wh.`` in it, means: its path and kind.

    None stands for what AUFS left behind (``.wh..wh.plnk`` and the like), which is to be dropped.
    (OCI image-spec, layer.md, "Whiteouts".)

    Raises:
        UnsafeEntry: a whiteout of nothing, ``.`` or ``..``; a whiteout that is a folder.
    """
    parent, slash, name = path.rpartition(b"/")
    for part in parent.split(b"/"):
        if part.startswith(_AUFS_PREFIX) and part != OPAQUE_NAME:
            return None
        if part.startswith(WHITEOUT_PREFIX):
            raise UnsafeEntry(layer, path, "a whiteout that is used as a folder")
    if not name.startswith(WHITEOUT_PREFIX):
        return path, kind
    if name.startswith(_AUFS_PREFIX) and name != OPAQUE_NAME:
        return None
    # AUFS made every whiteout a hard link to one file, and its layers are still about.
    if kind not in (Kind.REG, Kind.HARDLINK):
        raise UnsafeEntry(layer, path, "a whiteout that is not a regular file")
    if name == OPAQUE_NAME:
        return parent, Kind.OPAQUE
    victim = name[len(WHITEOUT_PREFIX) :]
    if victim in (b"", b".", b".."):
        raise UnsafeEntry(layer, path, f"a whiteout of {victim.decode() or 'an empty name'}")
    return parent + slash + victim, Kind.WHITEOUT
