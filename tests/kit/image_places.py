"""One image in every kind of place that images lie in, opened as a user's reference opens it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from engines import Engine
from made_images import CONFIG, LAYER, MANIFEST, Layout, digest, dump, tar
from registry_fake import Fake, fake_registry

from layerkit.images.open import open_sink, open_source
from layerkit.images.registry.options import RegistryOptions, Retry
from layerkit.model.ports import ImageSink, ImageSource
from layerkit.model.work import Work
from layerkit.store.import_layers import import_layers
from layerkit.store.layout import DataBackend
from layerkit.store.local import LocalStore
from layerkit.store.source import StoreSource

NAME = "app:one"
INDEXED = ("oci", "oci-archive", "registry")
"""Kinds of places that keep manifests, and so have digests, artifacts and indexes."""
SOURCES = (*INDEXED, "docker-archive", "docker-daemon", "store")
SINKS = ("oci", "oci-archive", "docker-archive", "docker-daemon", "registry")


@dataclass
class Made:
    """An image that was made by hand; its layers are plain tars, so that every place keeps them byte for byte."""

    layers: list[bytes]
    config: bytes
    manifest: bytes
    layout: Layout
    entry: dict[str, object]


def make(content: bytes = b"a" * 70_000) -> Made:
    layout = Layout()
    layers = [tar(("a", content), ("b", b"b")), tar(("c", b"c"))]
    config = dump({
        "architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [digest(x) for x in layers]},
    })  # fmt: skip
    manifest = dump({
        "schemaVersion": 2, "mediaType": MANIFEST, "config": layout.put(config, CONFIG),
        "layers": [layout.put(layer, LAYER) for layer in layers],
    })  # fmt: skip
    return Made(layers, config, manifest, layout, layout.list(layout.put(manifest, MANIFEST), NAME))


def docker_archive(made: Made) -> bytes:
    """As ``docker save`` wrote it before version 25."""
    saved = {"Config": "c.json", "RepoTags": [NAME], "Layers": [f"{i}/layer.tar" for i in range(len(made.layers))]}
    layers = [(f"{i}/layer.tar", layer) for i, layer in enumerate(made.layers)]
    return tar(("c.json", made.config), *layers, ("manifest.json", dump([saved])))


class Places:
    """Places of the test's own, by kind; ``stack`` closes what they need."""

    def __init__(self, folder: Path, stack: ExitStack, request: pytest.FixtureRequest) -> None:
        self.folder, self._stack, self._request = folder, stack, request
        self._fake: Fake | None = None
        self._store: LocalStore | None = None

    @property
    def fake(self) -> Fake:
        if self._fake is None:
            self._fake = self._stack.enter_context(fake_registry())
        return self._fake

    @property
    def store(self) -> LocalStore:
        """The store, open until the test ends."""
        if self._store is None:
            self._store = self._stack.enter_context(LocalStore.open(self.folder / "store"))
        return self._store

    @property
    def options(self) -> RegistryOptions:
        (self.folder / "auth.json").write_text("{}")
        return RegistryOptions(authfile=self.folder / "auth.json", tls_verify=False, retry=Retry(2, 0.001, 0.01))

    def daemon(self) -> Engine:
        engine: Engine = self._request.getfixturevalue("docker_engine")
        patch: pytest.MonkeyPatch = self._request.getfixturevalue("monkeypatch")
        patch.setenv("DOCKER_HOST", engine.address)
        self._stack.callback(engine.run, "rmi", "--force", NAME)
        return engine

    def fill(self, kind: str, made: Made) -> None:
        """Bring ``made`` into the place, without layerkit where that can be."""
        if kind == "oci":
            made.layout.folder(self.folder / kind)
        elif kind == "oci-archive":
            made.layout.archive(self.folder / kind)
        elif kind == "docker-archive":
            (self.folder / kind).write_bytes(docker_archive(made))
        elif kind == "docker-daemon":
            self.daemon()("load", stdin=docker_archive(made))
        elif kind == "registry":
            repo = self.fake.repo("app")
            repo.blobs |= made.layout.blobs
            for entry in made.layout.index["manifests"]:
                tag = entry.get("annotations", {}).get("org.opencontainers.image.ref.name", "").removeprefix("app:")
                repo.manifests[entry["digest"]] = (entry["mediaType"], made.layout.blobs[entry["digest"]])
                repo.tags |= {tag: entry["digest"]} if tag else {}
        else:
            with self.store.hold():
                source = open_source(f"{made.layout.folder(self.folder / 'for-store')}:{NAME}")
                import_layers(Work(source, source.image()), self.store, DataBackend.TAR)
                self.store.add_image(source.image(), [NAME])
                source.close()

    def reference(self, kind: str) -> str:
        if kind == "registry":
            return f"docker://{self.fake.host}/{NAME}"
        return f"docker-daemon:{NAME}" if kind == "docker-daemon" else f"{kind}:{self.folder}/{kind}:{NAME}"

    def source(self, kind: str, digest: str = "") -> ImageSource:
        """Open the image, by its digest where one is given."""
        if kind == "store":
            return StoreSource(self.store, NAME)
        reference = self.reference(kind)
        if digest:
            reference = f"{reference.removesuffix(f':{NAME}').removesuffix(':one')}@{digest}"
        return open_source(reference, registry=self.options if kind == "registry" else None)

    def sink(self, kind: str) -> ImageSink:
        if kind == "docker-daemon":
            self.daemon()
        return open_sink(self.reference(kind), registry=self.options if kind == "registry" else None)

    def state(self, kind: str) -> object:
        """What is to be seen in the place from outside; in a registry, what tags lead to."""
        if kind == "registry":
            app = self.fake.repo("app")
            return {tag: app.manifests[digest] for tag, digest in app.tags.items()}
        if kind == "docker-daemon":
            return sorted(self.daemon()("images", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}").splitlines())
        top = self.folder / kind
        return {
            str(p): p.read_bytes() if p.is_file() else None for p in [top, *sorted(top.rglob("*"))] if p.exists()
        }


@contextmanager
def places(folder: Path, request: pytest.FixtureRequest) -> Iterator[Places]:
    with ExitStack() as stack:
        yield Places(folder, stack, request)
