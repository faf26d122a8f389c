"""Everything that any command writes as an OCI document is valid by image-spec's JSON schemas."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import oci_schemas
import pytest
from made_images import INDEX, Layout, dump, tar
from programs import run_layerkit

written = functools.partial(run_layerkit, env={"SOURCE_DATE_EPOCH": ""})

MAP = ("--uid-map", "0:100000:65536")
WRITERS: dict[str, tuple[str, ...]] = {
    "copy": ("copy",),
    "artifact": ("remap", *MAP),
    "artifact-tar": ("remap", *MAP, "--rendering", "tar"),
    "layer": ("remap", "--form", "layer", *MAP),
    "layer-stock": ("remap", "--form", "layer", "--stock-media-type", *MAP),
    "portable": ("remap", "--form", "portable", *MAP),
    "optimize": ("optimize", "--created", "2026-01-31T12:00:00Z"),
    "optimize-metadata": ("optimize", "--metadata-only"),
    "flatten": ("flatten", "--created", "0"),
    "flatten-zstd": ("flatten", "--compression", "zstd"),
    "flatten-none": ("flatten", "--compression", "none", "--from", "2"),
}


@pytest.mark.parametrize(
    ("writer", "kind"),
    [*((writer, "oci") for writer in WRITERS), ("copy", "docker-archive"), ("flatten", "docker-archive")],
)
def test_what_is_made_of_one_image(
    writer: str, kind: str, tiny_archive: Callable[..., Path], tmp_path: Path
) -> None:
    command, *more = WRITERS[writer]
    source = tiny_archive(kind)
    written(command, source, f"oci:{tmp_path}/out:v1", *more, "--store", tmp_path / "store")
    counts = oci_schemas.check(tmp_path / "out")
    assert counts["config-schema"] == 1
    assert counts["image-manifest-schema"] == 1 + ("artifact" in writer)
    if writer not in ("copy", "artifact"):
        return
    # Once more into the same layout: its index.json is written anew, with what was in it.
    written(command, source, f"oci:{tmp_path}/out:v2", *more, "--store", tmp_path / "store")
    oci_schemas.check(tmp_path / "out")
    names = [m.get("annotations", {}) for m in json.loads((tmp_path / "out/index.json").read_bytes())["manifests"]]
    assert {"v1", "v2"} <= {name.get("org.opencontainers.image.ref.name") for name in names}


@pytest.mark.parametrize("command", ["copy", "optimize", "flatten"])
def test_what_is_made_of_all_platforms(command: str, tmp_path: Path) -> None:
    layout = Layout()
    entries = []
    for arch, variant in (("amd64", ""), ("arm64", "v8")):
        image = layout.image(tar(("a", b"1"), ("b", arch.encode())), tar(("a", b"2")), arch=arch, variant=variant)
        platform = {"os": "linux", "architecture": arch} | ({"variant": variant} if variant else {})
        entries.append(image | {"platform": platform})
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": entries, "annotations": {"who": "a test"}}
    layout.list(layout.put(dump(index), INDEX), "multi")
    layout.folder(tmp_path / "in")
    for kind in ("oci", "oci-archive"):
        out = tmp_path / kind
        written(command, f"oci:{tmp_path}/in:multi", f"{kind}:{out}:multi", "--all-platforms")
        counts = oci_schemas.check(out)
        assert (counts["image-index-schema"], counts["image-manifest-schema"], counts["config-schema"]) == (1, 2, 2)


def test_the_schemas_find_what_is_wrong() -> None:
    digest: dict[str, object] = {"mediaType": "a/b", "size": 1, "digest": "sha256:" + "0" * 64}
    good = {"schemaVersion": 2, "config": digest, "layers": [digest]}
    assert oci_schemas.problems("image-manifest-schema", good) == []
    broken: list[dict[str, object]] = [
        {"schemaVersion": 1}, {"layers": []}, {"layers": [digest | {"size": "1"}]},
        {"config": digest | {"digest": "sha256"}}, {"annotations": {"a": 1}}, {"subject": {}},
        {"layers": [digest | {"mediaType": "no type"}]},
    ]  # fmt: skip
    for change in broken:
        assert oci_schemas.problems("image-manifest-schema", good | change), change
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [digest["digest"]]}}
    assert oci_schemas.problems("config-schema", config | {"created": "2026-01-31T12:00:00Z"}) == []
    broken = [{"created": "2026-01-31"}, {"os": 1}, {"rootfs": {}}, {"config": {"Env": "A=1"}}]
    for change in broken:
        assert oci_schemas.problems("config-schema", config | change), change
