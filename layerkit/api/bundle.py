"""The Python API for OCI runtime bundles."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from layerkit.api import open as api
from layerkit.formats.runtime import config as rc
from layerkit.hosts.bundle.maps import _check_mapped, _namespace_maps, _root_of
from layerkit.hosts.bundle.root_mount import _root_mount
from layerkit.linux.configuration import configured
from layerkit.model.reports import Report

if TYPE_CHECKING:
    from layerkit.hosts.bundle.folder import Bundle
    from layerkit.hosts.mounts.records import Record
    from layerkit.idmap import Mapping
    from layerkit.model.ports import Progress
    from layerkit.model.reports import RemapReport


@dataclass(frozen=True, slots=True)
class BundleReport(Report):
    """What was made.

    Attributes:
        folder: of the bundle.
        name, manifest: of the image.
        map_text: the id map in canonical form, "" for none.
        user: uid:gid of the process, in the container.
        args: its words.
        how: as :class:`~layerkit.model.reports.RemapReport` has it.
        meta_bytes: bytes of metadata that exist for this map alone.
        layers_read: blobs that had to be read.
        rootless: the runtime mounts the root filesystem itself.
        reused: the folder was a bundle already, and kept what was written in it.
        seconds: wall time.
        warnings: what the image asked for and does not get, and what was odd but harmless.
    """

    folder: str
    name: str
    manifest: str
    map_text: str
    user: str
    args: tuple[str, ...]
    how: str
    meta_bytes: int
    layers_read: int
    rootless: bool
    reused: bool
    seconds: float
    warnings: tuple[str, ...] = ()


def bundle(
    image: api.OpenImage,
    folder: str | Path,
    mapping: Mapping | None = None,
    wishes: rc.Wishes | None = None,
    *,
    rootless: bool = False,
    rendering: str | None = None,
    own_meta: bool = False,
    progress: Progress | None = None,
) -> BundleReport:
    """Make an OCI runtime bundle of ``image`` in ``folder``: mounted, with a config.json, ready for runc or crun.

    Args:
        image: the open image.
        folder: a new or empty folder, or a bundle of the same image and map that is not mounted.
        mapping: the id map, for the files and for the container's user namespace; None for no namespace.
            Its host ids are those of the calling process's user namespace.
        wishes: what is to differ from what the image says.
        rootless: write a config whose first mount is the root filesystem, for a runtime that an ordinary user
            runs outside this user namespace. Call it as root of a user namespace: ``hosts.rootless.enter()``.
        rendering: of metadata, see ``OpenImage.mount``.
        own_meta: see ``OpenImage.mount``.
        progress: told about the bytes read.

    Raises:
        UsageError: no command, a folder in use, a map that no namespace can have.
        UnmappedId: the process's user, or an owner, is outside the map.
        InvalidImage: a malformed config, or a user that the image does not have.
    """
    from layerkit.formats.runtime.process import image_process
    from layerkit.hosts.bundle import folder as folders
    from layerkit.hosts.mounts import mount as mounter
    from layerkit.store import pins

    start = time.monotonic()
    chosen = wishes or rc.Wishes()
    process = image_process(image.image.config, f"config of {image.name}")
    rc.arguments(process, chosen)
    owner = _root_of(mapping, rootless)
    store = Path(os.path.realpath(image.store_path))
    made, new = folders.begin(
        Path(folder), store=store, image=image.name, manifest=str(image.image.descriptor.digest),
        map_text=mapping.canonical() if mapping else "", rootless=rootless,
    )  # fmt: skip
    run = mounter.default_run(store)
    if rootless and (rendering or configured("rendering")) == "auto":
        # The runtime mounts it, so that nothing of ours runs.
        rendering = "directory"
    try:
        mounted = image.mount(
            made.rootfs, mapping, upper=made.upper, work=made.work, rendering=rendering, own_meta=own_meta,
            progress=progress,
        )  # fmt: skip
        record = next(r for r in mounter.active(run) if r.target == str(made.rootfs))
        config, user, warnings = _fill(made, process, chosen, mapping, owner, new, rootless, record)
        pins.put(store, pins.Pin(made.id, str(made.folder / folders.FACTS), *_used(record)))
        if rootless:
            _leave_to_the_runtime(made, run)
        folders.write_whole(made.folder / folders.CONFIG, json.dumps(config, indent=1) + "\n")
    except BaseException:
        folders.unmount(made)
        pins.drop(store, made.id)
        if new:
            folders.delete(made)
        raise
    return _report(made, mounted.report, config, user, new, warnings, time.monotonic() - start)


def remove(folder: str | Path) -> None:
    """Unmount and delete a bundle, with all that was written in its container.

    Raises:
        NotFound: no bundle of layerkit's.
        LayerkitError: a container still runs in it.
    """
    from layerkit.hosts.bundle import folder as folders

    folders.remove(Path(folder))


def _fill(
    made: Bundle,
    process: object,
    wishes: rc.Wishes,
    mapping: Mapping | None,
    owner: tuple[int, int],
    new: bool,
    rootless: bool,
    record: Record,
) -> tuple[dict[str, object], str, list[str]]:
    from layerkit.formats.runtime.process import ImageProcess
    from layerkit.hosts.bundle import fill, seccomp
    from layerkit.hosts.bundle import folder as folders
    from layerkit.linux import userns

    assert isinstance(process, ImageProcess)
    root = os.open(made.rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        spec = process.user if wishes.user is None else wishes.user
        user = fill.user_of(root, spec, "Config.User" if wishes.user is None else "--user")
        _check_mapped(mapping, user.uid, (user.gid, *user.groups))
        fill.need_folder(root, rc.working_dir(process, wishes), owner)
        paths, warnings = rc.volumes(process, wishes)
        volume_mounts: list[dict[str, object]] = []
        for number, path in enumerate(paths):
            if wishes.image_volumes == "bind":
                place = made.volumes / str(number)
                if new or not place.exists():
                    fill.seed_volume(root, path, place, owner)
                kind, source, options = "bind", str(place), ["rbind", "rprivate", "nodev"]
            else:
                # tmpcopyup is the runtimes' own word for: with what the image has there.
                kind, source, options = "tmpfs", "tmpfs", ["nosuid", "nodev", "noexec", "tmpcopyup"]
            volume_mounts.append({"destination": path, "type": kind, "source": source, "options": options})
    finally:
        os.close(root)
    if mapping is not None:
        folders.open_to(made, owner[1])
        closed = folders.closed_to(made, *owner)
        if closed is not None:
            warnings.append(
                f"{closed} (mode {closed.stat().st_mode & 0o7777:04o}) keeps the container's root, "
                f"{owner[0]} on the host, out of the bundle; chmod o+x it, or make the bundle elsewhere"
            )
    inside = not userns.in_initial_userns()
    maps = _namespace_maps(mapping, rootless)
    first = [_root_mount(made, record)] if rootless else []
    calls, said = seccomp.profile(wishes.seccomp, rc.bounding(wishes))
    config, more = rc.runtime_config(
        process, wishes, user, root="rootfs", uid_map=maps[0], gid_map=maps[1], first_mounts=first,
        volume_mounts=volume_mounts, rootless=inside, seccomp=calls,
    )  # fmt: skip
    more += [said] if said else []
    return config, f"{user.uid}:{user.gid}", warnings + more


def _leave_to_the_runtime(made: Bundle, run: Path) -> None:
    """Unmount what was mounted to look into it, in a mount namespace that ends with this process."""
    from layerkit.hosts.bundle import folder as folders
    from layerkit.hosts.mounts.records import RunFolder

    folders.unmount(made)
    here = RunFolder(run)
    if not here.read_all():
        shutil.rmtree(here.base, ignore_errors=True)


def _used(record: Record) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (record.label["meta"],), record.indexes


def _report(
    made: Bundle,
    remapped: RemapReport,
    config: dict[str, object],
    user: str,
    new: bool,
    warnings: list[str],
    seconds: float,
) -> BundleReport:
    process = config["process"]
    assert isinstance(process, dict)
    return BundleReport(
        folder=str(made.folder), name=made.image, manifest=made.manifest, map_text=made.map, user=user,
        args=tuple(process["args"]), how=remapped.how, meta_bytes=remapped.meta_bytes,
        layers_read=remapped.layers_read, rootless=made.rootless, reused=not new, seconds=seconds,
        warnings=(*remapped.warnings, *warnings),
    )  # fmt: skip


__all__ = ["BundleReport", "bundle", "remove"]
