r"""Where a runtime keeps the unpacked layers of an image: read from its own files, never changed.

* ``containers-storage:NAME``, ``containers-storage:[overlay@ROOT]NAME``: podman, buildah, CRI-O.
* ``containerd:NAME``, ``containerd:[ROOT@NAMESPACE]NAME``: the overlayfs snapshotter.
* ``docker-storage:NAME``, ``docker-storage:[ROOT]NAME``: dockerd's overlay2.
* ``folders:UPPER:…:LOWEST``: any folders, in the order of overlayfs's ``lowerdir``; ``\\:`` is a colon in a name.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from layerkit.formats import strict_json
from layerkit.formats.bolt import Bolt, Bucket
from layerkit.formats.oci import images as oci_images
from layerkit.formats.overlay_options import parse_layers
from layerkit.linux import userns
from layerkit.linux.folders.reader import LayerFolder, Marks
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import DigestMismatch, InvalidImage, NotFound, UsageError, show_path
from layerkit.model.image import chain_ids

SCHEMES = ("containers-storage", "containerd", "docker-storage", "folders")
_BRACKET = re.compile(r"\[([^\]]*)\](.*)", re.DOTALL)
_HEX = re.compile(r"[0-9a-f]{12,64}")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_LAYERS_AT_MOST = 500
_TRIES = 5
_FILE_BYTES_AT_MOST = 1 << 30
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Unpacked:
    """An image as a runtime has it unpacked.

    Attributes:
        name: as the runtime calls it.
        runtime: one of :data:`SCHEMES`.
        folders: its layers, bottom first.
        digest: of its manifest or config, "" for plain folders.
        diff_ids: of the layers' tars, "" where the runtime does not say; as many as folders.
        blobs: digests of the layers' blobs, likewise.
    """

    name: str
    runtime: str
    folders: tuple[LayerFolder, ...]
    digest: str = ""
    diff_ids: tuple[str, ...] = ()
    blobs: tuple[str, ...] = ()


def find_unpacked(text: str) -> Unpacked:
    """Return the unpacked image that a reference names.

    Raises:
        UsageError: no such form.
        NotFound: the runtime has no such image, or several, or a layer that is not unpacked to the end.
        InvalidImage: the runtime's files are not what they should be.
    """
    scheme, _, rest = text.partition(":")
    if scheme not in SCHEMES or not rest:
        raise UsageError(f"{text}: want {', '.join(f'{s}:NAME' for s in SCHEMES[:3])} or folders:UPPER:...:LOWEST")
    if scheme == "folders":
        return _folders(rest)
    found = _BRACKET.fullmatch(rest)
    where, name = (found[1], found[2]) if found else ("", rest)
    if not name:
        raise UsageError(f"{text}: an image's name is missing after the colon")
    if scheme == "containers-storage":
        return _ContainersStorage(_containers_root(where)).image(name)
    if scheme == "containerd":
        root, _, namespace = where.rpartition("@") if "@" in where else (where, "", "default")
        return _Containerd(Path(root or "/var/lib/containerd"), namespace or "default").image(name)
    return _DockerStorage(Path(where or "/var/lib/docker")).image(name)


def _folders(text: str) -> Unpacked:
    parts, data = parse_layers(text, "folders")
    if data:
        raise UsageError(f"folders:{text}: an empty name between colons; want folders:UPPER:...:LOWEST")
    paths = [Path(os.path.abspath(part)) for part in reversed(parts)]
    return Unpacked(text, "folders", tuple(LayerFolder(path, name=path.name) for path in paths))


def _containers_root(where: str) -> Path:
    # skopeo's spelling is [DRIVER@ROOT+RUNROOT:OPTIONS]; only the root matters here.
    driver, at, rest = where.partition("@")
    if at and driver not in ("", "overlay"):
        raise UsageError(f"[{where}]: the storage driver {driver} has no layer folders to adopt; overlay has")
    place = re.split(r"[+:]", rest if at else where)[0]
    if place:
        return Path(place)
    if os.geteuid() == 0 and userns.in_initial_userns():
        return Path("/var/lib/containers/storage")
    # Rootless podman takes the home of the user, also inside `podman unshare`.
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "containers/storage"


class _Layer(msgspec.Struct):
    """A layer in ``overlay-layers/layers.json``."""

    id: str
    parent: str = ""
    diff_digest: str = msgspec.field(default="", name="diff-digest")
    compressed_digest: str = msgspec.field(default="", name="compressed-diff-digest")
    flags: dict[str, object] = {}


class _StoredImage(msgspec.Struct):
    """An image in ``overlay-images/images.json``."""

    id: str
    layer: str
    names: list[str] = []
    digest: str = ""


class _Repositories(msgspec.Struct):
    """dockerd's ``repositories.json``."""

    names: dict[str, dict[str, str]] = msgspec.field(name="Repositories")


class _Rootfs(msgspec.Struct):
    diff_ids: list[str] = []


class _Config(msgspec.Struct):
    rootfs: _Rootfs


def _json(path: Path, what: str, shape: type[_T]) -> _T:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"{path}: not there; {what}") from None
    except OSError as error:
        raise NotFound(f"{path}: {error.strerror}; {what}") from None
    try:
        return msgspec.convert(strict_json.loads(data, str(path)), shape)
    except msgspec.ValidationError as error:
        raise InvalidImage(
            f"{path}: {error}; the runtime's file is damaged, or of a version that is not known"
        ) from None


class _ContainersStorage:
    """A store of containers/storage with the overlay driver, read from its JSON files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        path = root / "overlay-layers/layers.json"
        layers = _json(path, "podman keeps images there once it has pulled one", list[_Layer])
        self._layers = {layer.id: layer for layer in layers}
        odd = next((layer for layer in self._layers if not _ID.fullmatch(layer)), None)
        if odd is not None:
            raise InvalidImage(f"{path}: {show_path(odd)!r} is no id of a layer")

    def image(self, name: str) -> Unpacked:
        """Return the image called ``name``: a name, a name without its registry, or (part of) an id."""
        image = self._find(name)
        chain = self._chain(image.layer)
        return Unpacked(
            name=next(iter(image.names), image.id[:12]),
            runtime="containers-storage",
            folders=tuple(
                LayerFolder(self.root / "overlay" / layer / "diff", self._marks, layer) for layer in chain
            ),
            digest=image.digest or f"sha256:{image.id}",
            diff_ids=tuple(self._layers[layer].diff_digest for layer in chain),
            blobs=tuple(self._layers[layer].compressed_digest for layer in chain),
        )

    @property
    def _marks(self) -> Marks:
        """Return how deletions are written: a store with a mount program has ``.wh.`` files."""
        # containers/storage writes this file to notice a change of the setting.
        try:
            text = (self.root / "overlay/.has-mount-program").read_text()
        except OSError:
            return Marks.OVERLAY
        return Marks.AUFS if text.strip() == "true" else Marks.OVERLAY

    def _chain(self, layer: str) -> list[str]:
        """Return the ids of ``layer`` and all beneath it, bottom first."""
        found: list[str] = []
        at = layer
        while at:
            if at not in self._layers or at in found or len(found) > _LAYERS_AT_MOST:
                raise InvalidImage(
                    f"{self.root}: layer {at[:12]} is missing or its own parent; run `podman system check`"
                )
            if self._layers[at].flags.get("incomplete"):
                raise NotFound(
                    f"{self.root}: layer {at[:12]} is being unpacked, or was left so; pull the image again"
                )
            found.append(at)
            at = self._layers[at].parent
        return found[::-1]

    def _find(self, name: str) -> _StoredImage:
        images = _json(self.root / "overlay-images/images.json", "no image was ever pulled", list[_StoredImage])
        for matches in (
            [i for i in images if name in i.names],
            [i for i in images if _HEX.fullmatch(name) and i.id.startswith(name)],
            [i for i in images if any(("/" + full).endswith("/" + _tagged(name)) for full in i.names)],
        ):
            if len(matches) == 1:
                return matches[0]
            if matches:
                names = ", ".join(sorted(n for i in matches for n in i.names)[:5])
                raise NotFound(f"{name}: {len(matches)} images of {self.root} are called so ({names}); say which")
        raise NotFound(f"{name}: no such image in {self.root}; `podman images` lists them")


def _tagged(name: str) -> str:
    return name if ":" in name.rpartition("/")[2] or "@" in name else name + ":latest"


@dataclass(frozen=True)
class _DockerStorage:
    """dockerd's overlay2 store, read from its files."""

    root: Path

    def image(self, name: str) -> Unpacked:
        base = self.root / "image/overlay2"
        what = "dockerd with the overlay2 driver keeps its images there"
        table = _json(base / "repositories.json", what, _Repositories)
        wanted = _tagged(name)
        ids = {image for tags in table.names.values() for tag, image in tags.items() if tag == wanted}
        if not ids and _HEX.fullmatch(name):
            folder = base / "imagedb/content/sha256"
            ids = {f"sha256:{entry}" for entry in os.listdir(folder) if entry.startswith(name)}
        if len(ids) != 1:
            raise NotFound(f"{name}: no such image in {self.root}; `docker images` lists them")
        digest = ids.pop()
        config = _json(base / "imagedb/content/sha256" / _hex(digest), "an image of dockerd", _Config)
        diff_ids = tuple(config.rootfs.diff_ids)
        for diff_id in diff_ids:
            _hex(diff_id)
        folders = tuple(self._folder(base / "layerdb/sha256" / _hex(chain)) for chain in chain_ids(diff_ids))
        return Unpacked(wanted, "docker-storage", folders, digest, diff_ids, ("",) * len(diff_ids))

    def _folder(self, record: Path) -> LayerFolder:
        try:
            cache = (record / "cache-id").read_text().strip()
        except FileNotFoundError:
            raise NotFound(f"{record}: the layer is not there; pull the image again") from None
        if not re.fullmatch(r"[0-9a-z-]{1,128}", cache):
            raise InvalidImage(f"{record}/cache-id: {cache!r} is no name of a layer's folder")
        return LayerFolder(self.root / "overlay2" / cache / "diff", Marks.OVERLAY, cache)


def _hex(digest: str) -> str:
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise InvalidImage(f"{digest!r}: not a digest")
    return digest.partition(":")[2]


class _Containerd:
    """containerd's images and the snapshots they are unpacked into, read from its files while it runs.

    ``ROOT/io.containerd.metadata.v1.bolt/meta.db`` has the images, ``io.containerd.content.v1.content`` the blobs,
    ``io.containerd.snapshotter.v1.overlayfs/metadata.db`` the snapshots: each a number, whose folder is
    ``snapshots/NUMBER/fs``, and the name of its parent. Reading leaves no lease: what containerd collects is gone.
    """

    def __init__(self, root: Path, namespace: str) -> None:
        self.root, self.namespace = root, namespace
        self._snapshots = root / "io.containerd.snapshotter.v1.overlayfs"

    def image(self, name: str) -> Unpacked:
        """Return the image called ``name``, in full or as docker shortens it."""
        meta = read_bolt(self.root / "io.containerd.metadata.v1.bolt/meta.db")
        images = meta.root.bucket(b"v1", self.namespace.encode(), b"images")
        full = self._full_name(name, images)
        assert images is not None
        target = images.bucket(full.encode(), b"target")
        if target is None:
            raise NotFound(f"{full}: the image has no target in {meta.where}")
        entry = Descriptor(
            target.value(b"mediatype").decode("utf-8", "replace"),
            Digest.parse(target.value(b"digest").decode("utf-8", "replace")),
            _zigzag(_varint(target.value(b"size"))),
        )
        image = oci_images.Reading(self._fetch, f"containerd's {full}").select([entry], full, None)
        diff_ids = tuple(map(str, image.diff_ids))
        chain = chain_ids(diff_ids)
        return Unpacked(
            name=full,
            runtime="containerd",
            folders=self._chain(chain[-1]) if chain else (),
            digest=str(image.descriptor.digest),
            diff_ids=diff_ids,
            blobs=tuple(str(layer.descriptor.digest) for layer in image.layers),
        )

    def _chain(self, chain_id: str) -> tuple[LayerFolder, ...]:
        """Return the folders of the snapshot that is called ``chain_id``, and of its parents, bottom first."""
        store = read_bolt(self._snapshots / "metadata.db")
        snapshots = store.root.bucket(b"v1", b"snapshots")
        names = [key for key, _ in snapshots.items()] if snapshots is not None else []
        # Their names are NAMESPACE/NUMBER/KEY.
        own = [key for key in names if key.startswith(self.namespace.encode() + b"/")]
        key = next((key for key in own if key.endswith(b"/" + chain_id.encode())), None)
        if key is None or snapshots is None:
            raise NotFound(
                f"snapshot {chain_id} is not in {store.where}, namespace {self.namespace}: it was pulled "
                "without unpacking, or for another snapshotter; `ctr images mount` or a first container unpacks it"
            )
        found: list[LayerFolder] = []
        while key:
            snapshot = snapshots.bucket(key)
            if snapshot is None or len(found) > _LAYERS_AT_MOST:
                raise InvalidImage(f"{store.where}: a parent of {chain_id} is missing or its own parent")
            number = _varint(snapshot.value(b"id"))
            folder = self._snapshots / "snapshots" / str(number) / "fs"
            found.append(LayerFolder(folder, Marks.OVERLAY, key.decode("utf-8", "replace").rpartition("/")[2]))
            key = snapshot.value(b"parent")
        return tuple(reversed(found))

    def _full_name(self, name: str, images: Bucket | None) -> str:
        names = [key.decode("utf-8", "replace") for key, _ in images.items()] if images is not None else []
        tagged = _tagged(name)
        for candidate in (name, tagged, f"docker.io/{tagged}", f"docker.io/library/{tagged}"):
            if candidate in names:
                return candidate
        shown = ", ".join(sorted(names)[:5]) or "none at all"
        raise NotFound(f"{name}: no such image in containerd's namespace {self.namespace}; there is {shown}")

    def _fetch(self, entry: Descriptor, most: int) -> bytes:
        path = self.root / "io.containerd.content.v1.content/blobs" / entry.digest.algorithm / entry.digest.hex
        try:
            with path.open("rb") as file:
                data = file.read(min(entry.size, most) + 1)
        except FileNotFoundError:
            raise NotFound(f"{path}: containerd has the image's record, and not this blob; pull it again") from None
        if len(data) != entry.size:
            raise DigestMismatch(str(path), f"{len(data)} bytes or more", f"{entry.size} bytes")
        return data


def _varint(data: bytes) -> int:
    """Return the unsigned varint that ``data`` begins with (Go's encoding/binary)."""
    value = shift = 0
    for byte in data[:10]:
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value
        shift += 7
    raise InvalidImage("containerd's record of a number is no varint")


def _zigzag(value: int) -> int:
    """Return the signed number behind a varint: containerd writes sizes so."""
    return value >> 1 ^ -(value & 1)


def read_bolt(path: Path) -> Bolt:
    """Return the state of a database that another process may have open.

    Bolt writes a transaction to free pages and then one meta page, so a state is whole unless its pages were
    given to a later transaction while they were read. That shows in the meta pages afterwards.

    Raises:
        NotFound: there is none.
        InvalidImage: it is damaged, too large, or never stays the same for long enough.
    """
    for _ in range(_TRIES):
        try:
            file = path.open("rb")
        except FileNotFoundError:
            raise NotFound(
                f"{path}: not there; name containerd's root as containerd:[ROOT@NAMESPACE]NAME"
            ) from None
        with file:
            data = file.read(_FILE_BYTES_AT_MOST)
            found = Bolt(data, str(path))
            file.seek(0)
            again = Bolt(file.read(2 * found.page_bytes), str(path))
        if again.txid == found.txid:
            return found
    raise InvalidImage(f"{path}: changes all the time; try again when its daemon is less busy")
