r"""Where a runtime keeps the unpacked layers of an image: read from its own files, never changed.

* ``containers-storage:NAME``, ``containers-storage:[overlay@ROOT]NAME``: podman, buildah, CRI-O.
* ``containerd:NAME``, ``containerd:[ROOT@NAMESPACE]NAME``: the overlayfs snapshotter.
* ``docker-storage:NAME``, ``docker-storage:[ROOT]NAME``: dockerd's overlay2.
* ``folders:TOP:…:BOTTOM``: any folders, in the order of overlayfs's ``lowerdir``; ``\\:`` is a colon in a name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerkit.errors import InvalidImage, NotFound, UsageError
from layerkit.formats import strict_json
from layerkit.hosts.adopt_index import LayerFolder, Marks
from layerkit.kernel import userns

SCHEMES = ("containers-storage", "containerd", "docker-storage", "folders")
_BRACKET = re.compile(r"\[([^\]]*)\](.*)", re.DOTALL)
_HEX = re.compile(r"[0-9a-f]{12,64}")
_LAYERS_AT_MOST = 500


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


def is_unpacked_reference(text: str) -> bool:
    """Return whether ``text`` names layers that a runtime unpacked."""
    return text.partition(":")[0] in SCHEMES and ":" in text


def find_unpacked(text: str) -> Unpacked:
    """Return the unpacked image that a reference names.

    Raises:
        UsageError: no such form.
        NotFound: the runtime has no such image, or not unpacked.
        InvalidImage: the runtime's files are not what they should be.
    """
    scheme, _, rest = text.partition(":")
    if scheme not in SCHEMES or not rest:
        raise UsageError(f"{text}: want {', '.join(f'{s}:NAME' for s in SCHEMES[:3])} or folders:TOP:...:BOTTOM")
    if scheme == "folders":
        return _folders(rest)
    found = _BRACKET.fullmatch(rest)
    where, name = (found[1], found[2]) if found else ("", rest)
    if not name:
        raise UsageError(f"{text}: an image's name is missing after the colon")
    if scheme == "containers-storage":
        return ContainersStorage(_containers_root(where)).image(name)
    if scheme == "containerd":
        from layerkit.hosts.adopt_containerd import Containerd

        root, _, namespace = where.rpartition("@") if "@" in where else (where, "", "default")
        return Containerd(Path(root or "/var/lib/containerd"), namespace or "default").image(name)
    return DockerStorage(Path(where or "/var/lib/docker")).image(name)


def _folders(text: str) -> Unpacked:
    parts = [part.replace("\\:", ":") for part in re.split(r"(?<!\\):", text)]
    if not all(parts):
        raise UsageError(f"folders:{text}: an empty name between colons; want folders:TOP:...:BOTTOM")
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


def _json(path: Path, what: str) -> Any:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"{path}: not there; {what}") from None
    return strict_json.loads(data, str(path))


class ContainersStorage:
    """A store of containers/storage with the overlay driver, read from its JSON files."""

    def __init__(self, root: Path) -> None:
        """Read the store at ``root``.

        Raises:
            NotFound: there is none.
        """
        self.root = root
        self._layers = {
            str(layer["id"]): layer
            for layer in _json(
                root / "overlay-layers/layers.json", "podman keeps images there once it has pulled one"
            )
        }

    def images(self) -> list[dict[str, Any]]:
        """Return the records of the store's images."""
        found: list[dict[str, Any]] = _json(self.root / "overlay-images/images.json", "no image was ever pulled")
        return found

    def image(self, name: str) -> Unpacked:
        """Return the image called ``name``: a name, a name without its registry, or (part of) an id.

        Raises:
            NotFound: no image, or several.
        """
        image = self._find(name)
        chain = self.chain(str(image["layer"]))
        return Unpacked(
            name=next(iter(image.get("names") or ()), str(image["id"])[:12]),
            runtime="containers-storage",
            folders=tuple(self.folder(layer) for layer in chain),
            digest=str(image.get("digest") or f"sha256:{image['id']}"),
            diff_ids=tuple(str(self._layers[layer].get("diff-digest") or "") for layer in chain),
            blobs=tuple(str(self._layers[layer].get("compressed-diff-digest") or "") for layer in chain),
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
            InvalidImage: a parent that is not there, or leads round in a circle.
        """
        found: list[str] = []
        at = layer
        while at:
            if at not in self._layers or at in found or len(found) > _LAYERS_AT_MOST:
                raise InvalidImage(
                    f"{self.root}: layer {at[:12]} is missing or its own parent; run `podman system check`"
                )
            found.append(at)
            at = str(self._layers[at].get("parent") or "")
        return found[::-1]

    def _find(self, name: str) -> dict[str, Any]:
        images = self.images()
        for matches in (
            [i for i in images if name in (i.get("names") or ())],
            [i for i in images if _HEX.fullmatch(name) and str(i["id"]).startswith(name)],
            [i for i in images if any(_short_match(name, full) for full in i.get("names") or ())],
        ):
            if len(matches) == 1:
                return matches[0]
            if matches:
                names = ", ".join(sorted(n for i in matches for n in i.get("names") or ())[:5])
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
        table = _json(base / "repositories.json", "dockerd with the overlay2 driver keeps its images there")
        wanted = name if ":" in name.rpartition("/")[2] else name + ":latest"
        ids = {image for tags in table["Repositories"].values() for tag, image in tags.items() if tag == wanted}
        if not ids and _HEX.fullmatch(name):
            folder = base / "imagedb/content/sha256"
            ids = {f"sha256:{entry}" for entry in os.listdir(folder) if entry.startswith(name)}
        if len(ids) != 1:
            raise NotFound(f"{name}: no such image in {self.root}; `docker images` lists them")
        digest = ids.pop()
        config = _json(base / "imagedb/content/sha256" / _hex(digest), "an image of dockerd")
        diff_ids = tuple(str(x) for x in config["rootfs"].get("diff_ids") or ())
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


def chain_ids(diff_ids: tuple[str, ...]) -> Iterator[str]:
    """Yield the chain id of each layer (image-spec, config.md, "Layer ChainID"), bottom first."""
    import hashlib

    chain = ""
    for diff_id in diff_ids:
        chain = diff_id if not chain else "sha256:" + hashlib.sha256(f"{chain} {diff_id}".encode()).hexdigest()
        yield chain
