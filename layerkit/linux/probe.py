"""What this host can do, found by doing it on the store's own filesystem; version numbers are not asked.

Every probe works on detached mounts and in a folder that is removed again, so nothing shows in the mount
table and nothing stays, also when the process dies in between.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from layerkit.linux import mounts, userns
from layerkit.linux import syscalls as sc
from layerkit.metaonly import METACOPY, METACOPY_EMPTY, Namespace
from layerkit.model.errors import LayerkitError, UnsupportedHost, UsageError

_SHIFT = 100_000
_MAP = ((0, _SHIFT, 65_536),)
_CHILD_SECONDS = 30

# Two EROFS images of one file, small enough to be spelled out (fs/erofs/erofs_fs.h). Not made by the real writer on
# purpose: a probe asks about the kernel, so it must not fail because of the writer.
_CONTENT = b"layerkit probe\n"
_FILE_NAME = "f"
_UID = 7
_SUPERBLOCK_AT = 1024
_DEVICE_SLOT_AT = 1152
_ROOT_NID = 40  # in units of 32 bytes: right behind the superblock and the device slot
_FILE_NID = 43
_CHUNKED_FILE, _DEVICE_TABLE = 0x4, 0x8
_INLINE, _CHUNK_BASED = 2, 4
_EIGHT_BYTE_INDEXES = 0x20
_IMAGE_BYTES = 4096

# A child of its own, because a process with threads (numpy starts some) may not change its user namespace.
_IN_USER_NAMESPACE = """
import ctypes, os, sys
uid, gid = os.geteuid(), os.getegid()
if ctypes.CDLL(None).unshare(0x10000000 | 0x00020000):
    sys.exit(1)
for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
    with open(f"/proc/self/{name}", "w") as f:
        f.write(text)
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from layerkit.linux.probe import Features
sys.exit(0 if Features(Path(sys.argv[1])).overlay_userxattr else 1)
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One feature for a person: its name, whether it is present, why it matters, what to do without it."""

    feature: str
    present: bool
    why: str
    hint: str


@dataclass(frozen=True)
class Features:
    """What the host offers for a store; each answer is found when it is first asked for, and kept.

    Attributes:
        store: the store's folder; where it does not exist yet, its nearest parent is probed.
    """

    store: Path

    @cached_property
    def probed(self) -> Path:
        """The folder that is probed: the store, or its nearest parent that exists."""
        return _existing(self.store)

    @cached_property
    def privileged(self) -> bool:
        """Whether this process is root of the host, or has its right to mount."""
        return userns.is_privileged()

    @cached_property
    def can_mount(self) -> bool:
        """Whether this process may mount at all, on the host or in its own user namespace."""
        return userns.can_mount()

    @cached_property
    def filesystem(self) -> str:
        """The type of the store's filesystem, as the mount table names it."""
        mount = mounts.mount_of(self.probed)
        return mount.fstype if mount else "unknown"

    @cached_property
    def overlay_trusted(self) -> bool:
        """Whether an overlay of data-only layers works with ``trusted.overlay`` xattrs."""
        return self._try(lambda place, stack: _data_only(place, stack, Namespace.TRUSTED))

    @cached_property
    def overlay_userxattr(self) -> bool:
        """The same with ``user.overlay`` xattrs and ``userxattr``, for this process."""
        return self._try(lambda place, stack: _data_only(place, stack, Namespace.USER))

    @cached_property
    def overlay_classic(self) -> bool:
        """Whether stubs work over normal layers, with ``metacopy=on`` (4.19, root of the host)."""
        return self._try(_classic)

    @cached_property
    def overlay_unprivileged(self) -> bool:
        """Whether :attr:`overlay_userxattr` works in an unprivileged user namespace (6.16)."""
        if self.can_mount and not self.privileged:
            return self.overlay_userxattr
        with _scratch(self.store) as place:
            done = subprocess.run(
                [sys.executable, "-I", "-c", _IN_USER_NAMESPACE, place, *filter(None, sys.path)],
                stdin=subprocess.DEVNULL, capture_output=True, timeout=_CHILD_SECONDS, check=False,
            )  # fmt: skip
        return done.returncode == 0

    @cached_property
    def layers_by_fd(self) -> bool:
        """Whether overlay takes descriptors of detached mounts as layers (6.15)."""

        def probe(place: Path, stack: ExitStack) -> bool:
            with mounts.Context("overlay") as context:
                for name in ("a", "b"):
                    (place / name).mkdir()
                    fd = _enter(stack, sc.open_tree(place / name))
                    if sc.fsconfig(context.fd, sc.FSCONFIG_SET_FD, "lowerdir+", None, fd) < 0:
                        return False
                _enter(stack, context.mount(0))
            return True

        return self._try(probe)

    @cached_property
    def max_layers(self) -> int:
        """How many lower layers one overlay takes; 0 where it takes none one by one."""
        count = 0

        def probe(place: Path, stack: ExitStack) -> bool:
            nonlocal count
            fd = _enter(stack, mounts.open_folder(place))
            with mounts.Context("overlay") as context, suppress(OSError):
                while count <= 2 * mounts.MAX_LAYERS:
                    context.layer("lowerdir+", fd)
                    count += 1
            return True

        self._try(probe)
        return count

    @cached_property
    def erofs(self) -> bool:
        """Whether an EROFS image in the store can be mounted, through a loop device if need be."""
        return self._mounts(_plain)

    @cached_property
    def erofs_file(self) -> bool:
        """Whether it can be mounted without a loop device (6.12)."""
        return self._mounts(lambda place: mounts.erofs_file(*_written(place, tiny_erofs())))

    @cached_property
    def erofs_device(self) -> bool:
        """Whether an EROFS with blocks of 512 bytes can map files onto a raw tar in the store."""
        return self._mounts(lambda place: mounts.erofs(*_over_device(place), directio=True))

    @cached_property
    def erofs_directio(self) -> bool:
        """Whether such an EROFS can read the tar without a second copy in the page cache."""
        return self._mounts(
            lambda place: mounts.erofs_file(*_written(place, *tiny_erofs_over_device()), directio=True)
        )

    @cached_property
    def erofs_idmap(self) -> bool:
        """Whether an EROFS mounted idmapped works as a lower layer, so that one META serves every map."""
        return self._try(lambda place, stack: _shifted(place, stack, _enter(stack, _plain(place)), _UID))

    @cached_property
    def store_idmap(self) -> bool:
        """The same for a META that is a folder on the store's filesystem."""

        def probe(place: Path, stack: ExitStack) -> bool:
            file = place / "meta" / _FILE_NAME
            file.parent.mkdir()
            file.touch()
            fd = _enter(stack, mounts.open_folder(file.parent))
            return _shifted(place, stack, fd, file.stat().st_uid)

        return self._try(probe)

    @cached_property
    def reflink(self) -> bool:
        """Whether files on the store's filesystem can share blocks (``FICLONE``)."""

        def probe(place: Path, stack: ExitStack) -> bool:
            with (place / "a").open("w+b") as a, (place / "b").open("w+b") as b:
                a.write(bytes(65536))
                a.flush()
                sc.clone_file(a.fileno(), b.fileno())
            return True

        return self._try(probe)

    @cached_property
    def fuse(self) -> bool:
        """Whether this process may serve a filesystem through /dev/fuse."""
        try:
            os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
        except OSError:
            return False
        return True

    def explain(self) -> list[Row]:
        """Return every feature as a row for a person; this runs all probes."""
        where = f"on {self.filesystem}"
        return [
            Row("root of the host", self.privileged,
                "EROFS and trusted xattrs are for it alone", "a user namespace mounts folders instead"),
            Row("overlay over data-only layers", self.overlay_trusted or self.overlay_userxattr,
                "what every mount is made of", "Linux 6.8 or newer, as root or in a user namespace"),
            Row("the same for ordinary users", self.overlay_unprivileged,
                "rootless mounts (userxattr)", "Linux 6.16 or newer, and user namespaces allowed"),
            Row("detached mounts as layers", self.layers_by_fd,
                "nothing shows in the mount table on the way", "not needed: layers are attached for a moment"),
            Row(f"EROFS images {where}", self.erofs,
                "META in one file, made without a system call for each entry", "META is a folder instead"),
            Row(f"EROFS without loop devices {where}", self.erofs_file,
                "nothing to set up or to leak", "Linux 6.12, ext4, xfs or btrfs; loop devices serve too"),
            Row("EROFS over raw layer tars", self.erofs_device,
                "no extraction: layers are used where they lie", "data goes into the object store instead"),
            Row("direct I/O below EROFS", self.erofs_directio,
                "data is cached once, not twice", "a loop device with direct I/O does the same"),
            Row("idmapped EROFS as a layer", self.erofs_idmap,
                "one META serves every map, 0 bytes each", "a META is written for each map"),
            Row(f"idmapped folders {where}", self.store_idmap,
                "the same for META as a folder", "a META is written for each map"),
            Row(f"reflinks {where}", self.reflink,
                "copies of data, copy-up among them, share blocks", "put store and uppers on xfs or btrfs"),
            Row("FUSE", self.fuse, "META without a file per entry for ordinary users", "give this user /dev/fuse"),
            Row(f"{mounts.MAX_LAYERS} layers in one overlay", self.max_layers >= mounts.MAX_LAYERS,
                "images of many layers", "data of many layers goes into one object store"),
        ]  # fmt: skip

    def _try(self, probe: Callable[[Path, ExitStack], bool]) -> bool:
        with _scratch(self.store) as place, ExitStack() as stack:
            try:
                return probe(place, stack)
            except (OSError, LayerkitError):
                return False

    def _mounts(self, mount: Callable[[Path], int]) -> bool:
        """Return whether the image that is mounted shows what its file holds."""
        return self._try(lambda place, stack: _content(_enter(stack, mount(place))) == _CONTENT)


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


@contextmanager
def _scratch(store: Path) -> Iterator[Path]:
    parent = _existing(store)
    try:
        place = Path(tempfile.mkdtemp(prefix=".layerkit-probe-", dir=parent))
    except OSError as error:
        raise UsageError(f"{parent}: cannot write there ({error.strerror}); name another store") from error
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _enter(stack: ExitStack, fd: int) -> int:
    return stack.enter_context(sc.closing(fd))


def _written(place: Path, *contents: bytes) -> list[Path]:
    files = [place / f"file{number}" for number in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    return files


def _over_device(place: Path) -> list[Path]:
    return _written(place, *tiny_erofs_over_device())


def _plain(place: Path) -> int:
    return mounts.erofs(*_written(place, tiny_erofs()))


def _content(mount: int) -> bytes:
    return Path(f"/proc/self/fd/{mount}", _FILE_NAME).read_bytes()


def _stub(place: Path, stack: ExitStack, xattrs: Mapping[bytes, bytes]) -> list[int]:
    """Return the folders (of a stub with ``xattrs``, of its data) as layers."""
    (place / "meta").mkdir()
    (place / "data").mkdir()
    (place / "data" / _FILE_NAME).write_bytes(_CONTENT)
    stub = place / "meta" / _FILE_NAME
    stub.touch()
    os.truncate(stub, len(_CONTENT))
    for name, value in xattrs.items():
        os.setxattr(stub, name, value)
    return [_enter(stack, mounts.open_folder(place / name)) for name in ("meta", "data")]


def _data_only(place: Path, stack: ExitStack, namespace: Namespace) -> bool:
    layers = _stub(place, stack, namespace.stub(f"/{_FILE_NAME}".encode()))
    merged = mounts.overlay(mounts.Layers(layers[:1], layers[1:]), userxattr=namespace is Namespace.USER)
    return _content(_enter(stack, merged)) == _CONTENT


def _classic(place: Path, stack: ExitStack) -> bool:
    layers = _stub(place, stack, {Namespace.TRUSTED.xattr(METACOPY): METACOPY_EMPTY})
    try:
        merged = mounts.overlay(mounts.Layers(layers), metacopy=True)
    except UnsupportedHost:
        # A kernel that has no detached overlays: it shows in the mount table for this moment.
        at = place / "at"
        at.mkdir()
        mounts.mount_overlay(at, mounts.Layers(layers), source="overlay")
        try:
            return (at / _FILE_NAME).read_bytes() == _CONTENT
        finally:
            mounts.detach(at, lazy=True)
    return _content(_enter(stack, merged)) == _CONTENT


def _shifted(place: Path, stack: ExitStack, layer: int, owner: int) -> bool:
    """Return whether ``layer``, mapped by the kernel, works under an overlay and shows the mapped owner."""
    mapped = _enter(stack, mounts.idmapped_clone(layer, _MAP, _MAP))
    (place / "beside").mkdir()
    beside = _enter(stack, mounts.open_folder(place / "beside"))
    try:
        shown = _enter(stack, mounts.overlay(mounts.Layers([mapped], [beside])))
    except OSError:
        # Before 6.15 the mounter attaches the mapped copy for a moment. A probe leaves the mount table
        # alone: what it can tell is whether the copy itself shows the mapped owner.
        shown = mapped
    return Path(f"/proc/self/fd/{shown}", _FILE_NAME).lstat().st_uid == owner + _SHIFT


def tiny_erofs() -> bytes:
    """Return an image with blocks of 4 KiB whose file ``f``, owned by 7:7, holds ``_CONTENT``."""
    return _image(12, external=False)


def tiny_erofs_over_device() -> tuple[bytes, bytes]:
    """Return (image with blocks of 512 bytes, the device that the data of ``f`` lies on)."""
    return _image(9, external=True), bytes(512) + _CONTENT.ljust(512, b"\0")


def _image(block_bits: int, *, external: bool) -> bytes:
    image = bytearray(_IMAGE_BYTES)
    struct.pack_into(
        "<IIIBBHQQIIII16s16sIHHHBB",
        image, _SUPERBLOCK_AT,
        sc.EROFS_MAGIC, 0, 0, block_bits, 0, _ROOT_NID, 2, 0, 0, _IMAGE_BYTES >> block_bits, 0, 0,
        b"layerkit probe", b"probe",
        _CHUNKED_FILE | _DEVICE_TABLE if external else 0, 0, int(external), _DEVICE_SLOT_AT // 128, 0, 0,
    )  # fmt: skip
    if external:
        struct.pack_into("<64sII", image, _DEVICE_SLOT_AT, b"", 2, 0)
    names = ((b".", _ROOT_NID, 2), (b"..", _ROOT_NID, 2), (_FILE_NAME.encode(), _FILE_NID, 1))
    listing, text, at = b"", b"", 12 * len(names)
    for name, nid, kind in names:
        listing += struct.pack("<QHBB", nid, at + len(text), kind, 0)
        text += name
    listing += text
    _inode(image, _ROOT_NID, _INLINE, 0o40755, 2, len(listing), 0, listing)
    if external:
        index = struct.pack("<HHI", 0, 1, 1)  # block 1 of device 1
        _inode(image, _FILE_NID, _CHUNK_BASED, 0o100644, 1, len(_CONTENT), _EIGHT_BYTE_INDEXES, index)
    else:
        _inode(image, _FILE_NID, _INLINE, 0o100644, 1, len(_CONTENT), 0, _CONTENT)
    return bytes(image)


def _inode(
    image: bytearray, nid: int, layout: int, mode: int, nlink: int, size: int, union: int, tail: bytes
) -> None:
    """Write a compact inode (32 bytes) and what stands behind it."""
    struct.pack_into(
        "<HHHHIIIIHHI", image, nid * 32, layout << 1, 0, mode, nlink, size, 0, union, nid, _UID, _UID, 0
    )  # fmt: skip
    image[nid * 32 + 32 : nid * 32 + 32 + len(tail)] = tail
