"""A new folder that appears under its name when it is whole, and otherwise not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from layerkit.linux.durable import NEW, staging_beside
from layerkit.linux.folders.walk import FOLDER
from layerkit.model.errors import StoreError, UsageError


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[int]:
    """Give a descriptor of a new folder that becomes ``target`` if the block ends well, and is removed if not.

    Until then nobody else can enter it, see :class:`~layerkit.linux.durable.Staging`. An empty folder at
    ``target`` is replaced.

    Raises:
        UsageError: ``target`` cannot be made, or is not an empty folder.
        StoreError: another process writes to it just now.
    """
    # Not resolve(): that would follow a link at the end.
    target = Path(os.path.abspath(target))
    check_target(target)
    with staging_beside(target) as staging:
        if staging.others:
            raise StoreError(f"{target}: another process writes to this place just now; wait for it")
        os.mkdir(NEW, 0o700, dir_fd=staging.fd)
        fd = os.open(NEW, FOLDER, dir_fd=staging.fd)
        try:
            yield fd
        finally:
            os.close(fd)
        try:
            staging.publish(target.name)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise UsageError(
                    f"{target}: something was put there meanwhile; nothing of it was touched"
                ) from error
            raise


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
