"""What this host can do for a store, what fits it best, and why."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from layerkit.hosts.diagnosis.runtimes import Runtime, examine_runtimes
from layerkit.hosts.mounts.spec import MountOptions, Ways, choose
from layerkit.linux.probe import Features, Row
from layerkit.model.reports import Report
from layerkit.store.layout import DataBackend
from layerkit.store.preparation import Rendering


@dataclass(frozen=True, slots=True)
class HostReport(Report):
    """What ``layerkit doctor`` says.

    Attributes:
        store: the folder that was asked about; filesystem: what it lies on.
        kernel: release of the running kernel, for the reader alone: nothing is decided by it.
        privileged: root of the host.
        rows: the features.
        rendering, data_backend, namespace: what ``auto`` takes here, and rendering_why, data_why: why.
        idmapped: the kernel maps owners, so one META serves every map; idmapped_why: what that means here.
        copy_up_clone: whether a file's first write in an upper shares its blocks instead of copying them.
        copy_up_why: what that hangs on.
        runtimes: what is best for each container runtime.
    """

    store: str
    filesystem: str
    kernel: str
    privileged: bool
    rows: tuple[Row, ...]
    rendering: str
    rendering_why: str
    data_backend: str
    data_why: str
    namespace: str
    idmapped: bool
    idmapped_why: str
    copy_up_clone: bool
    copy_up_why: str
    runtimes: tuple[Runtime, ...] = ()

    def conclusions(self) -> list[tuple[str, str]]:
        """Return what follows from the rows, as (name, text)."""
        return [
            ("store", f"{self.store} (on {self.filesystem}, kernel {self.kernel})"),
            ("rendering", f"{self.rendering}: {self.rendering_why}"),
            ("data", f"{self.data_backend}: {self.data_why}"),
            ("xattr namespace", self.namespace),
            ("idmapped mounts", f"{'yes' if self.idmapped else 'no'}: {self.idmapped_why}"),
            ("copy-up is a clone", f"{'yes' if self.copy_up_clone else 'no'}: {self.copy_up_why}"),
        ]


def examine(store: Path, *, upper: Path | None = None) -> HostReport:
    """Probe the host for ``store``, which need not exist yet.

    Args:
        store: the store's folder.
        upper: where writable layers will lie; beside the store if it is not given.

    Raises:
        UsageError: nothing can be written where the store is to be.
    """
    features = Features(store)
    ways = choose(store, None, MountOptions())
    idmapped = features.privileged and (
        features.erofs_idmap if ways.rendering is Rendering.EROFS else features.store_idmap
    )
    clone, clone_why = _copy_up(features, ways, upper)
    return HostReport(
        store=os.fspath(store),
        filesystem=features.filesystem,
        kernel=platform.release(),
        privileged=features.privileged,
        rows=tuple(features.explain()),
        rendering=ways.rendering.value,
        rendering_why=_rendering_why(features, ways),
        data_backend=ways.backend.value,
        data_why=_data_why(features, ways),
        namespace=ways.namespace.value,
        idmapped=idmapped,
        idmapped_why=_idmapped_why(features, idmapped),
        copy_up_clone=clone,
        copy_up_why=clone_why,
        runtimes=examine_runtimes(store),
    )


def _rendering_why(features: Features, ways: Ways) -> str:
    if ways.rendering is Rendering.EROFS:
        how = "mounted from its file" if features.erofs_file else "mounted through a loop device"
        return f"one image for all of META, {how}"
    if ways.rendering is Rendering.FUSE:
        return "one file for all maps, served by FUSE for as long as a mount is there; only root may mount EROFS"
    if not features.privileged:
        return "only root of the host may mount EROFS, nor can /dev/fuse be opened; folders of stubs work here"
    return "this kernel does not mount EROFS images from the store; folders of stubs work everywhere"


def _data_why(features: Features, ways: Ways) -> str:
    if ways.backend is DataBackend.TAR:
        cache = "cached once" if features.erofs_directio else "read through loop devices"
        return f"raw layer tars are used where they lie, no extraction, {cache}"
    if not features.privileged:
        return "ordinary users read plain files by content; layers are extracted once"
    return "EROFS cannot map files onto raw tars here; layers are extracted once into files by content"


def _idmapped_why(features: Features, idmapped: bool) -> str:
    if idmapped:
        return (
            "one META serves every map, nothing written per map. An unpacked root filesystem could be mounted "
            "idmapped without layerkit too; what layerkit adds is no extraction, sharing between images and a "
            "flat stack. Squashing maps and published results get a META of their own"
        )
    if not features.privileged and features.fuse:
        return "the kernel lets only root of the host map a mount; here the server of META maps it, nothing written"
    if not features.privileged:
        return "the kernel lets only root of the host map a mount; each map gets a META of its own"
    return f"the kernel cannot map META on {features.filesystem}; each map gets a META of its own"


def _copy_up(features: Features, ways: Ways, upper: Path | None) -> tuple[bool, str]:
    if not features.reflink:
        return False, f"{features.filesystem} has no reflinks: the first open for writing copies the file"
    if ways.backend is DataBackend.TAR:
        return False, "data lies inside layer tars: the first open for writing copies the file (or --data objects)"
    if upper is not None and upper.stat().st_dev != features.probed.stat().st_dev:
        return False, f"{upper} is on another filesystem than the store: the first open for writing copies the file"
    return True, "uppers on the store's filesystem share the blocks of what they change"
