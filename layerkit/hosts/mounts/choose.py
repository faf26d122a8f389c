"""Which way of remapping fits this host, store and map; a person's wish is taken or refused, never bent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from layerkit.hosts.mounts.spec import MountLayer, MountSpec, meta_layer
from layerkit.idmap import Mapping
from layerkit.linux.configuration import configured
from layerkit.linux.probe import Features
from layerkit.metaonly import Namespace
from layerkit.model.errors import UnsupportedHost, UsageError
from layerkit.store.layout import DataBackend
from layerkit.store.metas import MetaEntry, Stacking
from layerkit.store.preparation import Rendering


@dataclass(frozen=True, slots=True)
class Ways:
    """How an image is to be kept and mounted.

    Attributes:
        rendering: of META in the store.
        backend: of the data.
        namespace: of the stubs' xattrs.
        idmap: let the kernel map the owners of one shared META, instead of a META for each map.
    """

    rendering: Rendering
    backend: DataBackend
    namespace: Namespace
    idmap: bool

    @property
    def one_meta(self) -> bool:
        """Return whether one META serves every map."""
        return self.idmap or self.rendering is Rendering.FUSE


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What a user can ask of a mount.

    Attributes:
        rendering: of META: ``auto``, ``erofs``, ``directory`` or ``fuse``; None is what is configured.
        data: ``auto``, ``tar`` or ``objects``: how file data is kept.
        namespace: of the stubs' xattrs: ``auto``, ``trusted`` or ``user``.
        own_meta: write META for this map even where an idmapped mount of the shared one would do.
        upper: makes the mount writable; changes go to this folder.
        work: overlayfs's own folder beside ``upper``; None takes its name with ``.work``.
        stacking: over layers that a runtime unpacked: ``auto``, ``data-only`` or ``classic``.
        reread: accept such layers that changed since they were read.
    """

    rendering: str | None = None
    data: str = "auto"
    namespace: str = "auto"
    own_meta: bool = False
    upper: Path | None = None
    work: Path | None = None
    stacking: str = "auto"
    reread: bool = False

    def spec(
        self, target: Path, ways: Ways, mapping: Mapping | None, meta: MetaEntry, data: Iterable[MountLayer]
    ) -> MountSpec:
        """Return what to mount at ``target``: ``meta``, made in these ways for ``mapping``, over ``data``."""
        idmap = (mapping.uid.extents, mapping.gid.extents) if mapping and ways.idmap else None
        layer = meta_layer(meta, mapping)
        return MountSpec(layer, tuple(data), ways.namespace, target, idmap, upper=self.upper, work=self.work)

    def __post_init__(self) -> None:
        """Refuse words that mean nothing, before anything is opened or made.

        Raises:
            UsageError: a word that is none of the choices.
        """
        _word(self.rendering or "auto", "--rendering", ("auto", *Rendering))
        _word(self.data, "--data", ("auto", *DataBackend))
        _word(self.namespace, "--namespace", ("auto", *Namespace))
        _word(self.stacking, "--stacking", ("auto", *Stacking))


def choose(store: Path, mapping: Mapping | None, options: MountOptions) -> Ways:
    """Return the best way that the host offers within what the caller asks for.

    Raises:
        UnsupportedHost: what was asked for by name is not to be had here.
    """
    wanted_rendering = options.rendering or configured("rendering")
    wanted_data, wanted_namespace = options.data, options.namespace
    features = Features(store)
    privileged = features.privileged
    if wanted_namespace == "auto":
        wanted_namespace = Namespace.TRUSTED if privileged else Namespace.USER
    erofs = privileged and ("auto" in (wanted_rendering, wanted_data) or "tar" in wanted_data) and features.erofs
    if wanted_data == DataBackend.TAR and not (privileged and features.erofs_device):
        raise UnsupportedHost("EROFS over layer tars (--data tar)", _hint(privileged))
    if wanted_rendering == Rendering.EROFS and not (privileged and features.erofs):
        raise UnsupportedHost("mounting EROFS (--rendering erofs)", _hint(privileged))
    if wanted_rendering == Rendering.FUSE and not features.fuse:
        raise UnsupportedHost(
            "FUSE (--rendering fuse)", "load the module fuse and give this user /dev/fuse, or leave the choice out"
        )
    form = Rendering.EROFS if erofs else Rendering.DIRECTORY
    backend = DataBackend.TAR if erofs and features.erofs_device else DataBackend.OBJECTS
    if wanted_rendering != "auto":
        form = Rendering(wanted_rendering)
    elif not privileged and features.fuse:
        # A folder takes an inode for each entry and map, and a second to write; a served file takes neither.
        form = Rendering.FUSE
    if wanted_data != "auto":
        backend = DataBackend(wanted_data)
    idmapped = (
        mapping is not None
        and not options.own_meta
        and privileged
        and form is not Rendering.FUSE
        and mapping.fits_kernel
        and (features.erofs_idmap if form is Rendering.EROFS else features.store_idmap)
    )
    return Ways(form, backend, Namespace(wanted_namespace), idmapped)


def _word(value: str, flag: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{flag} {value!r}: want {', '.join(choices[:-1])} or {choices[-1]}")


def _hint(privileged: bool) -> str:
    if not privileged:
        return "only root of the host may mount EROFS; leave the choice to layerkit, which then takes folders"
    return "put the store on ext4, xfs or btrfs (`layerkit doctor` says what is missing), or leave the choice out"
