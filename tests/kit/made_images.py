"""Images for tests, made by hand with the standard library: an oracle must not share code with what it judges."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def dump(value: object) -> bytes:
    return json.dumps(value).encode()


def tar(*members: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    """A tar of (name, content) pairs and ready-made members without content."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return out.getvalue()


def special(name: str, kind: bytes, link: str = "", **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def descriptor(data: bytes, media_type: str, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest(data), "size": len(data), **more}


class Layout:
    """A layout as blobs and an index.json, to be written as a folder or an archive, whole or damaged."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.index: dict[str, Any] = {"schemaVersion": 2, "manifests": []}
        self.index_bytes: bytes | None = None
        self.layout_bytes = b'{"imageLayoutVersion": "1.0.0"}'

    def put(self, data: bytes, media_type: str, **more: Any) -> dict[str, Any]:
        self.blobs[digest(data)] = data
        return descriptor(data, media_type, **more)

    def image(self, *layers: bytes, arch: str = "amd64", variant: str = "", **config: Any) -> dict[str, Any]:
        """Put an image with gzip layers; return its manifest's descriptor, not listed yet."""
        document = {"architecture": arch, "os": "linux", **({"variant": variant} if variant else {})}
        document |= {"rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in layers]}} | config
        blobs = [self.put(gzip.compress(layer, mtime=0), LAYER + "+gzip") for layer in layers]
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.put(dump(document), CONFIG),
            "layers": blobs,
        }
        return self.put(dump(manifest), MANIFEST)

    def list(self, entry: dict[str, Any], name: str = "") -> dict[str, Any]:
        if name:
            entry = entry | {"annotations": {"org.opencontainers.image.ref.name": name}}
        self.index["manifests"].append(entry)
        return entry

    def members(self) -> Sequence[tuple[str, bytes]]:
        index = dump(self.index) if self.index_bytes is None else self.index_bytes
        blobs = [(f"blobs/{name.replace(':', '/')}", data) for name, data in self.blobs.items()]
        return [("oci-layout", self.layout_bytes), ("index.json", index), *blobs]

    def folder(self, path: Path) -> Path:
        for name, data in self.members():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        return path

    def archive(self, path: Path) -> Path:
        path.write_bytes(tar(*self.members()))
        return path


def simple(*names: str) -> Layout:
    """A layout with one two-layer image per name."""
    layout = Layout()
    for name in names or ("one",):
        layout.list(layout.image(tar(("a", b"a" * 700), ("b", name.encode())), tar(("c", b"c"))), name)
    return layout


def attach(layout: Layout, subject: dict[str, Any], content: bytes) -> dict[str, Any]:
    """Attach an artifact to ``subject`` and list it, as oras does."""
    manifest = {
        "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": "text/x",
        "config": layout.put(b"{}", EMPTY), "layers": [layout.put(content, "text/plain")],
        "subject": {key: subject[key] for key in ("mediaType", "digest", "size")},
    }  # fmt: skip
    return layout.list(layout.put(dump(manifest), MANIFEST) | {"artifactType": "text/x"})


def below(path: Path) -> list[str]:
    """Every name below a folder, to see what a failure left behind."""
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))
