"""A new folder that appears under its name when it is whole, and otherwise not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from layerkit.linux.durable import remove
from layerkit.linux.folders.writer import FOLDER
from layerkit.model.errors import StoreError, UsageError

_SUFFIX = ".layerkit-tmp"


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[int]:
    """Give a descriptor of a new folder that becomes ``target`` if the block ends well, and is removed if not.

    It lies beside ``target`` under a name of its own; one that a killed run left is removed first. An empty
    folder at ``target`` is replaced.

    Raises:
        UsageError: ``target`` cannot be made, or is not an empty folder.
        StoreError: another process unpacks to it just now.
    """
    # Not resolve(): that would follow a link at the end.
    target = Path(os.path.abspath(target))
    check_target(target)
    aside = target.with_name(f".{target.name[:200]}{_SUFFIX}")
    fd = _own_folder(aside)
    try:
        yield fd
        try:
            os.rename(aside, target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise UsageError(
                    f"{target}: something was put there meanwhile; nothing of it was touched"
                ) from error
            raise
    except BaseException:
        remove(aside)
        raise
    finally:
        os.close(fd)


def check_target(target: Path) -> None:
    """Raise unless a folder can be made at ``target`` in one step.

    Raises:
        UsageError: it exists and is no empty folder, it is a mount point, or there is nothing to make it in.
    """
    if target.is_symlink():
        raise UsageError(f"{target}: a symbolic link; name the folder itself")
    if not target.parent.is_dir():
        raise UsageError(f"{target}: there is no folder {target.parent} to make it in")
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"{target}: exists and is no folder; name a new one")
    if target.is_mount():
        raise UsageError(f"{target}: a mount point; name a new folder in it, as {target / 'rootfs'}")
    with os.scandir(target) as entries:
        if any(entries):
            raise UsageError(f"{target}: the folder is not empty; name a new one, or empty it first")


def _own_folder(path: Path) -> int:
    """Make the folder ``path``, locked for as long as the descriptor is open."""
    while True:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        try:
            fd = os.open(path, FOLDER)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise StoreError(f"{path}: another process unpacks to this place just now; wait for it") from None
        try:
            # Whoever had the lock before may have renamed or removed it, and another made a new one.
            same = os.path.samestat(os.fstat(fd), path.lstat())
        except FileNotFoundError:
            same = False
        if same and not os.listdir(fd):
            return fd
        if same:
            remove(path)
        os.close(fd)
