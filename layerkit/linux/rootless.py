"""An ordinary user as root of a user namespace of their own, with the ids of /etc/subuid and /etc/subgid.

Nothing heavy is imported here: a process that has threads may not change its user namespace.
"""

from __future__ import annotations

import errno
import os
import pwd
import shutil
import subprocess
from pathlib import Path

from layerkit.idmap import IdExtent, IdMap
from layerkit.linux import syscalls as sc
from layerkit.linux import userns
from layerkit.linux.subids import subid_map
from layerkit.model.errors import UnsupportedHost, UsageError

_PR_SET_DUMPABLE = 4


def enter() -> None:
    """Make this process root of new user and mount namespaces, as ``podman unshare`` does; there is no way back.

    0 is the user, 1 and up are their subordinate ids. A process that may mount already stays where it is.

    Raises:
        UnsupportedHost: no subordinate ids, no newuidmap, or no user namespaces; the hint says what to do.
    """
    if userns.can_mount():
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


def _subordinate(user: str, kind: str) -> tuple[IdExtent, ...]:
    try:
        return subid_map(user, kind, first=1).extents
    except UsageError as error:
        raise UnsupportedHost(
            f"subordinate ids for {user} in /etc/sub{kind}",
            f"as root: usermod --add-sub{kind}s 100000-165535 {user}",
        ) from error


def _write_maps(pid: int, lines: dict[str, list[IdExtent]]) -> int:
    try:
        for kind, extents in lines.items():
            words = [str(number) for extent in extents for number in extent]
            subprocess.run([f"new{kind}map", str(pid), *words], check=True)
    except (OSError, subprocess.CalledProcessError):
        return 1
    return 0
