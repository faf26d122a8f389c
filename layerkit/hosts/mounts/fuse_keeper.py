"""The processes behind one mount of the rendering ``fuse``: they come with it and end with it.

A *keeper* leaves the mount namespace, starts two workers and waits. A worker that is killed is replaced, and what
it had taken and not answered is sent again, so that a container goes on; when the mount is gone the device says so
and all of them end. If the keeper itself is killed its workers go on without it. If all are killed, everything
that is not in the kernel's cache answers "Transport endpoint is not connected": an error, never zeros, and never
for a file that is open: data does not come through here. The next mount starts anew.

Leaving the namespace is what lets them end with it, see ``kernel.empty_namespace``. Whoever makes a mount asks the
tree for its root before the mount is attached anywhere; by the time of the answer the keeper is outside.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import syslog
import time
from collections.abc import Sequence, Set
from typing import NoReturn

from layerkit.linux import empty_namespace, fuse

_WORKERS = 2
_RESTARTS_AT_MOST, _IN_SECONDS = 20, 60.0
_PR_SET_NAME = 15
_NAME = b"layerkit-fuse"


class Keeper:
    """Our side of the server, while the mount is made.

    Use it in ``with``; unless :meth:`mount` was called the processes end with the block.
    """

    def __init__(self, answers: fuse.Answers, data: int = -1) -> None:
        """Open the device and start the keeper, which waits for :meth:`mount`.

        Args:
            answers: what to serve.
            data: a descriptor that it needs.

        Raises:
            OSError: no FUSE for this user.
        """
        self._mount = -1
        self._device = fuse.open_device()
        ready, self._go = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._go)
            keep(self._device, answers, {data}, ready)
        os.close(ready)

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()
        if self._mount >= 0:
            os.close(self._mount)
            self._mount = -1

    def _let_go(self) -> None:
        for fd in (self._device, self._go):
            if fd >= 0:
                os.close(fd)
        self._device = self._go = -1

    def mount(self) -> int:
        """Return the tree's root, served from now on, in a mount that ends with this block unless it is used."""
        self._mount = fuse.mount(self._device)
        os.write(self._go, b"m")
        # The kernel sees a server that died by the last descriptor of the device: none may stay here.
        self._let_go()
        return fuse.open_tree_root(self._mount)


def keep(device: int, answers: fuse.Answers, needed: Set[int], ready: int = -1) -> NoReturn:
    """Be the keeper, in a process made for it; never returns.

    Args:
        device: of the mount.
        answers: what to serve.
        needed: descriptors to leave open; all others are closed.
        ready: where a byte says that the mount is made; -1 where it is made already. Its end without a byte is the
            end of whoever was to make it, and of the keeper.
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
        _close_others({0, 1, 2, device, ready, *needed})
        syslog.openlog("layerkit-fuse", syslog.LOG_PID | syslog.LOG_NDELAY)
        ctypes.CDLL(None).prctl(_PR_SET_NAME, _NAME, 0, 0, 0)
        queues = [fuse.open_device() for _ in range(_WORKERS - 1)]
        empty_namespace.enter()
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
    """Start a worker and return its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            fuse.serve(device, answers)
        except BaseException as error:
            _say(f"a worker failed: {error!r}")
            os._exit(1)
        os._exit(0)
    return pid


def _close_others(keep: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in keep:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _say(text: str) -> None:
    with contextlib.suppress(Exception):
        syslog.syslog(syslog.LOG_WARNING, text)
