"""The FUSE server of ``layerkit mount``: a program of its own, started by the mounter.

A process that has merged layers holds numpy, and one that uses the Python API may have threads: neither is to be
forked into servers that stay for as long as a mount. So the mounter starts this, ``main``, with the device and the
lock as descriptors and the rest on standard input; it makes the keeper (``fuse_keeper``) and ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerkit.hosts.podman.mount_options import IdMaps
from layerkit.linux import fuse, mounts
from layerkit.model.errors import LayerkitError, StoreError

_START_SECONDS = 30
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from layerkit.hosts.mounts.fuse_server import main; main()"


@contextmanager
def served(tree: Path, maps: IdMaps, lock: Path) -> Iterator[int]:
    """Give the root of a mount of ``tree`` that is served; it ends with the block unless an overlay has it.

    Args:
        tree: file that ``emit.fuse`` wrote.
        maps: for its owners.
        lock: a file to make; its lock is held for as long as a process of the server is there (:func:`is_served`).

    Raises:
        StoreError: the server did not start; the message says why.
        UnsupportedHost, OSError: no FUSE for this user.
    """
    device, held = fuse.open_device(), -1
    try:
        held = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(held, fcntl.LOCK_EX)
        with _start(device, held) as server:
            # While the other starts. It answers from the moment on that it knows what.
            mount = fuse.mount(device)
            with mounts.closing(mount):
                _tell(server, tree, maps)
                # The kernel sees a server that died by the last descriptor of the device: none may stay here.
                os.close(device)
                device = -1
                with mounts.closing(fuse.open_tree_root(mount)) as root:
                    yield root
    finally:
        for fd in (device, held):
            if fd >= 0:
                os.close(fd)


def is_served(lock: Path) -> bool:
    """Return whether a process of the server that holds ``lock`` is still there."""
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _start(device: int, lock: int) -> subprocess.Popen[bytes]:
    home = str(Path(__file__).resolve().parents[2])
    # Isolated, and without site: nothing of the caller's surroundings, and a quick start.
    words = [sys.executable, "-I", "-S", "-c", _PROGRAM, home, str(device), str(lock)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(device, lock))


def _tell(server: subprocess.Popen[bytes], tree: Path, maps: IdMaps) -> None:
    said = {"tree": str(tree), "uid": maps.uid, "gid": maps.gid, "overflow": maps.overflow}
    try:
        _, text = server.communicate(json.dumps(said).encode(), timeout=_START_SECONDS)
    except subprocess.TimeoutExpired as error:
        server.kill()
        raise StoreError(f"the server of metadata did not start within {_START_SECONDS} s") from error
    except BaseException:
        server.kill()
        raise
    if server.returncode != 0:
        why = text.decode(errors="replace").strip().rpartition("\n")[2]
        raise StoreError(f"the server of metadata did not start: {why or f'exit code {server.returncode}'}")


def main() -> None:
    """Serve what standard input says; return control to the mounter, by ending, when the keeper is there."""
    from layerkit.hosts.mounts import fuse_keeper
    from layerkit.hosts.mounts.fuse_answers import answers, open_tree

    device, lock = int(sys.argv[2]), int(sys.argv[3])
    said = json.loads(sys.stdin.buffer.read())
    uid, gid = (tuple((c, h, n) for c, h, n in said[kind]) for kind in ("uid", "gid"))
    maps = IdMaps(uid, gid, overflow=said["overflow"])
    try:
        with Path(said["tree"]).open("rb") as file:
            what = answers(open_tree(file), maps)
    except (LayerkitError, OSError) as error:
        sys.exit(str(error))
    if os.fork() == 0:
        fuse_keeper.keep(device, what, {lock})
    os._exit(0)
