"""Small layers for tests of the store, made with tarfile alone, and images of them."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
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
    tar: bytes
    index: Index

    @property
    def diff_id(self) -> Digest:
        return self.index.diff_id


def make_layer(
    files: dict[str, bytes], sparse: dict[str, tuple[int, tuple[Extent, ...]]] | None = None
) -> MadeLayer:
    """Return a layer of regular files; ``sparse`` gives name -> (size, runs), filled with stored bytes."""
    buffer = io.BytesIO()
    stored = {name: b"s" * sum(length for _, length in runs) for name, (_, runs) in (sparse or {}).items()}
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in {**files, **stored}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    raw = buffer.getvalue()
    entries = []
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        for member in tar:
            data = raw[member.offset_data : member.offset_data + member.size]
            runs = None
            if member.name in stored:
                size, runs = (sparse or {})[member.name]
                whole = bytearray(size)
                for start, length in runs:
                    whole[start : start + length] = b"s" * length
                data = bytes(whole)
            entries.append(
                Entry(
                    member.name.encode(), Kind.REG, size=len(data), offset=member.offset_data if data else -1,
                    sha256=hashlib.sha256(data).digest(), sparse=runs,
                )
            )  # fmt: skip
    return MadeLayer(raw, Index.of(entries, Digest.of(raw), len(raw)))


def random_layer(seed: int, files: int = 20, most_bytes: int = 9000) -> MadeLayer:
    """Return a layer that is the same for a seed; layers share a third of their contents."""
    rng = random.Random(seed)
    made = {}
    for i in range(files):
        source = random.Random(i) if i % 3 == 0 else rng
        made[f"d{i % 4}/f{i}"] = source.randbytes(source.randrange(most_bytes))
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
