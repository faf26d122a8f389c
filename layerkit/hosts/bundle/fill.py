"""What a bundle takes from the mounted root filesystem, and what it needs there: users, folders, volumes."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from layerkit.formats.runtime import passwd
from layerkit.linux.inside import make_folders, open_inside, read_inside
from layerkit.linux.syscalls import copy_range
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
    try:
        _Copy().folder(f"/proc/self/fd/{source}", str(target))
    finally:
        os.close(source)


@dataclass(slots=True)
class _Copy:
    """A copy of one tree; links between its files stay links."""

    links: dict[tuple[int, int], str] = field(default_factory=dict)

    def folder(self, source: str, target: str) -> None:
        with os.scandir(source) as entries:
            for entry in entries:
                self.entry(os.path.join(source, entry.name), os.path.join(target, entry.name))
        _attributes(source, target, os.stat(source))

    def entry(self, source: str, target: str) -> None:
        shown = os.lstat(source)
        kind = stat.S_IFMT(shown.st_mode)
        if kind == stat.S_IFDIR:
            os.mkdir(target, 0o700)
            self.folder(source, target)
            return
        first = self.links.get((shown.st_dev, shown.st_ino))
        if first is not None:
            os.link(first, target, follow_symlinks=False)
            return
        if kind == stat.S_IFREG:
            _content(source, target, shown.st_size)
        elif kind == stat.S_IFLNK:
            os.symlink(os.readlink(source), target)
        else:
            os.mknod(target, kind | 0o600, shown.st_rdev)
        if shown.st_nlink > 1:
            self.links[shown.st_dev, shown.st_ino] = target
        _attributes(source, target, shown)


def _content(source: str, target: str, size: int) -> None:
    with Path(source).open("rb") as old, Path(target).open("xb") as new:
        copy_range(old.fileno(), new.fileno(), size)


def _attributes(source: str, target: str, shown: os.stat_result) -> None:
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
