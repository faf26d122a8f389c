"""The operations of containerd's snapshots service (version 1), without the service.

Crash-safe in this sense: an operation's effect is one SQLite transaction, and a folder appears by rename within
it, before its row counts. So a kill at any moment leaves a whole state, and perhaps folders and mounts that no row
needs, which the next start and every :meth:`Snapshotter.cleanup` remove. Mounts that containers use are
containerd's own: they go on without this process.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from layerkit.hosts.containerd.snapshots import layers as stacks
from layerkit.hosts.containerd.snapshots.catalog import REF_LABEL, Catalog, Kind, Row, Usage, check_labels
from layerkit.hosts.containerd.snapshots.chains import StoreChains
from layerkit.hosts.containerd.snapshots.filters import matcher
from layerkit.hosts.mounts.mount import like_root
from layerkit.idmap import Mapping as IdMapping
from layerkit.linux import userns
from layerkit.linux.durable import remove
from layerkit.linux.folders.walk import TOP_FOLDER, disk_usage
from layerkit.linux.syscalls import opened
from layerkit.metaonly import Namespace
from layerkit.model.errors import LayerkitError, SnapshotError, StoreError, UsageError
from layerkit.model.limits import Limits
from layerkit.store.locks import open_lock, try_lock


def default_run(root: Path) -> Path:
    """Return the run folder of a snapshotter root: short, since every layer is a path below it."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:6]
    return Path("/run/layerkit") / f"s{name}"


class Snapshotter:
    """One snapshotter root, open; safe to use from several threads.

    Folders: ``snapshots.db``, ``snapshots/ID/+f`` and ``work``, ``meta/``, ``index/``.
    """

    def __init__(self, root: Path, store: Path, *, run: Path | None = None, limits: Limits) -> None:
        """Open the root, made if it is not there, and clear what a kill left.

        One process at a time has it. Images of ``store`` need no unpacking; it need not exist yet. ``run`` is a
        folder for mounts, on a tmpfs; None: :func:`default_run`.

        Raises:
            UsageError: another process has it, or a path that no mount option can hold.
            StoreError: it belongs to another user or a later version.
        """
        if not userns.is_privileged():
            raise UsageError("the snapshotter mounts for containerd: run it as root of the host")
        self.root = Path(os.path.realpath(root))
        self.run = Path(os.path.realpath(run or default_run(self.root)))
        for path in (self.root, self.run):
            if any(c in str(path) for c in ',:\\"') or not str(path).isprintable():
                raise UsageError(f"{path}: a comma, colon, quote or backslash cannot stand in mount options")
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.root.stat().st_uid != os.geteuid():
            raise StoreError(f"{self.root}: belongs to uid {self.root.stat().st_uid}; name a folder of your own")
        self.root.chmod(0o700)
        self._lock_file = open_lock(self.root / "lock")
        if not try_lock(self._lock_file):
            os.close(self._lock_file)
            raise UsageError(
                f"{self.root}: another snapshotter runs on it; give each name in containerd's proxy_plugins "
                "a --root of its own"
            )
        (self.root / "snapshots").mkdir(mode=0o700, exist_ok=True)
        self._catalog = Catalog(self.root / "snapshots.db")
        self._places = stacks.Places(self.run, self._catalog)
        owner = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:6]
        self._chains = StoreChains(store, owner, limits)
        self._layers = stacks.Layers(self.root, self._catalog, self._places, self._chains, limits)
        self._sweeping = threading.Lock()
        self._closed = False
        self._indexing: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._indexer = threading.Thread(target=self._index_committed, name="layerkit-index", daemon=True)
        self._indexer.start()
        self.cleanup()

    def close(self) -> None:
        """Release files; mounts stay for the containers that run. Harmless when called again."""
        if self._closed:
            return
        self._closed = True
        self._indexing.put(None)
        self._indexer.join()
        self._chains.close()
        self._catalog.close()
        os.close(self._lock_file)

    # Operations

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> list[stacks.Mount]:
        """Make an active snapshot over ``parent`` ("" for none); return how to mount it.

        Raises:
            SnapshotError: already_exists: ``key`` is taken, or the label ``containerd.io/snapshot.ref`` names a
                chain that lies in layerkit's store (a committed snapshot with that label is there then);
                not_found: no such parent; invalid_argument: a parent that is not committed, a bad map.
            UnmappedId: the map leaves out an owner of the image.
        """
        check_labels(labels)
        ref = labels.get(REF_LABEL, "")
        if ref and self._catalog.find(key) is None and self._stands_for(ref, parent, labels):
            raise SnapshotError("already_exists", f"target snapshot {ref!r} lies in layerkit's store")
        return self._create(Kind.ACTIVE, key, parent, labels)

    def view(self, key: str, parent: str, labels: Mapping[str, str]) -> list[stacks.Mount]:
        """Make a read-only view of ``parent``; see :meth:`prepare`."""
        check_labels(labels)
        return self._create(Kind.VIEW, key, parent, labels)

    def mounts(self, key: str) -> list[stacks.Mount]:
        """Return how to mount an active snapshot or a view; what it stands on is mounted if a reboot took it.

        Raises:
            SnapshotError: not_found; failed_precondition: it is committed.
        """
        row = self._catalog.get(key)
        if row.kind is Kind.COMMITTED:
            raise SnapshotError("failed_precondition", f"snapshot {key!r} is neither active nor a view")
        stack = stacks.stack_of(self._catalog.lineage(row.parent), row.map)
        with self._places.held(self._layers.places_of(stack)):
            lowers = self._layers.lowers(stack)
        return stacks.mounts_of(self._layers.folder(row.id), lowers, writable=row.kind is Kind.ACTIVE)

    def commit(self, name: str, key: str, labels: Mapping[str, str], parent: str = "") -> None:
        """Make the active snapshot ``key`` the committed one ``name``; ``key`` is gone then.

        ``labels`` are those of the new one, which inherits none; ``parent`` is what its parent has to be, "" for
        whatever it is.

        Raises:
            SnapshotError: already_exists: ``name``; not_found: ``key``; failed_precondition: it is not active.
        """
        check_labels(labels)
        if not name:
            raise SnapshotError("invalid_argument", "a committed snapshot needs a name")
        with self._catalog.write():
            if self._catalog.find(name) is not None:
                raise SnapshotError("already_exists", f"committed snapshot {name!r} exists")
            row = self._catalog.get(key)
            if row.kind is not Kind.ACTIVE:
                raise SnapshotError("failed_precondition", f"snapshot {key!r} is not active")
            if parent and row.parent_key != parent:
                raise SnapshotError(
                    "failed_precondition",
                    f"snapshot {key!r} was not prepared on {parent!r}; this snapshotter does not rebase",
                )
            self._catalog.commit(row.id, name, labels, labels.get(REF_LABEL, "") if not row.map else "")
        remove(self._layers.folder(row.id) / stacks.WORK)
        self._indexing.put(row.id)

    def remove(self, key: str) -> None:
        """Remove a snapshot; its files go with :meth:`cleanup`.

        Raises:
            SnapshotError: not_found; failed_precondition: it is the parent of another.
        """
        with self._catalog.write():
            row = self._catalog.get(key)
            if self._catalog.has_child(row.id):
                raise SnapshotError(
                    "failed_precondition", f"cannot remove snapshot {key!r}: it is the parent of another"
                )
            self._catalog.remove(row.id)

    def stat(self, key: str) -> Row:
        """Return what is known of a snapshot.

        Raises:
            SnapshotError: not_found.
        """
        return self._catalog.get(key)

    def update(self, name: str, labels: Mapping[str, str], paths: Sequence[str]) -> Row:
        """Change labels, the only thing of a snapshot that can be changed.

        ``paths`` are the fields: ``labels``, ``labels.KEY`` (removed where ``labels`` lacks it); none: all.

        Raises:
            SnapshotError: not_found; invalid_argument: another field.
        """
        with self._catalog.write():
            row = self._catalog.get(name)
            new = dict(row.labels)
            for path in paths or ("labels",):
                if path == "labels":
                    new = dict(labels)
                elif path.startswith("labels."):
                    key = path.removeprefix("labels.")
                    new[key] = labels.get(key, "")
                else:
                    raise SnapshotError("invalid_argument", f"cannot update {path!r} of snapshot {name!r}")
            new = {key: value for key, value in new.items() if value or not paths}
            check_labels(new)
            self._catalog.relabel(row.id, new)
        return self.stat(name)

    def walk(self, filters: Sequence[str] = ()) -> Iterator[Row]:
        """Yield the snapshots that match one of ``filters`` (all, without one), parents before children.

        Raises:
            SnapshotError: invalid_argument, a filter that cannot be read.
        """
        matches = matcher(filters)
        for row in self._catalog.rows():
            if matches(row.field):
                yield row

    def usage(self, key: str) -> Usage:
        """Return what a snapshot alone takes on disk; one whose files lie in layerkit's store takes nothing.

        Raises:
            SnapshotError: not_found.
        """
        row = self._catalog.get(key)
        if row.chain:
            return Usage(0, 0)
        usage = self._catalog.usage(row.id)
        if usage is None:
            found = disk_usage(self._layers.folder(row.id) / stacks.FILES)
            usage = Usage(found.allocated_bytes, found.inodes)
            if row.kind is Kind.COMMITTED:
                self._catalog.keep_usage(row.id, usage)
        return usage

    def cleanup(self) -> list[str]:
        """Remove folders, mounts, METAs and indexes that no snapshot needs; return what went, as text."""
        with self._sweeping:
            gone = self._places.sweep(self._needed)
            with self._catalog.write():
                # Within a transaction, since a folder stands there a moment before its row counts.
                alive = {row.id for row in self._catalog.rows()}
                dead = [path for path in (self.root / "snapshots").iterdir() if path.name not in map(str, alive)]
                for path in dead:
                    if not path.name.startswith("rm-"):
                        path.rename(path.with_name(f"rm-{path.name}"))
            for path in sorted((self.root / "snapshots").glob("rm-*")):
                name = path.name.removeprefix("rm-")
                if name.isdigit():
                    self._places.unlink(int(name))
                remove(path)
                gone.append(f"snapshots/{name}")
            gone += self._layers.collect(alive)
            with contextlib.suppress(LayerkitError):  # a store in use elsewhere: next time
                gone += self._chains.keep_only({row.image for row in self._catalog.rows() if row.image})
            return gone

    # How

    def _stands_for(self, ref: str, parent: str, labels: Mapping[str, str]) -> bool:
        """Return whether a committed snapshot stands for ``ref``, made now if layerkit's store has the chain."""
        above = self._catalog.find(parent) if parent else None
        number = above.id if above else None
        if any(r.parent == number and r.labels.get(REF_LABEL) == ref for r in self._catalog.with_ref(ref)):
            return True
        chain = self._chains.find(ref)
        if chain is None or (parent and above is None) or (above.ref if above else "") != chain.below:
            return False
        self._chains.pin(chain.image)
        with self._catalog.write():
            # Its name must be new; containerd finds it by its label.
            key = f"layerkit/{number or 0}/{ref}"
            if self._catalog.find(key) is None:
                diff_ids = tuple(map(str, chain.diff_ids))
                labels = {**labels, REF_LABEL: ref}
                self._catalog.insert(Row(key, number, Kind.COMMITTED, labels, "", diff_ids, chain.image, ref))
        return True

    def _create(self, kind: Kind, key: str, parent: str, labels: Mapping[str, str]) -> list[stacks.Mount]:
        if not key:
            raise SnapshotError("invalid_argument", "a snapshot needs a key")
        mapping = stacks.mapping_of(labels)
        above = self._parent(parent)
        stack = stacks.stack_of(self._catalog.lineage(above), mapping.canonical() if mapping else "")
        if self._catalog.find(key) is not None:
            # Before the layers are looked at, which may take long; the transaction below looks again.
            raise SnapshotError("already_exists", f"snapshot {key!r} exists")
        with self._places.held(self._layers.places_of(stack)):
            lowers = self._layers.lowers(stack)
            with self._catalog.write():
                if self._parent(parent) != above:
                    raise SnapshotError("not_found", f"parent snapshot {parent!r} was replaced meanwhile")
                identity = self._catalog.insert(Row(key, above, kind, labels, stack.map))
                self._make_folder(identity, stack, lowers, with_work=kind is Kind.ACTIVE)
        return stacks.mounts_of(self._layers.folder(identity), lowers, writable=kind is Kind.ACTIVE)

    def _parent(self, parent: str) -> int | None:
        if not parent:
            return None
        row = self._catalog.find(parent)
        if row is None:
            raise SnapshotError("not_found", f"parent snapshot {parent!r} does not exist")
        if row.kind is not Kind.COMMITTED:
            raise SnapshotError("invalid_argument", f"parent {parent!r} is not a committed snapshot")
        return row.id

    def _make_folder(self, identity: int, stack: stacks.Stack, lowers: stacks.Lowers, *, with_work: bool) -> None:
        new = self.root / "snapshots" / f"new-{identity}"
        remove(new)
        new.mkdir(mode=0o700)
        try:
            files = new / stacks.FILES
            if lowers.normal:
                # An overlay shows the root of its upper: owner, mode and xattrs are those of the layer below.
                with opened(lowers.normal[0], TOP_FOLDER) as top:
                    like_root(files, top, Namespace.TRUSTED)
            else:
                files.mkdir()
                files.chmod(0o755)
                if stack.map:
                    mapping = IdMapping.parse_canonical(stack.map)
                    os.chown(files, mapping.host_of("uid", 0), mapping.host_of("gid", 0))
            if with_work:
                (new / stacks.WORK).mkdir(mode=0o711)
            # A transaction that a full disk undid leaves its folder, and gives its number back.
            remove(self._layers.folder(identity))
            new.rename(self._layers.folder(identity))
        except BaseException:
            remove(new)
            raise

    def _needed(self) -> set[str]:
        needed: set[str] = set()
        for row in self._catalog.rows():
            if row.kind is Kind.COMMITTED:
                needed.update(self._layers.places_kept(row))
            else:
                stack = stacks.stack_of(self._catalog.lineage(row.parent), row.map)
                needed.update(self._layers.places_of(stack))
        return needed

    def _index_committed(self) -> None:
        """Read folders as soon as they are committed, so that the first map need not wait for it."""
        while (identity := self._indexing.get()) is not None:
            # Whoever needs the index tries again, and is told what is wrong.
            with contextlib.suppress(LayerkitError, OSError):
                row = self._catalog.lineage(identity)[:1]
                if row and not self._closed and not row[0].map:
                    self._layers.index(identity)
