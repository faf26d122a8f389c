"""Ordinary users for tests that run as root: in a namespace of their own, with subordinate ids, or on the host.

    python tests/kit/ordinary_users.py namespace UID FOLDER[:FOLDER...] COMMAND...
    python tests/kit/ordinary_users.py account FOLDER[:FOLDER...] COMMAND...
    python tests/kit/ordinary_users.py machine FOLDER UID NAME FOLDER[:FOLDER...]

``namespace`` runs a command as UID who is root of a new user and mount namespace: 0 is UID, 1 to 65536 are the
subordinate ids from 200000 on, as newuidmap would write it. ``account`` runs one as a user of the host who has
lines in /etc/passwd, /etc/subuid and /etc/subgid, and must do itself what it needs of newuidmap. ``machine`` holds
a mount namespace in which the machine has such a user NAME, prints ``ready`` and waits for its standard input to
end.

The folders become reachable for the user even where a folder above them is closed to others. What is laid over
files of the host, and over /dev/fuse, is seen in those mount namespaces only. Nothing here imports more than the
standard library: the interpreter may see no more.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SUBIDS, COUNT = 200000, 65536
"""The subordinate ids of ``namespace`` and ``machine``."""
NAME, UID, ACCOUNT_SUBIDS = "lkuser", 4343, 500000
"""The user of ``account``."""
_CLONE_NEWUSER, _CLONE_NEWNS = 0x10000000, 0x00020000
_PR_SET_DUMPABLE = 4
_PROGRAM = """
import sys
sys.path[:0] = {path!r}
import ordinary_users
{imports}
import concurrent.futures.thread, encodings.idna, json, os, stat, subprocess
from pathlib import Path
ordinary_users.enter({uid})
{body}
"""


def python(folder: Path, imports: str, body: str, uid: int = 4242) -> str:
    """Run ``body`` in a user namespace with ``folder`` as its working folder; return what it prints.

    An interpreter below a private home folder cannot be started by an ordinary user; one that has imported all it
    needs can become that user.
    """
    folder.chmod(0o777)
    for above in folder.parents:
        # pytest makes its folders 0700; none of them may keep the user out.
        if above.stat().st_mode & 0o001 == 0:
            above.chmod(above.stat().st_mode | 0o011)
    here = Path(__file__).resolve().parent
    code = _PROGRAM.format(path=[str(here)], imports=imports, uid=uid, body=body)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def enter(uid: int) -> None:
    """Become 0 in new user and mount namespaces; call it in a process made for it: there is no way back."""
    with _maps_written(os.getpid(), uid):
        _become(uid)
        _unshare(_CLONE_NEWUSER | _CLONE_NEWNS)
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


@contextlib.contextmanager
def _maps_written(pid: int, uid: int) -> Iterator[None]:
    """Write the id maps of ``pid`` at the end of the block, by a child that stays root outside."""
    ready_r, ready_w = os.pipe()
    helper = os.fork()
    if helper == 0:
        # With our end open a parent that died would be waited for without an end.
        os.close(ready_w)
        if os.read(ready_r, 1):
            for kind in ("uid", "gid"):
                Path(f"/proc/{pid}/{kind}_map").write_text(f"0 {uid} 1\n1 {SUBIDS} {COUNT}\n")
        os._exit(0)
    os.close(ready_r)
    yield
    os.write(ready_w, b"x")
    os.close(ready_w)
    if os.waitpid(helper, 0)[1] != 0:
        raise OSError("the id maps could not be written")


def _become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    # After a change of ids /proc/PID belongs to root, and the namespace's owner could not be checked.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


def _unshare(what: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(what) != 0:
        raise OSError(ctypes.get_errno(), "unshare")


def _private_mounts() -> None:
    _unshare(_CLONE_NEWNS)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def _open_ways(folders: list[Path]) -> None:
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


def _open_fuse() -> None:
    """Lay a device that everybody may open over /dev/fuse, as it is on most machines."""
    with _scratch() as place:
        os.mknod(place / "fuse", stat.S_IFCHR | 0o666, os.makedev(10, 229))
        (place / "fuse").chmod(0o666)
        subprocess.run(["mount", "--bind", place / "fuse", "/dev/fuse"], check=True)


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """Give a folder whose files may lie under mounts, and go by name all the same."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _add_user(name: str, uid: int, subids: int, home: str) -> None:
    """Give the machine a user, in files laid over those in /etc, with lines of subordinate ids of its own alone."""
    lines = {
        "passwd": f"{name}:x:{uid}:{uid}::{home}:/bin/sh\n",
        "group": f"{name}:x:{uid}:\n",
        "subuid": f"{name}:{subids}:{COUNT}\n",
        "subgid": f"{name}:{subids}:{COUNT}\n",
    }
    with _scratch() as work:
        for file, line in lines.items():
            host, own = Path("/etc", file), work / file
            host.touch()
            old = host.read_text() if file in ("passwd", "group") else ""
            own.write_text(old + ("" if not old or old.endswith("\n") else "\n") + line)
            own.chmod(0o644)
            subprocess.run(["mount", "--bind", own, host], check=True)


def _one_kind_of_cgroups() -> None:
    """Take the unified hierarchy beside the old ones away: crun refuses a host with both."""
    if Path("/sys/fs/cgroup/unified").is_dir():
        subprocess.run(["umount", "/sys/fs/cgroup/unified"], check=False, capture_output=True)


def _namespace(uid: int, folders: list[Path], command: list[str]) -> None:
    _private_mounts()
    _open_ways(folders)
    if Path("/dev/fuse").exists():
        _open_fuse()
    enter(uid)
    os.execvp(command[0], command)


def _account(folders: list[Path], command: list[str]) -> None:
    _private_mounts()
    _one_kind_of_cgroups()
    _open_ways(folders)
    _add_user(NAME, UID, ACCOUNT_SUBIDS, "/nonexistent")
    _become(UID)
    os.execvp(command[0], command)


def _machine(folder: Path, uid: int, name: str, readable: list[Path]) -> None:
    _private_mounts()
    _add_user(name, uid, SUBIDS, f"{folder}/home")
    _open_fuse()
    _open_ways(readable)
    _one_kind_of_cgroups()
    print("ready", flush=True)
    sys.stdin.read()


def _paths(text: str) -> list[Path]:
    return [Path(part).resolve() for part in text.split(":")]


if __name__ == "__main__":
    kind, *words = sys.argv[1:]
    if kind == "namespace":
        _namespace(int(words[0]), _paths(words[1]), words[2:])
    elif kind == "account":
        _account(_paths(words[0]), words[1:])
    else:
        _machine(Path(words[0]), int(words[1]), words[2], _paths(words[3]))
