"""What the public functions give besides what the commands show: one image or every platform, and odd arguments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import optimizing
import pytest
from made_images import INDEX, Layout, dump, tar

import layerkit
from layerkit import errors
from layerkit.model import errors as model_errors


@pytest.fixture
def multi(tmp_path: Path) -> str:
    """Return a reference to an index of two platforms, whose images hold a file twice."""
    layout, parts = Layout(), []
    for arch in ("amd64", "arm64"):
        image = layout.image(tar(("a", arch.encode() * 9000)), tar(("a", arch.encode() * 9000)), arch=arch)
        parts.append(image | {"platform": {"os": "linux", "architecture": arch}})
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": parts}
    layout.list(layout.put(dump(index), INDEX), "v1")
    return f"oci:{layout.folder(tmp_path / 'multi')}:v1"


@pytest.fixture(autouse=True)
def settings(tmp_path: Path) -> layerkit.Settings:
    return layerkit.Settings(store=tmp_path / "store")


def test_every_platform_by_one_word(multi: str, tmp_path: Path, settings: layerkit.Settings) -> None:
    mapping = layerkit.mapping(["0:1000:10"])
    assert mapping is not None
    both = ("linux/amd64", "linux/arm64")
    flat = layerkit.flatten(multi, f"oci:{tmp_path}/flat:v1", all_platforms=True, settings=settings)
    small = optimizing.optimize_to(multi, f"oci:{tmp_path}/small:v1", all_platforms=True, settings=settings)
    mapped = layerkit.remap(multi, f"oci:{tmp_path}/mapped:v1", mapping, all_platforms=True, settings=settings)
    plan = optimizing.optimize_to(multi, None, all_platforms=True, settings=settings)
    assert {each.platforms for each in (flat, small, mapped, plan)} == {both}
    assert [one.layers_after for one in flat.images] == [1, 1]
    assert [one.file_bytes_after for one in small.images] == [9000 * len(arch) for arch in ("amd64", "arm64")]
    assert plan.manifest == "" and [one.manifest for one in plan.images] == ["", ""]
    assert len(layerkit.copy(multi, f"oci:{tmp_path}/copy:v1", all_platforms=True).images) == 2


def test_one_platform_is_the_default(multi: str, tmp_path: Path, settings: layerkit.Settings) -> None:
    report = layerkit.flatten(multi, f"oci:{tmp_path}/one:v1", platform="linux/arm64", settings=settings)
    with layerkit.open_image(f"oci:{tmp_path}/one:v1") as image:
        assert str(image.image.platform) == "linux/arm64"
        assert str(image.image.descriptor.digest) == report.manifest


def test_arguments_that_mean_nothing_are_errors(multi: str, tmp_path: Path) -> None:
    dst, odd = f"oci:{tmp_path}/none:v1", {"compresion": "zstd"}
    with pytest.raises(TypeError, match="compresion"):
        layerkit.flatten(multi, dst, **odd)  # type: ignore[call-overload]
    with pytest.raises(errors.UsageError, match="cannot be used together"):
        layerkit.flatten(multi, dst, all_platforms=True, platform="linux/arm64")
    with pytest.raises(errors.UsageError, match="say where to begin"):
        layerkit.flatten(multi, dst, from_layer="1", keep_base=1)
    with pytest.raises(errors.UsageError, match="--stock-media-type needs"):
        optimizing.optimize_to(multi, dst, stock_media_type=True)
    with layerkit.open_image(multi) as image, pytest.raises(errors.UsageError, match="--stock-media-type needs"):
        layerkit.optimize(image).apply(dst, stock_media_type=True)
    assert not (tmp_path / "none").exists()


def test_the_errors_of_the_api_are_those_of_the_model() -> None:
    kinds: dict[str, Any] = {name: kind for name, kind in vars(model_errors).items() if isinstance(kind, type)}
    public = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert public == {name: kind for name, kind in kinds.items() if name in public}
    assert kinds.keys() - public.keys() == {"SnapshotError"}


def test_importing_costs_nothing_and_every_name_is_there() -> None:
    script = (
        "import sys, layerkit\n"
        "loaded = [name for name in sys.modules if name.startswith('layerkit')]\n"
        "assert loaded == ['layerkit'], loaded\n"
        "assert list(layerkit.__all__) == sorted(layerkit.__all__)\n"
        "assert all(getattr(layerkit, name) for name in layerkit.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
