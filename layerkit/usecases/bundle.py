"""Use case: an OCI runtime bundle: an image mounted under a map, with a config.json, ready for runc or crun."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from layerkit.formats.runtime.config import Wishes
from layerkit.formats.runtime.process import image_process
from layerkit.hosts.bundle import folder as folders
from layerkit.hosts.bundle.container import Container
from layerkit.hosts.mounts import mount as mounter
from layerkit.hosts.mounts.records import RunFolder
from layerkit.hosts.mounts.spec import MountOptions
from layerkit.idmap import Mapping
from layerkit.linux.configuration import configured
from layerkit.linux.durable import whole_file
from layerkit.model.reports import Report
from layerkit.model.work import Work
from layerkit.store import pins
from layerkit.usecases.into_store import mount
from layerkit.usecases.settings import Settings


@dataclass(frozen=True, slots=True)
class BundleReport(Report):
    """What was made.

    Attributes:
        folder: of the bundle.
        user: uid:gid of the process, in the container.
        args: its words.
        how: as :class:`~layerkit.model.reports.RemapReport` has it.
        rootless: the runtime mounts the root filesystem itself.
        reused: the folder was a bundle already, and kept what was written in it.
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


@dataclass(frozen=True, slots=True)
class BundleOptions:
    """What the bundle is to be like.

    Attributes:
        mapping: the id map, for the files and for the container's user namespace; None for no namespace.
            Its host ids are those of the calling process's user namespace.
        wishes: what is to differ from what the image says.
        rootless: write a config whose first mount is the root filesystem, for a runtime that an ordinary user
            runs outside this user namespace. It is made as root of one: ``linux.userns.enter()``.
        rendering: of metadata, and ``data``, ``own_meta``: see :class:`MountOptions`.
    """

    mapping: Mapping | None = None
    wishes: Wishes = field(default_factory=Wishes)
    rootless: bool = False
    rendering: str | None = None
    data: str = "auto"
    own_meta: bool = False


def bundle(work: Work, settings: Settings, folder: Path, options: BundleOptions) -> BundleReport:
    """Make an OCI runtime bundle of the image, which is brought into the store; the store is made last.

    ``folder`` is new or empty, or a bundle of the same image and map that is not mounted.

    Raises:
        UsageError: no command, a folder in use, a map that no namespace can have.
        UnmappedId: the process's user, or an owner, is outside the map.
        InvalidImage: a malformed config, or a user that the image does not have.
    """
    start, image, mapping, rootless = time.monotonic(), work.image, options.mapping, options.rootless
    container = Container.of(
        image_process(image.config, f"config of {work.name}"), options.wishes, mapping, rootless
    )
    rendering = options.rendering or configured("rendering")
    if rootless and rendering == "auto":
        # The runtime mounts it, so that nothing of ours runs.
        rendering = "directory"
    how = MountOptions(rendering, options.data, own_meta=options.own_meta)
    where = Path(os.path.realpath(settings.store_path))
    made, new = folders.begin(folders.Bundle(
        folder, pins.new_id(), str(where), work.name, str(image.descriptor.digest),
        mapping.canonical() if mapping else "", rootless,
    ))  # fmt: skip
    run = mounter.default_run(where)
    how = replace(how, upper=made.upper, work=made.work)
    try:
        with settings.open_store() as store:
            remapped = mount(work, store, made.rootfs, mapping, how)
        record = next(r for r in mounter.active(run) if r.target == str(made.rootfs))
        config = container.config(made, record, new)
        facts = str(made.folder / folders.FACTS)
        pins.put(where, pins.Pin(made.id, facts, (record.label["meta"],), record.indexes))
        if rootless:
            _leave_to_the_runtime(made, run)
        with whole_file(made.folder / folders.CONFIG) as file:
            file.write(json.dumps(config.json, indent=1).encode() + b"\n")
    except BaseException:
        folders.unmount(made)
        pins.drop(where, made.id)
        if new:
            folders.delete(made)
        raise
    process = config.json["process"]
    assert isinstance(process, dict)
    return BundleReport(
        folder=str(made.folder), name=made.image, manifest=made.manifest, map_text=made.map, user=config.user,
        args=tuple(process["args"]), how=remapped.how, meta_bytes=remapped.meta_bytes,
        layers_read=remapped.layers_read, rootless=rootless, reused=not new, seconds=time.monotonic() - start,
        warnings=(*remapped.warnings, *config.warnings),
    )  # fmt: skip


def _leave_to_the_runtime(made: folders.Bundle, run: Path) -> None:
    """Unmount what was mounted to look into it, in a mount namespace that ends with this process."""
    folders.unmount(made)
    here = RunFolder(run)
    if not here.read_all():
        shutil.rmtree(here.base, ignore_errors=True)
