"""One digest over all that a folder shows, whatever order the kernel lists it in."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import NamedTuple

_MODULUS = 1 << 256


class Listing(NamedTuple):
    """What :func:`list_folder` found: a digest over all entries, their number, the disk space they take."""

    digest: str
    entries: int
    allocated_bytes: int


def list_folder(root: Path) -> Listing:
    """Take every entry below ``root`` into one digest: path, type, mode, owner, size, mtime, xattrs, target.

    The content of files is left out: stubs have none. The sum of the entries' sha256 does not depend on
    their order, so nothing need be kept or sorted. It finds damage; it is no proof against an attacker,
    who could not get into the store's root folder in the first place.
    """
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        waiting = [b""]
        facts = os.fstat(top)
        total = int.from_bytes(_entry(b"", facts, b"/proc/self/fd/%d" % top), "little")
        count, blocks = 1, facts.st_blocks
        links: set[int] = set()
        while waiting:
            folder = waiting.pop()
            # Relative to the top: a path of an image fits, with the store's own before it it might not.
            fd = os.open(folder or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
            try:
                here = b"/proc/self/fd/%d/" % fd
                for name in map(os.fsencode, os.listdir(fd)):
                    facts = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    path = folder + b"/" + name if folder else name
                    if stat.S_ISDIR(facts.st_mode):
                        waiting.append(path)
                    total += int.from_bytes(_entry(path, facts, here + name), "little")
                    count += 1
                    # A file of several names takes its space once.
                    if facts.st_nlink == 1 or stat.S_ISDIR(facts.st_mode) or facts.st_ino not in links:
                        blocks += facts.st_blocks
                        links.add(facts.st_ino)
            finally:
                os.close(fd)
    finally:
        os.close(top)
    return Listing(f"{total % _MODULUS:064x}", count, blocks * 512)


def _entry(path: bytes, facts: os.stat_result, place: bytes) -> bytes:
    kind = stat.S_IFMT(facts.st_mode)
    size = facts.st_size if kind == stat.S_IFREG else 0
    follow = not path  # the top is named by its descriptor, and that is a link
    parts = [
        path,
        b"%d %d %d %d %d %d" % (facts.st_mode, facts.st_uid, facts.st_gid, size, facts.st_mtime_ns, facts.st_rdev),
        os.fsencode(os.readlink(place)) if kind == stat.S_IFLNK else b"",
    ]
    for name in sorted(os.listxattr(place, follow_symlinks=follow)):
        parts += (os.fsencode(name), os.getxattr(place, name, follow_symlinks=follow))
    h = hashlib.sha256()
    for part in parts:
        h.update(len(part).to_bytes(8, "little") + part)
    return h.digest()
