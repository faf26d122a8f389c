"""The folder of an OCI runtime bundle: made whole or not at all, known to the store, taken down without a rest.

::

    DIR/                0710, its group the container's root, so that only that user namespace comes in
      config.json       written last: without it no runtime starts anything
      rootfs/           where the image is mounted
      state/            0700: upper and work of the overlay
      volumes/N/        one for each volume of the image
      layerkit.json     what this is, and the id that the store's pin and the mount go by
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from layerkit.hosts.mounts import mount as mounter
from layerkit.hosts.mounts.records import SOURCE_PREFIX
from layerkit.linux import mounts
from layerkit.linux.durable import remove as delete_all
from layerkit.linux.durable import whole_file, whole_folder
from layerkit.linux.syscalls import FOLDER, opened
from layerkit.model.errors import LayerkitError, NotFound, UsageError
from layerkit.store import pins

FACTS = "layerkit.json"
CONFIG = "config.json"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle of ours.

    Attributes:
        folder: absolute.
        id: of its pin, and of its mount where the runtime mounts it.
        store: the store it was made from.
        image, manifest: name and digest of the image.
        map: canonical text of the id map, "" for none.
        rootless: mounted by the runtime itself, in the container's namespaces.
    """

    folder: Path
    id: str
    store: str
    image: str
    manifest: str
    map: str
    rootless: bool

    @property
    def rootfs(self) -> Path:
        """Return where the image is mounted."""
        return self.folder / "rootfs"

    @property
    def upper(self) -> Path:
        """Return where changes go."""
        return self.folder / "state" / "upper"

    @property
    def work(self) -> Path:
        """Return overlayfs's own folder."""
        return self.folder / "state" / "work"

    @property
    def volumes(self) -> Path:
        """Return the folder of the volumes."""
        return self.folder / "volumes"

    def open_to(self, gid: int) -> None:
        """Let the container's root, whose group is ``gid`` on the host, reach the root filesystem and the volumes.

        A runtime enters the bundle as that root. The group is enough for it, and keeps all others out.
        """
        for place in (self.folder, self.volumes):
            os.chown(place, -1, gid)
            place.chmod(0o710)

    def closed_to(self, uid: int, gid: int) -> Path | None:
        """Return the first folder above the bundle that keeps ``uid`` and ``gid`` out, by its mode."""
        for place in reversed(self.folder.parents):
            shown = place.stat()
            bit = 0o100 if shown.st_uid == uid else 0o010 if shown.st_gid == gid else 0o001
            if not shown.st_mode & bit:
                return place
        return None

    def write(self, folder: int) -> None:
        """Write ``layerkit.json`` into the folder that ``folder`` is a descriptor of."""
        facts = {"version": _VERSION, **asdict(self)}
        del facts["folder"]
        with whole_file(Path(FACTS), folder) as file:
            file.write(json.dumps(facts, indent=1, sort_keys=True).encode() + b"\n")


def read(folder: Path) -> Bundle | None:
    """Return the bundle of ours at ``folder``, None if it is none.

    Raises:
        UsageError: one of a later version of layerkit.
    """
    path = Path(os.path.realpath(folder))
    try:
        facts = json.loads((path / FACTS).read_bytes())
        version = facts.pop("version")
        if version != _VERSION:
            raise UsageError(f"{path / FACTS}: version {version}; use the layerkit that made this bundle")
        return Bundle(path, **facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def begin(wanted: Bundle) -> tuple[Bundle, bool]:
    """Return the bundle to fill, and whether it is new; one that is there and not mounted keeps its upper and id.

    Raises:
        UsageError: the folder is something else, another image's bundle, or in use.
    """
    folder = wanted.folder
    path = Path(os.path.realpath(folder))
    old = read(path)
    if old is not None:
        owner = path.stat().st_uid
        if owner != os.geteuid():
            raise UsageError(f"{folder} belongs to uid {owner}, who could change it all; use another folder")
        if (old.manifest, old.map, old.rootless) != (wanted.manifest, wanted.map, wanted.rootless):
            raise UsageError(
                f"{folder} is a bundle of {old.image} under the map {old.map or 'none'}; "
                f"take another folder, or first: layerkit bundle --remove {folder}"
            )
        _refuse_running(old)
        if any(m.point == str(old.rootfs) for m in mounts.mount_table()):
            raise UsageError(
                f"{folder} is ready already; take another folder, or: layerkit bundle --remove {folder}"
            )
        return old, False
    if path.is_dir() and any(path.iterdir()):
        raise UsageError(f"{folder}: the folder is not empty and not a bundle of layerkit; name a new one")
    if not path.parent.is_dir():
        raise UsageError(f"{folder}: there is no folder {path.parent} to make it in; create that first")
    made = replace(wanted, folder=path)
    with _new_folder(path) as fd:
        made.write(fd)
        for name, mode in (("state", 0o700), ("volumes", 0o700), ("rootfs", 0o755)):
            os.mkdir(name, mode, dir_fd=fd)
    return made, True


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[int]:
    """Give a descriptor of the empty folder ``path``; one that others may write to is replaced by a new one."""
    with contextlib.ExitStack() as stack:
        shown = None
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            fd = stack.enter_context(opened(path, FOLDER))
            shown = os.fstat(fd)
        if shown is None or shown.st_uid != os.geteuid() or shown.st_mode & 0o022:
            fd = stack.enter_context(whole_folder(path))
        yield fd


def remove(folder: Path) -> Bundle:
    """Unmount and delete the bundle at ``folder``, with all that was written in its container.

    Raises:
        NotFound: no bundle of layerkit's.
        LayerkitError: a container still runs in it.
    """
    bundle = read(folder)
    if bundle is None:
        raise NotFound(f"{folder}: not a bundle that layerkit made")
    _refuse_running(bundle)
    if not bundle.rootless:
        unmount(bundle)
    pins.drop(Path(bundle.store), bundle.id)
    delete(bundle)
    return bundle


def unmount(bundle: Bundle) -> None:
    """Unmount the root filesystem if it is mounted here."""
    with contextlib.suppress(NotFound):
        mounter.umount(bundle.rootfs, run=mounter.default_run(Path(bundle.store)))


def delete(bundle: Bundle) -> None:
    """Delete the folder; ``layerkit.json`` goes last, so that a kill leaves what can be removed again."""
    for name in os.listdir(bundle.folder):
        if name != FACTS:
            delete_all(bundle.folder / name)
    (bundle.folder / FACTS).unlink()
    bundle.folder.rmdir()


def _refuse_running(bundle: Bundle) -> None:
    user = next(iter(running(bundle)), None)
    if user is not None:
        raise LayerkitError(
            f"{bundle.folder} has a running container (process {user}); stop it first, with: "
            "runc kill NAME KILL, runc delete NAME"
        )


def running(bundle: Bundle) -> list[int]:
    """Return the processes whose root filesystem is the bundle's."""
    record = next(
        (r for r in mounter.active(mounter.default_run(Path(bundle.store))) if r.target == str(bundle.rootfs)), None
    )
    wanted = {SOURCE_PREFIX + bundle.id} | ({record.source} if record else set())
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            if any(m.point == "/" and m.source in wanted for m in mounts.mount_table(process.name)):
                found.append(int(process.name))
    return sorted(found)
