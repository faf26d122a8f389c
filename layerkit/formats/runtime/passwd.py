"""Who ``Config.User`` of an image is, told by the image's own /etc/passwd and /etc/group; the host's never count.

Rules: image-spec, config.md (``User``) and conversion.md (``Config.User``); the files: passwd(5), group(5).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from layerkit.idmap import is_id
from layerkit.model.errors import InvalidImage


@dataclass(frozen=True, slots=True)
class User:
    """Who a process runs as.

    Attributes:
        uid, gid: container ids.
        groups: supplementary container gids, rising.
        home: home folder, "" where passwd does not say.
    """

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    home: str = ""


def resolve(spec: str, passwd: bytes, group: bytes, *, what: str = "Config.User") -> User:
    """Return the user that ``spec`` names: ``""`` (root), ``user``, ``uid``, ``user:group``, ``uid:gid`` and mixed.

    Supplementary groups come from /etc/group for a user given by name and without a group, as the conversion
    document says: a number or a group says what is meant already.

    Args:
        spec: as the image or the caller has it.
        passwd: the image's /etc/passwd, empty where there is none.
        group: the image's /etc/group.
        what: names ``spec`` in errors.

    Raises:
        InvalidImage: a name that the image does not have, or a number that is no id.
    """
    user, _, wanted_group = spec.partition(":")
    named = not is_id(user)
    entry = _find(passwd, user or "0", 2)
    if entry is None and user and named:
        raise InvalidImage(
            f"{what} {spec!r}: /etc/passwd of the image has no user {user!r}; name one that it has with --user, "
            "or a number"
        )
    uid = int(entry[2] if entry else user or "0")
    gid = int(entry[3]) if entry and len(entry) > 3 and is_id(entry[3]) else 0
    groups: tuple[int, ...] = ()
    if wanted_group:
        found = _find(group, wanted_group, 2)
        if found is None and not is_id(wanted_group):
            raise InvalidImage(
                f"{what} {spec!r}: /etc/group of the image has no group {wanted_group!r}; name one that it has "
                "with --user, or a number"
            )
        gid = int(found[2] if found else wanted_group)
    elif entry is not None and named:
        groups = tuple(sorted(_groups_of(group, entry[0])))
    home = entry[5] if entry and len(entry) > 5 and entry[5].startswith("/") else ""
    return User(uid, gid, groups, home)


def _rows(data: bytes) -> Iterator[list[str]]:
    for line in data.splitlines():
        text = line.strip()
        if text and not text.startswith(b"#"):
            yield text.decode("utf-8", "surrogateescape").split(":")


def _find(data: bytes, wanted: str, id_column: int) -> list[str] | None:
    """Return the row called ``wanted``; only if no name is, and it is a number, the first row with that id."""
    by_id = None
    for row in _rows(data):
        if len(row) <= id_column or not is_id(row[id_column]):
            continue
        if row[0] == wanted:
            return row
        if by_id is None and is_id(wanted) and int(row[id_column]) == int(wanted):
            by_id = row
    return by_id


def _groups_of(group: bytes, name: str) -> set[int]:
    return {
        int(row[2])
        for row in _rows(group)
        if len(row) > 3 and is_id(row[2]) and name in (member.strip() for member in row[3].split(","))
    }
