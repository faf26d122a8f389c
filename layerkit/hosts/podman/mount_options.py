"""What containers-storage asks of a mount program, as values: ``-o OPTIONS TARGET``.

The options are those of overlayfs and of fuse-overlayfs (fuse-overlayfs(1)), whose place we take. Maps come as
``uidmapping=C:H:N:C:H:N…`` with a colon too many at either end. Only the standard library: a container waits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from layerkit.formats.overlay_options import FEATURE_KEYS, OverlayOptions
from layerkit.idmap import IdMap, Mapping, parse_id
from layerkit.model.errors import UsageError

OVERFLOW_ID = 65534

_MOUNT_FLAGS = (
    "noexec", "nodev", "nosuid", "noatime", "nodiratime", "relatime", "exec", "dev", "suid", "atime", "rw", "ro",
)  # fmt: skip
_OF_FUSE_OVERLAYFS = (
    "allow_root", "allow_other", "default_permissions", "static_nlink", "noacl", "clone_fd", "max_threads",
    "max_idle_threads", "threaded", "fsync", "timeout", "fast_ino", "writeback", "noxattrs", "disable_xattrs",
    "auto_unmount", "debug", "fsname", "subtype",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Options:
    """What is to be mounted.

    Attributes:
        lower: layer folders, top first.
        upper, work: of a writable mount, else "".
        mapping: of owners; the host ids are those of the mount program's user namespace.
        read_only: no upper, or ``ro``.
        attributes: words of the mount itself, such as ``noexec``.
        overlay: options for overlayfs as (key, value or None).
        rendering: ``auto``, ``fuse`` or ``directory``.
        notes: what was asked for and has no effect here, as text for a person.
    """

    lower: tuple[str, ...]
    upper: str
    work: str
    mapping: Mapping
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
    rendering = "auto"
    attributes, overlay, notes = list[str](), list[tuple[str, str | None]](), list[str]()
    sides = {"uid": IdMap.identity(), "gid": IdMap.identity()}
    squash: dict[str, IdMap] = {}
    overflow: int | None = None
    asked = OverlayOptions.parse(text)
    for key, given in asked.more:
        word, value = key if given is None else f"{key}={given}", given or ""
        if key == "rendering":
            rendering = value
        elif key in ("uidmapping", "gidmapping"):
            if value.strip(":"):
                sides[key[:3]] = IdMap.parse([value.strip(":")], what=key)
        elif key in ("squash_to_uid", "squash_to_gid"):
            squash[key[-3:]] = IdMap.everything(parse_id(value, key))
        elif key == "squash_to_root":
            squash = {"uid": IdMap.everything(0), "gid": IdMap.everything(0)}
        elif key == "overflow_id":
            overflow = parse_id(value, key) if value else None
        elif key in _MOUNT_FLAGS:
            attributes.append(key)
        elif key == "volatile":
            overlay.append(("volatile", None))
        elif key in ("context", "fscontext", "defcontext", "rootcontext"):
            overlay.append((key, value))
        elif key == "xattr_permissions" and value not in ("", "0"):
            raise UsageError(
                f"{word}: owners kept in xattrs (force_mask in storage.conf) are not supported; remove it, "
                "or use fuse-overlayfs as mount_program"
            )
        elif key in FEATURE_KEYS:
            notes.append(f"{word}: chosen by layerkit itself; ignored")
        elif key not in _OF_FUSE_OVERLAYFS and key != "xattr_permissions":
            notes.append(f"{word}: unknown option, ignored")
    lower = asked.lower + asked.data
    if not lower:
        raise UsageError("-o: no lowerdir=FOLDER[:FOLDER…], top layer first")
    if bool(asked.upper) != bool(asked.work):
        raise UsageError("-o: upperdir and workdir go together")
    if rendering not in ("auto", "fuse", "directory"):
        raise UsageError(f"rendering={rendering}: want auto, fuse or directory")
    read_only = not asked.upper or "ro" in attributes
    mapping = Mapping(**(sides | squash), overflow=overflow)
    return Options(
        lower, asked.upper, asked.work, mapping, read_only, tuple(attributes), tuple(overlay), rendering,
        tuple(notes),
    )  # fmt: skip


def shift_text(mapping: Mapping) -> str:
    """Return a text for what ``mapping`` shifts, equal for equal maps; "" where every id is kept."""
    # What lies outside a map of equal ids is an error even then, but nothing has to be shifted for it.
    sides = (("uid", mapping.uid), ("gid", mapping.gid))
    return ";".join(
        f"{kind}={one}" for kind, one in sides if one.rest is not None or any(c != h for c, h, _ in one.extents)
    )


def parse_shift(text: str) -> Mapping:
    """Return the mapping that :func:`shift_text` wrote as ``text``.

    Raises:
        UsageError: it did not.
    """
    sides = {"uid": IdMap.identity(), "gid": IdMap.identity()}
    for part in text.split(";") if text else ():
        kind, _, value = part.partition("=")
        if value.startswith("all:"):
            sides[kind] = IdMap.everything(parse_id(value[4:], part))
        else:
            sides[kind] = IdMap.parse([value], what=part)
    return Mapping(sides["uid"], sides["gid"])


def shifted_back(mapping: Mapping) -> Mapping:
    """Return the mapping from the owners in a mount back to those in the layers.

    What no map gives out becomes 65534, the kernel's overflow id, but for 0: what podman itself makes in a
    container's folder is root's.
    """
    return Mapping(_back(mapping.uid), _back(mapping.gid), OVERFLOW_ID)


def _back(one: IdMap) -> IdMap:
    if one.rest is not None:
        return IdMap.everything(0)
    back = one.inverse().extents
    return IdMap.of(back if any(c == 0 for c, _, _ in back) else [(0, 0, 1), *back], squash=True)
