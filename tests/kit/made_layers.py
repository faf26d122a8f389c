"""Small layers made with tarfile alone, images of them, and what a store then holds."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerkit.model.descriptor import Descriptor, Platform
from layerkit.model.digest import Digest
from layerkit.model.entry import Entry, Extent, Kind
from layerkit.model.image import Image, Layer
from layerkit.model.index import Index
from layerkit.store.local import LocalStore


@dataclass(frozen=True)
class MadeLayer:
    """A layer: its tar, and the index of it."""

    tar: bytes
    index: Index

    @property
    def diff_id(self) -> Digest:
        return self.index.diff_id

    def write(self, path: Path) -> Path:
        """Write the tar to ``path`` and return that."""
        path.write_bytes(self.tar)
        return path


Sparse = Mapping[bytes, tuple[Sequence[Extent], bytes]]


def make_layer(files: Mapping[bytes, bytes], sparse: Sparse | None = None) -> MadeLayer:
    """Return a layer of regular files, made without the tar reader and writer.

    Args:
        files: content by path.
        sparse: by path (runs of data, content with its holes): only the runs are stored, as a sparse
            entry's are; the tar's own headers do not matter to what is tested.
    """
    sparse = sparse or {}
    raw = io.BytesIO()
    entries: list[Entry] = []
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path, content in {**files, **{p: c for p, (_, c) in sparse.items()}}.items():
            runs = tuple(sparse[path][0]) if path in sparse else None
            stored = content if runs is None else b"".join(content[a : a + n] for a, n in runs)
            info = tarfile.TarInfo(os.fsdecode(path))
            info.size = len(stored)
            tar.addfile(info, io.BytesIO(stored))
            at = tar.offset - -(-len(stored) // 512) * 512 if stored else -1
            sha256 = hashlib.sha256(content).digest()
            entries.append(Entry(path, Kind.REG, size=len(content), offset=at, sha256=sha256, sparse=runs))
    data = raw.getvalue()
    for entry in entries:
        if entry.sparse is None and entry.size:
            assert data[entry.offset : entry.offset + entry.size] == files[entry.path]
    return MadeLayer(data, Index.of(entries, Digest.of(data), len(data)))


def written_layer(
    folder: Path, files: Mapping[bytes, bytes], sparse: Sparse | None = None, name: str = "layer.tar"
) -> tuple[Index, Path]:
    """Return the index of such a layer, and its tar as a file in ``folder``."""
    layer = make_layer(files, sparse)
    return layer.index, layer.write(folder / name)


def random_layer(seed: int, files: int = 20, most_bytes: int = 9000) -> MadeLayer:
    """Return a layer that is the same for a seed; layers share a third of their contents."""
    rng = random.Random(seed)
    made = {}
    for i in range(files):
        source = random.Random(i) if i % 3 == 0 else rng
        made[b"d%d/f%d" % (i % 4, i)] = source.randbytes(source.randrange(most_bytes))
    return make_layer(made)


def put(store: LocalStore, layer: MadeLayer, backend: str, step: int = 1 << 20) -> None:
    with store.begin_layer(backend) as writer:
        for start in range(0, len(layer.tar), step):
            writer.write(memoryview(layer.tar)[start : start + step])
        writer.commit(layer.index)


def make_image(*layers: MadeLayer, name: str = "img") -> Image:
    config = json.dumps({"diff_ids": [str(layer.diff_id) for layer in layers], "name": name}).encode()
    config_descriptor = Descriptor("application/vnd.oci.image.config.v1+json", Digest.of(config), len(config))
    manifest = json.dumps({"config": str(config_descriptor.digest)}).encode()
    return Image(
        name=name,
        manifest=manifest,
        descriptor=Descriptor(
            "application/vnd.oci.image.manifest.v1+json", Digest.of(manifest), len(manifest),
            annotations={"a": "b"}, platform=Platform("linux", "amd64"), extra={"x": [1, None]},
        ),
        config=config,
        config_descriptor=config_descriptor,
        layers=tuple(
            Layer(Descriptor("application/x-tar", layer.diff_id, len(layer.tar)), layer.diff_id) for layer in layers
        ),
        platform=Platform("linux", "amd64"),
    )  # fmt: skip


def meta_info(mapping: str = "") -> dict[str, object]:
    tree = str(Digest.of(b"tree"))
    return {"tree": tree, "map": mapping, "rendering": "erofs", "namespace": "trusted", "names": 10}


def put_meta(store: LocalStore, key: str, data: bytes = b"meta" * 3000, mapping: str = "") -> None:
    with store.begin_meta(key) as writer:
        writer.image_file.write_bytes(data)
        writer.fixups_file.write_bytes(b"fixups")
        writer.commit(meta_info(mapping))


def state(store: LocalStore) -> set[str]:
    """Return every file below the store but for the catalog, locks, owner files and folders."""
    below = (path.relative_to(store.root) for path in store.root.rglob("*") if not path.is_dir())
    return {
        str(p)
        for p in below
        if p.parts[0] not in ("locks", "version.json") and "catalog" not in p.name and p.suffix != ".owner"
    }


def overwrite(path: Path, at: int) -> None:
    """Flip one bit of a read-only file, and leave its mode as it was."""
    mode = path.stat().st_mode & 0o777
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    path.chmod(mode)
