"""Whoever may push to a repository can attach anything to an image: nothing of it may be believed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_images import MANIFEST, Layout, dump, tar
from made_images import digest as digest_of
from registry_fake import Fake, fake_registry

import layerkit
from layerkit.api import registry as publishing
from layerkit.formats.index.check import UNPROVEN
from layerkit.formats.oci import documents as oci
from layerkit.formats.oci import index_artifact
from layerkit.formats.oci import remap_artifact as artifact
from layerkit.idmap import Mapping
from layerkit.images.registry.options import RegistryOptions, Retry
from layerkit.model.errors import InvalidImage, LayerkitError

UID_MAP = ["0:100000:65536"]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Fake]:
    monkeypatch.setenv("LAYERKIT_CACHE", str(tmp_path / "cache"))
    with fake_registry() as registry:
        layout = Layout()
        entry = layout.image(tar(("a", b"a" * 700), ("b/c", b"content")), tar(("b/d", b"more")))
        repo = registry.repo("team/app")
        for digest, data in layout.blobs.items():
            if digest == entry["digest"]:
                registry.put("team/app", "v1", data)
            else:
                repo.blobs[digest] = data
        yield registry


@pytest.fixture
def settings(tmp_path: Path) -> layerkit.Settings:
    auth = tmp_path / "auth.json"
    auth.write_text("{}")
    registry = RegistryOptions(authfile=auth, tls_verify=False, retry=Retry(2, 0.001, 0.01))
    return layerkit.Settings(store=tmp_path / "store", data="objects", registry=registry)


def mapping() -> Mapping:
    found = layerkit.mapping(UID_MAP)
    assert found is not None
    return found


def ref(fake: Fake) -> str:
    return f"docker://{fake.host}/team/app:v1"


def remap(fake: Fake, settings: layerkit.Settings, **more: Any) -> Any:
    with layerkit.open_image(ref(fake), settings=settings) as image:
        return image.attach(mapping(), ref(fake), **more)


def manifests(fake: Fake, kind: str) -> dict[str, Any]:
    """Return digest and document of the manifests of an artifact type."""
    found = {d: json.loads(data) for d, (_, data) in fake.repo("team/app").manifests.items()}
    return {d: m for d, m in found.items() if m.get("artifactType") == kind}


def swap(fake: Fake, kind: str, change: Any) -> None:
    """Replace the one artifact of a type by a changed one."""
    ((digest, document),) = manifests(fake, kind).items()
    del fake.repo("team/app").manifests[digest]
    change(document)
    fake.put("team/app", "", dump(document))


def put_blob(fake: Fake, data: bytes) -> dict[str, Any]:
    fake.repo("team/app").blobs[digest_of(data)] = data
    return {"digest": digest_of(data), "size": len(data)}


def _other_bytes(fake: Fake) -> Any:
    """A META of zeros, honest about its own digest."""
    import zstandard

    blob = put_blob(fake, zstandard.ZstdCompressor().compress(bytes(8192)))

    def change(document: dict[str, Any]) -> None:
        document["layers"][0] |= blob
        document["layers"][0]["annotations"]["io.layerkit.remap.uncompressed-digest"] = digest_of(bytes(8192))

    return change


def _bomb(fake: Fake) -> Any:
    import zstandard

    blob = put_blob(fake, zstandard.ZstdCompressor().compress(bytes(80 << 20)))
    return lambda document: document["layers"][0].update(blob)


def _annotate(key: str, value: str) -> Any:
    return lambda _fake: lambda document: document["annotations"].update({key: value})


@pytest.mark.parametrize(
    "make",
    [
        _other_bytes,
        _bomb,
        _annotate(artifact.LAYERS_KEY, f"sha256:{'1' * 64}"),
        _annotate(artifact.LAYERS_KEY, "rubbish"),
        _annotate(artifact.VERSION_KEY, "99"),
        _annotate(artifact.NAMESPACE_KEY, "user"),
        _annotate(artifact.NAMESPACE_KEY, "evil"),
        _annotate(artifact.RENDERING_KEY, "tar"),
        lambda _f: lambda document: document["layers"].append(document["layers"][0]),
        lambda _f: lambda document: document["layers"][0].update(size=5),
        lambda _f: lambda document: document["layers"][0].update(digest=f"sha256:{'2' * 64}"),
    ],
    ids=[
        "zeros",
        "bomb",
        "layers",
        "no-layers",
        "version",
        "namespace",
        "no-namespace",
        "form",
        "two",
        "size",
        "gone",
    ],
)
def test_a_published_remap_that_is_wrong_is_not_used(fake: Fake, settings: layerkit.Settings, make: Any) -> None:
    good = remap(fake, settings)
    assert publishing.pull(ref(fake), mapping(), settings=settings).published == good.artifact
    swap(fake, artifact.ARTIFACT_TYPE, make(fake))
    report = publishing.pull(ref(fake), mapping(), settings=settings, own_meta=True)
    assert report.published == "" and len(report.refused) == 1
    assert report.remap.entries == 5  # made here instead
    with pytest.raises(InvalidImage, match="no published remap"):
        publishing.pull(ref(fake), mapping(), settings=settings, require_published=True)
    with pytest.raises(LayerkitError), layerkit.open_image(ref(fake), settings=settings) as image:
        image.verify()


def test_the_right_one_is_found_among_wrong_ones(fake: Fake, settings: layerkit.Settings) -> None:
    good = remap(fake, settings)
    for i in range(5):
        ((_, document),) = [
            (d, m) for d, m in manifests(fake, artifact.ARTIFACT_TYPE).items() if d == good.artifact
        ]
        document["annotations"] |= {artifact.LAYERS_KEY: f"sha256:{i:064x}"}
        fake.put("team/app", "", dump(document))
    report = publishing.pull(ref(fake), mapping(), settings=settings)
    assert report.published == good.artifact


@pytest.mark.parametrize("api", [True, False])
def test_forged_subjects(fake: Fake, settings: layerkit.Settings, api: bool) -> None:
    """A list of referrers that names an artifact of another image."""
    fake.referrers_api = api
    good = remap(fake, settings)
    image = fake.repo("team/app").tags["v1"]
    ((_, document),) = manifests(fake, artifact.ARTIFACT_TYPE).items()
    other = document | {"subject": document["subject"] | {"digest": f"sha256:{'3' * 64}"}}
    forged = fake.put("team/app", "", dump(other))
    entry = {
        "mediaType": MANIFEST,
        "digest": forged,
        "size": len(dump(other)),
        "artifactType": artifact.ARTIFACT_TYPE,
    }
    listing = dump({"schemaVersion": 2, "mediaType": oci.INDEX, "manifests": [entry]})
    if api:

        def lie(handler: Any) -> bool:
            if "/referrers/" in handler.path:
                handler.reply(200, listing, Content_Type=oci.INDEX)
                return True
            return False

        fake.before = lie
    else:
        fake.put("team/app", f"sha256-{image.removeprefix('sha256:')}", listing, oci.INDEX)
    report = publishing.pull(ref(fake), mapping(), settings=settings)
    assert (report.published, report.refused) == ("", ())
    assert good.artifact


def _index_blob(fake: Fake, settings: layerkit.Settings, change: Any) -> None:
    """Attach an index artifact whose first blob says something else, in a form that is whole."""
    with layerkit.open_image(ref(fake), settings=replace(settings, published=False)) as opened:
        index, image = opened.indexes()[0], opened.image
    blob, data = index_artifact.encode(change(index))
    fake.repo("team/app").blobs[str(blob.digest)] = data
    fake.repo("team/app").blobs[digest_of(b"{}")] = b"{}"
    blob = replace(blob, annotations={**blob.annotations, index_artifact.DIFF_ID_KEY: str(index.diff_id)})
    fake.put("team/app", "", index_artifact.build(image, [blob])[0])


def test_a_published_index_that_lies_never_reaches_a_mount(fake: Fake, settings: layerkit.Settings) -> None:
    """An index of the right layer with other owners: a remap believes it and says so; whoever checks finds out."""
    import numpy as np

    _index_blob(fake, settings, lambda index: replace(index, uid=np.full(len(index), 7, np.uint32)))
    wrong = remap(fake, settings)
    assert any(text.startswith(UNPROVEN) for text in wrong.warnings)
    report = publishing.pull(ref(fake), mapping(), settings=settings)
    assert report.published == "" and "got sha256" in report.refused[0]
    with layerkit.open_image(ref(fake), settings=settings) as image:
        assert set(image.tree().uid.tolist()) == {0}
    right = remap(fake, replace(settings, published=False, store=settings.store_path))
    assert right.artifact != wrong.artifact
    assert publishing.pull(ref(fake), mapping(), settings=settings).published == right.artifact


@pytest.mark.parametrize("kind", ["other-layer", "rubbish", "blob-gone"])
def test_published_indexes_that_cannot_be_used(fake: Fake, settings: layerkit.Settings, kind: str) -> None:
    """The layers are read instead, and the warnings say why."""
    from layerkit.model.digest import Digest

    if kind == "other-layer":
        _index_blob(fake, settings, lambda index: replace(index, diff_id=Digest.of(b"another")))
        # The artifact still claims that it is of this layer.
        ((_, document),) = manifests(fake, index_artifact.ARTIFACT_TYPE).items()
        assert document["layers"][0]["annotations"][index_artifact.DIFF_ID_KEY] != str(Digest.of(b"another"))
    else:
        publishing.push_indexes(ref(fake), settings=settings)
        ((_, document),) = manifests(fake, index_artifact.ARTIFACT_TYPE).items()
        for layer in document["layers"]:
            del fake.repo("team/app").blobs[layer["digest"]]
        if kind == "rubbish":
            swap(
                fake,
                index_artifact.ARTIFACT_TYPE,
                lambda m: [x.update(put_blob(fake, b"rubbish")) for x in m["layers"]],
            )
    report = remap(fake, settings)
    assert report.layers_read == 2
    with layerkit.open_image(ref(fake), settings=settings) as image:
        assert image.verify().artifacts == (report.artifact,)
