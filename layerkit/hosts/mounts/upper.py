"""The upper layer of an overlay that is new: its root must look like that of the layer beneath."""

from __future__ import annotations

import os
from pathlib import Path

from layerkit.metaonly import Namespace, own_mark


def like_root(folder: Path, root: int, namespace: Namespace) -> None:
    """Make ``folder`` with the owner, mode, xattrs and times of the folder that ``root`` is a descriptor of.

    A merged root is shown from the upper alone. Marks of overlayfs itself are not copied.

    Raises:
        OSError: as the system says; the folder may be there then.
    """
    shown = os.fstat(root)
    folder.mkdir(mode=0o700)
    os.chown(folder, shown.st_uid, shown.st_gid)
    folder.chmod(shown.st_mode & 0o7777)
    like = f"/proc/self/fd/{root}"
    for name in os.listxattr(like):
        if own_mark(os.fsencode(name), namespace) is None and name != "security.selinux":
            os.setxattr(folder, name, os.getxattr(like, name))
    os.utime(folder, ns=(shown.st_atime_ns, shown.st_mtime_ns))
