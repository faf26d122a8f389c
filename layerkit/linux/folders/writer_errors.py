"""What the kernel's refusals mean for whoever writes a tree as a folder."""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from layerkit.model.entry import Kind
from layerkit.model.errors import LayerkitError, LossyResult, StoreError, show_path
from layerkit.model.tree import Tree


class Advice(NamedTuple):
    """The words in which an error speaks of what is written.

    Attributes:
        what: the name of the work, for progress.
        whole: what the folder becomes, as ``a metadata layer``.
        elsewhere: what to do where the filesystem cannot hold an entry.
        room: what to do where it is full.
    """

    what: str
    whole: str
    elsewhere: str
    room: str


def explain(error: OSError, step: str, tree: Tree, row: int, root: int, advice: Advice) -> LayerkitError:
    """Return the error to raise for ``error``, met while trying to ``step`` the name ``row``.

    Args:
        error: what the kernel said.
        step: a verb phrase, as ``chown`` or ``set the xattr user.x of``.
        tree: what is written.
        row: the name in ``tree``.
        root: descriptor of the folder that is written.
        advice: what to tell people to do.
    """
    code = error.errno
    inode, path = int(tree.inode[row]), tree.path(row)
    is_xattr = step.startswith("set the xattr ")
    said = f"cannot {step} it: {os.strerror(code or 0)}"
    # ext4 says "no space" where an inode's xattrs are more than one block, however empty the disk is.
    full = code == errno.EDQUOT or (code == errno.ENOSPC and not (is_xattr and os.fstatvfs(root).f_bavail > 256))
    if full:
        return StoreError(f"{show_path(path) or '/'}: {said}; {advice.room}")
    if code == errno.EPERM and step == "create" and tree.mode[inode] >> 12 in (Kind.CHAR, Kind.BLOCK):
        return LossyResult(path, "a process without privileges cannot make device nodes; run as root")
    if code in (errno.EPERM, errno.EINVAL) and step == "chown":
        owner = f"{tree.uid[inode]}:{tree.gid[inode]}"
        return LossyResult(
            path, f"this process may not give files to {owner}; take a map to ids that its user namespace holds"
        )
    if is_xattr and code in (errno.EPERM, errno.EACCES):
        return LossyResult(path, f"{said}; only a privileged process may set it: run as root")
    if is_xattr and code in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSPC, errno.E2BIG, errno.ERANGE):
        return LossyResult(path, f"{said}; {advice.elsewhere}")
    if code in (errno.EFBIG, errno.EMLINK, errno.ENAMETOOLONG, errno.EILSEQ, errno.EOVERFLOW):
        return LossyResult(path, f"{said}; {advice.elsewhere}")
    return StoreError(f"{show_path(path) or '/'}: {said}")
