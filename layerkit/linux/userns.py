"""User namespaces: a descriptor that stands for an id map, and this process as root of one of its own; subuid(5).

Nothing heavy is imported here: a process that has threads may not change its user namespace.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pwd
import re
import signal
from collections.abc import Sequence
from pathlib import Path

from layerkit.idmap import IdExtent, IdMap, is_id
from layerkit.linux import syscalls as sc
from layerkit.model.errors import UnsupportedHost, UsageError

Extents = Sequence[tuple[int, int, int]]
"""(container id, host id, size) each; the columns of /proc/PID/uid_map (user_namespaces(7))."""

_INITIAL_USER_NAMESPACE = 0xEFFFFFFD  # PROC_USER_INIT_INO, the same on every boot
_CAP_SYS_ADMIN = 21
_WAIT_ALL = 0x40000000  # __WALL: our child sends no SIGCHLD, so a plain waitpid would not see it
_CHILD_SECONDS = 10
_STACK_BYTES = 64 << 10
_SUBID_FILES = {"uid": Path("/etc/subuid"), "gid": Path("/etc/subgid")}


def in_initial_userns() -> bool:
    """Return whether the process runs in the initial user namespace."""
    return Path("/proc/self/ns/user").stat().st_ino == _INITIAL_USER_NAMESPACE


def can_mount() -> bool:
    """Return whether the process may mount in its own mount namespace (``CAP_SYS_ADMIN``)."""
    effective = re.search(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return effective is not None and bool(int(effective[1], 16) >> _CAP_SYS_ADMIN & 1)


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
    stack = ctypes.create_string_buffer(_STACK_BYTES)
    top = (ctypes.addressof(stack) + _STACK_BYTES) & ~15
    program = ctypes.cast(sc.libc.sleep, ctypes.c_void_p)
    seconds = ctypes.c_void_p(_CHILD_SECONDS)
    try:
        pid = sc.libc.clone(program, ctypes.c_void_p(top), ctypes.c_int(sc.CLONE_NEWUSER), seconds)
        return sc.checked(pid, "clone")
    except OSError as error:
        raise UnsupportedHost(
            f"new user namespaces ({error.strerror})",
            "see user.max_user_namespaces and your security module; a META written for the map needs none",
        ) from error


def _write(pid: int, name: str, text: bytes) -> None:
    path = f"/proc/{pid}/{name}"
    try:
        with sc.opened(path, os.O_WRONLY) as fd:
            os.write(fd, text)
    except OSError as error:
        shown = text.decode().strip().replace("\n", ", ")
        raise UsageError(f"the kernel refuses {name} {shown!r}: {error.strerror}") from error


def enter() -> None:
    """Make this process root of new user and mount namespaces, as ``podman unshare`` does; there is no way back.

    0 is the user, 1 and up are their subordinate ids. A process that may mount already stays where it is.

    Raises:
        UnsupportedHost: no subordinate ids, no newuidmap, or no user namespaces; the hint says what to do.
    """
    import shutil

    if can_mount():
        return
    uid, gid = os.geteuid(), os.getegid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    lines = {kind: [(0, own, 1), *_subordinate(name, kind)] for kind, own in (("uid", uid), ("gid", gid))}
    for tool in ("newuidmap", "newgidmap"):
        if shutil.which(tool) is None:
            raise UnsupportedHost(tool, "install the package uidmap (Debian) or shadow-utils (Fedora)")
    ready, go = os.pipe()
    me = os.getpid()
    helper = os.fork()
    if helper == 0:
        # Stays in the old namespace, where the maps have to be written from.
        os.close(go)
        os.read(ready, 1)
        os._exit(_write_maps(me, lines))
    os.close(ready)
    try:
        sc.unshare(sc.CLONE_NEWUSER | sc.CLONE_NEWNS)
    except OSError as error:
        os.close(go)
        os.waitpid(helper, 0)
        hint = "see user.max_user_namespaces and your security module, or use podman unshare"
        if error.errno == errno.EINVAL:
            hint = "this process has threads; call it before they start, or inside podman unshare"
        raise UnsupportedHost(f"a new user namespace ({os.strerror(error.errno or 0)})", hint) from error
    os.write(go, b"x")
    os.close(go)
    if os.waitpid(helper, 0)[1] != 0:
        raise UnsupportedHost(
            f"the subordinate ids of {name} (newuidmap refused them)", "check /etc/subuid and /etc/subgid"
        )
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def outer_maps() -> tuple[IdMap, IdMap]:
    """Return this user namespace's (uid, gid) maps: from ids here to those in the namespace around it."""
    uid, gid = (
        IdMap.of(
            [(int(inside), int(outside), int(count)) for inside, outside, count in map(str.split, lines)],
            what="the user namespace's map",
        )
        for lines in (Path(f"/proc/self/{kind}_map").read_text().splitlines() for kind in ("uid", "gid"))
    )
    return uid, gid


def subid_map(user: str, kind: str = "uid", path: Path | None = None, *, first: int = 0) -> IdMap:
    """Return the map that gives container ids ``first``, ``first`` + 1, … to the subordinate ids of a user.

    The ranges follow one another in the order of the file, as ``podman run --subuidname`` has them.

    Args:
        user: user name, or a user id in digits; the file may name the user either way.
        kind: ``uid`` or ``gid``.
        path: the file, where it is not ``/etc/subuid`` or ``/etc/subgid``.
        first: the first container id.

    Raises:
        UsageError: the file cannot be read, has no range for the user, or a malformed one.
    """
    source = path if path is not None else _SUBID_FILES[kind]
    try:
        lines = source.read_text("utf-8", "surrogateescape").splitlines()
    except OSError as error:
        raise UsageError(f"{source}: {error.strerror}; give the map with --{kind}-map instead") from error
    owners = _names_of(user)
    ranges: list[tuple[int, int]] = []
    for number, line in enumerate(lines, 1):
        fields = line.strip().split(":")
        if line.startswith("#") or fields[0] not in owners:
            continue
        if len(fields) != 3 or not all(map(is_id, fields[1:])):
            raise UsageError(f"{source}, line {number}: want NAME:FIRST:SIZE, found {line!r}")
        ranges.append((int(fields[1]), int(fields[2])))
    ranges = [(start, size) for start, size in ranges if size]
    if not ranges:
        raise UsageError(f"{source}: no range for {user!r}; `usermod --add-sub{kind}s FIRST-LAST` adds one")
    return IdMap.of_ranges(ranges, first=first, what=str(source))


def _names_of(user: str) -> set[str]:
    """Return the name and the uid of ``user``, as far as the host knows them."""
    names = {user} - {""}
    try:
        entry = pwd.getpwuid(int(user)) if is_id(user) else pwd.getpwnam(user)
    except (KeyError, OverflowError):
        return names
    return names | {entry.pw_name, str(entry.pw_uid)}


def _subordinate(user: str, kind: str) -> tuple[IdExtent, ...]:
    try:
        return subid_map(user, kind, first=1).extents
    except UsageError as error:
        raise UnsupportedHost(
            f"subordinate ids for {user} in /etc/sub{kind}",
            f"as root: usermod --add-sub{kind}s 100000-165535 {user}",
        ) from error


def _write_maps(pid: int, lines: dict[str, list[IdExtent]]) -> int:
    import subprocess

    try:
        for kind, extents in lines.items():
            words = [str(number) for extent in extents for number in extent]
            subprocess.run([f"new{kind}map", str(pid), *words], check=True)
    except (OSError, subprocess.CalledProcessError):
        return 1
    return 0
