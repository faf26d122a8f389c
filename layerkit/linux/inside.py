"""Paths inside a root filesystem that strangers wrote: no symbolic link and no ``..`` leads out of it.

The kernel resolves them as if the folder were the root (openat2(2), ``RESOLVE_IN_ROOT``, Linux 5.6).
"""

from __future__ import annotations

import errno
import os
import stat

from layerkit.linux import syscalls as sc
from layerkit.model.errors import InvalidImage, UnsupportedHost, show_path


def open_inside(root: int, path: str | bytes, flags: int) -> int:
    """Return a descriptor of ``path`` with the folder ``root`` (a descriptor) as the root of all names.

    Raises:
        OSError: as openat2(2).
        UnsupportedHost: the kernel lacks it.
    """
    result = sc.openat2(root, path, flags, sc.RESOLVE_IN_ROOT | sc.RESOLVE_NO_MAGICLINKS)
    if result == -errno.ENOSYS:
        raise UnsupportedHost("openat2(2)", "Linux 5.6 has it; seccomp may hide it")
    if result < 0:
        raise sc.failed(-result, "open", path)
    return result


def read_inside(root: int, path: str, limit: int) -> bytes:
    """Return the content of the regular file at ``path``, ``b""`` where there is none.

    Raises:
        InvalidImage: something else than a file lies there, or more than ``limit`` bytes.
    """
    try:
        # Not blocking: the image may have put a fifo there.
        fd = open_inside(root, path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return b""
        raise InvalidImage(f"/{path.lstrip('/')} of the image: {os.strerror(error.errno or 0)}") from error
    with sc.closing(fd):
        shown = os.fstat(fd)
        if not stat.S_ISREG(shown.st_mode):
            raise InvalidImage(f"/{path.lstrip('/')} of the image is not a regular file")
        if shown.st_size > limit:
            raise InvalidImage(f"/{path.lstrip('/')} of the image has {shown.st_size} bytes; want at most {limit}")
        with open(fd, "rb", closefd=False) as file:
            return file.read(limit)


def make_folders(root: int, path: str, uid: int, gid: int) -> int:
    """Return an ``O_PATH`` descriptor of the folder at ``path``; what is missing is made, mode 0755.

    Args:
        root: descriptor of the root filesystem.
        path: absolute inside it.
        uid: host id of the owner of what is made.
        gid: host id of its group.

    Raises:
        InvalidImage: something else than a folder is in the way.
        OSError: as mkdir(2).
    """
    flags = os.O_PATH | os.O_DIRECTORY
    done = ""
    fd = open_inside(root, "/", flags)
    for part in path.split("/"):
        if part in ("", "."):
            continue
        # Names are resolved from the root each time, since a link may lead anywhere in it.
        done = f"{done}/{part}"
        try:
            deeper = open_inside(root, done, flags)
        except FileNotFoundError:
            try:
                os.mkdir(part, 0o755, dir_fd=fd)
            except FileExistsError:
                raise InvalidImage(f"{show_path(done)} of the image is a link to nowhere, not a folder") from None
            os.chown(part, uid, gid, dir_fd=fd, follow_symlinks=False)
            deeper = open_inside(root, done, flags)
            os.chmod(f"/proc/self/fd/{deeper}", 0o755)  # whatever the umask says
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise InvalidImage(f"{show_path(done)} of the image is not a folder") from error
            raise
        finally:
            os.close(fd)
        fd = deeper
    return fd
