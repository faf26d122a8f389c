"""Holds a mount namespace in which the machine has one more ordinary user, with subordinate ids and /dev/fuse.

``unshare -m python podman_user.py FOLDER UID NAME READABLE:…`` prints ``ready`` and waits for its standard input
to end. podman needs an entry in /etc/passwd, lines in /etc/subuid and /etc/subgid, a device that ordinary users
may open, and a way to the interpreter; the host's own files stay as they are.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

from in_userns import COUNT, SUBIDS, open_ways


def main(folder: Path, uid: int, name: str, readable: list[Path]) -> None:
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    etc = folder / "etc"
    etc.mkdir()
    lines = {
        "passwd": f"{name}:x:{uid}:{uid}::{folder}/home:/bin/sh\n",
        "group": f"{name}:x:{uid}:\n",
        "subuid": f"{name}:{SUBIDS}:{COUNT}\n",
        "subgid": f"{name}:{SUBIDS}:{COUNT}\n",
    }
    for file, line in lines.items():
        host = Path("/etc") / file
        host.touch(exist_ok=True)
        (etc / file).write_text((host.read_text() if file in ("passwd", "group") else "") + line)
        subprocess.run(["mount", "--bind", etc / file, host], check=True)
    fuse = folder / "fuse"
    os.mknod(fuse, stat.S_IFCHR | 0o666, os.makedev(10, 229))
    fuse.chmod(0o666)
    subprocess.run(["mount", "--bind", fuse, "/dev/fuse"], check=True)
    open_ways(readable)
    # crun would take a unified hierarchy beside the old ones for its own.
    subprocess.run(["umount", "/sys/fs/cgroup/unified"], check=False, capture_output=True)
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], [Path(p).resolve() for p in sys.argv[4].split(":")])
