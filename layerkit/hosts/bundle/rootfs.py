"""What a bundle takes from its mounted root filesystem, and what it needs there: users, folders, volumes."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from layerkit.formats.runtime import passwd
from layerkit.linux.folders.walk import walk
from layerkit.linux.inside import make_folders, open_inside, read_inside
from layerkit.linux.syscalls import Run, closing, copy_run
from layerkit.model.errors import InvalidImage

_ACCOUNT_BYTES = 16 << 20


def user_of(root: int, spec: str, what: str) -> passwd.User:
    """Return the user that ``spec`` names in the root filesystem ``root`` (a descriptor of its folder)."""
    return passwd.resolve(
        spec, read_inside(root, "/etc/passwd", _ACCOUNT_BYTES), read_inside(root, "/etc/group", _ACCOUNT_BYTES),
        what=what,
    )  # fmt: skip


def need_folder(root: int, path: str, owner: tuple[int, int]) -> None:
    """Make the folder ``path`` in the root filesystem if it is missing, owned by ``owner`` (host ids)."""
    os.close(make_folders(root, path, *owner))


def seed_volume(root: int, path: str, target: Path, owner: tuple[int, int]) -> None:
    """Make ``target`` a copy of the folder ``path`` of the root filesystem: attributes, and what is in it.

    Where the image has no such folder, ``target`` is an empty one of ``owner`` (host ids), mode 0755.

    Raises:
        InvalidImage: something else than a folder lies there.
    """
    target.mkdir(mode=0o700)
    try:
        source = open_inside(root, path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise InvalidImage(f"the image's volume {path} is not a folder in the image") from error
        if error.errno != errno.ENOENT:
            raise
        os.chown(target, *owner)
        target.chmod(0o755)
        return
    with closing(source):
        _copy(source, os.fsencode(target))


def _copy(source: int, target: bytes) -> None:
    """Copy what is in a folder into the folder ``target``; links between its files stay links."""
    at = b"/proc/self/fd/%d/" % source
    links: dict[tuple[int, int], bytes] = {}
    made = [(b"", os.fstat(source))]
    for folder in walk(source):
        for name, shown in folder.names:
            path = folder.below(name)
            copy = os.path.join(target, path)
            first = links.setdefault((shown.st_dev, shown.st_ino), copy)
            if stat.S_ISDIR(shown.st_mode):
                os.mkdir(copy, 0o700)
            elif first != copy:
                os.link(first, copy, follow_symlinks=False)
                continue
            elif stat.S_ISREG(shown.st_mode):
                with Path(os.fsdecode(at + path)).open("rb") as old, Path(os.fsdecode(copy)).open("xb") as new:
                    copy_run(Run(old.fileno(), 0, 0, shown.st_size), new.fileno())
            elif stat.S_ISLNK(shown.st_mode):
                os.symlink(os.readlink(at + path), copy)
            else:
                os.mknod(copy, stat.S_IFMT(shown.st_mode) | 0o600, shown.st_rdev)
            made.append((path, shown))
    # Folders after what is in them, which changes their times.
    for path, shown in reversed(made):
        _attributes(at + path, os.path.join(target, path), shown)


def _attributes(source: bytes, target: bytes, shown: os.stat_result) -> None:
    # chown clears setuid and capabilities, so it goes first (overlayfs and chown(2)).
    follow = stat.S_ISDIR(shown.st_mode)
    os.chown(target, shown.st_uid, shown.st_gid, follow_symlinks=follow)
    if not stat.S_ISLNK(shown.st_mode):
        os.chmod(target, stat.S_IMODE(shown.st_mode))
    with contextlib.suppress(OSError):  # no xattrs on this kind of file
        for name in os.listxattr(source, follow_symlinks=follow):
            if name != "security.selinux":
                value = os.getxattr(source, name, follow_symlinks=follow)
                os.setxattr(target, name, value, follow_symlinks=follow)
    os.utime(target, ns=(shown.st_atime_ns, shown.st_mtime_ns), follow_symlinks=follow)
