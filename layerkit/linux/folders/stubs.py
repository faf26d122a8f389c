"""A metadata layer as a folder: stubs with xattrs that point at the data."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from layerkit.linux.folders.writer import Advice, FolderWriter, StepFailed, Written, check_names
from layerkit.linux.syscalls import FOLDER, opened
from layerkit.metaonly import METACOPY, METACOPY_EMPTY, REDIRECT, MetadataLayer
from layerkit.model.errors import UnsupportedHost
from layerkit.model.ports import Progress

_ADVICE = Advice(
    what="directory",
    whole="a metadata layer",
    elsewhere="use the EROFS rendering, or a store on another filesystem",
    room="make room, or put the store on a larger filesystem",
)
_NO_XATTRS = (errno.EOPNOTSUPP, errno.EPERM, errno.EACCES)


def write_directory(
    meta: MetadataLayer, root: Path | int, *, progress: Progress | None = None, threads: int | None = None
) -> Written:
    """Write ``meta`` into the empty folder ``root``, which becomes the layer's root directory.

    Nothing is flushed to the disk, and a folder partly written is left where it is on an error: the caller
    knows whether to keep either.

    Args:
        meta: what to write; its ids are those that this process passes to chown.
        root: a folder or a descriptor of one; a path that does not exist is made.
        progress: called as ("directory", entries done, entries in all).
        threads: how many to use; by default one per processor, at most four.

    Raises:
        LossyResult: the folder's filesystem, or a process without privileges, cannot hold an entry exactly.
        StoreError: ``root`` is not empty, or the disk is full.
        UnsupportedHost: the filesystem, or the process, has no xattrs of the layer's namespace.
        InvalidImage: a name that is no path component.
    """
    check_names(meta.tree)
    if not isinstance(root, int):
        root.mkdir(mode=0o700, exist_ok=True)
        with opened(root, FOLDER) as fd:
            return write_directory(meta, fd, progress=progress, threads=threads)
    return FolderWriter(meta.tree, root, _Stubs(meta), _ADVICE, progress).write(threads)


class _Stubs:
    """Fills a file with nothing but its size and the xattrs of a stub."""

    alike = True

    def __init__(self, meta: MetadataLayer) -> None:
        self._meta = meta

    def begin(self, inodes: NDArray[np.integer]) -> Callable[[int, int, int], None]:
        places = iter(self._meta.redirect_list(inodes))
        redirect, metacopy = map(self._meta.namespace.xattr, (REDIRECT, METACOPY))

        def fill(fd: int, inode: int, size: int) -> None:
            place = next(places)
            step = "set the size of"
            try:
                os.ftruncate(fd, size)
                step = "set the redirect of"
                if place:
                    os.setxattr(fd, redirect, place)
                os.setxattr(fd, metacopy, METACOPY_EMPTY)
            except OSError as error:
                if step == "set the redirect of" and error.errno in _NO_XATTRS:
                    raise UnsupportedHost(
                        f"{self._meta.namespace.value} xattrs to this process on the filesystem of the store",
                        "trusted xattrs need CAP_SYS_ADMIN outside of user namespaces: without it, take the "
                        "user namespace",
                    ) from error
                raise StepFailed(step, error) from error

        return fill
