"""The mounts below the snapshotter's run folder, made once, shared by every snapshot that needs them.

``RUN/m/N`` is the mount point of place number N, ``RUN/l/ID`` leads to the files of snapshot ID and ``RUN/d/ID``
to its folder: names so short that the options of a stack of 100 layers fit into the one page that mount(2) takes.
The mount table is the truth: what a killed snapshotter left mounted is used again, and what is gone (a reboot) is
mounted again when somebody asks for it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from layerkit.hosts.containerd.snapshots.catalog import Catalog
from layerkit.linux import mounts
from layerkit.linux import syscalls as sc


def short(number: int) -> str:
    """Return a number in base 36."""
    return np.base_repr(number, 36).lower()


class Places:
    """Mount points by what is mounted on them; may be used from several threads."""

    def __init__(self, run: Path, catalog: Catalog) -> None:
        """Make the run folder's parts if they are not there; nothing is mounted yet."""
        self.run, self._catalog = run, catalog
        self._lock = threading.RLock()
        self._held: Counter[str] = Counter()
        self._making: dict[str, threading.Lock] = {}
        run.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in ("m", "l", "d"):
            (run / name).mkdir(mode=0o700, exist_ok=True)

    def link(self, kind: str, identity: int, target: Path) -> str:
        """Return a short name (``l`` or ``d``) for a folder of snapshot ``identity``."""
        name = self.run / kind / short(identity)
        try:
            name.symlink_to(target)
        except FileExistsError:
            if os.readlink(name) != os.fspath(target):
                new = name.with_name(f"{name.name}.new")
                new.unlink(missing_ok=True)
                new.symlink_to(target)
                new.replace(name)
        return str(name)

    def unlink(self, identity: int) -> None:
        """Remove the short names of a snapshot."""
        for kind in ("l", "d"):
            (self.run / kind / short(identity)).unlink(missing_ok=True)

    @contextlib.contextmanager
    def held(self, whats: list[str]) -> Iterator[None]:
        """Keep :meth:`sweep` from these places while they are mounted and written down."""
        with self._lock:
            self._held.update(whats)
        try:
            yield
        finally:
            with self._lock:
                self._held.subtract(whats)
                self._held += Counter()  # drops those that are zero

    def alone(self, what: str) -> threading.Lock:
        """Return the lock of whoever makes ``what``."""
        with self._lock:
            return self._making.setdefault(what, threading.Lock())

    def mounted(self, what: str, make: Callable[[], int]) -> Path:
        """Return the place for ``what``; if nothing is mounted there, attach the mount that ``make`` returns.

        Raises:
            OSError: the system refuses it.
        """
        place = self.run / "m" / short(self._catalog.place(what))
        if is_mount(place):
            return place
        with self.alone(what):
            if not is_mount(place):
                with mounts.closing(make()) as fd:
                    place.mkdir(mode=0o700, exist_ok=True)
                    # What a container may do over this is decided by the flags of its own overlay.
                    mounts.attach(fd, place, attributes=sc.MOUNT_ATTR_NOEXEC)
        return place

    def sweep(self, needed: Callable[[], set[str]]) -> list[str]:
        """Unmount every place that is neither held nor ``needed``; return what for.

        Lazily: an overlay that a container still uses keeps its layers until it is unmounted itself.
        """
        gone = []
        with self._lock:
            keep = needed() | set(self._held)
            places = self._catalog.places()
            numbers = {short(number) for what, number in places.items() if what in keep}
            for entry in sorted((self.run / "m").iterdir()):
                if entry.name not in numbers:
                    while is_mount(entry):
                        mounts.detach(entry, lazy=True)
                    with contextlib.suppress(OSError):
                        entry.rmdir()
            for what in places:
                if what not in keep:
                    self._catalog.drop_place(what)
                    self._making.pop(what, None)
                    gone.append(what)
        return gone


def is_mount(place: Path) -> bool:
    """Return whether something is mounted on ``place`` itself."""
    try:
        return mounts.mount_id(place) != mounts.mount_id(place.parent)
    except FileNotFoundError:
        return False
