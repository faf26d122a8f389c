"""containerd's images and the snapshots they are unpacked into, read from its files while it runs.

``ROOT/io.containerd.metadata.v1.bolt/meta.db`` has the images, ``io.containerd.content.v1.content`` the blobs,
``io.containerd.snapshotter.v1.overlayfs/metadata.db`` the snapshots: each a number, whose folder is
``snapshots/NUMBER/fs``, and the name of its parent. Reading leaves no lease: what containerd collects is gone.
"""

from __future__ import annotations

from pathlib import Path

from layerkit.formats.bolt import Bolt, Bucket
from layerkit.formats.oci import images as oci_images
from layerkit.hosts.adopted.unpacked import Unpacked
from layerkit.linux.folders.reader import LayerFolder, Marks
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import DigestMismatch, InvalidImage, NotFound
from layerkit.model.image import chain_ids

_LAYERS_AT_MOST = 500


class Containerd:
    """The state of a containerd, of one of its namespaces and the overlayfs snapshotter."""

    def __init__(self, root: Path, namespace: str) -> None:
        """Name the daemon's root folder (``--root``, ``/var/lib/containerd`` by default)."""
        self.root, self.namespace = root, namespace
        self._snapshots = root / "io.containerd.snapshotter.v1.overlayfs"

    def image(self, name: str) -> Unpacked:
        """Return the image called ``name``, in full or as docker shortens it.

        Raises:
            NotFound: no such image in the namespace, or not unpacked by the overlayfs snapshotter.
        """
        meta = self._open(self.root / "io.containerd.metadata.v1.bolt/meta.db")
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
            folders=self.chain(chain[-1]) if chain else (),
            digest=str(image.descriptor.digest),
            diff_ids=diff_ids,
            blobs=tuple(str(layer.descriptor.digest) for layer in image.layers),
        )

    def chain(self, chain_id: str) -> tuple[LayerFolder, ...]:
        """Return the folders of the snapshot that is called ``chain_id``, and of its parents, bottom first.

        Raises:
            NotFound: there is none in the namespace.
            InvalidImage: a parent that is not there, or leads round in a circle.
        """
        store = self._open(self._snapshots / "metadata.db")
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

    def _open(self, path: Path) -> Bolt:
        try:
            return read_bolt(path)
        except FileNotFoundError:
            raise NotFound(
                f"{path}: not there; name containerd's root as containerd:[ROOT@NAMESPACE]NAME"
            ) from None

    def _full_name(self, name: str, images: Bucket | None) -> str:
        names = [key.decode("utf-8", "replace") for key, _ in images.items()] if images is not None else []
        tagged = name if ":" in name.rpartition("/")[2] or "@" in name else name + ":latest"
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


_TRIES = 5


_FILE_BYTES_AT_MOST = 1 << 30


def read_bolt(path: Path) -> Bolt:
    """Return the state of a database that another process may have open.

    Bolt writes a transaction to free pages and then one meta page, so a state is whole unless its pages were
    given to a later transaction while they were read. That shows in the meta pages afterwards.

    Raises:
        FileNotFoundError: there is none.
        InvalidImage: it is damaged, too large, or never stays the same for long enough.
    """
    for _ in range(_TRIES):
        with path.open("rb") as file:
            data = file.read(_FILE_BYTES_AT_MOST)
            found = Bolt(data, str(path))
            file.seek(0)
            again = Bolt(file.read(2 * found.page_bytes), str(path))
        if again.txid == found.txid:
            return found
    raise InvalidImage(f"{path}: changes all the time; try again when its daemon is less busy")
