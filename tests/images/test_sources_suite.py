"""What the port of sources promises, asked of every kind of place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from image_places import INDEXED, NAME, SOURCES, Made, Places
from in_memory import MemorySink
from made_images import MANIFEST, attach, digest, dump
from programs import wait_for

from layerkit.formats.oci import documents as oci
from layerkit.images.oci.blobs import chunks, verified
from layerkit.images.transfer import copy_image
from layerkit.model.descriptor import Descriptor, Platform
from layerkit.model.digest import Digest
from layerkit.model.errors import DigestMismatch, InvalidImage, LayerkitError, NotFound
from layerkit.model.ports import BlobReader, ImageSource

every = pytest.mark.parametrize("kind", SOURCES)
indexed = pytest.mark.parametrize("kind", INDEXED)


@pytest.fixture
def source(kind: str, made: Made, places: Places) -> Iterator[ImageSource]:
    places.fill(kind, made)
    opened = places.source(kind)
    yield opened
    opened.close()


def read(reader: BlobReader) -> bytes:
    data = b"".join(map(bytes, chunks(reader.readinto)))
    assert reader.readinto(memoryview(bytearray(8))) == 0  # the end stays the end
    reader.close()
    reader.close()
    return data


@every
def test_the_image_is_the_one_that_was_put_there(kind: str, made: Made, source: ImageSource) -> None:
    image = source.image()
    assert image.config == made.config
    assert list(map(str, image.diff_ids)) == list(map(digest, made.layers))
    assert (image.platform, image.name.rpartition(":")[2]) == (Platform("linux", "amd64"), "one")
    for told, data in ((image.descriptor, image.manifest), (image.config_descriptor, image.config)):
        assert (str(told.digest), told.size) == (digest(data), len(data))
    if kind in INDEXED or kind == "store":
        assert image.manifest == made.manifest
    assert source.image(Platform("linux", "amd64")) == image
    assert source.image() == image  # asked again


@every
def test_another_platform_is_not_found(kind: str, source: ImageSource) -> None:
    with pytest.raises(NotFound, match="arm64"):
        source.image(Platform("linux", "arm64"))


@every
def test_blobs_are_what_their_descriptors_say(kind: str, made: Made, source: ImageSource) -> None:
    image = source.image()
    for layer, want in zip(image.layers, made.layers, strict=True):
        assert read(source.open_blob(layer.descriptor)) == want
        assert (str(layer.descriptor.digest), layer.descriptor.size) == (digest(want), len(want))
    assert read(source.open_blob(image.config_descriptor)) == made.config


@every
def test_many_readers_at_once(kind: str, made: Made, source: ImageSource) -> None:
    layer = source.image().layers[0].descriptor
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: read(source.open_blob(layer)), range(8))) == [made.layers[0]] * 8
    first, second = source.open_blob(layer), source.open_blob(layer)
    buffer = memoryview(bytearray(100))
    for reader in (first, second, first):
        assert reader.readinto(buffer) == 100
    assert bytes(buffer) == made.layers[0][100:200]
    first.close()
    assert second.readinto(buffer) == 100
    second.close()


@every
def test_a_blob_that_is_not_there(kind: str, source: ImageSource) -> None:
    source.image()
    with pytest.raises((NotFound, InvalidImage), match=f"{'ab' * 32}") as caught:
        source.open_blob(Descriptor("x", Digest("sha256", "ab" * 32), 5))
    assert NAME in str(caught.value) or source.where.partition(":")[2] in str(caught.value)


@every
@pytest.mark.parametrize("more", [-1, 1])
def test_a_wrong_length_never_passes(kind: str, more: int, source: ImageSource) -> None:
    layer = source.image().layers[0].descriptor
    lying = replace(layer, size=layer.size + more)
    with pytest.raises(LayerkitError):
        for _ in verified(chunks(source.open_blob(lying).readinto), lying, "x"):
            pass


@every
def test_small_blobs_whole(kind: str, made: Made, source: ImageSource) -> None:
    image = source.image()
    assert source.fetch(image.config_descriptor, 1 << 20) == made.config
    assert source.fetch(image.descriptor, 1 << 20) == image.manifest
    with pytest.raises(InvalidImage):
        source.fetch(image.layers[0].descriptor, 100)


@every
def test_what_the_reference_selects(kind: str, source: ImageSource) -> None:
    assert [e.digest for e in source.chosen()] == ([source.image().descriptor.digest] if kind in INDEXED else [])


@every
def test_what_is_attached(kind: str, made: Made, places: Places) -> None:
    first, second = (attach(made.layout, made.entry, text) for text in (b"one", b"two"))
    named = made.layout.put(dump({
        "schemaVersion": 2, "mediaType": MANIFEST, "config": oci_empty(made), "layers": [],
    }), MANIFEST)  # fmt: skip
    tag = f"{str(made.entry['digest']).replace(':', '-')}.sig"
    made.layout.list(named, tag)
    places.fill(kind, made)
    source = places.source(kind)
    subject = source.image().descriptor.digest
    found, by_name = source.referrers(subject), source.attached_by_name(subject)
    if kind not in INDEXED:
        assert (found, by_name) == ([], [])
    else:
        assert sorted(str(e.digest) for e, _ in found) == sorted([first["digest"], second["digest"]])
        assert all(digest(data) == str(entry.digest) for entry, data in found)
        assert len(source.referrers(subject, "text/x")) == 2
        assert source.referrers(subject, "text/y") == source.referrers(Digest.of(b"other")) == []
        assert [(str(e.digest), name) for e, name in by_name] == [(named["digest"], tag)]
        assert source.attached_by_name(Digest.of(b"other")) == []
    source.close()


def oci_empty(made: Made) -> dict[str, object]:
    return made.layout.put(oci.EMPTY_JSON, str(oci.EMPTY_DESCRIPTOR.media_type))


@every
def test_what_only_a_registry_can(kind: str, made: Made, places: Places, source: ImageSource) -> None:
    layer = source.image().layers[0].descriptor
    ranges, before = source.ranges(layer), source.bytes_read()
    if kind != "registry":
        assert (ranges, before, source.repository_at("registry.example.com")) == (None, 0, "")
        return
    assert ranges is not None and ranges(512, 1000) == made.layers[0][512:1512]
    assert source.bytes_read() == before + 1000
    assert source.repository_at(places.fake.host) == "app"
    assert source.repository_at("registry.example.com") == ""


@every
def test_a_copy_has_all_of_it(kind: str, made: Made, source: ImageSource) -> None:
    sink, image = MemorySink(), source.image()
    seen: list[tuple[str, int, int]] = []
    copy_image(source, sink, image, NAME, progress=lambda *step: seen.append(step))
    assert [sink.blobs[layer.descriptor.digest] for layer in image.layers] == made.layers
    assert sink.blobs[image.descriptor.digest] == image.manifest
    assert {total for _, _, total in seen} == {len(layer) for layer in made.layers}


@every
def test_closing_releases_all(kind: str, made: Made, places: Places) -> None:
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    places.fill(kind, made)
    before = opened()
    for _ in range(3):
        source = places.source(kind)  # the store itself stays open
        read(source.open_blob(source.image().layers[0].descriptor))
        source.close()
    wait_for(lambda: opened() == before)  # the fake registry, in this process too, sees a moment later who is gone


@indexed
def test_a_damaged_manifest_or_blob_is_refused(kind: str, made: Made, places: Places) -> None:
    layer = digest(made.layers[0])
    made.layout.blobs[layer] = made.layout.blobs[layer][:-1] + b"!"
    places.fill(kind, made)
    source = places.source(kind)
    with pytest.raises(DigestMismatch):
        copy_image(source, MemorySinkThatVerifies(), source.image(), NAME)
    source.close()
    made.layout.blobs[str(made.entry["digest"])] = made.manifest[:-1] + b" "
    places.fill(kind, made)
    source = places.source(kind, str(made.entry["digest"]))
    with pytest.raises((DigestMismatch, InvalidImage)):
        source.image()
    source.close()


class MemorySinkThatVerifies(MemorySink):
    def put_blob(self, descriptor: Descriptor, chunks: object) -> None:
        super().put_blob(descriptor, verified(chunks, descriptor, "x"))  # type: ignore[arg-type]
