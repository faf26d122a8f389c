"""From a path in a mount to its image, layer and data, and who shares it; and back from a content or digest."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path

from layerkit.hosts.adopted.mount import LABEL as UNPACKED
from layerkit.hosts.diagnosis.which_content import (
    Place,
    Sharer,
    Which,
    content_mask,
    exact,
    find_row,
    load_index,
    place_in_tar,
    places_of,
    rows_with,
    source_layer,
    texts_of,
    which_content,
    which_digest,
)
from layerkit.hosts.mounts import mount as mounter
from layerkit.hosts.mounts.records import SOURCE_PREFIX, Record
from layerkit.linux import mounts
from layerkit.metaonly import data_path
from layerkit.model.digest import Digest
from layerkit.model.entry import Kind
from layerkit.model.errors import NotFound, UsageError, show_path
from layerkit.model.index import Index
from layerkit.model.tree import Tree
from layerkit.model.trees.merge import merge
from layerkit.store.layout import DataBackend
from layerkit.store.local import LocalStore


def which(asked: str, store: LocalStore) -> Which:
    """Answer for a path in one of the store's mounts, a content (digest, its beginning, short name) or a digest.

    Raises:
        NotFound: nothing is known of it.
        UsageError: neither a path in a mount of layerkit nor a name of a content.
    """
    content = content_mask(asked)
    path = os.path.lexists(asked) and not asked.startswith(("sha256:", ":", "/:"))
    if path:
        return _of_path(Path(asked), store)
    if content is None:
        raise UsageError(
            f"{asked}: neither there as a path nor a name of content; want a path in a mount, sha256:HEX, the "
            "first 8 or more digits, or a short name as /:x/NAME"
        )
    found = which_digest(asked, store)
    if found is not None:
        return found
    return which_content(asked, content, store)


def _of_path(path: Path, store: LocalStore) -> Which:
    full = Path(os.path.realpath(path.parent)) / path.name if path.name not in ("", "..") else path.resolve()
    record, target = _record_of(full, store)
    relative = os.fsencode(full.relative_to(target)) if full != target else b""
    relative = b"" if relative == b"." else relative
    shown = full.lstat()
    image = layers_of(record, store)
    tree = merge([index for _, index in image.layers], limits=store.limits)
    row = find_row(tree, relative)
    upper = _in_upper(record, relative, row >= 0)
    answer = Which(
        asked=str(path),
        kind="path",
        mount=str(target),
        map=record.label.get("map", ""),
        file=_kind(shown.st_mode),
        size=shown.st_size,
        upper=upper,
    )
    if row < 0 or upper in ("made", "data"):
        where = str(Path(record.upper or "") / os.fsdecode(relative))
        return replace(answer, data=where if stat.S_ISREG(shown.st_mode) else "",
                        place=None if row < 0 else _place_of(image, tree, row, relative))  # fmt: skip
    inode = int(tree.inode[row])
    place = _place_of(image, tree, row, relative)
    if not (stat.S_ISREG(shown.st_mode) and tree.size[inode]):
        return replace(answer, place=place)
    at = place.layer - 1
    sha256 = tree.sha256[inode].tobytes()
    if record.label.get("backend") == UNPACKED:
        below = Path(record.label["folders"].split("\n")[at]) / os.fsdecode(tree.inode_path(inode))
        with below.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").digest()
        data = str(below)
    elif record.label.get("backend") == DataBackend.OBJECTS:
        data = str(store.object_file(sha256))
    else:
        diff_id = image.layers[at][0]
        data = place_in_tar(store, diff_id, int(tree.offset[inode]))
    return replace(
        answer,
        sha256=f"sha256:{sha256.hex()}",
        name="/" + data_path(sha256).decode(),
        data=data,
        place=place,
        places=places_of(store, exact(sha256)),
        sharers=_sharers(store, record, image.layers[at][0], sha256, data),
    )


def _record_of(path: Path, store: LocalStore) -> tuple[Record, Path]:
    mount = mounts.mount_of(path.parent if not path.is_dir() else path)
    if mount is None or not mount.source.startswith(SOURCE_PREFIX):
        what = f"it lies on {mount.fstype} at {mount.point}" if mount else "its mount is not in the mount table"
        raise UsageError(f"{path}: not in a mount of layerkit: {what}; `layerkit mounts` lists them")
    run = mounter.default_run(store.root)
    record = next((r for r in mounter.active(run) if r.source == mount.source), None)
    if record is None:
        raise NotFound(
            f"{mount.point}: a mount of layerkit over another store than {store.root}; name it with --store"
        )
    return record, Path(mount.point)


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers of a mount: (name of the index, index) bottom first, and what they are called outside."""

    name: str
    manifest: str
    layers: tuple[tuple[Digest, Index], ...]
    diff_ids: tuple[str, ...]
    blobs: tuple[str, ...]


def layers_of(record: Record, store: LocalStore) -> Layers:
    """Return the layers under a mount.

    Raises:
        StoreError: an index is gone.
        NotFound: the image is.
    """
    label = record.label
    if label.get("backend") == UNPACKED:
        names = [Digest.parse(text) for text in label["layers"].split(",") if text]
        diff_ids, blobs = (tuple(label.get(key, "").split(",")) for key in ("diff_ids", "blobs"))
        manifest = label.get("manifest", "")
        if len(diff_ids) != len(names):
            diff_ids = blobs = ("",) * len(names)
    else:
        image = store.stored_image(label["manifest"]).image
        names = list(image.diff_ids)
        diff_ids = tuple(map(str, names))
        blobs = tuple(str(layer.descriptor.digest) for layer in image.layers)
        manifest = str(image.descriptor.digest)
    return Layers(
        label.get("image", ""), manifest, tuple((n, load_index(store, n)) for n in names), diff_ids, blobs
    )


def _place_of(image: Layers, tree: Tree, row: int, path: bytes) -> Place:
    """Return the topmost layer that has an entry at ``path``; for a file with data, the one that has the data."""
    at = source_layer(tree, row, path, [index for _, index in image.layers])
    return Place(image.name, image.manifest, at + 1, image.diff_ids[at], image.blobs[at], show_path(path), True)


def _in_upper(record: Record, path: bytes, in_layer: bool) -> str:
    if record.upper is None:
        return ""
    full = os.path.join(os.fsencode(record.upper), path)
    try:
        st = os.lstat(full)
    except OSError:
        return ""
    if not in_layer:
        return "made"
    if not stat.S_ISREG(st.st_mode):
        return "metadata"
    names = os.listxattr(full, follow_symlinks=False)
    return "metadata" if f"{record.namespace}.overlay.metacopy" in names else "data"


def _kind(mode: int) -> str:
    names = {Kind.REG: "regular file", Kind.DIR: "folder", Kind.SYMLINK: "symbolic link", Kind.FIFO: "fifo",
             Kind.CHAR: "character device", Kind.BLOCK: "block device"}  # fmt: skip
    return names.get(Kind(mode >> 12), "file") if mode >> 12 in list(Kind) else "socket"


def _sharers(store: LocalStore, own: Record, layer: Digest, sha256: bytes, data: str) -> tuple[Sharer, ...]:
    found = []
    backend = own.label.get("backend")
    for record in mounter.active(mounter.default_run(store.root)):
        if record.id == own.id or record.label.get("backend") != backend:
            continue
        if backend == UNPACKED:
            same = any(data.startswith(folder + "/") for folder in record.label.get("folders", "").split("\n"))
        elif backend == DataBackend.OBJECTS:
            indexes = (store.load_index(d) for d in map(Digest.parse, texts_of(record.label.get("layers", ""))))
            same = any(len(rows_with(index, exact(sha256))) for index in indexes if index is not None)
        else:
            same = str(layer) in texts_of(record.label.get("layers", ""))
        if same:
            found.append(Sharer(record.target, record.label.get("image", ""), record.label.get("map", "")))
    return tuple(found)


__all__ = ["Layers", "Place", "Sharer", "Which", "find_row", "layers_of", "which"]
