"""The remap artifact's manifest: written, read back, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made_images import simple

from layerkit.formats.oci import documents as oci
from layerkit.formats.oci import remap_artifact as artifact
from layerkit.images.oci.source import LayoutSource
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import InvalidImage
from layerkit.model.image import Image

MAP = "u:0:100000:65536,g:0:100000:65536"
META = Descriptor(artifact.META_EROFS, Digest.of(b"meta"), 4)


@pytest.fixture
def image(tmp_path: Path) -> Image:
    source = LayoutSource.in_folder(str(simple().folder(tmp_path / "lay")))
    try:
        return source.image()
    finally:
        source.close()


def _build(image: Image, **more: Any) -> tuple[bytes, Descriptor]:
    said: dict[str, Any] = {
        "subject": image.descriptor, "mapping": MAP, "namespace": "trusted", "rendering": "erofs", "blobs": (META,),
        "diff_ids": image.diff_ids,
    }  # fmt: skip
    return artifact.RemapArtifact(**(said | more)).encode()


def test_round_trip(image: Image) -> None:
    data, entry = _build(image, annotations={"other": "x"})
    assert entry == Descriptor(oci.MANIFEST, Digest.of(data), len(data), artifact_type=artifact.ARTIFACT_TYPE)
    parsed = artifact.parse(data, "doc")
    assert parsed.subject == Descriptor(image.descriptor.media_type, image.descriptor.digest, image.descriptor.size)
    assert (parsed.mapping, parsed.namespace, parsed.rendering) == (MAP, "trusted", "erofs")
    assert parsed.diff_ids == image.diff_ids
    assert parsed.blobs == (META,)
    assert parsed.annotations["other"] == "x"
    assert _build(image, annotations={"other": "x"}) == (data, entry)


def test_it_is_an_oci_1_1_artifact(image: Image) -> None:
    document = json.loads(_build(image)[0])
    assert document["artifactType"] == "application/vnd.layerkit.remap.v1"
    assert document["config"] == {
        "mediaType": "application/vnd.oci.empty.v1+json",
        "digest": "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        "size": 2,
    }
    assert set(document["subject"]) == {"mediaType", "digest", "size"}
    assert all(key.startswith("io.layerkit.") for key in document["annotations"])


def test_other_maps_are_other_artifacts(image: Image) -> None:
    made = {_build(image, mapping=text)[1].digest for text in ("a", "b")}
    made |= {_build(image, namespace="user")[1].digest, _build(image, rendering="tar")[1].digest}
    assert len(made) == 4


@pytest.mark.parametrize(
    "bad", [{"namespace": "system"}, {"rendering": "zip"}, {"blobs": ()}, {"format_version": 0}]
)
def test_nonsense_is_not_built(image: Image, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a remap artifact"):
        _build(image, **bad)


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        ("artifactType", "x/y", "want artifactType application/vnd.layerkit.remap.v1, found 'x/y'"),
        ("artifactType", None, "want artifactType"),
        ("subject", None, "subject: missing"),
        ("subject", {"mediaType": "a", "digest": "sha256:00", "size": 1}, "subject.digest"),
        ("layers", [], "layers: want at least one"),
        ("config.mediaType", oci.CONFIG, "config: want the empty one"),
        ("annotations.io.layerkit.remap.map", None, "remap.map'.*: missing"),
        ("annotations.io.layerkit.remap.map", "", "remap.map'.*: missing"),
        ("annotations.io.layerkit.remap.namespace", "system", "want trusted or user, found 'system'"),
        ("annotations.io.layerkit.remap.rendering", "squashfs", "want erofs or tar, found 'squashfs'"),
        ("annotations.io.layerkit.remap.version", "2", "reads version 1, found '2'; use a newer one"),
        ("annotations.io.layerkit.remap.version", None, "version'.*: missing"),
        ("annotations.io.layerkit.remap.diff-ids", "sha256:1", "diff-ids'.*: not a digest"),
        ("annotations", None, "missing"),
    ],
)
def test_malformed(image: Image, path: str, value: object, why: str) -> None:
    document = json.loads(_build(image)[0])
    head, _, tail = path.partition(".")
    place, key = (document[head], tail) if tail else (document, head)
    if value is None:
        del place[key]
    else:
        place[key] = value
    with pytest.raises(InvalidImage, match=f"^doc: .*{why}"):
        artifact.parse(json.dumps(document).encode(), "doc")


def test_an_image_is_no_artifact(image: Image) -> None:
    with pytest.raises(InvalidImage, match="want artifactType"):
        artifact.parse(image.manifest, "doc")
