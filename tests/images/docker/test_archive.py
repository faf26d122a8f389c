"""Docker archives: both layouts, links, compressed layers and archives, several images."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
import zstandard
from made_images import below, digest, dump, special, tar

from layerkit.formats.oci import docker
from layerkit.formats.oci import documents as oci
from layerkit.images import transfer
from layerkit.images.docker.archive import DockerArchiveSource
from layerkit.images.oci.layout_sink import LayoutSink
from layerkit.images.oci.outer_tar import OuterTar
from layerkit.model.errors import DigestMismatch, InvalidImage, LimitExceeded, NotFound
from layerkit.model.image import Image
from layerkit.model.limits import Limits

A, B = tar(("a", b"a" * 5000)), tar(("b", b"b"))


def _config(*layers: bytes, **more: Any) -> bytes:
    document = {"os": "linux", "architecture": "arm64", "rootfs": {"type": "layers"}} | more
    document["rootfs"]["diff_ids"] = [digest(layer) for layer in layers]
    return dump(document)


def _saved(*tags: str, config: str = "c.json", layers: tuple[str, ...] = ("a.tar", "b.tar")) -> dict[str, Any]:
    return {"Config": config, "RepoTags": list(tags) or None, "Layers": list(layers)}


def _open(tmp_path: Path, data: bytes, name: str = "", limits: Limits | None = None) -> DockerArchiveSource:
    (tmp_path / "x.tar").write_bytes(data)
    limits = limits or Limits()
    archive = OuterTar((tmp_path / "x.tar").open("rb"), "x.tar", limits=limits, tmp=tmp_path)
    return DockerArchiveSource(archive, name, limits=limits)


def _blobs(source: DockerArchiveSource, image: Image) -> list[bytes]:
    return [b"".join(map(bytes, transfer.blob_chunks(source, layer.descriptor))) for layer in image.layers]


PLAIN = (("c.json", _config(A, B)), ("a.tar", A), ("b.tar", B), ("manifest.json", dump([_saved("app:v1")])))


def test_current_layout(tmp_path: Path) -> None:
    source = _open(tmp_path, tar(*PLAIN))
    image = source.image()
    assert (image.name, str(image.platform)) == ("app:v1", "linux/arm64")
    assert image.config == _config(A, B)
    assert [str(d) for d in image.diff_ids] == [digest(A), digest(B)]
    assert [layer.descriptor.media_type for layer in image.layers] == [oci.LAYER_TAR] * 2
    assert [layer.descriptor.digest for layer in image.layers] == list(image.diff_ids)
    assert _blobs(source, image) == [A, B]
    assert digest(image.manifest) == str(image.descriptor.digest)
    assert source.image() == image
    source.close()


def test_it_becomes_a_layout_and_back_the_same_image(tmp_path: Path) -> None:
    source = _open(tmp_path, tar(*PLAIN))
    image = source.image()
    with LayoutSink(str(tmp_path / "lay")) as sink:
        transfer.copy_image(source, sink, image, "v1")
        sink.commit()
    manifest = json.loads((tmp_path / "lay/blobs/sha256" / image.descriptor.digest.hex).read_bytes())
    assert manifest["config"]["mediaType"] == oci.CONFIG
    source.close()


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_compressed_layers_stay_compressed(tmp_path: Path, kind: str) -> None:
    packed = gzip.compress(A, mtime=0) if kind == "gzip" else zstandard.compress(A)
    members = [("a.tar", packed) if name == "a.tar" else (name, data) for name, data in PLAIN]
    source = _open(tmp_path, tar(*members))
    layer = source.image().layers[0]
    assert str(layer.descriptor.digest) == digest(packed)
    assert str(layer.diff_id) == digest(A)
    assert layer.descriptor.media_type == f"{oci.LAYER_TAR}+{kind}"
    assert _blobs(source, source.image())[0] == packed
    source.close()


@pytest.mark.parametrize("packer", ["gzip", "zstd"])
def test_compressed_archive(tmp_path: Path, packer: str) -> None:
    data = subprocess.run([packer, "-c"], input=tar(*PLAIN), capture_output=True, check=True).stdout
    source = _open(tmp_path, data)
    assert _blobs(source, source.image()) == [A, B]
    assert below(tmp_path) == ["x.tar"]
    source.close()
    source = _open(tmp_path, data + data)  # members of gzip and frames of zstd may follow each other
    with pytest.raises(LimitExceeded, match="layer_tar_bytes"):
        _open(tmp_path, data, limits=Limits(layer_tar_bytes=4096))
    with pytest.raises(InvalidImage, match=r"x\.tar"):
        _open(tmp_path, data[: len(data) // 2])
    assert below(tmp_path) == ["x.tar"]
    source.close()


@pytest.mark.parametrize(("magic", "name"), [(b"\xfd7zXZ\0", "xz"), (b"BZh91AY&SY", "bzip2")])
def test_other_compressions_are_named(tmp_path: Path, magic: bytes, name: str) -> None:
    with pytest.raises(InvalidImage, match=f"compressed with {name}"):
        _open(tmp_path, magic + bytes(1000))
    members = [("a.tar", magic) if member == "a.tar" else (member, data) for member, data in PLAIN]
    with pytest.raises(InvalidImage, match=f"compressed with {name}"):
        _open(tmp_path, tar(*members)).image()


def test_repeated_layer_as_link(tmp_path: Path) -> None:
    folders = ("1" * 64, "2" * 64, "3" * 64)
    layers = tuple(f"{folder}/layer.tar" for folder in folders)
    data = tar(
        special(folders[0], tarfile.DIRTYPE),
        (layers[0], A),
        special(layers[1], tarfile.SYMTYPE, f"../{layers[0]}"),
        special(layers[2], tarfile.LNKTYPE, layers[0]),
        ("c.json", _config(A, A, A)),
        ("manifest.json", dump([_saved("x:1", layers=layers)])),
    )
    source = _open(tmp_path, data)
    assert _blobs(source, source.image()) == [A, A, A]
    source.close()


def _legacy(*chain: tuple[str, bytes], **top: Any) -> list[tuple[str, bytes]]:
    members, parent = [], ""
    for i, (layer_id, layer) in enumerate(chain):
        document: dict[str, Any] = {"id": layer_id, "created": f"2014-0{i + 1}-01T00:00:00Z", "os": "linux"}
        document |= {"parent": parent} if parent else {}
        document |= {"architecture": "amd64", "container_config": {"Cmd": ["/bin/sh", "-c", f"step {i}"]}}
        document |= top if i == len(chain) - 1 else {}
        members += [
            (f"{layer_id}/VERSION", b"1.0"),
            (f"{layer_id}/json", dump(document)),
            (f"{layer_id}/layer.tar", layer),
        ]
        parent = layer_id
    return members


ONE, TWO = "a1" * 32, "b2" * 32


def test_legacy_layout(tmp_path: Path) -> None:
    members = _legacy((ONE, A), (TWO, B), config={"Cmd": ["/run"], "Env": ["A=b"]}, author="me")
    source = _open(tmp_path, tar(*members, ("repositories", dump({"old/app": {"v1": TWO}}))), "old/app:v1")
    image = source.image()
    config = json.loads(image.config)
    assert config["config"] == {"Cmd": ["/run"], "Env": ["A=b"]}
    assert (config["author"], config["created"]) == ("me", "2014-02-01T00:00:00Z")
    assert config["rootfs"]["diff_ids"] == [digest(A), digest(B)]
    assert [step["created_by"] for step in config["history"]] == ["/bin/sh -c step 0", "/bin/sh -c step 1"]
    assert _blobs(source, image) == [A, B]
    assert source.image() == image
    source.close()


def test_legacy_layer_that_is_compressed(tmp_path: Path) -> None:
    source = _open(tmp_path, tar(*_legacy((ONE, gzip.compress(A))), ("repositories", dump({"x": {"y": ONE}}))))
    (layer,) = source.image().layers
    assert str(layer.diff_id) == digest(A)
    assert layer.descriptor.media_type == oci.LAYER_GZIP
    source.close()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m | {f"{ONE}/json": dump({"id": ONE, "parent": TWO})}, "circle"),
        (lambda m: {k: v for k, v in m.items() if k != f"{ONE}/json"}, "names '.*/json', which is not in"),
        (lambda m: {k: v for k, v in m.items() if k != f"{ONE}/layer.tar"}, "layer.tar', which is not in"),
        (lambda m: m | {f"{TWO}/json": dump({"id": ONE})}, "id: found"),
        (lambda m: m | {f"{TWO}/json": dump({"parent": "../../etc"})}, "parent: want an id"),
        (lambda m: m | {"repositories": dump({"x": {"y": "../.."}})}, "x.y: want an id"),
        (lambda m: m | {"repositories": dump({"x": []})}, "x: want an object of tags"),
        (lambda m: m | {"repositories": b"[]"}, "want a JSON object"),
    ],
)
def test_legacy_damaged(tmp_path: Path, change: Any, why: str) -> None:
    members = dict(_legacy((ONE, A), (TWO, B))) | {"repositories": dump({"x": {"y": TWO}})}
    with pytest.raises(InvalidImage, match=why):
        _open(tmp_path, tar(*change(members).items())).image()


def test_choice_among_images(tmp_path: Path) -> None:
    config = _config(A, B)
    other = _config(B, author="other")
    listed = [
        _saved("app:v1", "app:latest"),
        _saved("localhost/x:1", config="d.json", layers=("b.tar",)),
        _saved(config="d.json", layers=("b.tar",)),
    ]
    data = tar(("c.json", config), ("d.json", other), ("a.tar", A), ("b.tar", B), ("manifest.json", dump(listed)))
    for name in ("app:v1", "app", "docker.io/library/app", "library/app:v1", "@0"):
        source = _open(tmp_path, data, name)
        assert source.image().config == config
        source.close()
    for name in ("localhost/x:1", "@1", "@2"):
        assert _open(tmp_path, data, name).image().config == other
    for name in ("", "app:v2", "x:1", "@3", "@", "@-1", "@x"):
        with pytest.raises(NotFound, match=r"there are: app:v1, app:latest, localhost/x:1, @2 \(no name\)"):
            _open(tmp_path, data, name).image()
    with pytest.raises(NotFound, match="holds no image"):
        _open(tmp_path, tar(("manifest.json", b"[]"))).image()


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("a", "docker.io/library/a:latest"),
        ("a:1", "docker.io/library/a:1"),
        ("b/a", "docker.io/b/a:latest"),
        ("localhost/a", "localhost/a:latest"),
        ("h:5000/a", "h:5000/a:latest"),
        ("q.io/b/a:2", "q.io/b/a:2"),
        ("a@sha256:00", "docker.io/library/a@sha256:00"),
    ],
)
def test_normal_name(text: str, normal: str) -> None:
    assert docker.normal_name(text) == normal


@pytest.mark.parametrize(
    ("manifest", "why"),
    [
        (b"{}", "want a JSON list"),
        (b"[1]", r"\[0\]: want an object"),
        (b'[{"Layers":[]}]', r"\[0\].Config: want the name of a file"),
        (b'[{"Config":"c.json","Layers":["a.tar",1]}]', r"\[0\].Layers: want a list of strings"),
        (b'[{"Config":"c.json","RepoTags":"x"}]', r"\[0\].RepoTags"),
        (b'[{"Config":"c.json","Config":"d.json"}]', "occurs twice"),
        (b'[{"Config":"c.json","Layers":["a.tar"]}]', r"1 layers, but c.json lists 2 rootfs\.diff_ids"),
        (b'[{"Config":"none.json","Layers":[]}]', "names 'none.json', which is not in the archive"),
        (b'[{"Config":"c.json","Layers":["a.tar","none"]}]', "names 'none', which is not in the archive"),
        (b'[{"Config":"../c.json","Layers":[]}]', "names '../c.json'"),
        (b'[{"Config":"/etc/passwd","Layers":[]}]', "names '/etc/passwd'"),
    ],
)
def test_malformed_list(tmp_path: Path, manifest: bytes, why: str) -> None:
    with pytest.raises(InvalidImage, match=why):
        _open(tmp_path, tar(*PLAIN[:3], ("manifest.json", manifest))).image()


def test_config_that_is_not_the_named_one(tmp_path: Path) -> None:
    name = hashlib.sha256(b"another").hexdigest() + ".json"
    data = tar((name, _config()), ("manifest.json", dump([_saved(config=name, layers=())])))
    with pytest.raises(DigestMismatch, match=name):
        _open(tmp_path, data).image()


def test_layer_that_is_not_the_promised_one_is_found_when_it_is_copied(tmp_path: Path) -> None:
    members = [("a.tar", A.replace(b"aaa", b"axa")) if name == "a.tar" else (name, data) for name, data in PLAIN]
    source = _open(tmp_path, tar(*members))
    image = source.image()
    with LayoutSink(str(tmp_path / "lay")) as sink, pytest.raises(DigestMismatch):
        transfer.copy_image(source, sink, image)
    source.close()
    assert below(tmp_path) == ["x.tar"]
