"""What is to be mounted, as values, and the refusals that need no lock and no mount.

Which way of remapping fits host, store and map is chosen here; a person's wish is taken or refused, never bent.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from layerkit.formats.meta.fuse_tree import TREE_FILE
from layerkit.idmap import Mapping
from layerkit.linux import mounts, userns
from layerkit.linux import syscalls as sc
from layerkit.linux.configuration import configured
from layerkit.linux.folders.walk import walk, xattr_names, xattr_path
from layerkit.linux.probe import Features
from layerkit.metaonly import METACOPY, Namespace
from layerkit.model.digest import Digest
from layerkit.model.errors import UnsupportedHost, UsageError
from layerkit.model.facts import TreeFacts
from layerkit.store.layout import DataBackend
from layerkit.store.local import LocalStore
from layerkit.store.metas import MetaEntry, Stacking
from layerkit.store.preparation import Rendering

IdExtents = tuple[tuple[int, int, int], ...]
"""(container id, host id, size) each."""

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+@-]{0,179}")
_STUB_SEARCH_NAMES = 5000


@dataclass(frozen=True, slots=True)
class MountLayer:
    """A layer as the mounter takes it: a folder, an EROFS image that mounts share, or a META that is served.

    Attributes:
        path: the folder (a META rendered as one, an object store, a runtime's unpacked layer), or the file.
        key: of an EROFS image, which is mounted once per key; "" for what is none. The key stands for the content:
            what is mounted under it serves whoever comes with the same key. Make it of a digest (the diff_id).
        tar: the layer's raw tar that such an image is over: it is DATA then, and META without.
        mapping: of the owners in a META that a server of ours answers for; one file serves every map.
    """

    path: Path
    key: str = ""
    tar: Path | None = None
    mapping: Mapping | None = None

    @property
    def is_folder(self) -> bool:
        """Return whether it is a folder: nothing has to be mounted for it."""
        return not self.key and self.mapping is None

    @property
    def name(self) -> str:
        """Return the name of an image's mount point among the shared layers."""
        return f"{'meta' if self.tar is None else 'data'}-{self.key}"

    def mount(self) -> int:
        """Return a detached mount of an image."""
        return mounts.erofs(self.path, self.tar, directio=self.tar is not None)

    def checked(self, what: str) -> MountLayer:
        """Return it with its files resolved; see :func:`checked`."""
        if self.is_folder:
            return MountLayer(_real(self.path, what))
        tar = None if self.tar is None else _real(self.tar, "the layer's tar", folder=False)
        what = f"the {what} image" if self.key else f"the {what}"
        return replace(self, path=_real(self.path, what, folder=False), tar=tar)


def meta_layer(entry: MetaEntry, mapping: Mapping | None = None) -> MountLayer:
    """Return a META of the store as the mounter takes it; ``mapping`` is for one that is served."""
    if entry.info["rendering"] == Rendering.FUSE:
        return MountLayer(entry.path / TREE_FILE, mapping=mapping or Mapping.identity())
    if entry.info["rendering"] == Rendering.EROFS:
        return MountLayer(entry.image_file, entry.key)
    return MountLayer(entry.root)


def data_layers(store: LocalStore, backend: DataBackend, facts: TreeFacts) -> tuple[MountLayer, ...]:
    """Return the data that the stubs of a tree point at; layers whose files are all hidden are left out."""
    if backend is DataBackend.OBJECTS:
        return (MountLayer(store.objects_root),)
    digests = map(Digest.parse, facts.data_layers)
    return tuple(MountLayer(store.data_image(each), each.hex, store.tar_path(each)) for each in digests)


@dataclass(frozen=True, slots=True)
class MountSpec:
    """One overlay mount of a META over data.

    Attributes:
        meta: the metadata layer.
        data: the data layers, top first; none for an image without data.
        namespace: where META's stubs have their xattrs: ``user`` mounts with ``userxattr``.
        target: an existing folder.
        idmap: (uid ranges, gid ranges) that the kernel is to apply to META; None: META's owners as they are.
        upper: the writable layer, made if it is absent; None for a mount that is read-only.
        work: overlayfs's own folder beside ``upper``; None: ``UPPER.work``.
        classic: ``data`` are folders that lie under META as normal layers, with ``metacopy=on``: META's files
            are found in them at their own paths, and what META does not have shows through.
        label: kept in the record for whoever lists mounts (image, map and so on).
    """

    meta: MountLayer
    data: tuple[MountLayer, ...]
    namespace: Namespace
    target: Path
    idmap: tuple[IdExtents, IdExtents] | None = None
    upper: Path | None = None
    work: Path | None = None
    classic: bool = False
    label: dict[str, str] = field(default_factory=dict)

    @property
    def shared(self) -> tuple[MountLayer, ...]:
        """Return the layers that are mounted once for all."""
        return tuple(layer for layer in (self.meta, *self.data) if layer.key)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Return the layers that are folders."""
        return tuple(layer.path for layer in (self.meta, *self.data) if layer.is_folder)


def checked(spec: MountSpec) -> MountSpec:
    """Return ``spec`` with every path absolute and without symbolic links.

    Raises:
        UsageError: it cannot mean anything, or would damage something.
        UnsupportedHost: this user or kernel cannot mount it.
    """
    if spec.meta.mapping is not None and spec.idmap is not None:
        raise UsageError("an idmapped mount of a META that a server answers for: it maps the owners itself")
    spec = replace(
        spec, target=_real(spec.target, "the target"), meta=spec.meta.checked("META"),
        data=tuple(layer.checked("DATA") for layer in spec.data),
    )  # fmt: skip
    _check_layers(spec)
    _check_rights(spec)
    if spec.upper is not None:
        return _with_upper(spec, spec.upper)
    if spec.work is not None:
        raise UsageError("--work needs --upper")
    return spec


def _real(path: Path, what: str, *, folder: bool = True) -> Path:
    """Return ``path`` resolved; refuse what is not there, and what is no folder, or no regular file."""
    try:
        resolved = Path(os.path.realpath(path, strict=True))
        mode = resolved.lstat().st_mode
    except OSError as error:
        hint = "make it first" if folder else "the store may have lost it: run store verify"
        more = f"; {hint}" if error.errno == errno.ENOENT else ""
        raise UsageError(f"{what} {path}: {error.strerror}{more}") from error
    if folder and not stat.S_ISDIR(mode):
        raise UsageError(f"{what} {path} is not a folder; name one")
    if not folder and not stat.S_ISREG(mode):
        raise UsageError(f"{what} {path} is not a regular file")
    return resolved


def _check_layers(spec: MountSpec) -> None:
    count = 1 + max(len(spec.data), 1)
    if count > mounts.MAX_LAYERS:
        raise UsageError(
            f"{count} layers: an overlay takes {mounts.MAX_LAYERS} with the data layers counted; "
            "merge the data into one object store (--data objects), or flatten the image"
        )
    images: dict[str, MountLayer] = {}
    for layer in spec.shared:
        if not _KEY.fullmatch(layer.key):
            raise UsageError(f"layer key {layer.key!r}: want letters, digits and ._:+@- , at most 180")
        if images.setdefault(layer.name, layer) != layer:
            raise UsageError(f"layer key {layer.key} stands for two images: {images[layer.name].path} and another")
    folders = spec.folders
    for folder in folders:
        if folders.count(folder) > 1:
            raise UsageError(f"the folder {folder} is given twice as a layer")
        if folder.is_relative_to(spec.target):
            raise UsageError(f"the target {spec.target} would hide the layer {folder}; choose another target")


def _check_rights(spec: MountSpec) -> None:
    if userns.is_privileged():
        return
    if not userns.can_mount():
        raise UnsupportedHost(
            "mounting for this user",
            "run as root, or inside a user and mount namespace (unshare -Urm, podman unshare)",
        )
    if spec.namespace is not Namespace.USER:
        raise UnsupportedHost(
            "trusted.overlay xattrs in a user namespace",
            "have the META made for the user namespace (namespace user, rendering directory)",
        )
    if spec.shared:
        raise UnsupportedHost(
            "mounting EROFS in a user namespace",
            "use the directory rendering over the object store (--data objects)",
        )


def _with_upper(spec: MountSpec, upper: Path) -> MountSpec:
    upper = _may_be_absent(upper, "the upper folder")
    work = _may_be_absent(spec.work or upper.with_name(upper.name + ".work"), "the work folder")
    if _overlap(upper, work):
        raise UsageError(f"the work folder {work} must be beside the upper folder {upper}, not in it or above it")
    for name, path in (("upper", upper), ("work", work)):
        for other, called in (*((folder, "layer") for folder in spec.folders), (spec.target, "target")):
            if _overlap(path, other):
                raise UsageError(
                    f"the {name} folder {path} overlaps the {called} {other}; take a folder of its own"
                )
        _real(path.parent, f"the parent of the {name} folder,")
    places = [path if path.exists() else path.parent for path in (upper, work)]
    for place in places:
        if sc.filesystem_magic(place) == sc.OVERLAYFS_MAGIC:
            raise UsageError(
                f"{place} lies on an overlay itself, which cannot hold an upper folder; use a disk or tmpfs"
            )
    if len(set(map(mounts.mount_id, places))) > 1:
        raise UsageError(f"upper {upper} and work {work} lie on different mounts; overlayfs needs one mount")
    if work.exists():
        _check_work(work)
    return replace(spec, upper=upper, work=work)


def _check_work(work: Path) -> None:
    names = set(os.listdir(work))
    # What an earlier mount with the same upper leaves behind: overlayfs clears it itself.
    if names - {"work", "index"}:
        shown = ", ".join(sorted(names - {"work", "index"})[:3])
        raise UsageError(f"the work folder {work} is not empty ({shown}); overlayfs would delete what is in it")
    if (work / "work" / "incompat").exists():
        raise UsageError(
            f"{work} belongs to an upper that was mounted volatile and not unmounted cleanly; "
            "its data may be incomplete: remove upper and work"
        )


def _overlap(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def _may_be_absent(path: Path, what: str) -> Path:
    if os.path.lexists(path):
        return _real(path, what)
    return Path(os.path.realpath(path.absolute().parent)) / path.name


def check_stubs(meta: str, namespace: Namespace, where: str) -> None:
    """Refuse a META whose stubs the mount, which reads ``namespace``, would not follow: it would read as zeros.

    ``meta`` is a path to META's root, through a descriptor if it is a detached mount; ``where`` is what to call it.

    Raises:
        UsageError: the first file with data found in META is not a stub of ``namespace``.
    """
    names = ((folder, name, st) for folder in walk(meta) for name, st in folder.names)
    for folder, name, st in islice(names, _STUB_SEARCH_NAMES):
        if not (stat.S_ISREG(st.st_mode) and st.st_size):
            continue
        attributes = set(xattr_names(xattr_path(folder.fd, name)))
        stub_of = [space for space in Namespace if os.fsdecode(space.xattr(METACOPY)) in attributes]
        shown = name.decode("utf-8", "replace")
        if namespace not in stub_of and stub_of:
            raise UsageError(
                f"{where}: {shown!r} is a stub for {stub_of[0].value}.overlay, not {namespace.value}.overlay; "
                f"mounted this way it would read as zeros. Have META made for the namespace {namespace.value}"
            )
        if not stub_of:
            raise UsageError(
                f"{where}: {shown!r} has a size and is no stub of {namespace.value}.overlay; this is not a META"
            )
        return


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
        """Refuse words that mean nothing (UsageError), before anything is opened or made."""
        check_word(self.rendering or "auto", "--rendering", ("auto", *Rendering))
        check_word(self.data, "--data", ("auto", *DataBackend))
        check_word(self.namespace, "--namespace", ("auto", *Namespace))
        check_word(self.stacking, "--stacking", ("auto", *Stacking))


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


def check_word(value: str, flag: str, choices: tuple[str, ...]) -> None:
    """Refuse (UsageError) a word that is none of the choices of ``flag``."""
    if value not in choices:
        raise UsageError(f"{flag} {value!r}: want {', '.join(choices[:-1])} or {choices[-1]}")


def _hint(privileged: bool) -> str:
    if not privileged:
        return "only root of the host may mount EROFS; leave the choice to layerkit, which then takes folders"
    return "put the store on ext4, xfs or btrfs (`layerkit doctor` says what is missing), or leave the choice out"
