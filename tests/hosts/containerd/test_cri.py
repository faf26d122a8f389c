"""A pull as Kubernetes and nerdctl do it: layers that lie in layerkit's store are not downloaded, nor unpacked."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import engines
import grpc
import made_images
import pytest
from engines import Engine, containerd, containerd_version, short_folder
from needs import need_root, need_tool
from programs import skopeo
from registry_server import Registry, docker_registry
from snapshot_client import Process, snapshotter

from layerkit.api import open as api
from layerkit.hosts.containerd.config_toml import proxy_plugin

_CRI = """
[plugins.{table}]
  snapshotter = "layerkit"
"""
_LAYERS = [made_images.tar((f"file{n}", bytes([65 + n]) * (100_000 + n))) for n in range(4)]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    need_tool("skopeo")
    folder = tmp_path_factory.mktemp("registry")
    with docker_registry(folder / "registry") as found:
        for name, layers in (("base", _LAYERS[:3]), ("above", _LAYERS)):
            layout = made_images.Layout()
            layout.list(layout.image(*layers), name)
            source = f"oci:{layout.folder(folder / name)}:{name}"
            done = skopeo("copy", "--dest-tls-verify=false", source, found.ref(f"{name}:1"))
            assert done.returncode == 0, done.stderr
        yield found


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Engine, Process]]:
    need_root()
    need_tool("containerd", "ctr", "setpriv")
    config = engines._CONTAINERD_CONF.replace('"io.containerd.grpc.v1.cri", ', "")
    monkeypatch.setattr(engines, "_CONTAINERD_CONF", config)
    with short_folder() as folder, snapshotter(folder) as process:
        # 2.x reads the old table only where it also lists runtimes.
        of_2 = containerd_version() >= (2, 0)
        table = '"io.containerd.cri.v1.images"' if of_2 else '"io.containerd.grpc.v1.cri".containerd'
        extra = proxy_plugin("layerkit", process.socket, unpack=of_2) + _CRI.format(table=table)
        with containerd(folder, config=extra) as engine:
            yield engine, process


def _field(number: int, data: bytes) -> bytes:
    length, size = b"", len(data)
    while True:
        length += bytes([size & 127 | (128 if size > 127 else 0)])
        size >>= 7
        if not size:
            return bytes([number << 3 | 2]) + length + data


def pull(engine: Engine, name: str) -> None:
    """Call PullImage of the CRI (runtime.v1): the request's first field is the image, whose first is its name."""
    with grpc.insecure_channel(f"unix:{engine.address}") as channel:
        call = channel.unary_unary("/runtime.v1.ImageService/PullImage")
        call(_field(1, _field(1, name.encode())), timeout=60)


def _blobs(engine: Engine) -> set[str]:
    lines = engine("--namespace", "k8s.io", "content", "ls", "-q").split()
    layers = {made_images.digest(gzip.compress(layer, mtime=0)): n for n, layer in enumerate(_LAYERS)}
    return {f"layer {layers[line]}" if line in layers else "other" for line in lines}


@pytest.mark.parametrize("known", [True, False], ids=["in-the-store", "unknown"])
def test_pull(host: tuple[Engine, Process], registry: Registry, tmp_path: Path, known: bool) -> None:
    engine, process = host
    if known:
        layout = made_images.Layout()
        layout.list(layout.image(*_LAYERS[:3]), "base")
        source = f"oci:{layout.folder(tmp_path / 'base')}:base"
        with api.open_image(source, settings=api.Settings(store=process.store)) as image:
            image.remap(None)
    pull(engine, f"{registry.host}/base:1")
    assert _blobs(engine) == ({"other"} if known else {"other", "layer 0", "layer 1", "layer 2"})
    infos = process.client.walk()
    assert len(infos) == 3 and all(info.name.startswith("layerkit/") is known for info in infos)
    assert [process.client.usage(info.name).size == 0 for info in infos] == [known] * 3
    # One that shares its base: only what is new comes.
    pull(engine, f"{registry.host}/above:1")
    new = {"layer 3"} if known else {f"layer {n}" for n in range(4)}
    assert _blobs(engine) == {"other"} | new
    assert len(process.client.walk()) == 4
    top = process.client.walk()[-1].name
    for shift in (0, 100_000):
        labels = {f"containerd.io/snapshot/{s}mapping": f"0:{shift}:65536" for s in ("uid", "gid")}
        assert process.client.prepare(f"c{shift}", top, labels if shift else {})
