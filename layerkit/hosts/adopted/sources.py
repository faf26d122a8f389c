r"""Where a runtime keeps the unpacked layers of an image: read from its own files, never changed.

* ``containers-storage:NAME``, ``containers-storage:[overlay@ROOT]NAME``: podman, buildah, CRI-O.
* ``containerd:NAME``, ``containerd:[ROOT@NAMESPACE]NAME``: the overlayfs snapshotter.
* ``docker-storage:NAME``, ``docker-storage:[ROOT]NAME``: dockerd's overlay2.
* ``folders:UPPER:…:LOWEST``: any folders, in the order of overlayfs's ``lowerdir``; ``\\:`` is a colon in a name.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TypeVar

import msgspec

from layerkit.formats import strict_json
from layerkit.formats.overlay_options import parse_layers
from layerkit.hosts.adopted.unpacked import SCHEMES, Unpacked
from layerkit.linux import userns
from layerkit.linux.folders.reader import LayerFolder, Marks
from layerkit.model.errors import InvalidImage, NotFound, UsageError, show_path
from layerkit.model.image import chain_ids

_BRACKET = re.compile(r"\[([^\]]*)\](.*)", re.DOTALL)
_HEX = re.compile(r"[0-9a-f]{12,64}")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_LAYERS_AT_MOST = 500
_T = TypeVar("_T")


def find_unpacked(text: str) -> Unpacked:
    """Return the unpacked image that a reference names.

    Raises:
        UsageError: no such form.
        NotFound: the runtime has no such image, or not unpacked.
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
        return ContainersStorage(_containers_root(where)).image(name)
    if scheme == "containerd":
        from layerkit.hosts.adopted.containerd import Containerd

        root, _, namespace = where.rpartition("@") if "@" in where else (where, "", "default")
        return Containerd(Path(root or "/var/lib/containerd"), namespace or "default").image(name)
    return DockerStorage(Path(where or "/var/lib/docker")).image(name)


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


class StoredImage(msgspec.Struct):
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


class ContainersStorage:
    """A store of containers/storage with the overlay driver, read from its JSON files."""

    def __init__(self, root: Path) -> None:
        """Read the store at ``root``.

        Raises:
            NotFound: there is none.
        """
        self.root = root
        path = root / "overlay-layers/layers.json"
        layers = _json(path, "podman keeps images there once it has pulled one", list[_Layer])
        self._layers = {layer.id: layer for layer in layers}
        odd = next((layer for layer in self._layers if not _ID.fullmatch(layer)), None)
        if odd is not None:
            raise InvalidImage(f"{path}: {show_path(odd)!r} is no id of a layer")

    def images(self) -> list[StoredImage]:
        """Return the records of the store's images."""
        return _json(self.root / "overlay-images/images.json", "no image was ever pulled", list[StoredImage])

    def image(self, name: str) -> Unpacked:
        """Return the image called ``name``: a name, a name without its registry, or (part of) an id.

        Raises:
            NotFound: no image, or several.
        """
        image = self._find(name)
        chain = self.chain(image.layer)
        return Unpacked(
            name=next(iter(image.names), image.id[:12]),
            runtime="containers-storage",
            folders=tuple(self.folder(layer) for layer in chain),
            digest=image.digest or f"sha256:{image.id}",
            diff_ids=tuple(self._layers[layer].diff_digest for layer in chain),
            blobs=tuple(self._layers[layer].compressed_digest for layer in chain),
        )

    def folder(self, layer: str) -> LayerFolder:
        """Return the folder of the layer with this id."""
        return LayerFolder(self.root / "overlay" / layer / "diff", self.marks, layer)

    @property
    def marks(self) -> Marks:
        """Return how deletions are written: a store with a mount program has ``.wh.`` files."""
        # containers/storage writes this file to notice a change of the setting.
        try:
            text = (self.root / "overlay/.has-mount-program").read_text()
        except OSError:
            return Marks.OVERLAY
        return Marks.AUFS if text.strip() == "true" else Marks.OVERLAY

    def chain(self, layer: str) -> list[str]:
        """Return the ids of ``layer`` and all beneath it, bottom first.

        Raises:
            NotFound: one is not unpacked to the end.
            InvalidImage: a parent that is not there, or leads round in a circle.
        """
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

    def _find(self, name: str) -> StoredImage:
        images = self.images()
        for matches in (
            [i for i in images if name in i.names],
            [i for i in images if _HEX.fullmatch(name) and i.id.startswith(name)],
            [i for i in images if any(_short_match(name, full) for full in i.names)],
        ):
            if len(matches) == 1:
                return matches[0]
            if matches:
                names = ", ".join(sorted(n for i in matches for n in i.names)[:5])
                raise NotFound(f"{name}: {len(matches)} images of {self.root} are called so ({names}); say which")
        raise NotFound(f"{name}: no such image in {self.root}; `podman images` lists them")


def _short_match(name: str, full: str) -> bool:
    wanted = name if ":" in name.rpartition("/")[2] else name + ":latest"
    return full == wanted or full.endswith("/" + wanted)


class DockerStorage:
    """dockerd's overlay2 store, read from its files."""

    def __init__(self, root: Path) -> None:
        """Use the store at ``root``."""
        self.root = root

    def image(self, name: str) -> Unpacked:
        """Return the image called ``name``.

        Raises:
            NotFound: no such image.
        """
        base = self.root / "image/overlay2"
        what = "dockerd with the overlay2 driver keeps its images there"
        table = _json(base / "repositories.json", what, _Repositories)
        wanted = name if ":" in name.rpartition("/")[2] else name + ":latest"
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
