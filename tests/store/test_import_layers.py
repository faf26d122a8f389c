"""Layers on their way into the store: one is begun while another ends, and an error lets everything go."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from in_memory import Blob
from made_layers import make_image, make_layer

from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import Cancelled, DigestMismatch, LayerkitError
from layerkit.model.image import Image, Layer
from layerkit.model.work import Work
from layerkit.store.import_layers import import_layers
from layerkit.store.layout import DataBackend
from layerkit.store.local import LocalStore

BYTES = 100_000
MADE = [make_layer({b"layer%d" % i: bytes((i,)) * BYTES}) for i in range(4)]
BLOBS = [gzip.compress(layer.tar, mtime=0) for layer in MADE]


def image() -> Image:
    layers = tuple(
        Layer(Descriptor("application/vnd.oci.image.layer.v1.tar+gzip", Digest.of(blob), len(blob)), made.diff_id)
        for made, blob in zip(MADE, BLOBS, strict=True)
    )
    return replace(make_image(*MADE), layers=layers)


class Source:
    """Gives the blobs, and says in what order they are opened and closed."""

    def __init__(self, damaged: int = -1, on_open: Callable[[int], None] = lambda _: None) -> None:
        self.blobs = {Digest.of(blob): (i, blob) for i, blob in enumerate(BLOBS)}
        self.damaged, self.on_open = damaged, on_open
        self.open: set[int] = set()

    def open_blob(self, descriptor: Descriptor) -> Blob:
        number, blob = self.blobs[descriptor.digest]
        self.on_open(number)
        reader = Blob(blob[:-9] + bytes(9) if number == self.damaged else blob)
        self.open.add(number)
        reader.close = lambda: self.open.discard(number)  # type: ignore[method-assign]
        return reader


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    before = threading.active_count()
    with LocalStore.open(tmp_path / "store") as store, store.hold():
        yield store
    assert threading.active_count() == before


def bring(store: LocalStore, source: Source, progress: object = None, jobs: int = 1) -> int:
    work = Work(source, image(), jobs=jobs, progress=progress)  # type: ignore[arg-type]
    return import_layers(work, store, DataBackend.TAR)


def kept(store: LocalStore) -> list[int]:
    return [i for i, layer in enumerate(MADE) if store.has_layer(layer.diff_id, DataBackend.TAR)]


def left(store: LocalStore) -> list[Path]:
    return [path for path in (store.root / "tmp").rglob("*") if path.is_file() and path.suffix != ".owner"]


@pytest.mark.parametrize("jobs", [1, 3])
def test_all_layers_arrive(store: LocalStore, jobs: int) -> None:
    source = Source()
    assert bring(store, source, jobs=jobs) == 4
    assert kept(store) == [0, 1, 2, 3] and not source.open and not left(store)
    assert bring(store, source, jobs=jobs) == 0
    for layer in MADE:
        assert (store.root / "tar" / layer.diff_id.hex).read_bytes() == layer.tar


def test_the_next_layer_is_begun_before_this_one_is_done(store: LocalStore) -> None:
    opened = [threading.Event() for _ in MADE]

    def progress(what: str, _done: int, _total: int) -> None:
        number = int(what.removeprefix("layer ").partition("/")[0])
        if number < len(MADE):
            assert opened[number].wait(20), "the next blob is opened while this one is still walked over"

    assert bring(store, Source(on_open=lambda number: opened[number].set()), progress) == 4


def test_no_more_than_one_layer_is_begun_ahead(store: LocalStore) -> None:
    held: list[set[int]] = []
    source = Source(on_open=lambda _: held.append(set(source.open)))
    bring(store, source)
    # Progress would not do to tell it: a layer may be begun before the first report of the one before.
    assert all(before <= {number - 1} for number, before in enumerate(held))


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("damaged", range(4))
def test_a_damaged_layer_ends_it_and_lets_all_go(store: LocalStore, damaged: int, jobs: int) -> None:
    source = Source(damaged)
    with pytest.raises(DigestMismatch):
        bring(store, source, jobs=jobs)
    assert damaged not in kept(store) and not source.open and not left(store)
    if jobs == 1:
        assert kept(store) == list(range(damaged))
    # Every lock is free again.
    assert bring(store, Source()) == 4 - len(set(kept(store)) - {damaged}) or kept(store) == [0, 1, 2, 3]
    assert kept(store) == [0, 1, 2, 3]


@pytest.mark.parametrize("error", [Cancelled("stop"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_what_is_cancelled_lets_all_go(store: LocalStore, error: BaseException, at: int) -> None:
    source = Source()

    def progress(what: str, _done: int, _total: int) -> None:
        if what == f"layer {at}/4":
            raise error

    with pytest.raises(type(error)):
        bring(store, source, progress)
    assert kept(store) == list(range(at - 1)) and not source.open and not left(store)
    assert bring(store, Source()) == 5 - at


@pytest.mark.parametrize("failing", range(4))
def test_a_source_that_fails_to_open_ends_it(store: LocalStore, failing: int) -> None:
    def on_open(number: int) -> None:
        if number == failing:
            raise LayerkitError("the registry is gone")

    source = Source(on_open=on_open)
    with pytest.raises(LayerkitError, match="gone"):
        bring(store, source)
    assert kept(store) == list(range(failing)) and not source.open and not left(store)
