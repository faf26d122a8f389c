"""What containers-storage asks of a mount program, as values: ``-o OPTIONS TARGET``.

The options are those of overlayfs and of fuse-overlayfs (fuse-overlayfs(1)), whose place we take. Maps come as
``uidmapping=C:H:N:C:H:N…`` with a colon too many at either end. Only the standard library: a container waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from layerkit.model.errors import UnmappedId, UsageError

MAX_ID = (1 << 32) - 2
OVERFLOW_ID = 65534
Extent = tuple[int, int, int]
"""(container id, id in the mount program's user namespace, count)."""

_MOUNT_FLAGS = (
    "noexec",
    "nodev",
    "nosuid",
    "noatime",
    "nodiratime",
    "relatime",
    "exec",
    "dev",
    "suid",
    "atime",
    "rw",
)
_OF_FUSE_OVERLAYFS = (
    "allow_root", "allow_other", "default_permissions", "static_nlink", "noacl", "clone_fd", "max_threads",
    "max_idle_threads", "threaded", "fsync", "timeout", "fast_ino", "writeback", "noxattrs", "disable_xattrs",
    "auto_unmount", "debug", "fsname", "subtype",
)  # fmt: skip
_OF_OVERLAYFS = ("metacopy", "redirect_dir", "index", "xino", "userxattr", "nfs_export", "uuid", "verity")


@dataclass(frozen=True, slots=True)
class IdMaps:
    """How owners in the layers become owners in the mount.

    Attributes:
        uid, gid: extents; none keeps every id.
        squash_uid, squash_gid: the one id that everything belongs to instead.
        overflow: id for owners outside the extents; None makes them an error.
    """

    uid: tuple[Extent, ...] = ()
    gid: tuple[Extent, ...] = ()
    squash_uid: int | None = None
    squash_gid: int | None = None
    overflow: int | None = None

    @property
    def canonical(self) -> str:
        """Return a text that is equal for equal maps, "" where every id is kept."""
        parts = []
        for kind, extents, squash in (("uid", self.uid, self.squash_uid), ("gid", self.gid, self.squash_gid)):
            if squash is not None:
                parts.append(f"{kind}=all:{squash}")
            elif extents and not _is_identity(extents):
                parts.append(f"{kind}=" + ",".join(f"{c}:{h}:{n}" for c, h, n in sorted(extents)))
        return ";".join(parts)

    @classmethod
    def parse(cls, text: str) -> IdMaps:
        """Return the maps that :attr:`canonical` wrote as ``text``.

        Raises:
            UsageError: it did not.
        """
        found: dict[str, tuple[tuple[Extent, ...], int | None]] = {}
        for part in text.split(";") if text else ():
            kind, _, value = part.partition("=")
            if value.startswith("all:"):
                found[kind] = ((), _id(value[4:], part))
            else:
                found[kind] = (extents(value.replace(",", ":"), part), None)
        (uid, squash_uid), (gid, squash_gid) = (found.get(kind, ((), None)) for kind in ("uid", "gid"))
        return cls(uid, gid, squash_uid, squash_gid)

    def inverse(self) -> IdMaps:
        """Return the maps from the owners in a mount back to those in the layers.

        What no map gives out becomes 65534, the kernel's overflow id, but for 0: what podman itself makes in a
        container's folder is root's.
        """
        uid, gid = (
            (*((host, container, count) for container, host, count in side), *_roots(side))
            for side in (self.uid, self.gid)
        )
        squash_uid, squash_gid = (None if squash is None else 0 for squash in (self.squash_uid, self.squash_gid))
        return IdMaps(uid, gid, squash_uid, squash_gid, OVERFLOW_ID)

    def table(self, ids: Iterable[int], kind: str) -> dict[int, int]:
        """Return the id to show for each of ``ids`` (``kind`` is ``uid`` or ``gid``).

        Raises:
            UnmappedId: one lies outside, and no overflow id was given; its path is left empty.
        """
        map_extents, squash = (self.uid, self.squash_uid) if kind == "uid" else (self.gid, self.squash_gid)
        return {number: self._one(number, map_extents, squash, kind) for number in ids}

    def one(self, kind: str, number: int) -> int:
        """Return the id for one inside an xattr; ``kind`` begins with ``uid``, ``gid`` or ``rootid``."""
        if kind.startswith("gid"):
            return self._one(number, self.gid, self.squash_gid, kind)
        return self._one(number, self.uid, self.squash_uid, kind)

    def _one(self, number: int, map_extents: tuple[Extent, ...], squash: int | None, kind: str) -> int:
        if squash is not None:
            return squash
        if not map_extents:
            return number
        for container, host, count in map_extents:
            if container <= number < container + count:
                return host + number - container
        if self.overflow is None:
            shown = ", ".join(f"{c}:{h}:{n}" for c, h, n in map_extents)
            raise UnmappedId(b"", kind, number, shown)
        return self.overflow


@dataclass(frozen=True, slots=True)
class Options:
    """What is to be mounted.

    Attributes:
        lower: layer folders, top first.
        upper, work: of a writable mount, else "".
        maps: for owners.
        read_only: no upper, or ``ro``.
        attributes: words of the mount itself, such as ``noexec``.
        overlay: options for overlayfs as (key, value or None).
        rendering: ``auto``, ``fuse`` or ``directory``.
        notes: what was asked for and has no effect here, as text for a person.
    """

    lower: tuple[str, ...]
    upper: str
    work: str
    maps: IdMaps
    read_only: bool
    attributes: tuple[str, ...] = ()
    overlay: tuple[tuple[str, str | None], ...] = ()
    rendering: str = "auto"
    notes: tuple[str, ...] = field(default=())


def parse(text: str) -> Options:
    """Return what the option string ``text`` asks for.

    Raises:
        UsageError: no lower folder, a map that is none, or an option that would change what is shown and that
            we cannot follow (``xattr_permissions``).
    """
    values: dict[str, str] = {}
    attributes, overlay, notes = list[str](), list[tuple[str, str | None]](), list[str]()
    squash: dict[str, int] = {}
    for word in split_unescaped(text, ","):
        key, _, value = word.partition("=")
        if key in ("lowerdir", "upperdir", "workdir", "uidmapping", "gidmapping", "overflow_id", "rendering"):
            values[key] = value
        elif key in ("squash_to_uid", "squash_to_gid"):
            squash[key[-3:]] = _id(value, word)
        elif key == "squash_to_root":
            squash = {"uid": 0, "gid": 0}
        elif key == "ro" or key in _MOUNT_FLAGS:
            attributes.append(key)
        elif key == "volatile":
            overlay.append(("volatile", None))
        elif key in ("context", "fscontext", "defcontext", "rootcontext"):
            overlay.append((key, value.strip('"')))
        elif key == "xattr_permissions" and value not in ("", "0"):
            raise UsageError(
                f"{word}: owners kept in xattrs (force_mask in storage.conf) are not supported; take it out, "
                "or use fuse-overlayfs as mount_program"
            )
        elif key in _OF_OVERLAYFS:
            notes.append(f"{word}: chosen by layerkit itself; ignored")
        elif key not in _OF_FUSE_OVERLAYFS and key != "xattr_permissions" and word:
            notes.append(f"{word}: unknown option, ignored")
    lower = tuple(part for part in split_unescaped(values.get("lowerdir", ""), ":") if part)
    if not lower:
        raise UsageError("-o: no lowerdir=FOLDER[:FOLDER…], top layer first")
    upper, work = values.get("upperdir", ""), values.get("workdir", "")
    if bool(upper) != bool(work):
        raise UsageError("-o: upperdir and workdir go together")
    overflow = values.get("overflow_id")
    maps = IdMaps(
        extents(values.get("uidmapping", ""), "uidmapping"),
        extents(values.get("gidmapping", ""), "gidmapping"),
        squash.get("uid"),
        squash.get("gid"),
        _id(overflow, "overflow_id") if overflow else None,
    )
    rendering = values.get("rendering", "auto")
    if rendering not in ("auto", "fuse", "directory"):
        raise UsageError(f"rendering={rendering}: want auto, fuse or directory")
    read_only = not upper or "ro" in attributes
    return Options(
        lower, upper, work, maps, read_only, tuple(attributes), tuple(overlay), rendering, tuple(notes)
    )  # fmt: skip


def extents(text: str, what: str) -> tuple[Extent, ...]:
    """Return the extents of ``C:H:N:C:H:N…``; colons at the ends do no harm.

    Raises:
        UsageError: not threes of numbers, beyond the last id, or overlapping on either side.
    """
    words = [word for word in text.split(":") if word]
    if len(words) % 3:
        raise UsageError(f"{what}={text}: want threes of container id, id, count")
    numbers = [_id(word, what) for word in words]
    found = tuple(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
    for side in (0, 1):
        runs = sorted((extent[side], extent[side] + extent[2]) for extent in found)
        if any(count <= 0 for *_, count in found) or any(end > MAX_ID + 1 for _, end in runs):
            raise UsageError(f"{what}={text}: a count of 0, or ids above {MAX_ID}")
        if any(end > start for (_, end), (start, _) in pairwise(runs)):
            raise UsageError(f"{what}={text}: ranges overlap")
    return found


def split_unescaped(text: str, separator: str) -> list[str]:
    r"""Split at ``separator`` except after a backslash and inside double quotes; ``\:`` becomes ``:``."""
    parts, here, quoted, escaped = list[str](), list[str](), False, False
    for char in text:
        if escaped:
            here.append(char if char in (separator, "\\") else "\\" + char)
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == separator and not quoted:
            parts.append("".join(here))
            here.clear()
        else:
            quoted ^= char == '"'
            here.append(char)
    parts.append("".join(here) + ("\\" if escaped else ""))
    return parts


def _roots(side: tuple[Extent, ...]) -> tuple[Extent, ...]:
    """Return the extent that keeps 0, unless ``side`` gives 0 out."""
    return () if not side or any(host == 0 for _, host, _ in side) else ((0, 0, 1),)


def _is_identity(map_extents: tuple[Extent, ...]) -> bool:
    # What lies outside is an error even then, but nothing has to be shifted for it.
    return all(container == host for container, host, _ in map_extents)


def _id(text: str, what: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > MAX_ID + 1:
        raise UsageError(f"{what}: {text!r} is no id")
    return int(text)
