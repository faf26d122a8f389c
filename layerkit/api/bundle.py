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
from layerkit.linux.configuration import configured
from layerkit.model.reports import Report

if TYPE_CHECKING:
    from layerkit.hosts.bundle.container import Config
    from layerkit.hosts.bundle.folder import Bundle
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
    from layerkit.hosts.bundle.container import Container
    from layerkit.hosts.mounts import mount as mounter
    from layerkit.linux.durable import whole_file
    from layerkit.store import pins

    start = time.monotonic()
    process = image_process(image.image.config, f"config of {image.name}")
    container = Container.of(process, wishes or rc.Wishes(), mapping, rootless)
    store = Path(os.path.realpath(image.store_path))
    wanted = folders.Bundle(
        Path(folder), pins.new_id(), str(store), image.name, str(image.image.descriptor.digest),
        mapping.canonical() if mapping else "", rootless,
    )  # fmt: skip
    made, new = folders.begin(wanted)
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
        config = container.config(made, record, new)
        pins.put(
            store, pins.Pin(made.id, str(made.folder / folders.FACTS), (record.label["meta"],), record.indexes)
        )
        if rootless:
            _leave_to_the_runtime(made, run)
        with whole_file(made.folder / folders.CONFIG) as file:
            file.write(json.dumps(config.json, indent=1).encode() + b"\n")
    except BaseException:
        folders.unmount(made)
        pins.drop(store, made.id)
        if new:
            folders.delete(made)
        raise
    return _report(made, mounted.report, config, new, time.monotonic() - start)


def remove(folder: str | Path) -> None:
    """Unmount and delete a bundle, with all that was written in its container.

    Raises:
        NotFound: no bundle of layerkit's.
        LayerkitError: a container still runs in it.
    """
    from layerkit.hosts.bundle import folder as folders

    folders.remove(Path(folder))


def _leave_to_the_runtime(made: Bundle, run: Path) -> None:
    """Unmount what was mounted to look into it, in a mount namespace that ends with this process."""
    from layerkit.hosts.bundle import folder as folders
    from layerkit.hosts.mounts.records import RunFolder

    folders.unmount(made)
    here = RunFolder(run)
    if not here.read_all():
        shutil.rmtree(here.base, ignore_errors=True)


def _report(made: Bundle, remapped: RemapReport, config: Config, new: bool, seconds: float) -> BundleReport:
    process = config.json["process"]
    assert isinstance(process, dict)
    return BundleReport(
        folder=str(made.folder), name=made.image, manifest=made.manifest, map_text=made.map, user=config.user,
        args=tuple(process["args"]), how=remapped.how, meta_bytes=remapped.meta_bytes,
        layers_read=remapped.layers_read, rootless=made.rootless, reused=not new, seconds=seconds,
        warnings=(*remapped.warnings, *config.warnings),
    )  # fmt: skip


__all__ = ["BundleReport", "bundle", "remove"]
