"""The mounter: a META over its data as one overlay, the EROFS images below it mounted once and shared.

Every EROFS image is mounted once per run folder and key, whatever number of overlays uses it, so that all
of them share its page cache; the last overlay to go takes it along. The mount table is the truth and the
records (``records.py``) say which of our mounts uses what, so a kill at any moment leaves nothing that
:func:`umount` or :func:`clear_stale` does not clear.

Flags: shared layers are ``ro,nodev,nosuid,noexec`` (what an overlay over them may do is decided by the
overlay's own flags). The overlay is ``nodev``: device nodes are shown but cannot be opened, so that a stranger's
image gives no one the host's disks; a container's /dev comes from its runtime. It is never ``nosuid``: setuid
programs of a container must keep working.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from layerkit.formats.overlay_options import OverlayOptions
from layerkit.hosts.mounts import served as serving
from layerkit.hosts.mounts.records import SOURCE_PREFIX, Record, RunFolder
from layerkit.hosts.mounts.spec import MountLayer, MountSpec, check_stubs, checked
from layerkit.linux import mounts, userns
from layerkit.linux import syscalls as sc
from layerkit.linux.durable import staging_beside
from layerkit.linux.folders.walk import make_like
from layerkit.metaonly import Namespace
from layerkit.model.errors import LayerkitError, NotFound, UnsupportedHost, UsageError
from layerkit.store import pins


def default_run(store: Path) -> Path:
    """Return the run folder for a store: below /run for root, else below the user's runtime folder."""
    real = os.path.realpath(store)
    name = hashlib.sha256(os.fsencode(real)).hexdigest()[:12]
    if os.geteuid() == 0 and userns.in_initial_userns():
        return Path("/run/layerkit") / name
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "layerkit" / name if runtime else Path(real) / "run"


def mount(spec: MountSpec, *, run: Path) -> Record:
    """Mount what ``spec`` says, and return its record.

    Each store has its run folder (:func:`default_run`). Any number of processes may mount at once.

    Raises:
        UsageError: a spec that cannot work, or a target or upper that is in use.
        UnsupportedHost: the kernel or this user cannot do it; the hint says what can.
        OSError: a failure of the system, with the kernel's own words.
    """
    spec = checked(spec)
    folder = RunFolder(run)
    with ExitStack() as stack:
        # Before the lock, so that its child process never holds a copy of the lock's descriptor.
        opened = sc.closing(userns.userns_fd(*spec.idmap)) if spec.idmap is not None else nullcontext()
        namespace = stack.enter_context(opened)
        stack.enter_context(folder.locked())
        _refuse_busy(spec, folder)
        record = Record(
            id=pins.new_id(), target=str(spec.target), layers=tuple(layer.name for layer in spec.shared),
            namespace=spec.namespace.value, idmap=spec.idmap,
            upper=None if spec.upper is None else str(spec.upper),
            work=None if spec.work is None else str(spec.work), read_only=spec.upper is None,
            pid=os.getpid(), created=time.time(), label=dict(spec.label),
        )  # fmt: skip
        folder.write(record)
        try:
            with _Assembly(spec, folder, record) as assembly:
                assembly.attach(namespace)
        except BaseException:
            folder.release_unused()
            raise
    return record


def umount(target: Path, *, run: Path, lazy: bool = False) -> None:
    """Unmount what layerkit mounted at ``target``, and the shared layers that nobody needs any more.

    A mount that was cut short by a kill is cleared as well. ``run`` is the run folder that it was mounted with, or
    that of another store beside it. ``lazy`` hides the mount now and frees it when its last user is gone.

    Raises:
        NotFound: layerkit mounted nothing there.
        LayerkitError: the mount is in use; the message names by whom.
    """
    path = os.path.realpath(target)
    folder = _folder_of(path, run)
    with folder.locked():
        top = _top(path)
        if top is not None and top.fstype == "overlay" and top.source.startswith(SOURCE_PREFIX):
            try:
                mounts.detach(path, lazy=lazy)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                raise LayerkitError(_in_use(path)) from error
        elif not any(r.target == path for r in folder.read_all()):
            what = f"a mount of {top.fstype} that layerkit did not make" if top else "nothing is mounted there"
            raise NotFound(f"{target}: {what}; layerkit unmounts its own mounts only")
        folder.release_unused()


def _folder_of(path: str, run: Path) -> RunFolder:
    """Return the run folder where the mount at ``path`` is recorded: its shared layers are among those there."""
    source = top.source if (top := _top(path)) else ""
    if source.startswith(SOURCE_PREFIX) and run.parent.is_dir():
        name = f"{source.removeprefix(SOURCE_PREFIX)}.json"
        for each in (run, *run.parent.iterdir()):
            folder = RunFolder(each)
            if (folder.records / name).exists():
                return folder
    return RunFolder(run)


def _top(path: str) -> mounts.Mount | None:
    return next((m for m in reversed(mounts.mount_table()) if m.point == path), None)


def unserved(run: Path) -> list[Record]:
    """Return the records of mounts whose metadata nobody serves any more: the server was killed, whole."""
    folder = RunFolder(run)
    return [r for r in folder.live() if (lock := folder.server(r)).exists() and not serving.is_served(lock)]


def active(run: Path) -> list[Record]:
    """Return the records of our mounts that are there, oldest first."""
    return RunFolder(run).live()


def clear_stale(run: Path) -> list[str]:
    """Clear what killed processes left: records without a mount, shared layers without a user.

    Returns:
        What was cleared, as text for a person.
    """
    folder = RunFolder(run)
    if not folder.run.is_dir():
        return []
    with folder.locked():
        return folder.release_unused() + folder.clear_other_namespaces()


def _refuse_busy(spec: MountSpec, folder: RunFolder) -> None:
    table = mounts.mount_table()
    for entry in table:
        if entry.fstype != "overlay":
            continue
        if entry.point == str(spec.target) and entry.source.startswith(SOURCE_PREFIX):
            raise UsageError(
                f"{spec.target} has a mount of layerkit already; unmount it first, or take another target"
            )
        shown = OverlayOptions.shown(entry.super_options)
        for key, value in (("upperdir", shown.upper), ("workdir", shown.work)):
            for path in (spec.upper, spec.work):
                if path is not None and value == str(path):
                    raise UsageError(
                        f"{path} is the {key} of the overlay at {entry.point}; give each mount its own"
                    )
    for record in folder.live(table):
        if spec.upper is not None and str(spec.upper) in (record.upper, record.work):
            raise UsageError(
                f"{spec.upper} is in use by the mount at {record.target}; give each mount its own upper"
            )


class _Assembly(ExitStack):
    """A mount that is being put together; its descriptors, and what was made for one that fails, go at the end."""

    def __init__(self, spec: MountSpec, folder: RunFolder, record: Record) -> None:
        super().__init__()
        self.spec, self.folder, self.record = spec, folder, record

    def _closing(self, fd: int) -> int:
        return self.enter_context(sc.closing(fd))

    def attach(self, namespace: int | None) -> None:
        """Mount it; ``namespace`` is a descriptor of the user namespace whose maps META gets."""
        spec, record = self.spec, self.record
        target = self._closing(mounts.open_folder(spec.target))
        # An overlay without an upper wants two layers, and an image without data has but META.
        data = [self._closing(self._open(layer)) for layer in spec.data or (MountLayer(self.folder.empty),)]
        if spec.meta.mapping is not None:
            server = serving.served(spec.meta.path, spec.meta.mapping, self.folder.server(record))
            meta = self.enter_context(server)
        else:
            meta = self._closing(self._open(spec.meta))
        check_stubs(f"/proc/self/fd/{meta}", spec.namespace, str(spec.meta.path))
        if namespace is not None:
            plain, meta = meta, self._closing(sc.open_tree(meta))
            _idmap(meta, namespace, plain)
        upper, work = self.enter_context(_upper(spec, meta))
        layers = mounts.Layers([meta, *data] if spec.classic else [meta], [] if spec.classic else data, upper, work)
        try:
            overlay = self._closing(self._overlay(layers))
        except UnsupportedHost:
            if not spec.classic or spec.idmap is not None:
                raise
            # Normal layers can be mounted in the old way too, from Linux 4.19 on.
            mounts.mount_overlay(spec.target, layers, source=record.source, read_only=record.read_only, nodev=True)
            return
        read_only = sc.MOUNT_ATTR_RDONLY if record.read_only else 0
        mounts.attach(overlay, target, attributes=sc.MOUNT_ATTR_NODEV | read_only)

    def _open(self, layer: MountLayer) -> int:
        """Return a descriptor of a layer's root; a shared one is mounted if it is not yet."""
        if layer.is_folder:
            return mounts.open_folder(layer.path)
        place = self.folder.layers / layer.name
        place.mkdir(mode=0o700, exist_ok=True)
        if not mounts.is_mount(place):
            with sc.closing(layer.mount()) as fd:
                mounts.attach(fd, place, attributes=sc.MOUNT_ATTR_NOEXEC)
        return mounts.open_folder(place)

    def _overlay(self, layers: mounts.Layers) -> int:
        spec = self.spec
        user = spec.namespace is Namespace.USER

        def make(top: int) -> int:
            return mounts.overlay(
                layers._replace(lower=[top, *layers.lower[1:]]),
                userxattr=user,
                # Without it chmod and chown in the mount copy the data up; for a single META without an upper
                # it would make absolute redirects walk META first (overlay-rules: a same-named folder is EIO).
                metacopy=(layers.upper is not None or spec.classic) and not user,
                source=self.record.source,
            )

        try:
            try:
                return make(layers.lower[0])
            except OSError as error:
                if error.errno != errno.EINVAL or spec.idmap is None:
                    raise
                # Before 6.15 overlayfs takes no detached mount as a layer: attach it for the moment.
                with _attached_for_now(layers.lower[0], self.folder.layers / f"map-{self.record.id}") as top:
                    return make(top)
        except OSError as error:
            hint = _explain(error, layers)
            raise type(error)(error.errno, f"{error.strerror}{hint}", str(spec.target)) from error


@contextmanager
def _attached_for_now(mount_fd: int, place: Path) -> Iterator[int]:
    # Among the shared layers, where release_unused finds it if we are killed here.
    place.mkdir(mode=0o700)
    try:
        mounts.attach(mount_fd, place)
        try:
            with sc.closing(mounts.open_folder(place)) as fd:
                yield fd
        finally:
            mounts.detach(place, lazy=True)
    finally:
        place.rmdir()


def _idmap(clone: int, namespace: int, plain: int) -> None:
    try:
        mounts.idmap(clone, namespace)
    except UnsupportedHost as error:
        kind = f"{sc.filesystem_magic(plain):#x}"
        raise UnsupportedHost(
            f"an idmapped mount of META's filesystem (type {kind})",
            "have a META written for the map (a mount without idmap), or keep the store on ext4, xfs or btrfs",
        ) from error


@contextmanager
def _upper(spec: MountSpec, meta: int) -> Iterator[tuple[int | None, int | None]]:
    """Give descriptors of upper and work; what was made for a mount that then fails is removed."""
    if spec.upper is None or spec.work is None:
        yield None, None
        return
    made: list[Path] = []
    try:
        if not spec.upper.exists():
            with staging_beside(spec.upper) as staging:
                like_root(staging.new, meta, spec.namespace)
                staging.publish(spec.upper.name)
            made.append(spec.upper)
        if not spec.work.exists():
            spec.work.mkdir(mode=0o700)
            made.append(spec.work)
        with (
            sc.closing(mounts.open_folder(spec.upper)) as upper,
            sc.closing(mounts.open_folder(spec.work)) as work,
        ):
            yield upper, work
    except BaseException:
        for path in made:
            with suppress(OSError):
                for left in path.iterdir():
                    left.rmdir()
                path.rmdir()
        raise


def like_root(folder: Path, root: int, namespace: Namespace) -> None:
    """Make ``folder`` with the owner, mode, xattrs and times of the folder that ``root`` is a descriptor of.

    A merged root is shown from the upper alone. Marks of overlayfs itself are not copied.

    Raises:
        OSError: as the system says; the folder may be there then.
    """
    folder.mkdir(mode=0o700)
    make_like(os.fsencode(folder), b"/proc/self/fd/%d/" % root, os.fstat(root), namespace)


def _explain(error: OSError, layers: mounts.Layers) -> str:
    """Return what may be behind a refusal of overlayfs, which says most things in the kernel's log only."""
    if error.errno == errno.EINVAL:
        if any(sc.filesystem_magic(fd) == sc.OVERLAYFS_MAGIC for fd in (*layers.lower, *layers.data)):
            return "; a layer lies on an overlay that lies on another: the kernel stacks two, no more"
        if layers.upper is not None and sc.filesystem_magic(layers.upper) in (sc.FUSE_MAGIC, 0x6969):
            return "; the upper's filesystem (network or FUSE) cannot hold one: use a local disk or tmpfs"
        return "; the kernel's log (dmesg) has the reason; `layerkit doctor` shows what this host can do"
    if error.errno in (errno.EBUSY, errno.ESTALE):
        return "; the upper or work folder belongs to another overlay"
    if error.errno == errno.EUCLEAN:
        return "; the image is damaged: run `layerkit store verify`"
    return ""


def _in_use(path: str) -> str:
    users = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            links = [process / "cwd", process / "root", process / "exe", *(process / "fd").iterdir()]
            for link in links:
                with suppress(OSError):
                    place = str(link.readlink())
                    if place == path or place.startswith(path + "/"):
                        users.append(f"{process.name} ({(process / 'comm').read_text().strip()})")
                        break
        if len(users) == 5:
            break
    who = f" by {', '.join(users)}" if users else " (a mount below it, or a process of another namespace)"
    return f"{path} is in use{who}; stop that and try again, or unmount it lazily"
