"""Mounts as descriptors: made detached, combined, and attached last, so that nothing half-made shows.

Everything here returns or takes file descriptors of detached mounts; the one that is closed without
being attached is gone, also when the process dies. Kernel: Documentation/filesystems/{overlayfs,erofs}.rst.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from layerkit.formats.overlay_options import OverlayOptions
from layerkit.linux import syscalls as sc
from layerkit.linux import userns
from layerkit.model.errors import UnsupportedHost

LAYER_ATTRIBUTES = sc.MOUNT_ATTR_RDONLY | sc.MOUNT_ATTR_NODEV | sc.MOUNT_ATTR_NOSUID
MAX_LAYERS = 500
"""Lower layers of one overlay, data-only ones among them (``OVL_MAX_STACK``)."""

_LOOP_CONFIGURE = 0x4C0A
_LOOP_CTL_GET_FREE = 0x4C82
_READ_ONLY = 1
_AUTOCLEAR = 4
_DIRECT_IO = 16
_CONFIG_BYTES = 304  # struct loop_config: fd, block_size, struct loop_info64 (232), 8 reserved words
_FLAGS_OFFSET = 8 + 52
_NAME_OFFSET = 8 + 56
_TRIES = 64
_OCTAL = re.compile(rb"\\([0-7]{3})")  # space, tab, newline, # and \ in mountinfo


class Context(AbstractContextManager["Context"]):
    """A filesystem context (fsopen(2)) whose errors carry the kernel's own words."""

    def __init__(self, fstype: str) -> None:
        """Open a context for ``fstype``.

        Raises:
            UnsupportedHost: the filesystem or the mount API is not there.
            OSError: no right to mount.
        """
        self.fstype = fstype
        try:
            self.fd = sc.fsopen(fstype)
        except OSError as error:
            missing = {
                errno.ENODEV: (f"the filesystem {fstype}", f"try: modprobe {fstype}"),
                errno.ENOSYS: ("fsopen(2)", "Linux 5.2 or newer has it; seccomp may hide it"),
                errno.EPERM: (f"mounting {fstype} for this user",
                              "run as root, or in a user namespace where it may be mounted"),
            }.get(error.errno or 0)  # fmt: skip
            if missing is None:
                raise
            raise UnsupportedHost(*missing) from error

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def flag(self, key: str) -> None:
        """Set an option that has no value."""
        self._done(sc.fsconfig(self.fd, sc.FSCONFIG_SET_FLAG, key, None, 0), key)

    def text(self, key: str, value: str | bytes) -> None:
        """Set an option to a string of at most 255 bytes."""
        raw = os.fsencode(value)
        self._done(sc.fsconfig(self.fd, sc.FSCONFIG_SET_STRING, key, raw, 0), f"{key}={os.fsdecode(raw)}")

    def path(self, key: str, value: Path, keep: ExitStack) -> None:
        """Set an option to a path of any length; a descriptor that it needs is closed by ``keep``."""
        raw = os.fsencode(value)
        if len(raw) > sc.FSCONFIG_STRING_BYTES:
            raw = b"/proc/self/fd/%d" % keep.enter_context(sc.opened(raw, os.O_PATH))
        self.text(key, raw)

    def layer(self, key: str, fd: int) -> None:
        """Set an option to the folder or detached mount ``fd``: by descriptor, before 6.13 by its /proc name."""
        if sc.fsconfig(self.fd, sc.FSCONFIG_SET_FD, key, None, fd) < 0:
            sc.context_log(self.fd)
            self.text(key, f"/proc/self/fd/{fd}")

    def mount(self, attributes: int) -> int:
        """Create the filesystem and return a detached mount of it.

        Raises:
            OSError: with what the kernel logged about it.
        """
        self._done(sc.fsconfig(self.fd, sc.FSCONFIG_CMD_CREATE, None, None, 0), "mount")
        fd = sc.fsmount(self.fd, attributes)
        self._done(min(fd, 0), "fsmount")
        return fd

    def _done(self, result: int, what: str) -> None:
        if result < 0:
            log = "; ".join(sc.context_log(self.fd))
            raise sc.failed(-result, f"{self.fstype}: {what}" + (f" ({log})" if log else ""))


def erofs(image: Path, device: Path | None = None, *, directio: bool = False, loop_only: bool = False) -> int:
    """Return a detached, read-only mount of an EROFS image.

    The file itself is mounted where the kernel can (6.12; images on ext4, xfs, btrfs), else a loop device
    that goes away with the mount.

    Args:
        image: the image file.
        device: the external device that the image's chunks lie in (a raw layer tar).
        directio: read without a second copy in the page cache; dropped where the file cannot.
        loop_only: do not try without a loop device.

    Raises:
        UnsupportedHost: no EROFS, or no right to mount it.
        OSError: as the kernel says; ``EUCLEAN`` for a damaged image.
    """
    if not loop_only:
        for direct in (True, False) if directio else (False,):
            try:
                return erofs_file(image, device, directio=direct)
            except OSError as error:
                if error.errno == errno.ENOTBLK:
                    break
                # EINVAL: no O_DIRECT on the image's filesystem, or a kernel without the option.
                if not (direct and error.errno in (errno.EINVAL, errno.EOPNOTSUPP)):
                    error.filename = os.fspath(image)
                    raise
    with loop_device(image, direct=directio) as disk:
        if device is None:
            return erofs_file(disk)
        with loop_device(device, direct=directio) as second:
            return erofs_file(disk, second)


def erofs_file(image: Path, device: Path | None = None, *, directio: bool = False) -> int:
    """Return a detached mount of an image as it is, a file or a block device, or fail.

    Raises:
        OSError: ``ENOTBLK`` where the kernel wants a block device, else as for :func:`erofs`.
    """
    with ExitStack() as keep, Context("erofs") as context:
        context.path("source", image, keep)
        if device is not None:
            context.path("device", device, keep)
        if directio:
            context.flag("directio")
        context.flag("ro")
        return context.mount(LAYER_ATTRIBUTES)


@contextmanager
def loop_device(file: Path, *, direct: bool = False) -> Iterator[Path]:
    """Give a read-only loop device (loop(4)) over ``file``; it frees itself when the last user is gone.

    Args:
        file: a regular file.
        direct: read it with O_DIRECT where its filesystem can, so that it is cached once and not twice.

    Raises:
        UnsupportedHost: no loop devices here.
        OSError: the file cannot be opened.
    """
    with sc.opened(file) as backing:
        device, path = _configure(backing, file, direct)
    with sc.closing(device):
        yield path


def _configure(backing: int, file: Path, direct: bool) -> tuple[int, Path]:
    flags = _READ_ONLY | _AUTOCLEAR | (_DIRECT_IO if direct else 0)
    for _ in range(_TRIES):
        path = _free_device()
        try:
            device = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UnsupportedHost(
                f"the loop device {path} ({error.strerror})", "give it to this container"
            ) from error
        config = bytearray(_CONFIG_BYTES)
        struct.pack_into("=II", config, 0, backing, 0)
        struct.pack_into("=I", config, _FLAGS_OFFSET, flags)
        name = os.fsencode(file)[:63]
        config[_NAME_OFFSET : _NAME_OFFSET + len(name)] = name
        try:
            fcntl.ioctl(device, _LOOP_CONFIGURE, bytes(config))
        except OSError as error:
            os.close(device)
            if error.errno == errno.EBUSY:
                continue  # another process took it between the two calls
            if error.errno == errno.EINVAL and flags & _DIRECT_IO:
                flags &= ~_DIRECT_IO
                continue
            raise UnsupportedHost(f"a loop device over {file} ({error.strerror})") from error
        return device, path
    raise UnsupportedHost("a free loop device", "all were taken by others at each try")


def _free_device() -> Path:
    try:
        with sc.opened("/dev/loop-control", os.O_RDWR) as control:
            return Path(f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}")
    except OSError as error:
        raise UnsupportedHost(
            f"loop devices ({error.strerror})", "modprobe loop, or keep the store on ext4"
        ) from error


class Layers(NamedTuple):
    """What an overlay is made of, as descriptors of folders or detached mounts (idmapped ones too), top first.

    Attributes:
        lower: the normal layers. data: the data-only ones below them.
        upper: the writable layer's folder. work: an empty folder on its mount.
    """

    lower: Sequence[int]
    data: Sequence[int] = ()
    upper: int | None = None
    work: int | None = None


def overlay(
    layers: Layers,
    *,
    userxattr: bool = False,
    metacopy: bool = False,
    source: str = "overlay",
    options: Iterable[tuple[str, str | None]] = (),
) -> int:
    """Return a detached overlay mount.

    Args:
        layers: what it is made of.
        userxattr: read ``user.overlay.*`` and not ``trusted.overlay.*``.
        metacopy: copy up metadata alone.
        source: what mountinfo shows as the source.
        options: further options as (key, value or None for a flag).

    Raises:
        UnsupportedHost: no overlayfs, or none for this user.
        OSError: as the kernel says.
    """
    with Context("overlay") as context:
        context.text("source", source)
        if userxattr:
            context.flag("userxattr")
        else:
            context.text("metacopy", "on" if metacopy else "off")
        # Handles of stubs read zeros when they are opened cold; a host may have set it for all overlays.
        context.text("nfs_export", "off")
        for key, value in options:
            context.flag(key) if value is None else context.text(key, value)
        try:
            for fd in layers.lower:
                context.layer("lowerdir+", fd)
            for fd in layers.data:
                context.layer("datadir+", fd)
        except OSError as error:
            if error.errno == errno.EINVAL and len(layers.lower) + len(layers.data) <= MAX_LAYERS:
                raise UnsupportedHost(
                    f"overlay layers one by one ({error.strerror})", "Linux 6.8 has them"
                ) from error
            raise
        if layers.upper is not None and layers.work is not None:
            context.layer("upperdir", layers.upper)
            context.layer("workdir", layers.work)
        else:
            context.flag("ro")
        return context.mount(0)


def mount_overlay(
    target: Path, layers: Layers, *, source: str, read_only: bool = True, nodev: bool = False
) -> None:
    """Mount an overlay of normal layers with ``metacopy=on`` at ``target``, by mount(2).

    For kernels whose overlayfs takes no layers one by one (6.8), or without fsopen (5.2): all has to go into one
    page of text, and the mount shows at its place at once.

    Raises:
        UnsupportedHost: more layers than a page of text has room for.
        OSError: as mount(2).
    """
    options = _options(layers, os.readlink)
    if not options.fits:
        options = _options(layers, str)
    if not options.fits:
        raise UnsupportedHost(
            f"an overlay of {len(layers.lower)} layers by mount(2) ({options.size} bytes of options)",
            "Linux 6.8 or newer takes 500; flatten the image",
        )
    flags = (sc.MS_RDONLY if read_only else 0) | (sc.MS_NODEV if nodev else 0)
    sc.mount(source, target, "overlay", flags, str(options))


def _options(layers: Layers, name: Callable[[str], str]) -> OverlayOptions:
    lower, places = (
        tuple(name(f"/proc/self/fd/{fd}") for fd in fds if fd is not None)
        for fds in (layers.lower, (layers.upper, layers.work))
    )
    upper, work = places or ("", "")
    return OverlayOptions(lower, (), upper, work, (("metacopy", "on"),))


def open_folder(path: Path | str) -> int:
    """Return an ``O_PATH`` descriptor of a folder."""
    return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def idmap(mount: int, userns_fd: int) -> None:
    """Map the owners that a detached mount shows by the maps of a user namespace.

    Raises:
        UnsupportedHost: the filesystem cannot be mounted idmapped, or this user may not do it.
    """
    try:
        sc.mount_setattr(mount, add=sc.MOUNT_ATTR_IDMAP, userns=userns_fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EPERM, errno.ENOSYS):
            raise
        raise UnsupportedHost(
            f"an idmapped mount of this filesystem ({error.strerror})", "have a META written for the map instead"
        ) from error


def idmapped_clone(path: Path | str | int, uid: userns.Extents, gid: userns.Extents) -> int:
    """Return a detached copy of a mount that shows owners mapped by ``uid`` and ``gid``.

    Raises:
        UnsupportedHost: as :func:`idmap`.
        UsageError: maps that the kernel refuses.
    """
    with sc.closing(userns.userns_fd(uid, gid)) as namespace:
        fd = sc.open_tree(path)
        try:
            idmap(fd, namespace)
        except BaseException:
            os.close(fd)
            raise
        return fd


def attach(mount: int, target: Path | str | int, *, attributes: int = 0) -> None:
    """Attach a detached mount at ``target``, with ``MOUNT_ATTR_*`` flags added first."""
    if attributes:
        sc.mount_setattr(mount, add=attributes)
    sc.move_mount(mount, target)


def detach(target: Path | str, *, lazy: bool = False) -> None:
    """Unmount what is on top at ``target``; ``lazy`` hides it now and frees it when nobody uses it.

    Raises:
        OSError: ``EBUSY`` in use, ``EINVAL`` nothing mounted there.
    """
    sc.umount2(target, sc.UMOUNT_NOFOLLOW | (sc.MNT_DETACH if lazy else 0))


_EMPTY_ROOT_AT = "/proc"
"""Any folder that is there for sure: the new root is mounted on it, and then all else goes."""


def enter_empty_namespace() -> bool:
    """Move this process into a mount namespace of its own that holds one empty filesystem; return whether it did.

    A process keeps its mount namespace alive, and with it every mount in there. One that has to end when a mount
    goes must be outside, or the end of a namespace (the last shell of an ``unshare``, a container's last process)
    would never come. Where it cannot be done (a chroot, whose root is no mount) the process is where it was.
    Descriptors stay valid; paths lead nowhere any more.

    The process must have one thread.
    """
    folder = os.O_PATH | os.O_DIRECTORY
    with sc.opened("/proc/self/ns/mnt") as back, sc.opened("/", folder) as root:
        try:
            sc.unshare(sc.CLONE_NEWNS)
        except OSError:
            return False
        try:
            # Else the new root would show in the namespace that we come from.
            sc.mount("none", "/", "", sc.MS_REC | sc.MS_PRIVATE)
            sc.mount("none", _EMPTY_ROOT_AT, "tmpfs", options="size=4k,mode=555")
            os.chdir(_EMPTY_ROOT_AT)
            # The old root lands on the new one, and goes from there with everything on it: pivot_root(2).
            sc.checked(sc.libc.pivot_root(b".", b"."), "pivot_root")
            sc.umount2(".", sc.MNT_DETACH)
            os.chdir("/")
        except OSError:
            sc.checked(sc.libc.setns(back, sc.CLONE_NEWNS), "setns")
            os.fchdir(root)
            os.chroot(".")
            return False
    return True


class Mount(NamedTuple):
    """A line of /proc/PID/mountinfo (proc_pid_mountinfo(5)); ``root`` is the folder of ``device`` that it shows."""

    mount_id: int
    device: str
    root: str
    point: str
    fstype: str
    source: str
    options: str
    super_options: str


def mount_table(process: int | str = "self") -> list[Mount]:
    """Return the mounts in the mount namespace of a process, in the order in which they were made."""
    table = []
    for line in Path(f"/proc/{process}/mountinfo").read_bytes().splitlines():
        left, _, right = line.partition(b" - ")
        number, _, device, *places = left.split(b" ")[:6]
        fstype, source, shown = right.split(b" ")[:3]
        root, point, options, fstype_text, source_text = map(_unescape, (*places, fstype, source))
        more = os.fsdecode(shown)  # which has escapes of its own
        table.append(Mount(int(number), os.fsdecode(device), root, point, fstype_text, source_text, options, more))
    return table


def namespaces() -> Iterator[tuple[int, str]]:
    """Yield (inode of the mount namespace, pid) of each process that may be asked; some hide even from root."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            yield (process / "ns" / "mnt").stat().st_ino, process.name


def mount_id(path: Path | str) -> int:
    """Return the id of the mount that ``path`` lies on.

    Raises:
        OSError: the path cannot be reached.
    """
    with sc.opened(path, os.O_PATH) as fd:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("mnt_id:")))


def is_mount(place: Path) -> bool:
    """Return whether something is mounted on ``place`` itself; not if it is not there."""
    try:
        return mount_id(place) != mount_id(place.parent)
    except FileNotFoundError:
        return False


def mount_of(path: Path | str) -> Mount | None:
    """Return the mount that ``path`` lies on, None where it is not in our mount table."""
    wanted = mount_id(path)
    return next((m for m in mount_table() if m.mount_id == wanted), None)


def _unescape(field: bytes) -> str:
    return os.fsdecode(_OCTAL.sub(lambda m: bytes([int(m[1], 8)]), field))
