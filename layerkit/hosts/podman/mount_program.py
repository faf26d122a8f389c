"""What ``layerkit mount-program`` does: an overlay for a container over the folders that podman names.

META, served by our own FUSE server or written out as a folder, lies over the storage's layer folders as data-only
layers, and the container's folder over that. Owners are those of the map in META, so nothing is copied for it.
The owners in the container's folder are those of the map too, on disk: the kernel writes them. So the folder is
marked with the map, and when podman asks for the same container *without* a map, to commit it or to compare it,
it is shown what the image would hold: a read-only snapshot with the owners mapped back.

The options are those of overlayfs and of fuse-overlayfs (fuse-overlayfs(1)), whose place we take. Maps come as
``uidmapping=C:H:N:C:H:N…`` with a colon too many at either end.

Started for every container, so it imports little; what reads layers runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from layerkit.formats.meta.fuse_tree import TREE_FILE
from layerkit.formats.overlay_options import FEATURE_KEYS, OverlayOptions
from layerkit.hosts.mounts.served import Keeper, answers, open_tree
from layerkit.hosts.podman import layers as sl
from layerkit.idmap import IdMap, Mapping, parse_id
from layerkit.linux import fuse, mounts, userns
from layerkit.linux import syscalls as sc
from layerkit.metaonly import OWNERS, Namespace
from layerkit.model.errors import Cancelled, LayerkitError, StoreError, UnsupportedHost, UsageError

_MOUNT_FLAGS = (
    "noexec", "nodev", "nosuid", "noatime", "nodiratime", "relatime", "exec", "dev", "suid", "atime", "rw", "ro",
)  # fmt: skip
_OF_FUSE_OVERLAYFS = (
    "allow_root", "allow_other", "default_permissions", "static_nlink", "noacl", "clone_fd", "max_threads",
    "max_idle_threads", "threaded", "fsync", "timeout", "fast_ino", "writeback", "noxattrs", "disable_xattrs",
    "auto_unmount", "debug", "fsname", "subtype",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Options:
    """What is to be mounted.

    Attributes:
        lower: layer folders, top first.
        upper, work: of a writable mount, else "".
        mapping: of owners; the host ids are those of the mount program's user namespace.
        read_only: no upper, or ``ro``.
        attributes: words of the mount itself, such as ``noexec``.
        overlay: options for overlayfs as (key, value or None).
        rendering: ``auto``, ``fuse`` or ``directory``.
        notes: what was asked for and has no effect here, as text for a person.
    """

    lower: tuple[str, ...]
    upper: str
    work: str
    mapping: Mapping
    read_only: bool
    attributes: tuple[str, ...] = ()
    overlay: tuple[tuple[str, str | None], ...] = ()
    rendering: str = "auto"
    notes: tuple[str, ...] = ()


def parse(text: str) -> Options:
    """Return what the option string ``text`` asks for.

    Raises:
        UsageError: no lower folder, a map that is none, or an option that would change what is shown and that
            we cannot follow (``xattr_permissions``).
    """
    rendering = "auto"
    attributes, overlay, notes = list[str](), list[tuple[str, str | None]](), list[str]()
    sides = {"uid": IdMap.identity(), "gid": IdMap.identity()}
    squash: dict[str, IdMap] = {}
    overflow: int | None = None
    asked = OverlayOptions.parse(text)
    for key, given in asked.more:
        word, value = key if given is None else f"{key}={given}", given or ""
        if key == "rendering":
            rendering = value
        elif key in ("uidmapping", "gidmapping"):
            if value.strip(":"):
                sides[key[:3]] = IdMap.parse([value.strip(":")], what=key)
        elif key in ("squash_to_uid", "squash_to_gid"):
            squash[key[-3:]] = IdMap.everything(parse_id(value, key))
        elif key == "squash_to_root":
            squash = {"uid": IdMap.everything(0), "gid": IdMap.everything(0)}
        elif key == "overflow_id":
            overflow = parse_id(value, key) if value else None
        elif key in _MOUNT_FLAGS:
            attributes.append(key)
        elif key == "volatile":
            overlay.append(("volatile", None))
        elif key in ("context", "fscontext", "defcontext", "rootcontext"):
            overlay.append((key, value))
        elif key == "xattr_permissions" and value not in ("", "0"):
            raise UsageError(
                f"{word}: owners kept in xattrs (force_mask in storage.conf) are not supported; remove it, "
                "or use fuse-overlayfs as mount_program"
            )
        elif key in FEATURE_KEYS:
            notes.append(f"{word}: chosen by layerkit itself; ignored")
        elif key not in _OF_FUSE_OVERLAYFS and key != "xattr_permissions":
            notes.append(f"{word}: unknown option, ignored")
    lower = asked.lower + asked.data
    if not lower:
        raise UsageError("-o: no lowerdir=FOLDER[:FOLDER…], top layer first")
    if bool(asked.upper) != bool(asked.work):
        raise UsageError("-o: upperdir and workdir go together")
    if rendering not in ("auto", "fuse", "directory"):
        raise UsageError(f"rendering={rendering}: want auto, fuse or directory")
    read_only = not asked.upper or "ro" in attributes
    mapping = Mapping(**(sides | squash), overflow=overflow)
    return Options(
        lower, asked.upper, asked.work, mapping, read_only, tuple(attributes), tuple(overlay), rendering,
        tuple(notes),
    )  # fmt: skip


_ATTRIBUTES = {
    "noexec": sc.MOUNT_ATTR_NOEXEC, "nodev": sc.MOUNT_ATTR_NODEV, "nosuid": sc.MOUNT_ATTR_NOSUID,
    "noatime": 0x10, "nodiratime": 0x80, "ro": sc.MOUNT_ATTR_RDONLY,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mounted:
    """What was made.

    Attributes:
        way: ``overlay`` (the kernel's alone), ``fuse``, ``directory``, ``bind`` or ``snapshot``.
        pid: of the process that keeps the server, 0 without one.
        notes: what a person should know.
    """

    way: str
    pid: int = 0
    notes: tuple[str, ...] = ()


def mount(options: str, target: Path, store: Path) -> Mounted:
    """Mount what ``options`` ask for at the existing folder ``target``; it is there in whole or not at all.

    Options are as containers-storage gives them (:func:`parse`); the store is made if it is missing.

    Raises:
        UsageError: a container's folder that was written under another map.
        UnmappedId: the map does not cover an owner.
        UnsupportedHost: the kernel refuses what this needs; the message says what helps.
        LayerkitError: a layer that cannot be read, a store that refuses.
    """
    parsed = parse(options)
    with _Mount(parsed, target, store) as mounting:
        mounted = mounting.run()
    return replace(mounted, notes=(*parsed.notes, *mounted.notes))


@dataclass(frozen=True, slots=True)
class _Stacked:
    """Layers for overlayfs: descriptors of normal and of data-only ones, and what is said of them.

    ``root`` is (uid, gid, mode) of the mount's root folder, None where a new upper need not be made like it.
    """

    mounted: Mounted
    lower: list[int]
    data: list[int]
    root: tuple[int, int, int] | None = None


class _Mount(contextlib.ExitStack):
    """One mount on its way; descriptors and processes that it does not keep end with the block."""

    def __init__(self, options: Options, target: Path, store: Path) -> None:
        super().__init__()
        self.options, self.target, self.store = options, target, store
        self.privileged = userns.is_privileged()
        self.namespace = Namespace.TRUSTED if self.privileged else Namespace.USER
        self.mapping, self.shift = options.mapping, sl.shift_text(options.mapping)
        self.upper = "" if options.read_only else options.upper

    def run(self) -> Mounted:
        lower = list(self.options.lower)
        if self.options.upper and (not self.upper or self._shows_snapshot()):
            lower.insert(0, self.options.upper)
            self.upper = ""
        layers = sl.storage_layers(lower, self.namespace, top_changes=not self.upper)
        if self.upper and not self.shift and self._is_mounted():
            # podman asks again for what it has mounted already, to look at it.
            mounts.attach(self._closing(sc.open_tree(self.target)), self.target)
            return Mounted("bind")
        views = tuple(layer for layer in layers if not layer.fixed)
        over = list(map(self._view, views))
        stacked = self._base(layers[len(views) :], bool(over))
        self._overlay([*over, *stacked.lower], stacked)
        return replace(stacked.mounted, way="snapshot") if views else stacked.mounted

    def _closing(self, fd: int) -> int:
        return self.enter_context(sc.closing(fd))

    def _opened(self, paths: Iterable[Path | str]) -> list[int]:
        return [self._closing(mounts.open_folder(path)) for path in paths]

    def _shows_snapshot(self) -> bool:
        """Return whether the container's folder has to be shown with its owners mapped back."""
        # Written again: an earlier version may have had more words for the same map.
        shifted = sl.shift_text(sl.parse_shift(sl.marker(self.upper, self.namespace)))
        wanted = self.shift
        if shifted == wanted or not os.listdir(self.upper):
            return False
        if not wanted:
            return True
        was = f"the map {shifted}" if shifted else "another mount program or without a map"
        raise UsageError(
            f"{self.upper}: written under {was}, and now wanted under {wanted}; commit the container to an image "
            "and run that"
        )

    def _is_mounted(self) -> bool:
        """Return whether an overlay with this container's folder is mounted at the target."""
        target, upper = os.path.realpath(self.target), os.path.realpath(self.upper)
        return any(
            m.point == target and m.fstype == "overlay" and OverlayOptions.shown(m.super_options).upper == upper
            for m in mounts.mount_table()
        )

    def _view(self, layer: sl.StorageLayer) -> int:
        """Return a mount of a container's folder as it is now, as a layer of an image."""
        file = self.enter_context(tempfile.TemporaryFile(prefix="layerkit-"))  # noqa: SIM115

        def write() -> None:
            from layerkit.hosts.podman.build import write_view

            write_view(layer, self.namespace, file)

        _in_child(write)
        data = self._closing(os.open(layer.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        keeper = self.enter_context(Keeper(answers(open_tree(file), self.mapping, data), data))
        return self._closing(keeper.mount())

    def _base(self, layers: Sequence[sl.StorageLayer], under: bool) -> _Stacked:
        """Return how the layers of the image are stacked; ``under`` says that something lies over them."""
        data = [layer.path for layer in layers]
        rendering, why = self.options.rendering, tuple[str, ...]()
        if rendering != "directory":
            meta = self._built(layers, sl.tree_key(layers, self.namespace), served=True)
            tree = open_tree(self.enter_context((meta / TREE_FILE).open("rb")))
            # overlayfs wants two layers at least; META and data are two.
            enough = bool(self.upper) or under or len(layers) > 1
            if rendering == "auto" and not self.shift and enough:
                marked = sl.with_marks(layers, meta, tree.facts.more["marks_below"])
                return _Stacked(Mounted("overlay"), self._opened(marked), [])
            try:
                keeper = self.enter_context(Keeper(answers(tree, self.mapping)))
                top, inode = self._closing(keeper.mount()), tree.inode(0)
                owner = self.mapping.host_of("uid", inode.uid), self.mapping.host_of("gid", inode.gid)
                return _Stacked(Mounted("fuse", keeper.pid), [top], self._opened(data), (*owner, inode.mode))
            except OSError as error:
                if rendering == "fuse" or error.filename != fuse.DEVICE:
                    raise
                why = (f"{fuse.DEVICE}: {error.strerror}; metadata is written as files instead, once for each map",)
        key = sl.folder_key(layers, self.namespace, self.mapping)
        top = self._closing(mounts.open_folder(self._built(layers, key, served=False) / "root"))
        seen = os.fstat(top)
        owner = seen.st_uid, seen.st_gid
        return _Stacked(Mounted("directory", 0, why), [top], self._opened(data), (*owner, seen.st_mode))

    def _built(self, layers: Sequence[sl.StorageLayer], key: str, *, served: bool) -> Path:
        """Return the META of ``layers`` in the store, made if it is not there."""

        def make() -> None:
            from layerkit.hosts.podman.build import build_meta

            build_meta(self.store, layers, self.namespace, None if served else self.mapping)

        path = self.store / "meta" / key
        # It appears there by rename, whole; so the folder itself says that it may be used.
        if not path.is_dir():
            _in_child(make)
        return path

    def _overlay(self, lower: list[int], stacked: _Stacked) -> None:
        upper = work = None
        if self.upper:
            self._prepare_upper(stacked.root)
            upper, work = self._opened((self.upper, self.options.work))
        # What the kernel would note in the upper's root (uuid) would make a layer look changed: podman mounts
        # layers of images writable too, to compare them.
        extra = (*self.options.overlay, ("uuid", "off")) if self.upper else self.options.overlay
        attributes = 0 if self.upper else sc.MOUNT_ATTR_RDONLY
        for word in self.options.attributes:
            attributes |= _ATTRIBUTES.get(word, 0)
        try:
            fd = mounts.overlay(
                mounts.Layers(lower, stacked.data, upper, work), userxattr=not self.privileged, source="layerkit",
                options=extra,
            )  # fmt: skip
        except OSError as error:
            raise _refused(error, bool(stacked.data), self.privileged) from error
        mounts.attach(self._closing(fd), self.target, attributes=attributes)

    def _prepare_upper(self, root: tuple[int, int, int] | None) -> None:
        """Give a new container's folder the look of the image's root, which the mount shows from it alone."""
        if root is None or os.listdir(self.upper):
            return
        name = self.namespace.xattr(OWNERS)
        if self.shift:
            os.setxattr(self.upper, name, self.shift.encode())
        elif sl.marker(self.upper, self.namespace):
            os.removexattr(self.upper, name)
        uid, gid, mode = root
        os.chown(self.upper, uid, gid)
        Path(self.upper).chmod(mode & 0o7777)


class _BuildFailed(LayerkitError):
    """Layers could not be read, in the process that was to do it; message and exit code are its own."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.exit_code = code  # type: ignore[misc]


def _in_child(work: Callable[[], object]) -> None:
    """Run ``work`` in a process of its own: numpy and its threads must not be in one that forks servers."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code, text = 0, ""
        # Threads of numpy's that only wait would take the processor from the one that works.
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        gc.disable()
        try:
            work()
        except (LayerkitError, Cancelled) as error:
            code, text = error.exit_code, str(error)
        except OSError as error:
            code, text = 1, f"{error.strerror}: {error.filename}" if error.filename else str(error)
        except BaseException as error:
            code, text = 1, f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            os.write(write, text.encode("utf-8", "replace")[:60_000])
        os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as said:
        text = said.read().decode("utf-8", "replace")
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status != 0:
        raise _BuildFailed(
            text or f"reading the layers ended with {status}; try again", status if status > 0 else 1
        )


def _refused(error: OSError, data_only: bool, privileged: bool) -> LayerkitError:
    """Return what a refusal of overlayfs means for a person."""
    if error.errno == errno.EINVAL and data_only:
        needs = "Linux 6.8 (data-only layers by name)" if privileged else "Linux 6.16 (the same for ordinary users)"
        return UnsupportedHost(
            f"overlay layers of data only here ({error.strerror})",
            f"it needs {needs}; take mount_program out of storage.conf (`layerkit setup podman --undo`), or name "
            "fuse-overlayfs there: podman then copies, or maps in FUSE",
        )
    if error.errno in (errno.EPERM, errno.EACCES):
        return UnsupportedHost(
            f"an overlay mount ({error.strerror})", "run it as podman does: as root, or in `podman unshare`"
        )
    if error.errno in (errno.EBUSY, errno.ESTALE):
        return StoreError(f"{error}: the container's folder is in use by another mount; stop that container")
    return StoreError(f"{error}")
