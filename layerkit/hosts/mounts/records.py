"""The run folder: who mounted what, in files that survive a kill at any moment.

``RUN/mnt-<mount namespace>/`` holds ``lock``, ``records/ID.json``, the shared layers under ``layers/``, and for a
mount whose META is served ``records/ID.server``, whose lock the server holds.
Records are hints, the mount table is the truth: a mount of ours shows ``layerkit:ID`` as its source, and a
record whose mount is not in the table is stale. Each mount namespace has a folder of its own, because a
mount made in one is not seen, and a mount point removed in one is detached, in the others.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec

from layerkit.linux import mounts, userns
from layerkit.linux.durable import whole_file
from layerkit.linux.syscalls import closing, opened
from layerkit.model.errors import StoreError
from layerkit.store.locks import open_lock, try_lock

SOURCE_PREFIX = "layerkit:"
UNPACKED = "unpacked"
"""The backend of a mount over folders that another runtime unpacked, beside those of ``store.layout``."""
_VERSION = 1
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO


@dataclass(frozen=True, slots=True)
class Record:
    """A mount that was made, or was about to be.

    Attributes:
        id: random; the mount's source in the mount table is ``layerkit:ID``.
        target: where it was attached.
        layers: names of the shared layers it uses, folders of ``RUN/…/layers``.
        namespace: ``trusted`` or ``user``.
        idmap: (uid ranges, gid ranges) applied by the kernel, or None.
        upper: the writable layer, or None. work: its work folder, or None.
        read_only: whether writing is forbidden.
        pid: the process that made it. created: seconds since 1970.
        label: as the caller gave it.
    """

    id: str
    target: str
    layers: tuple[str, ...]
    namespace: str
    idmap: tuple[tuple[tuple[int, int, int], ...], tuple[tuple[int, int, int], ...]] | None
    upper: str | None
    work: str | None
    read_only: bool
    pid: int
    created: float
    label: dict[str, str] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Return what the mount table shows as the mount's source."""
        return SOURCE_PREFIX + self.id

    @property
    def image(self) -> str:
        """Return the name of the image, "" where it has none."""
        return self.label.get("image", "")

    @property
    def map(self) -> str:
        """Return the canonical text of the id map, "" for none."""
        return self.label.get("map", "")

    @property
    def backend(self) -> str:
        """Return what keeps the data: ``tar``, ``objects`` or :data:`UNPACKED`."""
        return self.label.get("backend", "")

    @property
    def indexes(self) -> tuple[str, ...]:
        """Return the diff_ids under which the store keeps the indexes of the layers with data."""
        return tuple(text for text in self.label.get("layers", "").split(",") if text)

    @property
    def folders(self) -> tuple[str, ...]:
        """Return the layer folders of another runtime, bottom first; none for layers in the store."""
        return tuple(path for path in self.label.get("folders", "").split("\n") if path)


class RunFolder:
    """The run folder of the calling process's mount namespace."""

    def __init__(self, run: Path) -> None:
        """Name the folder; nothing is made before :meth:`locked`."""
        self.run = Path(os.path.realpath(run))
        self.base = self.run / f"mnt-{Path('/proc/self/ns/mnt').stat().st_ino}"
        self.layers = self.base / "layers"
        self.records = self.base / "records"
        self.empty = self.base / "empty"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock; others wait. The kernel drops it if we die.

        Raises:
            StoreError: the folder belongs to another user, who could put mounts of theirs in place of ours.
        """
        self.run.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = self.run.stat().st_uid
        if owner != os.geteuid():
            raise StoreError(f"the run folder {self.run} belongs to uid {owner}; name one of your own")
        while True:
            for folder in (self.base, self.layers, self.records):
                folder.mkdir(mode=0o700, exist_ok=True)
            # An image's program running as root in its mount must not be able to write into a data layer.
            with suppress(FileExistsError):
                self.empty.mkdir(mode=0o555)
            lock = open_lock(self.base / "lock")
            fcntl.flock(lock, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), (self.base / "lock").stat()):
                    break
            os.close(lock)  # clear_stale of another namespace took the folder away while we waited
        with closing(lock):
            yield

    def write(self, record: Record) -> None:
        """Write a record, whole or not at all."""
        with whole_file(self.records / f"{record.id}.json") as file:
            file.write(json.dumps({"version": _VERSION, **asdict(record)}, sort_keys=True).encode())

    def server(self, record: Record) -> Path:
        """Return the file that the server of the mount's META locks."""
        return self.records / f"{record.id}.server"

    def read_all(self) -> list[Record]:
        """Return every record, oldest first.

        Raises:
            StoreError: a record of a later version of layerkit.
        """
        found = []
        for path in self.records.glob("*.json"):
            with suppress(FileNotFoundError):
                record = _parse(path.read_bytes(), path)
                if record is not None:
                    found.append(record)
        return sorted(found, key=lambda r: (r.created, r.id))

    def live(self, table: list[mounts.Mount] | None = None) -> list[Record]:
        """Return the records whose mounts are in the mount table."""
        sources = {m.source for m in (mounts.mount_table() if table is None else table) if m.fstype == "overlay"}
        return [record for record in self.read_all() if record.source in sources]

    def release_unused(self) -> list[str]:
        """Under the lock: drop stale records, and unmount each shared layer that no live mount uses.

        Returns:
            What was cleared, as text.
        """
        cleared = []
        table = mounts.mount_table()
        live = self.live(table)
        alive = {record.id for record in live}
        for path in self.records.iterdir():
            if path.name.removesuffix(".json").removesuffix(".server") not in alive:
                path.unlink(missing_ok=True)
                cleared.append(f"record {path.name}")
        used = {name for record in live for name in record.layers}
        prefix = f"{self.layers}/"
        for mount in reversed(table):
            name = mount.point.removeprefix(prefix)
            if mount.point.startswith(prefix) and name not in used:
                # Lazily: a shell that stands in it must not keep the store's files busy for ever.
                mounts.detach(mount.point, lazy=True)
                cleared.append(f"layer {name}")
        for folder in self.layers.iterdir():
            if folder.name not in used:
                with suppress(OSError):
                    folder.rmdir()
        return cleared

    def clear_other_namespaces(self) -> list[str]:
        """Remove the folders of mount namespaces that no process lives in any more.

        A namespace without a process that we see may still be held, by a bind mount say. Then its records
        are lost, never a mount: unmounting works without them. Does nothing outside the host's own pid and
        user namespaces, where most processes cannot be seen.
        """
        others = [p for p in self.run.glob("mnt-*") if p != self.base] if self.run.is_dir() else []
        whole = Path("/proc/self/ns/pid").stat().st_ino == _INITIAL_PID_NAMESPACE and userns.is_privileged()
        if not (others and whole):
            return []
        # Of processes that hide even from root; what a wrong guess costs is a record, see above.
        alive, cleared = {f"mnt-{namespace}" for namespace, _ in mounts.namespaces()}, []
        for folder in others:
            if folder.name in alive:
                continue
            with suppress(OSError), opened(folder / "lock", os.O_RDWR) as lock:
                if try_lock(lock):
                    shutil.rmtree(folder)
                    cleared.append(f"folder {folder.name}")
        return cleared


def _parse(data: bytes, path: Path) -> Record | None:
    """Return the record, or None for one that a crash of the machine left empty or torn."""
    try:
        fields = json.loads(data)
        if fields["version"] == _VERSION:
            return msgspec.convert(fields, Record)
    except (ValueError, KeyError, TypeError, msgspec.ValidationError):
        return None
    raise StoreError(f"{path}: a record of version {fields['version']}; unmount with the layerkit that made it")
