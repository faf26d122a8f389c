"""A META that a server of ours answers for (rendering ``fuse``): what it says, and the processes behind a mount.

A *keeper* leaves the mount namespace, starts two workers and waits. A worker that is killed is replaced, and what
it had taken and not answered is sent again, so that a container goes on; when the mount is gone the device says so
and all of them end. If the keeper itself is killed its workers go on without it. If all are killed, everything
that is not in the kernel's cache answers "Transport endpoint is not connected": an error, never zeros, and never
for a file that is open: data does not come through here. The next mount starts anew.

Leaving the namespace is what lets them end with it, see ``enter_empty_namespace``. Whoever makes a mount asks the
tree for its root before the mount is attached anywhere; by the time of the answer the keeper is outside.

podman's mount program is small and forks its keeper itself (:class:`Keeper`). A process that has merged layers
holds numpy, and one that uses the Python API may have threads: neither is to be forked into servers that stay as
long as a mount. So :func:`served` starts a program of its own, :func:`main`, with the device and the lock as
descriptors and the rest on standard input; it makes the keeper and ends. Only the standard library: a mount waits.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import signal
import sys
import syslog
import time
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from layerkit.formats.meta.fuse_tree import FuseTree
from layerkit.idmap import Mapping
from layerkit.linux import fuse, mounts
from layerkit.linux.syscalls import closing, opened
from layerkit.model import acl_caps
from layerkit.model.errors import InvalidImage, LayerkitError, StoreError, UnmappedId
from layerkit.store.locks import try_lock

if TYPE_CHECKING:
    import subprocess

_WORKERS = 2
_RESTARTS_AT_MOST, _IN_SECONDS = 20, 60.0
_PR_SET_NAME = 15
_NAME = b"layerkit-fuse"
_START_SECONDS = 30
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from layerkit.hosts.mounts.served import main; main()"


def open_tree(file: BinaryIO) -> FuseTree:
    """Return the tree in ``file``, mapped into memory.

    Raises:
        InvalidImage: there is none in it.
    """
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise InvalidImage(f"{file.name}: empty; remove its folder, and it is made again")
    return FuseTree(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), str(file.name))


def answers(tree: FuseTree, mapping: Mapping, data: int | None = None) -> fuse.Answers:
    """Return the answers about ``tree`` with its owners, also those in xattrs, mapped.

    ``data`` is as :class:`layerkit.linux.fuse.Answers` has it.

    Raises:
        UnmappedId: an owner outside the map, with the first path that has it.
    """
    try:
        uids, gids = (
            {one: mapping.host_of(kind, one) for one in ids}
            for kind, ids in (("uid", tree.facts.uids), ("gid", tree.facts.gids))
        )
    except UnmappedId as error:
        raise _with_path(error, tree) from None
    sets = [
        tuple((name, acl_caps.map_value(name, value, mapping.host_of)) for name, value in pairs)
        for pairs in tree.xattr_sets()
    ]
    return fuse.Answers(tree, uids, gids, sets, data)


def _with_path(error: UnmappedId, tree: FuseTree) -> UnmappedId:
    for row in range(tree.inodes):
        inode = tree.inode(row)
        if (inode.gid if error.kind == "gid" else inode.uid) == error.value:
            return UnmappedId(tree.path(inode), error.kind, error.value, error.ranges)
    return error


class Keeper(contextlib.ExitStack):
    """Our side of the server, while the mount is made.

    Use it in ``with``; unless :meth:`mount` was called the processes end with the block.
    """

    def __init__(self, answers: fuse.Answers, data: int = -1) -> None:
        """Open the device and start the keeper, which waits for :meth:`mount`; ``data``: a descriptor it needs.

        Raises:
            OSError: no FUSE for this user.
        """
        super().__init__()
        self._ours = self.enter_context(contextlib.ExitStack())
        self._device = self._ours.enter_context(closing(fuse.open_device()))
        ready, go = os.pipe()
        self._go = self._ours.enter_context(closing(go))
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._go)
            keep(self._device, answers, {data}, ready)
        os.close(ready)

    def mount(self) -> int:
        """Return the tree's root, served from now on, in a mount that ends with this block unless it is used."""
        mount = self.enter_context(closing(fuse.mount(self._device)))
        os.write(self._go, b"m")
        # The kernel sees a server that died by the last descriptor of the device: none may stay here.
        self._ours.close()
        return fuse.open_tree_root(mount)


def keep(device: int, answers: fuse.Answers, needed: Set[int], ready: int = -1) -> NoReturn:
    """Be the keeper, in a process made for it; never returns. All descriptors are closed but those ``needed``.

    At ``ready`` a byte says that the mount is made; it is -1 where that is so already. Its end without a byte is
    the end of whoever was to make it, and of the keeper.
    """
    try:
        os.setsid()
        os.chdir("/")
        # All that has a path comes before the namespace is left.
        null = os.open(os.devnull, os.O_RDWR)
        # podman reads our error output to its end before it goes on.
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(sent, signal.SIG_DFL)
        kept = {0, 1, 2, device, ready, *needed}
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd not in kept:
                with contextlib.suppress(OSError):
                    os.close(fd)
        syslog.openlog("layerkit-fuse", syslog.LOG_PID | syslog.LOG_NDELAY)
        ctypes.CDLL(None).prctl(_PR_SET_NAME, _NAME, 0, 0, 0)
        queues = [fuse.open_device() for _ in range(_WORKERS - 1)]
        mounts.enter_empty_namespace()
        if ready < 0 or os.read(ready, 1) == b"m":
            if ready >= 0:
                os.close(ready)
            _supervise(device, queues, answers)
    except BaseException as error:
        _say(f"the server of a mount ended: {error!r}")
        os._exit(1)
    os._exit(0)


def _supervise(device: int, queues: Sequence[int], answers: fuse.Answers) -> None:
    devices = [device]
    for queue in queues:
        # Without it there is one worker, which is enough.
        with contextlib.suppress(OSError):
            fuse.clone_device(device, queue)
            devices.append(queue)
    workers = {_work(fd, answers): fd for fd in devices}
    restarts: list[float] = []
    while workers:
        pid, status = os.wait()
        fd = workers.pop(pid, -1)
        if fd < 0 or status == 0:
            # Unmounted: the others have been told the same.
            continue
        now = time.monotonic()
        restarts = [moment for moment in restarts if now - moment < _IN_SECONDS] + [now]
        code = os.waitstatus_to_exitcode(status)
        if len(restarts) > _RESTARTS_AT_MOST:
            _say(f"a worker of a mount ended again ({code}); it is given up")
            return
        _say(f"a worker of a mount ended ({code}); another takes its place")
        workers[_work(fd, answers)] = fd
        fuse.resend(device)


def _work(device: int, answers: fuse.Answers) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            fuse.serve(device, answers)
        except BaseException as error:
            _say(f"a worker failed: {error!r}")
            os._exit(1)
        os._exit(0)
    return pid


def _say(text: str) -> None:
    with contextlib.suppress(Exception):
        syslog.syslog(syslog.LOG_WARNING, text)


@contextlib.contextmanager
def served(tree: Path, mapping: Mapping, lock: Path) -> Iterator[int]:
    """Give the root of a mount of ``tree`` that is served; it ends with the block unless an overlay has it.

    ``formats.meta.fuse_tree`` wrote the tree, whose owners are mapped. ``lock`` is a file to make; its lock is held
    for as long as a process of the server is there (:func:`is_served`).

    Raises:
        StoreError: the server did not start; the message says why.
        UnsupportedHost, OSError: no FUSE for this user.
    """
    import subprocess

    home = str(Path(__file__).resolve().parents[3])
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(contextlib.ExitStack())
        device = ours.enter_context(closing(fuse.open_device()))
        held = stack.enter_context(opened(lock, os.O_RDWR | os.O_CREAT, mode=0o600))
        fcntl.flock(held, fcntl.LOCK_EX)
        # Isolated, and without site: nothing of the caller's surroundings, and a quick start.
        words = [sys.executable, "-I", "-S", "-c", _PROGRAM, home, str(device), str(held)]
        server = subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(device, held))
        stack.enter_context(server)
        # While the other starts. It answers from the moment on that it knows what.
        mount = stack.enter_context(closing(fuse.mount(device)))
        _tell(server, tree, mapping)
        # The kernel sees a server that died by the last descriptor of the device: none may stay here.
        ours.close()
        yield stack.enter_context(closing(fuse.open_tree_root(mount)))


def is_served(lock: Path) -> bool:
    """Return whether a process of the server that holds ``lock`` is still there."""
    try:
        with opened(lock, os.O_RDWR) as fd:
            return not try_lock(fd, shared=True)
    except FileNotFoundError:
        return False


def _tell(server: subprocess.Popen[bytes], tree: Path, mapping: Mapping) -> None:
    import subprocess

    said = {"tree": str(tree), "map": mapping.canonical()}
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
    device, lock = int(sys.argv[2]), int(sys.argv[3])
    said = json.loads(sys.stdin.buffer.read())
    try:
        with Path(said["tree"]).open("rb") as file:
            what = answers(open_tree(file), Mapping.parse_canonical(said["map"]))
    except (LayerkitError, OSError) as error:
        sys.exit(str(error))
    if os.fork() == 0:
        keep(device, what, {lock})
    os._exit(0)
