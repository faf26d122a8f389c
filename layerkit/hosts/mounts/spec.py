"""What is to be mounted, as values, and the refusals that need no lock and no mount."""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path

from layerkit.idmap import Mapping
from layerkit.linux import syscalls as sc
from layerkit.linux import userns
from layerkit.linux.mounts import MAX_LAYERS, mount_id
from layerkit.metaonly import METACOPY, Namespace
from layerkit.model.errors import UnsupportedHost, UsageError

IdExtents = tuple[tuple[int, int, int], ...]
"""(container id, host id, size) each."""

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+@-]{0,179}")
_STUB_SEARCH_NAMES = 5000
_OWN_OPTIONS = frozenset(
    {"lowerdir", "lowerdir+", "datadir", "datadir+", "upperdir", "workdir"} | {"userxattr", "metacopy", "source"}
)


@dataclass(frozen=True, slots=True)
class ErofsData:
    """A DATA image over the raw tar of a layer, mounted once per ``key``.

    The key stands for the content: what is mounted under it serves whoever comes with the same key. Make it
    of a digest (the layer's diff_id).
    """

    key: str
    image: Path
    tar: Path


@dataclass(frozen=True, slots=True)
class FolderData:
    """A folder of data: an object store, or a runtime's unpacked layer."""

    path: Path


@dataclass(frozen=True, slots=True)
class ErofsMeta:
    """A META image, mounted once per ``key`` and shared by every map that the kernel can apply."""

    key: str
    image: Path


@dataclass(frozen=True, slots=True)
class FolderMeta:
    """A META rendered as a directory."""

    path: Path


@dataclass(frozen=True, slots=True)
class FuseMeta:
    """A META that a server of ours answers for, under the owners of ``maps``; one file serves every map."""

    path: Path
    mapping: Mapping


Meta = ErofsMeta | FolderMeta | FuseMeta


@dataclass(frozen=True, slots=True)
class MountSpec:
    """One overlay mount of a META over data.

    Attributes:
        meta: the metadata layer.
        data: the data layers, top first; none for an image without data.
        namespace: where META's stubs have their xattrs: ``user`` mounts with ``userxattr``.
        target: an existing folder.
        idmap: (uid ranges, gid ranges) that the kernel is to apply to META; None: META's owners as they are.
        upper: the writable layer, made if it is absent; None for a mount without one.
        work: overlayfs's own folder beside ``upper``; None: ``UPPER.work``.
        read_only: forbid writing through the mount. Without ``upper`` there is nothing to write to.
        nodev: device nodes are shown but cannot be opened, so that a stranger's image gives no one the
            host's disks. A container's /dev comes from its runtime. setuid files keep working.
        options: further overlay options as (key, value or None).
        classic: ``data`` are folders that lie under META as normal layers, with ``metacopy=on``: META's files
            are found in them at their own paths, and what META does not have shows through.
        label: kept in the record for whoever lists mounts (image, map and so on).
    """

    meta: Meta
    data: tuple[ErofsData | FolderData, ...]
    namespace: Namespace
    target: Path
    idmap: tuple[IdExtents, IdExtents] | None = None
    upper: Path | None = None
    work: Path | None = None
    read_only: bool = True
    nodev: bool = True
    options: tuple[tuple[str, str | None], ...] = ()
    classic: bool = False
    label: dict[str, str] = field(default_factory=dict)


def checked(spec: MountSpec) -> MountSpec:
    """Return ``spec`` with every path absolute and without symbolic links.

    Raises:
        UsageError: it cannot mean anything, or would damage something.
        UnsupportedHost: this user or kernel cannot mount it.
    """
    target = real_folder(spec.target, "the target")
    meta: Meta
    if isinstance(spec.meta, FolderMeta):
        meta = FolderMeta(real_folder(spec.meta.path, "META"))
    elif isinstance(spec.meta, FuseMeta):
        if spec.idmap is not None:
            raise UsageError("an idmapped mount of a META that a server answers for: it maps the owners itself")
        meta = replace(spec.meta, path=_real_file(spec.meta.path, "the META"))
    else:
        meta = replace(spec.meta, image=_real_file(spec.meta.image, "the META image"))
    data = tuple(
        FolderData(real_folder(d.path, "the data folder"))
        if isinstance(d, FolderData)
        else replace(d, image=_real_file(d.image, "the DATA image"), tar=_real_file(d.tar, "the layer's tar"))
        for d in spec.data
    )
    spec = replace(spec, target=target, meta=meta, data=data)
    _check_layers(spec)
    _check_options(spec)
    _check_rights(spec)
    return _with_upper(spec) if spec.upper is not None else _without_upper(spec)


def real_folder(path: Path, what: str) -> Path:
    """Return ``path`` resolved.

    Raises:
        UsageError: it is not there, or not a folder.
    """
    try:
        resolved = Path(os.path.realpath(path, strict=True))
        mode = resolved.lstat().st_mode
    except OSError as error:
        hint = "; make it first" if error.errno == errno.ENOENT else ""
        raise UsageError(f"{what} {path}: {error.strerror}{hint}") from error
    if not stat.S_ISDIR(mode):
        raise UsageError(f"{what} {path} is not a folder; name one")
    return resolved


def _real_file(path: Path, what: str) -> Path:
    try:
        resolved = Path(os.path.realpath(path, strict=True))
        mode = resolved.lstat().st_mode
    except OSError as error:
        raise UsageError(
            f"{what} {path}: {error.strerror}; the store may have lost it: run store verify"
        ) from error
    if not stat.S_ISREG(mode):
        raise UsageError(f"{what} {path} is not a regular file")
    return resolved


def _check_layers(spec: MountSpec) -> None:
    count = 1 + max(len(spec.data), 1)
    if count > MAX_LAYERS:
        raise UsageError(
            f"{count} layers: an overlay takes {MAX_LAYERS} with the data layers counted; "
            "merge the data into one object store (--data objects), or flatten the image"
        )
    images: dict[str, tuple[Path, ...]] = {}
    for layer in (spec.meta, *spec.data):
        if isinstance(layer, ErofsData | ErofsMeta):
            if not _KEY.fullmatch(layer.key):
                raise UsageError(f"layer key {layer.key!r}: want letters, digits and ._:+@- , at most 180")
            files = (layer.image, layer.tar) if isinstance(layer, ErofsData) else (layer.image,)
            if images.setdefault(f"{type(layer).__name__} {layer.key}", files) != files:
                raise UsageError(f"layer key {layer.key} stands for two images: {files[0]} and another")
    folders = [layer.path for layer in (spec.meta, *spec.data) if isinstance(layer, FolderData | FolderMeta)]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UsageError(f"the folder {folder} is given twice as a layer")
        if folder == spec.target or spec.target in folder.parents:
            raise UsageError(f"the target {spec.target} would hide the layer {folder}; choose another target")


def _check_options(spec: MountSpec) -> None:
    for key, value in spec.options:
        if key == "nfs_export" and value != "off":
            raise UsageError(
                "nfs_export=on: a file of stubs opened by handle reads zeros; export a plain copy (layerkit unpack)"
            )
        if key in _OWN_OPTIONS:
            raise UsageError(f"the overlay option {key} is set by layerkit itself; leave it out")


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
    if any(isinstance(layer, ErofsData | ErofsMeta) for layer in (spec.meta, *spec.data)):
        raise UnsupportedHost(
            "mounting EROFS in a user namespace",
            "use the directory rendering over the object store (--data objects)",
        )


def _without_upper(spec: MountSpec) -> MountSpec:
    if spec.work is not None:
        raise UsageError("--work means something only with --upper")
    return spec


def _with_upper(spec: MountSpec) -> MountSpec:
    assert spec.upper is not None
    upper = _may_be_absent(spec.upper, "the upper folder")
    work = _may_be_absent(spec.work or upper.with_name(upper.name + ".work"), "the work folder")
    if upper == work or upper in work.parents or work in upper.parents:
        raise UsageError(f"the work folder {work} must be beside the upper folder {upper}, neither in the other")
    folders = [layer.path for layer in (spec.meta, *spec.data) if isinstance(layer, FolderData | FolderMeta)]
    for name, path in (("upper", upper), ("work", work)):
        for other in folders:
            if path == other or path in other.parents or other in path.parents:
                raise UsageError(f"the {name} folder {path} overlaps the layer {other}; take a folder of its own")
        if path == spec.target or path in spec.target.parents or spec.target in path.parents:
            raise UsageError(
                f"the {name} folder {path} overlaps the target {spec.target}; take a folder of its own"
            )
    for name, path in (("upper", upper), ("work", work)):
        real_folder(path.parent, f"the parent of the {name} folder,")
    places = [_nearest(upper), _nearest(work)]
    for place in places:
        if sc.filesystem_magic(place) == sc.OVERLAYFS_MAGIC:
            raise UsageError(
                f"{place} lies on an overlay itself, which cannot hold an upper folder; use a disk or tmpfs"
            )
    if mount_id(places[0]) != mount_id(places[1]):
        raise UsageError(f"upper {upper} and work {work} lie on different mounts; overlayfs wants them on one")
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


def _may_be_absent(path: Path, what: str) -> Path:
    if os.path.lexists(path):
        return real_folder(path, what)
    return Path(os.path.realpath(path.absolute().parent)) / path.name


def _nearest(path: Path) -> Path:
    return path if path.exists() else path.parent


def check_stubs(meta: str, namespace: Namespace, where: str) -> None:
    """Refuse a META whose stubs the mount would not follow: it would read as zeros.

    Args:
        meta: a path to META's root, through a descriptor if it is a detached mount.
        namespace: the one that the mount will read.
        where: what to call META.

    Raises:
        UsageError: the first file with data found in META is not a stub of ``namespace``.
    """
    seen, folders = 0, [meta]
    while folders and seen < _STUB_SEARCH_NAMES:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                seen += 1
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_size:
                    _check_stub(entry.path, namespace, where)
                    return


def _check_stub(path: str, namespace: Namespace, where: str) -> None:
    attributes = set(os.listxattr(path, follow_symlinks=False))
    name = os.fsencode(path).rpartition(b"/")[2].decode("utf-8", "replace")
    if os.fsdecode(namespace.xattr(METACOPY)) in attributes:
        return
    for other in Namespace:
        if os.fsdecode(other.xattr(METACOPY)) in attributes:
            raise UsageError(
                f"{where}: {name!r} is a stub for {other.value}.overlay, not {namespace.value}.overlay; mounted "
                f"this way it would read as zeros. Have META made for the namespace {namespace.value}"
            )
    raise UsageError(
        f"{where}: {name!r} has a size and is no stub of {namespace.value}.overlay; this is not a META"
    )
