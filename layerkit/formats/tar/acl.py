"""POSIX ACLs as text (star's SCHILY.acl.access and .default PAX records) to the kernel's xattr form."""

from __future__ import annotations

from layerkit.model import acl_caps as acl

ACL_XATTRS = dict(zip((b"SCHILY.acl.access", b"SCHILY.acl.default"), acl.ACL_NAMES, strict=True))

_TAGS = {
    b"user": (acl.USER_OBJ, acl.USER), b"group": (acl.GROUP_OBJ, acl.GROUP), b"mask": (acl.MASK, acl.MASK),
    b"other": (acl.OTHER, acl.OTHER),
}  # fmt: skip
_TAGS |= {word[:1]: tags for word, tags in _TAGS.items()}


class NamedIds(ValueError):
    """An ACL names users or groups that only the machine that wrote it can translate."""


def from_text(text: bytes) -> bytes:
    """Return the xattr value of the ACL that ``text`` spells, b"" if it says no more than a mode does.

    Entries are separated by commas or newlines; ``tag:qualifier:perms``, with the numeric id of a named
    qualifier as an optional fourth field (star).

    Raises:
        NamedIds: a qualifier that is a name without its number.
        ValueError: not an ACL, or one that the kernel would refuse.
    """
    entries: dict[tuple[int, int], int] = {}
    for item in text.replace(b"\n", b",").split(b","):
        entry = item.partition(b"#")[0].strip()
        if not entry:
            continue
        fields = entry.split(b":")
        if len(fields) not in (3, 4) or fields[0] not in _TAGS:
            raise ValueError(f"not an ACL entry: {entry!r}")
        own, named = _TAGS[fields[0]]
        qualifier = fields[1]
        ident = acl.NO_ID
        tag = own
        if qualifier:
            if own == named:
                raise ValueError(f"{fields[0]!r} takes no name: {entry!r}")
            tag = named
            ident = _id(fields[3] if len(fields) == 4 and fields[3] else qualifier)
        if (tag, ident) in entries:
            raise ValueError(f"two entries for {entry!r}")
        entries[tag, ident] = _permissions(fields[2])
    tags = [tag for tag, _ in entries]
    if any(tags.count(tag) != 1 for tag in (acl.USER_OBJ, acl.GROUP_OBJ, acl.OTHER)):
        raise ValueError("an ACL needs one entry each for the owner, the group and all others")
    if (acl.USER in tags or acl.GROUP in tags) and acl.MASK not in tags:
        raise ValueError("an ACL with named entries needs a mask")
    if len(entries) == 3:
        return b""
    return acl.encode_acl(acl.AclEntry(tag, entries[tag, ident], ident) for tag, ident in sorted(entries))


def _id(text: bytes) -> int:
    if not text.isdigit():
        raise NamedIds(f"the ACL names {text!r} without its number")
    value = int(text[:12])
    if value >= acl.NO_ID:
        raise ValueError(f"the ACL has id {value}")
    return value


def _permissions(text: bytes) -> int:
    """Return the bits of ``rwx`` text, with ``-`` for those that are off."""
    bits = 0
    for letter in text:
        place = b"xwr".find(letter)
        if place < 0 and letter != ord("-"):
            raise ValueError(f"not permissions: {text!r}")
        bits |= 1 << place if place >= 0 else 0
    return bits
