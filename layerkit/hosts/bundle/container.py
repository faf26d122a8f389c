"""The container that a bundle is for: who is its root on the host, what config.json says, what it needs."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from layerkit.formats import strict_json
from layerkit.formats.overlay_options import OverlayOptions
from layerkit.formats.runtime import config as rc
from layerkit.formats.runtime import passwd, seccomp
from layerkit.formats.runtime.process import ImageProcess
from layerkit.hosts.bundle.folder import Bundle
from layerkit.hosts.mounts.records import SOURCE_PREFIX, Record
from layerkit.idmap import Mapping
from layerkit.linux import mounts, userns
from layerkit.linux.folders.walk import make_like, walk
from layerkit.linux.inside import make_folders, open_inside, read_inside
from layerkit.linux.syscalls import Run, closing, copy_run
from layerkit.linux.userns import outer_maps
from layerkit.model.errors import InvalidImage, UnmappedId, UnsupportedHost, UsageError
from layerkit.store.layout import Layout

_ACCOUNT_BYTES = 16 << 20


class Config(NamedTuple):
    """A config.json, uid:gid of its process, and what a person should know."""

    json: rc.JsonObject
    user: str
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class Container:
    """What is to run in a bundle.

    Attributes:
        process: what the image wants. wishes: what the caller wants otherwise.
        mapping: of the container's user namespace, None for no namespace.
        rootless: the runtime mounts the root filesystem itself.
        owner: host ids of the container's root.
        seccomp: the filter of system calls, None for none, and what a person should know about it.
    """

    process: ImageProcess
    wishes: rc.Wishes
    mapping: Mapping | None
    rootless: bool
    owner: tuple[int, int]
    seccomp: tuple[rc.JsonObject | None, str]

    @classmethod
    def of(cls, process: ImageProcess, wishes: rc.Wishes, mapping: Mapping | None, rootless: bool) -> Container:
        """Return it, if any container can run so; nothing is made before that is known.

        Raises:
            UsageError: no command, a wish that means nothing, or a map that no namespace can have.
            InvalidImage: a volume at the root.
            UnsupportedHost: a rootless container whose root is somebody else.
        """
        rc.arguments(process, wishes)
        rc.volumes(process, wishes)
        owner = _root_of(mapping, rootless)
        return cls(process, wishes, mapping, rootless, owner, seccomp_profile(wishes.seccomp, rc.bounding(wishes)))

    def config(self, bundle: Bundle, record: Record, new: bool) -> Config:
        """Return the config.json of ``bundle``, whose root filesystem is mounted; ``new``: volumes are made.

        Raises:
            UnmappedId: the process's user is outside the map.
            InvalidImage: a user that the image does not have, or a volume that is no folder there.
        """
        with closing(mounts.open_folder(bundle.rootfs)) as root:
            passwords, groups = (read_inside(root, f"/etc/{name}", _ACCOUNT_BYTES) for name in ("passwd", "group"))
            own = self.wishes.user is not None
            spec = self.process.user if self.wishes.user is None else self.wishes.user
            user = passwd.resolve(spec, passwords, groups, what="--user" if own else "Config.User")
            self._check_mapped("uid", user.uid)
            for gid in (user.gid, *user.groups):
                self._check_mapped("gid", gid)
            os.close(make_folders(root, rc.working_dir(self.process, self.wishes), *self.owner))
            volumes, warnings = self._volumes(bundle, root, new)
        if self.mapping is not None:
            bundle.open_to(self.owner[1])
            closed = bundle.closed_to(*self.owner)
            if closed is not None:
                warnings.append(
                    f"{closed} (mode {closed.stat().st_mode & 0o7777:04o}) keeps the container's root, "
                    f"{self.owner[0]} on the host, out of the bundle; chmod o+x it, or make the bundle elsewhere"
                )
        filter_of_calls, said = self.seccomp
        uid_map, gid_map = self._namespace_maps()
        host = rc.HostSide(
            "rootfs", uid_map, gid_map, [_root_mount(bundle, record)] if self.rootless else [], volumes,
            rootless=not userns.in_initial_userns(), seccomp=filter_of_calls,
        )  # fmt: skip
        config, more = rc.runtime_config(self.process, self.wishes, user, host)
        return Config(config, f"{user.uid}:{user.gid}", [*warnings, *more, *([said] if said else [])])

    def _check_mapped(self, kind: str, wanted: int) -> None:
        if self.mapping is not None and self.mapping.of(kind).host_of(wanted) is None:
            raise UnmappedId(b"the container's process", kind, wanted, str(self.mapping.of(kind)))

    def _volumes(self, bundle: Bundle, root: int, new: bool) -> tuple[list[rc.JsonObject], list[str]]:
        """Return the mounts of the image's volumes, each filled with what the image has there, and warnings."""
        found: list[rc.JsonObject] = []
        paths, warnings = rc.volumes(self.process, self.wishes)
        for number, path in enumerate(paths):
            if self.wishes.image_volumes == "bind":
                place = bundle.volumes / str(number)
                if new or not place.exists():
                    _seed_volume(root, path, place, self.owner)
                kind, source, options = "bind", str(place), ["rbind", "rprivate", "nodev"]
            else:
                # tmpcopyup is the runtimes' own word for: with what the image has there.
                kind, source, options = "tmpfs", "tmpfs", ["nosuid", "nodev", "noexec", "tmpcopyup"]
            found.append({"destination": path, "type": kind, "source": source, "options": options})
        return found, warnings

    def _namespace_maps(self) -> tuple[rc.Extents, rc.Extents]:
        """Return the maps of the container's namespace as the runtime will see them."""
        if not self.rootless:
            return (self.mapping.uid.extents, self.mapping.gid.extents) if self.mapping else ((), ())
        uid, gid = outer_maps()
        if self.mapping is not None:
            uid, gid = self.mapping.uid.compose(uid), self.mapping.gid.compose(gid)
        return uid.extents, gid.extents


def _root_of(mapping: Mapping | None, rootless: bool) -> tuple[int, int]:
    """Return the host ids of the container's root; refuse maps that no container can run under."""
    if rootless and userns.in_initial_userns():
        raise UsageError("--rootless is for ordinary users; leave it out as root")
    if mapping is None:
        return 0, 0
    if not mapping.fits_kernel:
        raise UsageError("a user namespace supports neither --squash nor --overflow-id, and at most 340 ranges")
    uid, gid = mapping.uid.host_of(0), mapping.gid.host_of(0)
    if uid is None or gid is None:
        kind, one = ("uid", mapping.uid) if uid is None else ("gid", mapping.gid)
        raise UsageError(f"the {kind} map {one} leaves out 0, so the container would have no root")
    if rootless and (uid, gid) != (0, 0):
        # runc gives the container's root its pipes and its fifo, and the store is closed to every other id.
        raise UnsupportedHost(
            f"a rootless container whose root is not yourself ({mapping.uid})",
            "give 0 to 0, as in --uid-map 0:0:1,1:1000:60000; or, for any map, run both layerkit and the runtime "
            "in `podman unshare` or `unshare --map-root-user --map-auto --mount`, without --rootless",
        )
    return uid, gid


def _root_mount(bundle: Bundle, record: Record) -> rc.JsonObject:
    """Return the mount that makes the root filesystem in the container's own namespaces."""
    layout = Layout(Path(bundle.store))
    meta = layout.meta(record.label["meta"]) / "root"
    if not meta.is_dir() or record.backend != "objects":
        raise UnsupportedHost(
            "a rootless bundle over EROFS or FUSE", "leave out --data and --rendering: it takes folders and objects"
        )
    upper, work = os.fspath(bundle.upper), os.fspath(bundle.work)
    options = OverlayOptions((str(meta),), (str(layout.objects),), upper, work, (("userxattr", None),))
    if not options.fits:
        raise UsageError(f"{options.size} bytes of mount options; give the store and the bundle shorter paths")
    source = SOURCE_PREFIX + bundle.id
    return {"destination": "/", "type": "overlay", "source": source, "options": list(options.texts)}


def _seed_volume(root: int, path: str, target: Path, owner: tuple[int, int]) -> None:
    """Make ``target`` a copy of the folder ``path`` of the root filesystem: attributes, and what is in it.

    Where the image has no such folder, ``target`` is an empty one of ``owner`` (host ids), mode 0755.
    """
    target.mkdir(mode=0o700)
    try:
        source = open_inside(root, path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise InvalidImage(f"the image's volume {path} is not a folder in the image") from error
        if error.errno != errno.ENOENT:
            raise
        os.chown(target, *owner)
        target.chmod(0o755)
        return
    with closing(source):
        _copy(source, os.fsencode(target))


def _copy(source: int, target: bytes) -> None:
    """Copy what is in a folder into the folder ``target``; links between its files stay links."""
    at = b"/proc/self/fd/%d/" % source
    links: dict[tuple[int, int], bytes] = {}
    made = [(b"", os.fstat(source))]
    for folder in walk(source):
        for name, shown in folder.names:
            path = folder.below(name)
            copy = os.path.join(target, path)
            first = links.setdefault((shown.st_dev, shown.st_ino), copy)
            if stat.S_ISDIR(shown.st_mode):
                os.mkdir(copy, 0o700)
            elif first != copy:
                os.link(first, copy, follow_symlinks=False)
                continue
            elif stat.S_ISREG(shown.st_mode):
                with Path(os.fsdecode(at + path)).open("rb") as old, Path(os.fsdecode(copy)).open("xb") as new:
                    copy_run(Run(old.fileno(), 0, 0, shown.st_size), new.fileno())
            elif stat.S_ISLNK(shown.st_mode):
                os.symlink(os.readlink(at + path), copy)
            else:
                os.mknod(copy, stat.S_IFMT(shown.st_mode) | 0o600, shown.st_rdev)
            made.append((path, shown))
    # Folders after what is in them, which changes their times.
    for path, shown in reversed(made):
        make_like(os.path.join(target, path), at + path, shown, lossy=True)


SECCOMP_PROFILES = (Path("/etc/containers/seccomp.json"), Path("/usr/share/containers/seccomp.json"))
"""Where podman looks (containers.conf(5), ``seccomp_profile``)."""
_SECCOMP_BYTES_AT_MOST = 4 << 20


def seccomp_profile(wish: str, capabilities: Collection[str]) -> tuple[strict_json.JsonObject | None, str]:
    """Return ``linux.seccomp`` of a config.json, None for none, and what a person should know, "" for nothing.

    ``wish`` is ``auto`` (the host's, if there is one), ``unconfined``, or the path of a profile; ``capabilities``
    are those of the container's bounding set.

    Raises:
        UsageError: a file that is no profile.
    """
    if wish == "unconfined":
        return None, ""
    place = Path(wish)
    if wish == "auto":
        found = next((path for path in SECCOMP_PROFILES if path.is_file()), None)
        if found is None:
            return None, (
                "no seccomp profile on this host: every system call is open to the container; install "
                "containers-common, or name a profile with --seccomp FILE"
            )
        place = found
    try:
        with place.open("rb") as file:
            text = file.read(_SECCOMP_BYTES_AT_MOST + 1)
    except OSError as error:
        raise UsageError(f"--seccomp {wish}: {error.strerror}; want auto, unconfined or a file") from error
    if len(text) > _SECCOMP_BYTES_AT_MOST:
        raise UsageError(f"{place}: more than {_SECCOMP_BYTES_AT_MOST} bytes are no seccomp profile")
    system = os.uname()
    numbers = re.match(r"(\d+)\.(\d+)", system.release)
    kernel = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    around = seccomp.Surroundings(system.machine, kernel, capabilities)
    try:
        read = strict_json.load_object(text, str(place))
    except InvalidImage as error:
        raise UsageError(f"--seccomp: {error}") from error
    return seccomp.runtime_profile(read, around, str(place)), ""
