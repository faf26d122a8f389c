"""A store that cannot be written to: said clearly where it is needed, done without where it is not."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_images import simple
from needs import need_root

import layerkit
from layerkit.model.errors import StoreError

MAP = ["0:100000:65536"]


@pytest.fixture
def image(tmp_path: Path) -> str:
    return f"oci:{simple('x').folder(tmp_path / 'in')}:x"


@pytest.fixture
def read_only(tmp_path: Path, image: str) -> Iterator[layerkit.Settings]:
    """Return settings with a store that holds the image, on a read-only filesystem."""
    need_root()
    store = tmp_path / "store"
    settings = layerkit.Settings(store=store)
    with layerkit.open_image(image, settings=settings) as opened:
        opened.remap(layerkit.mapping(MAP))
    subprocess.run(["mount", "--bind", store, store], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", store], check=True)
        yield settings
    finally:
        subprocess.run(["umount", store], check=True)


def test_it_is_said_where_a_store_is_needed(read_only: layerkit.Settings, image: str, tmp_path: Path) -> None:
    said = "the filesystem is read-only .*--store"
    with layerkit.open_image(image, settings=read_only) as opened:
        with pytest.raises(StoreError, match=said):
            opened.remap(layerkit.mapping(MAP))
        with pytest.raises(StoreError, match=said):
            opened.unpack(tmp_path / "r")
    with pytest.raises(StoreError, match=said):
        layerkit.collect_garbage(read_only.store)
    with pytest.raises(StoreError, match=said), layerkit.open_store(read_only.store_path):
        pass


def test_what_looks_at_an_image_or_writes_another_does_without(
    read_only: layerkit.Settings, image: str, tmp_path: Path
) -> None:
    with layerkit.open_image(image, settings=read_only) as opened:
        assert opened.inspect().entries == 4
        assert opened.analyze()[0].file_bytes > 0
        assert opened.verify().entries == 4
        layerkit.optimize(opened).apply(f"oci:{tmp_path / 'small'}:x")
    layerkit.flatten(image, f"oci:{tmp_path / 'flat'}:x", settings=read_only)
