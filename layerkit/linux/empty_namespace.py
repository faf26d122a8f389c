"""A mount namespace with nothing in it, for a process that serves mounts and must not hold any."""

from __future__ import annotations

import os

from layerkit.linux import syscalls as sc

_PLACE = "/proc"
"""Any folder that is there for sure: the new root is mounted on it, and then all else goes."""


def enter() -> bool:
    """Move this process into a mount namespace of its own that holds one empty filesystem; return whether it did.

    A process keeps its mount namespace alive, and with it every mount in there. One that has to end when a mount
    goes must be outside, or the end of a namespace (the last shell of an ``unshare``, a container's last process)
    would never come. Where it cannot be done (a chroot, whose root is no mount) the process is where it was.
    Descriptors stay valid; paths lead nowhere any more.

    The process must have one thread.
    """
    folder = os.O_PATH | os.O_DIRECTORY
    with sc.opened("/proc/self/ns/mnt") as back, sc.opened("/", folder) as root:
        try:
            sc.unshare(sc.CLONE_NEWNS)
        except OSError:
            return False
        try:
            # Else the new root would show in the namespace that we come from.
            sc.mount("none", "/", "", sc.MS_REC | sc.MS_PRIVATE)
            sc.mount("none", _PLACE, "tmpfs", options="size=4k,mode=555")
            os.chdir(_PLACE)
            # The old root lands on the new one, and goes from there with everything on it: pivot_root(2).
            sc.checked(sc.libc.pivot_root(b".", b"."), "pivot_root")
            sc.umount2(".", sc.MNT_DETACH)
            os.chdir("/")
        except OSError:
            sc.checked(sc.libc.setns(back, sc.CLONE_NEWNS), "setns")
            os.fchdir(root)
            os.chroot(".")
            return False
    return True
