"""User namespaces as values: a descriptor that stands for an id map."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from layerkit.linux.syscalls import CLONE_NEWUSER, failed
from layerkit.model.errors import UnsupportedHost, UsageError

Extents = Sequence[tuple[int, int, int]]
"""(container id, host id, size) each; the columns of /proc/PID/uid_map (user_namespaces(7))."""

_INITIAL_USER_NAMESPACE = 0xEFFFFFFD  # PROC_USER_INIT_INO, the same on every boot
_CAP_SYS_ADMIN = 21
_WAIT_ALL = 0x40000000  # __WALL: our child sends no SIGCHLD, so a plain waitpid would not see it
_CHILD_SECONDS = 10
_STACK_BYTES = 64 << 10


def in_initial_userns() -> bool:
    """Return whether the process runs in the initial user namespace."""
    return Path("/proc/self/ns/user").stat().st_ino == _INITIAL_USER_NAMESPACE


def can_mount() -> bool:
    """Return whether the process may mount in its own mount namespace (``CAP_SYS_ADMIN``)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1)
    return False


def is_privileged() -> bool:
    """Return whether the process may mount anything: ``CAP_SYS_ADMIN`` in the initial user namespace."""
    return in_initial_userns() and can_mount()


def map_text(extents: Extents) -> bytes:
    """Return ``extents`` in the form of /proc/PID/uid_map.

    Raises:
        UsageError: no extent, too many, or more text than the kernel reads at once.
    """
    if not extents:
        raise UsageError("an id map without a range maps nothing")
    text = b"".join(b"%d %d %d\n" % extent for extent in extents)
    # user_namespaces(7): one write, below one page, at most 340 lines.
    page = os.sysconf("SC_PAGE_SIZE")
    if len(extents) > 340 or len(text) >= page:
        raise UsageError(
            f"an id map of {len(extents)} ranges ({len(text)} bytes) is more than the kernel takes "
            f"(340 ranges, {page - 1} bytes); merge ranges, or have a META written for this map"
        )
    return text


def userns_fd(uid_extents: Extents, gid_extents: Extents) -> int:
    """Return a descriptor of a new user namespace with these maps, for :func:`mounts.idmap`.

    The namespace lives as long as the descriptor and what is mounted with it. Safe in a process with
    threads: the child runs one C function and never Python. It is gone when this returns.

    Args:
        uid_extents: ranges as (container_uid, host_uid, size).
        gid_extents: the same for groups.

    Raises:
        UsageError: a map that the kernel refuses.
        UnsupportedHost: no right to make user namespaces, or none left.
    """
    uid_text, gid_text = map_text(uid_extents), map_text(gid_extents)
    child = _spawn_sleeper()
    try:
        if not is_privileged():
            # user_namespaces(7): without privilege the gid map is taken only after this.
            _write(child, "setgroups", b"deny")
        _write(child, "gid_map", gid_text)
        _write(child, "uid_map", uid_text)
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, _WAIT_ALL)


def _spawn_sleeper() -> int:
    """Return the pid of a child in a new user namespace that sleeps in C and then ends by itself.

    ``clone`` with a function of the C library as the child's whole program: no fork handlers, no
    interpreter, no lock that another thread may hold. If we are killed the child, which holds copies of
    our descriptors (locks among them), ends on its own soon after.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    stack = ctypes.create_string_buffer(_STACK_BYTES)
    top = (ctypes.addressof(stack) + _STACK_BYTES) & ~15
    program = ctypes.cast(libc.sleep, ctypes.c_void_p)
    pid: int = libc.clone(
        program, ctypes.c_void_p(top), ctypes.c_int(CLONE_NEWUSER), ctypes.c_void_p(_CHILD_SECONDS)
    )
    if pid < 0:
        error = failed(ctypes.get_errno(), "clone")
        raise UnsupportedHost(
            f"new user namespaces ({error.strerror})",
            "see user.max_user_namespaces and your security module; a META written for the map needs none",
        ) from error
    return pid


def _write(pid: int, name: str, text: bytes) -> None:
    path = f"/proc/{pid}/{name}"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text)
        finally:
            os.close(fd)
    except OSError as error:
        shown = text.decode().strip().replace("\n", ", ")
        raise UsageError(f"the kernel refuses {name} {shown!r}: {error.strerror}") from error
