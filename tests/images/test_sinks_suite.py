"""What the port of sinks promises, asked of every kind of place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import image_places
import pytest
from image_places import INDEXED, NAME, SINKS, Made, Places
from made_images import MANIFEST, below

from layerkit.formats.oci import documents as oci
from layerkit.formats.oci import remap_artifact as artifact
from layerkit.images.open import open_source
from layerkit.images.transfer import blob_chunks, copy_image
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import DigestMismatch, InvalidImage, LayerkitError, NotFound, RegistryError, UsageError
from layerkit.model.ports import ImageSink

every = pytest.mark.parametrize("kind", SINKS)
local = pytest.mark.parametrize("kind", ["oci", "oci-archive", "docker-archive"])
BLOB = Descriptor(oci.LAYER_TAR, Digest.of(b"xyz"), 3)


class Stop(Exception):
    pass


@pytest.fixture
def put(made: Made, tmp_path: Path) -> Callable[..., None]:
    """Return what puts ``made``, or another image, into a sink."""

    def copy(sink: ImageSink, other: Made | None = None) -> None:
        folder = tmp_path / f"source-{'made' if other is None else 'other'}"
        source = open_source(str((other or made).layout.folder(folder)))
        copy_image(source, sink, source.image(), NAME)
        source.close()

    return copy


@every
def test_what_is_put_is_there(
    kind: str, made: Made, places: Places, put: Callable[..., None], tmp_path: Path
) -> None:
    before = places.state(kind)
    with places.sink(kind) as sink:
        put(sink)
        assert places.state(kind) == before or kind == "oci"  # a layout's staging folder is there
        sink.commit()
    source = places.source(kind)
    image = source.image()
    assert (image.config, list(map(str, image.diff_ids))) == (made.config, [str(Digest.of(x)) for x in made.layers])
    if kind in INDEXED:
        assert image.manifest == made.manifest
    for layer in image.layers:
        assert b"".join(map(bytes, blob_chunks(source, layer.descriptor))) in made.layers
    source.close()
    if kind == "docker-archive":  # it is an OCI archive as well
        again = open_source(f"oci-archive:{places.folder}/{kind}")
        assert again.image().manifest == made.manifest
        again.close()
    assert not [name for name in below(tmp_path) if "layerkit" in name]


@every
def test_nothing_is_visible_before_the_commit(kind: str, places: Places, put: Callable[..., None]) -> None:
    sink = places.sink(kind)
    put(sink)
    with pytest.raises(LayerkitError):
        places.source(kind).image()
    sink.abort()
    sink.abort()
    with pytest.raises(LayerkitError):
        places.source(kind).image()


@every
def test_a_block_that_ends_early_leaves_nothing(kind: str, places: Places, put: Callable[..., None]) -> None:
    before = places.state(kind)
    with pytest.raises(Stop), places.sink(kind) as sink:
        put(sink)
        raise Stop
    assert places.state(kind) == before


@every
def test_it_is_written_once(kind: str, places: Places, put: Callable[..., None]) -> None:
    sink = places.sink(kind)
    put(sink)
    sink.commit()
    with pytest.raises(UsageError, match="written already"):
        sink.commit()
    sink.abort()  # of what was committed nothing goes
    source = places.source(kind)
    assert source.image()
    source.close()


@every
def test_it_knows_what_it_has(kind: str, places: Places) -> None:
    with places.sink(kind) as sink:
        assert not sink.has_blob(BLOB.digest)
        sink.put_blob(BLOB, [memoryview(b"x"), b"yz"])
        assert sink.has_blob(BLOB.digest)
        sink.put_blob(BLOB, [b"xyz"])  # again: checked and dropped
        assert sink.has_blob(BLOB.digest)


@every
@pytest.mark.parametrize(
    ("entry", "pieces"),
    [
        (BLOB, [b"xy"]),
        (BLOB, [b"xyz", b"!"]),
        (Descriptor("x", BLOB.digest, 2), [b"xyz"]),
        (Descriptor("x", BLOB.digest, 4), [b"xyz"]),
        (BLOB, [b"xy", b"Z"]),
    ],
    ids=["short", "long", "size too small", "size too large", "other"],
)
def test_a_blob_that_is_not_the_promised_one(
    kind: str, entry: Descriptor, pieces: list[bytes], places: Places, put: Callable[..., None]
) -> None:
    with places.sink(kind) as sink:
        with pytest.raises(DigestMismatch, match=r"got .*want "):
            sink.put_blob(entry, pieces)
        assert not sink.has_blob(BLOB.digest)
        if kind == "docker-daemon":  # its upload is cut off: nothing can follow
            return
        sink.put_blob(BLOB, [b"xyz"])
        put(sink)
        sink.commit()
    source = places.source(kind)
    assert source.image()
    source.close()


@every
def test_a_blob_without_end_is_stopped_at_its_size(kind: str, places: Places) -> None:
    pieces = iter([b"x" * 1000] * 1000)
    with places.sink(kind) as sink, pytest.raises(DigestMismatch, match="more than 5000 bytes"):
        sink.put_blob(Descriptor("x", Digest.of(b""), 5000), pieces)
    assert len(list(pieces)) == 994


@every
def test_blobs_from_several_threads(kind: str, made: Made, places: Places, put: Callable[..., None]) -> None:
    blobs = [str(i).encode() * 50_000 for i in range(12)]
    with places.sink(kind) as sink, ThreadPoolExecutor(sink.parallel) as pool:
        entries = [Descriptor("x", Digest.of(data), len(data)) for data in blobs]
        list(pool.map(lambda pair: sink.put_blob(pair[0], [pair[1]]), zip(entries, blobs, strict=True)))
        put(sink)
        sink.commit()
    source = places.source(kind)
    assert source.image().config == made.config
    source.close()


def _steps() -> dict[str, Callable[[ImageSink], None]]:
    def incomplete(sink: ImageSink) -> None:
        data = oci.manifest_json(BLOB, [BLOB])
        sink.put_manifest(Descriptor(MANIFEST, Digest.of(data), len(data)), data, "x")
        sink.commit()

    def wrong_size(sink: ImageSink) -> None:
        sink.put_blob(BLOB, [b"xyz"])
        config = oci.EMPTY_DESCRIPTOR
        data = oci.manifest_json(config, [Descriptor(BLOB.media_type, BLOB.digest, 4)])
        sink.put_blob(config, [b"{}"])
        sink.put_manifest(Descriptor(MANIFEST, Digest.of(data), len(data)), data)
        sink.commit()

    def stopped(sink: ImageSink) -> None:
        def pieces() -> Iterator[bytes]:
            yield b"x"
            raise Stop

        sink.put_blob(BLOB, pieces())

    return {
        "short blob": lambda sink: sink.put_blob(BLOB, [b"xy"]),
        "long blob": lambda sink: sink.put_blob(BLOB, [b"xyz", b"!"]),
        "blob too small": lambda sink: sink.put_blob(Descriptor("x", BLOB.digest, 2), [b"xyz"]),
        "blob too large": lambda sink: sink.put_blob(Descriptor("x", BLOB.digest, 4), [b"xyz"]),
        "other blob": lambda sink: sink.put_blob(BLOB, [b"xy", b"Z"]),
        "size": lambda sink: sink.put_manifest(Descriptor(MANIFEST, Digest.of(b"{}"), 3), b"{}"),
        "another digest": lambda sink: sink.put_manifest(Descriptor(MANIFEST, BLOB.digest, 3), b"{}}"),
        "none at all": lambda sink: sink.put_manifest(Descriptor(MANIFEST, Digest.of(b"{}"), 2), b"{}"),
        "incomplete": incomplete,
        "wrong size": wrong_size,
        "stopped": stopped,
    }


@every
@pytest.mark.parametrize("there", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("step", _steps())
def test_errors_leave_what_was_there(
    kind: str, step: str, there: bool, places: Places, put: Callable[..., None]
) -> None:
    if kind == "registry" and step == "wrong size":
        return  # sizes in manifests are the registry's to check
    if there:
        with places.sink(kind) as sink:
            put(sink, image_places.make(b"other"))
            sink.commit()
    state = places.state(kind)
    sink = places.sink(kind)
    put(sink)
    refusals = {
        "registry": RegistryError,  # by the registry itself: the client does not ask for each blob again
        "docker-daemon": UsageError,  # it takes no artifacts, and has been told so
    }
    want = refusals.get(kind, InvalidImage) if step in ("incomplete", "wrong size") else (InvalidImage, Stop)
    with pytest.raises(want):
        _steps()[step](sink)
    sink.abort()
    assert places.state(kind) == state


@every
def test_attached_artifacts_are_found(
    kind: str, made: Made, places: Places, put: Callable[..., None], tmp_path: Path
) -> None:
    if kind == "docker-daemon":
        sink = places.sink(kind)
        assert not sink.keeps_attached
        sink.abort()
        return
    sink = places.sink(kind)
    assert sink.keeps_attached
    put(sink)
    image = open_source(str(tmp_path / "source-made")).image()
    meta = Descriptor(artifact.META_EROFS, Digest.of(b"meta"), 4)
    sink.put_blob(meta, [b"meta"])
    sink.put_blob(oci.EMPTY_DESCRIPTOR, [oci.EMPTY_JSON])
    kept = []
    for text in ("map one", "map two"):
        remapped = artifact.RemapArtifact(image.descriptor, (meta,), text, "user", "erofs", image.diff_ids)
        data, entry = remapped.encode()
        sink.put_manifest(entry, data)
        kept.append((entry.digest, data))
    other = oci.manifest_json(
        oci.EMPTY_DESCRIPTOR, [meta], artifact_type="application/x.signature", subject=image.descriptor
    )
    sink.put_manifest(Descriptor(MANIFEST, Digest.of(other), len(other)), other)
    sink.commit()

    # A docker archive is an OCI archive as well.
    whole = f"oci-archive:{places.folder}/{kind}"
    source = open_source(whole) if kind == "docker-archive" else places.source(kind)
    assert source.image().descriptor.digest == image.descriptor.digest  # the only image: artifacts are none
    found = source.referrers(image.descriptor.digest, artifact.ARTIFACT_TYPE)
    assert [(entry.digest, data) for entry, data in found] == kept
    assert [artifact.parse(data, "x").mapping for _, data in found] == ["map one", "map two"]
    assert all(entry.artifact_type == artifact.ARTIFACT_TYPE for entry, _ in found)
    assert len(source.referrers(image.descriptor.digest)) == 3
    assert source.referrers(Digest.of(b"other")) == []
    source.close()


@every
def test_blobs_that_are_there_are_not_read(kind: str, made: Made, places: Places, tmp_path: Path) -> None:
    if kind in ("oci", "registry"):
        places.fill(kind, made)
    source = open_source(str(made.layout.folder(tmp_path / "closed")))
    image = source.image()
    sink = places.sink(kind)
    if kind not in ("oci", "registry"):  # places of one use have what was put
        copy_image(source, sink, image, NAME)
    source.close()  # reading any blob from here on would fail
    copy_image(source, sink, image, NAME)
    sink.commit()
    again = places.source(kind)
    assert again.image().config == made.config
    again.close()


@local
def test_the_folder_above_must_be_there(kind: str, tmp_path: Path) -> None:
    from layerkit.images.open import open_sink

    with pytest.raises(NotFound, match="does not exist"):
        open_sink(f"{kind}:{tmp_path}/none/x")
