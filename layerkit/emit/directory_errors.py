"""What the kernel's refusals mean for whoever writes a metadata layer as a folder."""

from __future__ import annotations

import errno
import os

from layerkit.errors import LayerkitError, LossyResult, StoreError, UnsupportedHost, show_path
from layerkit.metaonly import MetadataLayer
from layerkit.model.entry import Kind

_NO_XATTRS = (errno.EOPNOTSUPP, errno.EPERM, errno.EACCES)
_ELSEWHERE = "use the EROFS rendering, or a store on another filesystem"


def explain(error: OSError, step: str, meta: MetadataLayer, row: int, root: int) -> LayerkitError:
    """Return the error to raise for ``error``, met while trying to ``step`` the name ``row``.

    Args:
        error: what the kernel said.
        step: a verb phrase, as ``chown`` or ``set the xattr user.x of``.
        meta: the layer that is written.
        row: the name in ``meta.tree``.
        root: descriptor of the folder that is written.
    """
    tree, code = meta.tree, error.errno
    inode, path = int(tree.inode[row]), tree.path(row)
    is_xattr = step.startswith("set the xattr ")
    said = f"cannot {step} it: {os.strerror(code or 0)}"
    if step == "set the redirect of" and code in _NO_XATTRS:
        return UnsupportedHost(
            f"{meta.namespace.value} xattrs to this process on the filesystem of the store",
            "trusted xattrs need CAP_SYS_ADMIN outside of user namespaces: without it, take the user namespace",
        )
    # ext4 says "no space" where an inode's xattrs are more than one block, however empty the disk is.
    full = code == errno.EDQUOT or (code == errno.ENOSPC and not (is_xattr and os.fstatvfs(root).f_bavail > 256))
    if full:
        return StoreError(f"{show_path(path) or '/'}: {said}; make room, or put the store on a larger filesystem")
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
        return LossyResult(path, f"{said}; {_ELSEWHERE}")
    if code in (errno.EFBIG, errno.EMLINK, errno.ENAMETOOLONG, errno.EILSEQ, errno.EOVERFLOW):
        return LossyResult(path, f"{said}; {_ELSEWHERE}")
    return StoreError(f"{show_path(path) or '/'}: {said}")
