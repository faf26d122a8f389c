"""Run a command as an ordinary user who has a line in /etc/passwd, /etc/subuid and /etc/subgid.

    python tests/kit/ordinary_user.py FOLDER[:FOLDER...] COMMAND...

Run it as root. The lines are there in the command's own mount namespace only, and so is what makes the folders
reachable for the user where a folder above them is closed to others. Unlike ``in_userns`` the command starts in the
host's user namespace: what it needs of newuidmap and subordinate ids it must do itself.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from in_userns import open_ways

NAME, UID = "lkuser", 4343
SUBIDS, COUNT = 500000, 65536
_CLONE_NEWNS = 0x00020000


def _private_accounts() -> None:
    with tempfile.TemporaryDirectory() as work:
        for name, line in (
            ("passwd", f"{NAME}:x:{UID}:{UID}::/nonexistent:/bin/sh"),
            ("group", f"{NAME}:x:{UID}:"),
            ("subuid", f"{NAME}:{SUBIDS}:{COUNT}"),
            ("subgid", f"{NAME}:{SUBIDS}:{COUNT}"),
        ):
            real, own = Path("/etc", name), Path(work, name)
            old = real.read_text() if real.exists() else ""
            real.touch()
            own.write_text(old + ("" if not old or old.endswith("\n") else "\n") + line + "\n")
            own.chmod(0o644)
            subprocess.run(["mount", "--bind", own, real], check=True)


def main(folders: list[Path], command: list[str]) -> None:
    if ctypes.CDLL(None).unshare(_CLONE_NEWNS) != 0:
        raise OSError("unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    if Path("/sys/fs/cgroup/unified").is_dir():
        # crun refuses a host with both kinds of cgroups.
        subprocess.run(["umount", "/sys/fs/cgroup/unified"], check=False)
    open_ways(folders)
    _private_accounts()
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, UID)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main([Path(text).resolve() for text in sys.argv[1].split(":")], sys.argv[2:])
