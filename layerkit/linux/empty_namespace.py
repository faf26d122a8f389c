"""A mount namespace with nothing in it, for a process that serves mounts and must not hold any."""

from __future__ import annotations

import contextlib
import ctypes
import os

from layerkit.linux import syscalls as sc

_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18
_PLACE = "/proc"
"""Any folder that is there for sure: the new root is mounted on it, and then all else goes."""

_libc = ctypes.CDLL(None, use_errno=True)


def enter() -> bool:
    """Move this process into a mount namespace of its own that holds one empty filesystem; return whether it did.

    A process keeps its mount namespace alive, and with it every mount in there. One that has to end when a mount
    goes must be outside, or the end of a namespace (the last shell of an ``unshare``, a container's last process)
    would never come. Where it cannot be done (a chroot, whose root is no mount) the process is where it was.
    Descriptors stay valid; paths lead nowhere any more.

    The process must have one thread.
    """
    with contextlib.ExitStack() as stack:
        back = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, back)
        root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, root)
        try:
            sc.unshare(sc.CLONE_NEWNS)
        except OSError:
            return False
        try:
            # Else the new root would show in the namespace that we come from.
            _call("mount", b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None)
            _call("mount", b"none", _PLACE.encode(), b"tmpfs", ctypes.c_ulong(0), b"size=4k,mode=555")
            os.chdir(_PLACE)
            # The old root lands on the new one, and goes from there with everything on it: pivot_root(2).
            _call("pivot_root", b".", b".")
            sc.umount2(".", sc.MNT_DETACH)
            os.chdir("/")
        except OSError:
            _call("setns", back, sc.CLONE_NEWNS)
            os.fchdir(root)
            os.chroot(".")
            return False
    return True


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        raise sc.failed(ctypes.get_errno(), name)
