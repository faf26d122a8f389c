"""Images of unusual shape through every command that writes one, judged by umoci: layers, types, indexes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from judge import differences, mapped, snapshot, umoci
from made_images import INDEX, LAYER, Layout, digest, dump, special, tar
from needs import need_root, need_tool

import layerkit
from layerkit.model.errors import LossyResult, UsageError

DOCKER = "application/vnd.docker."
EXTENTS = ((0, 100000, 65536),)
ROOT = special("./", b"5", mode=0o755)
FIRST = tar(ROOT, special("d", b"5", mode=0o755), ("a", b"one"), ("d/b", b"two"))
SECOND = tar(("d/.wh.b", b""), ("d/c", b"three"), ("a", b"four"))


def many() -> tuple[Layout, list[bytes]]:
    """More layers than docker allows, and than fit into a page of mount options."""
    layout = Layout()
    rest = [tar((f"f{i}", b"%d" % i), *([(f".wh.f{i - 7}", b"")] if i % 10 == 9 else [])) for i in range(139)]
    layout.list(layout.image(tar(ROOT), *rest), "x")
    return layout, [tar(ROOT), *rest]


def repeated() -> tuple[Layout, list[bytes]]:
    """The same layer several times, and layers of nothing: an archive's end alone, and no byte at all."""
    layout, layers = Layout(), [FIRST, bytes(1024), SECOND, b"", FIRST, bytes(10240), SECOND]
    layout.list(layout.image(*layers), "x")
    return layout, layers


def mixed() -> tuple[Layout, list[bytes]]:
    """docker's types and OCI's in one manifest, of all compressions, with fields and annotations nobody knows."""
    layout, layers = Layout(), [FIRST, SECOND, FIRST, SECOND]
    blobs = [
        layout.put(gzip.compress(FIRST, mtime=0), f"{DOCKER}image.rootfs.diff.tar.gzip", unknown={"b": [1, None]}),
        layout.put(zstandard.compress(SECOND), f"{LAYER}+zstd", annotations={"org.example.x": "y"}),
        layout.put(FIRST, LAYER),
        layout.put(zstandard.compress(SECOND, 3), f"{DOCKER}image.rootfs.diff.tar.zstd"),
    ]
    config = {"architecture": "amd64", "os": "linux", "future": True}
    config |= {"rootfs": {"type": "layers", "diff_ids": list(map(digest, layers))}}
    media_type = f"{DOCKER}distribution.manifest.v2+json"
    manifest = {
        "schemaVersion": 2, "mediaType": media_type, "layers": blobs,
        "config": layout.put(dump(config), f"{DOCKER}container.image.v1+json"),
        "annotations": {"org.example.\u00fc": "\U0001f433"}, "future": {"field": [1.5, {}]},
    }  # fmt: skip
    layout.list(layout.put(dump(manifest), media_type), "x")
    return layout, layers


def nested() -> tuple[Layout, list[bytes]]:
    """An index of docker's kind in one of OCI's in the layout's."""
    layout, layers = Layout(), [FIRST, SECOND]
    image = layout.image(*layers) | {"platform": {"os": "linux", "architecture": "amd64"}}
    media_type = f"{DOCKER}distribution.manifest.list.v2+json"
    inner = {"schemaVersion": 2, "mediaType": media_type, "manifests": [image]}
    listed = layout.put(dump(inner), media_type)
    layout.list(layout.put(dump({"schemaVersion": 2, "mediaType": INDEX, "manifests": [listed]}), INDEX), "x")
    return layout, layers


def inflated(path: Path) -> bytes:
    data = path.read_bytes()
    if data[:4] == b"\x28\xb5\x2f\xfd":
        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


@pytest.mark.parametrize("make", [many, repeated, mixed, nested])
def test_every_writer_keeps_the_tree_that_umoci_sees(
    make: Callable[[], tuple[Layout, list[bytes]]], tmp_path: Path
) -> None:
    need_root()
    need_tool("umoci")
    layout, layers = make()
    source, platform = f"oci:{layout.folder(tmp_path / 'in')}:x", "linux/amd64"
    settings = layerkit.Settings(store=tmp_path / "store")
    mapping = layerkit.mapping(["0:100000:65536"])
    assert mapping is not None
    (tmp_path / "m").mkdir()
    # The judge gets the layers in the one form that it knows: no zstd, none of docker's types.
    plain = Layout()
    plain.list(plain.image(*layers), "x")
    judge = umoci(f"{plain.folder(tmp_path / 'plain')}:x", tmp_path / "judge")

    def seen(name: str) -> Path:
        written = json.loads((tmp_path / name / "index.json").read_text())["manifests"][0]
        manifest = json.loads((tmp_path / name / "blobs" / written["digest"].replace(":", "/")).read_text())
        again = Layout()
        tars = [inflated(tmp_path / name / "blobs" / b["digest"].replace(":", "/")) for b in manifest["layers"]]
        again.list(again.image(*tars), "x")
        return umoci(f"{again.folder(tmp_path / f'{name}-plain')}:x", tmp_path / f"{name}-umoci")

    want = snapshot(judge)
    with layerkit.open_image(source, platform=platform, settings=settings) as image:
        layerkit.optimize(image).apply(f"oci:{tmp_path / 'small'}:x")
    layerkit.flatten(source, f"oci:{tmp_path / 'flat'}:x", platform=platform, settings=settings)
    to = f"oci:{tmp_path / 'moved'}:x"
    layerkit.remap(source, to, mapping, form="portable", platform=platform, settings=settings)
    for name in ("small", "flat"):
        assert differences(want, snapshot(seen(name))) == []
    with mapped(judge, tmp_path / "shown", EXTENTS) as shown:
        moved = snapshot(shown)
        assert differences(moved, snapshot(seen("moved"))) == []
        with layerkit.open_image(source, platform=platform, settings=settings) as image:
            for rendering in ("erofs", "directory"):
                with image.mount(tmp_path / "m", mapping, rendering=rendering):
                    assert differences(moved, snapshot(tmp_path / "m")) == []
            image.unpack(tmp_path / "r", mapping)
            assert differences(moved, snapshot(tmp_path / "r")) == []
            packed = image.pack(tmp_path / "r", f"oci:{tmp_path / 'packed'}:x", mapping, checksum=True)
            assert (packed.added, packed.changed, packed.removed) == (0, 0, 0)


def test_an_image_without_layers(tmp_path: Path) -> None:
    need_root()
    layout = Layout()
    layout.list(layout.image(), "x")
    source = f"oci:{layout.folder(tmp_path / 'in')}:x"
    settings = layerkit.Settings(store=tmp_path / "store")
    mapping = layerkit.mapping(["0:100000:65536"])
    assert mapping is not None
    (tmp_path / "m").mkdir()
    with layerkit.open_image(source, settings=settings) as image:
        for rendering in ("erofs", "directory"):
            with image.mount(tmp_path / "m", mapping, rendering=rendering):
                assert ((tmp_path / "m").stat().st_uid, list((tmp_path / "m").iterdir())) == (100000, [])
        image.unpack(tmp_path / "r", mapping)
        assert (tmp_path / "r").stat().st_uid == 100000
    with pytest.raises(LossyResult, match="no layers"):
        layerkit.remap(source, f"oci:{tmp_path / 'out'}:x", mapping, form="portable", settings=settings)
    with pytest.raises(UsageError, match="no layers"):
        layerkit.flatten(source, f"oci:{tmp_path / 'out'}:x", settings=settings)
    assert not (tmp_path / "out").exists()
