"""The two xattrs whose values hold ids: POSIX ACLs and file capabilities.

Layouts are those of the kernel's ``include/uapi/linux/posix_acl_xattr.h`` and ``capability.h``, little
endian. Bytes in, bytes out; whoever calls knows the path and adds it to an error.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

from layerkit.model.errors import InvalidImage

ACL_NAMES = (b"system.posix_acl_access", b"system.posix_acl_default")
CAPABILITY_NAME = b"security.capability"
ID_NAMES = (*ACL_NAMES, CAPABILITY_NAME)
"""Names of all xattrs that hold ids; fixups of an EROFS image give one by its place here."""

USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32
"""Tags of ACL entries; only USER and GROUP carry an id, the kernel ignores that of the others."""

NO_ID = 0xFFFF_FFFF
"""The id field of an entry that has none."""

_ACL_VERSION = 2
_ACL_ENTRY = struct.Struct("<HHI")
_TAGS = frozenset((USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER))

_FLAGS_MASK = 0x00FF_FFFF
_CAPS_BYTES = {1: 12, 2: 20, 3: 24}

IdMapper = Callable[[str, int], int]
"""Called as (kind, id), kind being ``uid`` or ``gid`` with its place; returns the new id or raises."""


class AclEntry(NamedTuple):
    """One entry of an ACL: a tag, permission bits (rwx = 4, 2, 1) and an id or :data:`NO_ID`."""

    tag: int
    perm: int
    id: int = NO_ID


class Capability(NamedTuple):
    """A file's capabilities.

    Attributes:
        revision: 1, 2 or 3; only 3 stores a ``rootid``.
        flags: low 24 bits of the magic; bit 0 is "effective".
        permitted, inheritable: sets of 64 bits (32 in revision 1).
        rootid: the user that is root in the namespaces where the file has them; 0 before revision 3.
    """

    revision: int
    flags: int
    permitted: int
    inheritable: int
    rootid: int = 0


def decode_acl(value: bytes) -> tuple[AclEntry, ...]:
    """Return the entries of an ACL's xattr value, in order; a bare header is an empty ACL.

    Raises:
        InvalidImage: another version than 2, a part of an entry, an unknown tag or permission bit.
    """
    if len(value) < 4 or (len(value) - 4) % _ACL_ENTRY.size:
        raise InvalidImage(f"an ACL of {len(value)} bytes (want 4 and 8 for each entry)")
    version = int.from_bytes(value[:4], "little")
    if version != _ACL_VERSION:
        raise InvalidImage(f"an ACL of version {version} (want {_ACL_VERSION})")
    entries = tuple(AclEntry(*fields) for fields in _ACL_ENTRY.iter_unpack(value[4:]))
    for entry in entries:
        if entry.tag not in _TAGS:
            raise InvalidImage(f"an ACL entry with the unknown tag {entry.tag:#x}")
        if entry.perm > 7:
            raise InvalidImage(f"an ACL entry with the unknown permission bits {entry.perm:#x}")
    return entries


def encode_acl(entries: Iterable[AclEntry]) -> bytes:
    """Return the xattr value that holds ``entries``: the inverse of :func:`decode_acl`."""
    return _ACL_VERSION.to_bytes(4, "little") + b"".join(_ACL_ENTRY.pack(*entry) for entry in entries)


def map_acl(value: bytes, mapper: IdMapper) -> bytes:
    """Return an ACL's value with the ids of its USER and GROUP entries mapped; their order stays."""
    mapped = []
    for entry in decode_acl(value):
        if entry.tag == USER:
            entry = entry._replace(id=mapper("uid in ACL", entry.id))
        elif entry.tag == GROUP:
            entry = entry._replace(id=mapper("gid in ACL", entry.id))
        mapped.append(entry)
    return encode_acl(mapped)


def decode_capability(value: bytes) -> Capability:
    """Return what a ``security.capability`` value holds.

    Raises:
        InvalidImage: an unknown revision, or a length that is not the revision's.
    """
    magic = int.from_bytes(value[:4], "little")
    revision = magic >> 24
    if len(value) < 4 or len(value) != _CAPS_BYTES.get(revision):
        raise InvalidImage(
            f"a file capability of revision {revision} in {len(value)} bytes "
            "(want revision 1 in 12, 2 in 20 or 3 in 24)"
        )
    words = struct.unpack_from(f"<{(len(value) - 4) // 4}I", value, 4)
    high = words[2:4] if revision > 1 else (0, 0)
    return Capability(
        revision=revision,
        flags=magic & _FLAGS_MASK,
        permitted=words[0] | high[0] << 32,
        inheritable=words[1] | high[1] << 32,
        rootid=words[4] if revision == 3 else 0,
    )


def encode_capability(capability: Capability) -> bytes:
    """Return the xattr value of ``capability``: the inverse of :func:`decode_capability`."""
    low = 0xFFFF_FFFF
    words = [capability.revision << 24 | capability.flags, capability.permitted & low, capability.inheritable & low]
    if capability.revision > 1:
        words += [capability.permitted >> 32, capability.inheritable >> 32]
    if capability.revision > 2:
        words.append(capability.rootid)
    return struct.pack(f"<{len(words)}I", *words)


def map_capability(value: bytes, mapper: IdMapper) -> bytes:
    """Return a capability's value as an idmapped mount shows it.

    Revisions 1 and 2 stand for rootid 0 of the file's namespace, so that id is mapped like one that is
    written out (``get_vfs_caps_from_disk`` in the kernel). What then belongs to root of the host is shown
    as revision 2, everything else as revision 3. Revision 1 is never kept: left as it is, it would give
    its capabilities to root of the host, whatever the map says.
    """
    capability = decode_capability(value)
    rootid = mapper("rootid of file capability", capability.rootid)
    return encode_capability(capability._replace(revision=3 if rootid else 2, rootid=rootid))


def capability_with_rootid(value: bytes) -> bytes:
    """Return a capability's value in revision 3, the form that has room for any rootid.

    Revisions 1 and 2 mean "root of the filesystem's owner", which 3 spells as rootid 0; the kernel shows that
    as revision 2 again.
    """
    return encode_capability(decode_capability(value)._replace(revision=3))


def map_value(name: bytes, value: bytes, mapper: IdMapper) -> bytes:
    """Return the value of the xattr ``name`` with every id in it mapped; other xattrs stay as they are.

    Raises:
        InvalidImage: a malformed value. Whatever ``mapper`` raises passes through.
    """
    if name in ACL_NAMES:
        return map_acl(value, mapper)
    return map_capability(value, mapper) if name == CAPABILITY_NAME else value
