"""Run a command as an ordinary user who is root of a user and mount namespace of its own.

    python tests/in_userns.py UID COMMAND...

Run it as root: it drops to UID first, and then writes the maps as newuidmap would: 0 is UID, 1 to 65536 are
the subordinate ids from 200000 on.
"""

from __future__ import annotations

import ctypes
import os
import sys

SUBIDS = 200000
COUNT = 65536
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNS = 0x00020000
_PR_SET_DUMPABLE = 4


def main(uid: int, command: list[str]) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    ready_r, ready_w = os.pipe()
    go_r, go_w = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        # After a change of ids /proc/PID belongs to root, and the namespace's owner could not be checked.
        libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
        if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS) != 0:
            os._exit(120)
        os.write(ready_w, b"x")
        os.read(go_r, 1)
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        os.execvp(command[0], command)
    os.read(ready_r, 1)
    for kind in ("uid", "gid"):
        with open(f"/proc/{child}/{kind}_map", "w") as f:  # noqa: PTH123
            f.write(f"0 {uid} 1\n1 {SUBIDS} {COUNT}\n")
    os.write(go_w, b"x")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
