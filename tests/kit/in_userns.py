"""Run a command as an ordinary user who is root of a user and mount namespace of its own.

    python tests/kit/in_userns.py UID FOLDER[:FOLDER...] COMMAND...

Run it as root: it drops to UID first, and then writes the maps as newuidmap would: 0 is UID, 1 to 65536 are
the subordinate ids from 200000 on. The folders become reachable for the user even where a folder above them is
closed to others, in the command's own mount namespace only.
"""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

SUBIDS = 200000
COUNT = 65536
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNS = 0x00020000
_PR_SET_DUMPABLE = 4


def open_ways(folders: list[Path]) -> None:
    """Lay an open folder over each closed one above ``folders``, with nothing but them in it."""
    held = {folder: os.open(folder, os.O_PATH) for folder in folders}
    # pytest's own folder is closed too, but other tests that run now may have opened it for a moment.
    closed = {
        p for each in folders for p in each.parents if not p.stat().st_mode & 1 or p.name.startswith("pytest-of-")
    }
    for top in sorted(p for p in closed if not closed.intersection(p.parents)):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", top], check=True)
        for folder, fd in held.items():
            if top in folder.parents:
                folder.mkdir(parents=True, exist_ok=True)
                source = f"/proc/{os.getpid()}/fd/{fd}"
                subprocess.run(["mount", "--rbind", "--no-canonicalize", source, folder], check=True)


def open_fuse() -> None:
    """Lay a device that everybody may open over /dev/fuse, as it is on most machines."""
    place = Path(tempfile.mkdtemp())
    os.mknod(place / "fuse", stat.S_IFCHR | 0o666, os.makedev(10, 229))
    (place / "fuse").chmod(0o666)
    subprocess.run(["mount", "--bind", place / "fuse", "/dev/fuse"], check=True)
    (place / "fuse").unlink()
    place.rmdir()


def main(uid: int, folders: list[Path], command: list[str]) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    ready_r, ready_w = os.pipe()
    go_r, go_w = os.pipe()
    child = os.fork()
    if child == 0:
        if libc.unshare(_CLONE_NEWNS) != 0:
            os._exit(121)
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        open_ways(folders)
        if Path("/dev/fuse").exists():
            open_fuse()
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
    # With our end open a child that died would be waited for without an end.
    os.close(ready_w)
    if not os.read(ready_r, 1):
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for kind in ("uid", "gid"):
        with open(f"/proc/{child}/{kind}_map", "w") as f:
            f.write(f"0 {uid} 1\n1 {SUBIDS} {COUNT}\n")
    os.write(go_w, b"x")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), [Path(text).resolve() for text in sys.argv[2].split(":")], sys.argv[3:]))
