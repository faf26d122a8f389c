"""The one reader of /etc/subuid and /etc/subgid (subuid(5)): the subordinate ids of a user."""

from __future__ import annotations

import pwd
from pathlib import Path

from layerkit.idmap import IdMap, is_id
from layerkit.model.errors import UsageError

_FILES = {"uid": Path("/etc/subuid"), "gid": Path("/etc/subgid")}


def subid_map(user: str, kind: str = "uid", path: Path | None = None, *, first: int = 0) -> IdMap:
    """Return the map that gives container ids ``first``, ``first`` + 1, … to the subordinate ids of a user.

    The ranges follow one another in the order of the file, as ``podman run --subuidname`` has them.

    Args:
        user: user name, or a user id in digits; the file may name the user either way.
        kind: ``uid`` or ``gid``.
        path: the file, where it is not ``/etc/subuid`` or ``/etc/subgid``.
        first: the first container id.

    Raises:
        UsageError: the file cannot be read, has no range for the user, or a malformed one.
    """
    source = path if path is not None else _FILES[kind]
    try:
        lines = source.read_text("utf-8", "surrogateescape").splitlines()
    except OSError as error:
        raise UsageError(f"{source}: {error.strerror}; give the map with --{kind}-map instead") from error
    owners = _names_of(user)
    ranges: list[tuple[int, int]] = []
    for number, line in enumerate(lines, 1):
        fields = line.strip().split(":")
        if line.startswith("#") or fields[0] not in owners:
            continue
        if len(fields) != 3 or not all(map(is_id, fields[1:])):
            raise UsageError(f"{source}, line {number}: want NAME:FIRST:SIZE, found {line!r}")
        ranges.append((int(fields[1]), int(fields[2])))
    ranges = [(start, size) for start, size in ranges if size]
    if not ranges:
        raise UsageError(f"{source}: no range for {user!r}; `usermod --add-sub{kind}s FIRST-LAST` adds one")
    return IdMap.of_ranges(ranges, first=first, what=str(source))


def _names_of(user: str) -> set[str]:
    """Return the name and the uid of ``user``, as far as the host knows them."""
    names = {user} - {""}
    try:
        entry = pwd.getpwuid(int(user)) if is_id(user) else pwd.getpwnam(user)
    except (KeyError, OverflowError):
        return names
    return names | {entry.pw_name, str(entry.pw_uid)}
