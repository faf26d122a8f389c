"""One digest over all that a folder shows, whatever order the kernel lists it in."""

from __future__ import annotations

import hashlib
import os
import stat
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from layerkit.linux.folders.walk import DiskUsage, walk, xattr_path
from layerkit.metaonly import METACOPY, REDIRECT, REDIRECT_BYTES, Namespace
from layerkit.model.errors import StoreError, show_path

_MODULUS = 1 << 256


class Listing(NamedTuple):
    """What :func:`list_folder` found: a digest over all entries, their number, the disk space they take."""

    digest: str
    entries: int
    allocated_bytes: int


def list_folder(root: Path, stubs: Namespace | None = None, *, by_path: bool = False) -> Listing:
    """Take every entry below ``root`` into one digest: path, type, mode, owner, size, mtime, device, target.

    Xattrs are left out: reading them would take half as long again as writing the folder did. The sum of the
    entries' sha256 does not depend on their order, so nothing need be kept or sorted. It finds damage; it is
    no proof against an attacker, who could not get into the store's root folder in the first place.

    Args:
        root: the folder.
        stubs: check also that every file that is not empty is a stub of this namespace.
        by_path: such stubs name their data by its path, which is the stub's own, or by none; else by its content.

    Raises:
        StoreError: one is not.
    """
    total, usage, count = 0, DiskUsage(), 0
    for folder in walk(root):
        names = folder.names if folder.path else chain([(b"", os.fstat(folder.fd))], folder.names)
        for name, facts in names:
            path, target = folder.below(name) if name else b"", b""
            if stat.S_ISLNK(facts.st_mode):
                target = os.readlink(name, dir_fd=folder.fd)
            elif stubs is not None and stat.S_ISREG(facts.st_mode) and facts.st_size:
                redirect = _redirect(xattr_path(folder.fd, name), path, stubs, by_path)
                # Of a file with several names only the first is named.
                own = facts.st_nlink > 1 or redirect in (b"", b"/" + path)
                content = len(redirect) == REDIRECT_BYTES and redirect.startswith(b"/:")
                if not (own if by_path else content):
                    where = show_path(redirect)
                    raise StoreError(f"root: {show_path(path)}: a stub that leads nowhere ({where})")
            total += _entry(path, facts, target)
            usage.add(facts)
            count += 1
    return Listing(f"{total % _MODULUS:064x}", count, usage.allocated_bytes)


def _entry(path: bytes, facts: os.stat_result, target: bytes) -> int:
    is_file = stat.S_ISREG(facts.st_mode)
    numbers = b"%d %d %d %d %d %d %d" % (
        facts.st_mode, facts.st_uid, facts.st_gid, facts.st_size if is_file else 0, facts.st_mtime_ns,
        facts.st_rdev, 0 if stat.S_ISDIR(facts.st_mode) else facts.st_nlink,
    )  # fmt: skip
    # Neither a path nor a target holds a NUL.
    return int.from_bytes(hashlib.sha256(b"%b\0%b\0%b" % (path, target, numbers)).digest(), "little")


def _redirect(place: bytes, path: bytes, namespace: Namespace, by_path: bool) -> bytes:
    """Return where a stub says that its data is; ``b""``, for below itself, is taken only ``by_path``."""
    try:
        metacopy = os.getxattr(place, namespace.xattr(METACOPY))
        redirect = b""
        if not by_path or os.fsdecode(namespace.xattr(REDIRECT)) in os.listxattr(place):
            redirect = os.getxattr(place, namespace.xattr(REDIRECT))
    except OSError as error:
        raise StoreError(f"root: {show_path(path)}: not a stub ({error.strerror})") from error
    if len(metacopy) not in (0, 4):
        raise StoreError(f"root: {show_path(path)}: not a stub (overlay.metacopy of {len(metacopy)} bytes)")
    return redirect
