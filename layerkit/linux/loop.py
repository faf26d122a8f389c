"""Loop devices, for images on filesystems whose files EROFS does not mount (loop(4))."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerkit.linux.syscalls import opened
from layerkit.model.errors import UnsupportedHost

_LOOP_CONFIGURE = 0x4C0A
_LOOP_CTL_GET_FREE = 0x4C82
_READ_ONLY = 1
_AUTOCLEAR = 4
_DIRECT_IO = 16
_CONFIG_BYTES = 304  # struct loop_config: fd, block_size, struct loop_info64 (232), 8 reserved words
_FLAGS_OFFSET = 8 + 52
_NAME_OFFSET = 8 + 56
_TRIES = 64


@contextmanager
def attached(file: Path, *, direct: bool = False) -> Iterator[Path]:
    """Give a read-only loop device over ``file``; it frees itself when the last user is gone.

    Args:
        file: a regular file.
        direct: read it with O_DIRECT where its filesystem can, so that it is cached once and not twice.

    Raises:
        UnsupportedHost: no loop devices here.
        OSError: the file cannot be opened.
    """
    with opened(file) as backing:
        device, path = _configure(backing, file, direct)
    try:
        yield path
    finally:
        os.close(device)


def _configure(backing: int, file: Path, direct: bool) -> tuple[int, Path]:
    flags = _READ_ONLY | _AUTOCLEAR | (_DIRECT_IO if direct else 0)
    for _ in range(_TRIES):
        path = _free_device()
        try:
            device = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UnsupportedHost(
                f"the loop device {path} ({error.strerror})", "give it to this container"
            ) from error
        config = bytearray(_CONFIG_BYTES)
        struct.pack_into("=II", config, 0, backing, 0)
        struct.pack_into("=I", config, _FLAGS_OFFSET, flags)
        name = os.fsencode(file)[:63]
        config[_NAME_OFFSET : _NAME_OFFSET + len(name)] = name
        try:
            fcntl.ioctl(device, _LOOP_CONFIGURE, bytes(config))
        except OSError as error:
            os.close(device)
            if error.errno == errno.EBUSY:
                continue  # another process took it between the two calls
            if error.errno == errno.EINVAL and flags & _DIRECT_IO:
                flags &= ~_DIRECT_IO
                continue
            raise UnsupportedHost(f"a loop device over {file} ({error.strerror})") from error
        return device, path
    raise UnsupportedHost("a free loop device", "all were taken by others at each try")


def _free_device() -> Path:
    try:
        with opened("/dev/loop-control", os.O_RDWR) as control:
            return Path(f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}")
    except OSError as error:
        raise UnsupportedHost(
            f"loop devices ({error.strerror})", "modprobe loop, or keep the store on ext4"
        ) from error
