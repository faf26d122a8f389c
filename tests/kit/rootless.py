"""Become root of a new user namespace without leaving the Python process.

An interpreter below a private home folder cannot be started by an ordinary user; one that has imported all it
needs can become that user. Call :func:`enter` in a process made for it: there is no way back.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

SUBIDS = 200000
COUNT = 65536
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNS = 0x00020000
_PR_SET_DUMPABLE = 4

_PROGRAM = """
import sys
sys.path[:0] = {path!r}
import rootless
{imports}
import concurrent.futures.thread, encodings.idna, json, os, stat, subprocess
from pathlib import Path
rootless.enter({uid})
{body}
"""


def enter(uid: int) -> None:
    """Become 0 in new user and mount namespaces: 0 is ``uid`` outside, 1 to 65536 are 200000 and up."""
    libc = ctypes.CDLL(None, use_errno=True)
    ready_r, ready_w = os.pipe()
    me = os.getpid()
    helper = os.fork()
    if helper == 0:
        # Stays root outside, and writes the maps as newuidmap would.
        os.read(ready_r, 1)
        for kind in ("uid", "gid"):
            Path(f"/proc/{me}/{kind}_map").write_text(f"0 {uid} 1\n1 {SUBIDS} {COUNT}\n")
        os._exit(0)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    # After a change of ids /proc/PID belongs to root, and the namespace's owner could not be checked.
    libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    os.write(ready_w, b"x")
    if os.waitpid(helper, 0)[1] != 0:
        raise OSError("the id maps could not be written")
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def run(folder: Path, imports: str, body: str, uid: int = 4242) -> str:
    """Run ``body`` in a user namespace with ``folder`` as its working folder; return what it prints."""
    folder.chmod(0o777)
    for above in folder.parents:
        # pytest makes its folders 0700; none of them may keep the user out.
        if above.stat().st_mode & 0o001 == 0:
            above.chmod(above.stat().st_mode | 0o011)
    here = Path(__file__).resolve().parent
    code = _PROGRAM.format(path=[str(here), str(here.parent)], imports=imports, uid=uid, body=body)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
