"""Layer folders of containers-storage as a mount program gets them, and the tree to serve over them.

The fast way, taken for every container, stats each folder and looks for one file in the store. Only when that
is missing are the folders read, merged and written down, in a process of its own: numpy and what else that
takes stays out of the one that serves.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from layerkit.idmap import IdMap, Mapping, parse_id
from layerkit.linux import mounts
from layerkit.metaonly import OWNERS, Namespace
from layerkit.model.errors import NotFound, UnsupportedHost

if TYPE_CHECKING:
    from layerkit.store.metas import MetaEntry

FORMAT_VERSION = 2
_OVERFLOW_ID = 65534

TOP = "top"
"""The folder of marks that lies over all layers; those between them are called by the place of the layer above."""
_MAPPED = re.compile(r"(.*/[^/]+/mapped/\d+)(/.*)?")


@dataclass(frozen=True, slots=True)
class StorageLayer:
    """A folder below the writable one.

    Attributes:
        path: without links; not through an idmapped mount.
        identity: equal for as long as the folder is the one it was; for the key of what is made of it.
        shifted: canonical map that the owners on disk were made under, "" for a layer of an image.
        fixed: whether it never changes again: a layer of an image, and no container's writable folder.
    """

    path: Path
    identity: str
    shifted: str = ""
    fixed: bool = True


def storage_layers(folders: Sequence[str], namespace: Namespace, *, top_changes: bool) -> tuple[StorageLayer, ...]:
    """Return the layers in ``folders``, top first.

    Links, and paths through the idmapped mounts that a rootful podman makes (``CONTAINER/mapped/N/LAYER/diff``),
    are followed to the folder itself: a map is applied once. With ``top_changes`` the first may be a container's
    writable folder. All others have a layer on them, and what has one never changes again.

    Raises:
        NotFound: one is not there.
        UnsupportedHost: an idmapped mount whose source cannot be found.
    """
    return tuple(_layer(folder, namespace, top_changes and not place) for place, folder in enumerate(folders))


def _layer(folder: str, namespace: Namespace, may_change: bool) -> StorageLayer:
    path = os.path.realpath(folder)
    try:
        seen = os.stat(path)
    except OSError as error:
        raise NotFound(
            f"{folder}: the layer is not there ({error.strerror}); podman removes it with the last image that has "
            "it: pull the image again"
        ) from None
    if _MAPPED.fullmatch(path):
        path = _unmapped(path, seen)
    shifted = marker(path, namespace) if may_change else ""
    fixed = not may_change or not (shifted or _is_writable(path))
    identity = f"{path}\0{seen.st_dev}:{seen.st_ino}:{seen.st_ctime_ns}"
    return StorageLayer(Path(path), identity, shifted, fixed)


def _is_writable(path: str) -> bool:
    """Return whether a folder that was never mounted under a map is a container's, not a layer of an image.

    podman mounts layers of images writable as well, to compare them, so that says little: its own list of
    containers does. Without that list a folder counts that overlayfs has had its own folder beside.
    """
    above, name = os.path.split(path)
    home, layer = os.path.split(above)
    if name != "diff" or not os.path.isdir(f"{above}/work/work"):
        return False
    lists = [Path(f"{home}-containers/{kind}.json") for kind in ("containers", "volatile-containers")]
    if not any(file.exists() for file in lists):
        return True
    return any(layer.encode() in file.read_bytes() for file in lists if file.exists())


def marker(path: str, namespace: Namespace) -> str:
    """Return the map that an upper was written under, "" where it says none."""
    try:
        return os.getxattr(path, namespace.xattr(OWNERS)).decode()
    except OSError:
        return ""


def _unmapped(path: str, seen: os.stat_result) -> str:
    """Return the folder that ``path`` shows through an idmapped mount of a folder above it."""
    table = mounts.mount_table()
    # The last mount at the longest point is the one that is seen.
    above = [mount for mount in table if path == mount.point or path.startswith(mount.point.rstrip("/") + "/")]
    shown = max(reversed(above), key=lambda mount: len(mount.point), default=None)
    for mount in table if shown is not None else ():
        if shown is None or mount.device != shown.device or mount.point == shown.point:
            continue
        inside = os.path.join(shown.root, os.path.relpath(path, shown.point))
        if not (inside + "/").startswith(mount.root.rstrip("/") + "/"):
            continue
        candidate = os.path.normpath(os.path.join(mount.point, os.path.relpath(inside, mount.root)))
        try:
            same = os.path.samestat(os.stat(candidate), seen)
        except OSError:
            continue
        if same and not _MAPPED.fullmatch(candidate):
            return candidate
    raise UnsupportedHost(
        f"the folder behind {path}", "podman's idmapped mount hides it; take mount_program out of storage.conf"
    )


def tree_key(layers: Sequence[StorageLayer], namespace: Namespace) -> str:
    """Return the key of the META to serve over a chain of layers (top first); no map is in it."""
    parts = ("layerkit.storage-layers", FORMAT_VERSION, namespace, *(layer.identity for layer in layers))
    return hashlib.sha256(json.dumps(parts).encode("utf-8", "surrogateescape")).hexdigest()


def folder_key(layers: Sequence[StorageLayer], namespace: Namespace, mapping: Mapping) -> str:
    """Return the key of the META over a chain of layers that is written as a folder, for one map."""
    text = f"{tree_key(layers, namespace)} {shift_text(mapping)} {mapping.overflow}"
    return hashlib.sha256(text.encode()).hexdigest()


def with_marks(layers: Sequence[StorageLayer], meta: Path, below: Iterable[int] | None) -> list[Path]:
    """Return the folders of ``layers`` (top first) with those between them that ``build`` wrote for deletions.

    They lie in the ``root`` of ``meta``, the META over the layers. ``below`` are the places of the layers that have
    one below them; None where nothing had to be written.
    """
    found = [] if below is None else [meta / "root" / TOP]
    for place, layer in enumerate(layers):
        found.append(layer.path)
        if below is not None and place in below:
            found.append(meta / "root" / str(place))
    return found


def in_use(metas: Iterable[MetaEntry]) -> tuple[set[str], set[str]]:
    """Return what gc keeps among ``metas``: (names of indexes, keys of METAs) over folders that are still there.

    A META over a storage's folders belongs to no image of ours: it goes when podman has removed one of the folders.
    What a running container is served from may go as well; its server has it open.
    """
    layers, keys = set[str](), set[str]()
    for entry in metas:
        identities = entry.info.get("identities")
        if identities is not None and all(map(_is_there, identities)):
            layers.update(entry.info["diff_ids"])
            keys.add(entry.key)
    return layers, keys


def _is_there(identity: str) -> bool:
    path, _, numbers = identity.partition("\0")
    try:
        seen = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        # Not reachable for us is not gone.
        return True
    return numbers == f"{seen.st_dev}:{seen.st_ino}:{seen.st_ctime_ns}"


# The maps of owners on disk


def shift_text(mapping: Mapping) -> str:
    """Return a text for what ``mapping`` shifts, equal for equal maps; "" where every id is kept."""
    # What lies outside a map of equal ids is an error even then, but nothing has to be shifted for it.
    sides = (("uid", mapping.uid), ("gid", mapping.gid))
    return ";".join(
        f"{kind}={one}" for kind, one in sides if one.rest is not None or any(c != h for c, h, _ in one.extents)
    )


def parse_shift(text: str) -> Mapping:
    """Return the mapping that :func:`shift_text` wrote as ``text``.

    Raises:
        UsageError: it did not.
    """
    sides = {"uid": IdMap.identity(), "gid": IdMap.identity()}
    for part in text.split(";") if text else ():
        kind, _, value = part.partition("=")
        if value.startswith("all:"):
            sides[kind] = IdMap.everything(parse_id(value[4:], part))
        else:
            sides[kind] = IdMap.parse([value], what=part)
    return Mapping(sides["uid"], sides["gid"])


def shifted_back(mapping: Mapping) -> Mapping:
    """Return the mapping from the owners in a mount back to those in the layers.

    What no map gives out becomes 65534, the kernel's overflow id, but for 0: what podman itself makes in a
    container's folder is root's.
    """
    return Mapping(_back(mapping.uid), _back(mapping.gid), _OVERFLOW_ID)


def _back(one: IdMap) -> IdMap:
    if one.rest is not None:
        return IdMap.everything(0)
    back = one.inverse().extents
    return IdMap.of(back if any(c == 0 for c, _, _ in back) else [(0, 0, 1), *back], squash=True)
