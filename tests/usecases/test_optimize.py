"""Optimized images, judged by umoci, skopeo and podman: the same root filesystem in fewer bytes."""

from __future__ import annotations

import errno
import functools
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optimizing
import pytest
from judge import differences, snapshot, umoci
from needs import need_root, need_tool
from programs import answer, run_layerkit

from layerkit.api.open import Settings, open_image
from layerkit.model.errors import Cancelled, InvalidImage, UsageError

optimize_command = functools.partial(run_layerkit, "optimize")


def layout(reference: str, folder: Path) -> str:
    """Return the image as ``LAYOUT:TAG``, as umoci wants it."""
    subprocess.run(["skopeo", "copy", "-q", reference, f"oci:{folder}:x"], check=True)
    return f"{folder}:x"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(store=tmp_path / "store")


def judge(source: str, result: str, tmp: Path) -> None:
    """Let umoci unpack both and compare every attribute."""
    got = snapshot(umoci(layout(result, tmp / "got"), tmp / "a"))
    want = snapshot(umoci(layout(source, tmp / "want"), tmp / "b"))
    assert differences(got, want) == []
    assert len(want) > 10


def test_the_real_image_shrinks_and_stays_what_it_is(app_image: Path, tmp_path: Path) -> None:
    need_root()
    need_tool("umoci", "skopeo")
    small, plain = tmp_path / "small.tar", tmp_path / "plain.tar"
    # With the default compression, as the input has it.
    report = json.loads(optimize_command(app_image, f"oci-archive:{small}:s", "--json").stdout)
    assert report["schema"] == "layerkit.optimize.v2"
    assert report["saved_percent"] >= 40
    assert report["file_bytes_after"] < 0.6 * report["file_bytes_before"]
    assert [layer["action"] for layer in report["layers"]][4:6] == ["drop", "drop"]
    same = json.loads(
        optimize_command(app_image, f"oci-archive:{plain}:s", "--compression", "none", "--json").stdout
    )
    assert same["tree_digest"] == report["tree_digest"]
    with open_image(str(small)) as one, open_image(str(plain)) as two:
        assert one.image.diff_ids == two.image.diff_ids
    judge(f"oci-archive:{app_image}", f"oci-archive:{small}:s", tmp_path)


def test_the_tiny_image(tiny_image: Path, tmp_path: Path, settings: Settings) -> None:
    need_root()
    need_tool("umoci", "skopeo")
    out = tmp_path / "out"
    report = optimizing.optimize_to(f"oci:{tiny_image}", f"oci:{out}:s", settings=settings)
    with open_image(f"oci:{out}:s") as new, open_image(str(tiny_image)) as old:
        assert str(new.tree().digest()) == str(old.tree().digest()) == report.tree_digest
        kept = {layer.descriptor.digest for layer in old.image.layers}
        for layer in report.layers:
            assert (layer.action == "keep") == (layer.digest_after == layer.digest_before)
        assert all(x.descriptor.digest in kept for x, y in zip(new.image.layers, report.layers, strict=False)
                   if y.action == "keep" and x.diff_id in old.image.diff_ids)  # fmt: skip
        before, after = json.loads(old.image.config), json.loads(new.image.config)
        assert after["config"] == before["config"]
        assert after["rootfs"]["diff_ids"] == [str(x) for x in new.image.diff_ids]
        made = [step for step in after.get("history", []) if not step.get("empty_layer")]
        assert len(made) in (0, len(new.image.layers))
    judge(f"oci:{tiny_image}:latest", f"oci:{out}:s", tmp_path)
    assert not settings.store_path.exists()


def test_the_same_input_gives_the_same_bytes_and_a_second_run_changes_nothing(
    tiny_image: Path, tmp_path: Path, settings: Settings
) -> None:
    for compression in ("gzip", "zstd", "none"):
        one, two = (
            optimizing.optimize_to(
                str(tiny_image), f"oci:{tmp_path / compression}{i}:s", compression=compression, settings=settings
            )
            for i in range(2)
        )
        assert one.manifest == two.manifest
        again = optimizing.optimize_to(
            f"oci:{tmp_path / compression}0:s", f"oci:{tmp_path / compression}3:s", settings=settings
        )
        assert again.manifest == one.manifest
        assert {layer.action for layer in again.layers} == {"keep"}


def test_a_kept_base(tiny_image: Path, tmp_path: Path, settings: Settings) -> None:
    out = f"oci:{tmp_path / 'out'}:s"
    with open_image(str(tiny_image)) as image:
        count = len(image.image.layers)
        base = image.image.layers[:2]
    report = optimizing.optimize_to(str(tiny_image), out, keep_base=2, settings=settings)
    assert [layer.action for layer in report.layers[:2]] == ["keep", "keep"]
    with open_image(out) as image:
        assert image.image.layers[:2] == base
    assert report.base_cost_bytes >= 0
    all_kept = optimizing.optimize_to(str(tiny_image), None, keep_base=str(tiny_image), settings=settings)
    assert all_kept.kept_base == count
    assert all_kept.file_bytes_after == all_kept.file_bytes_before
    for wrong in (-1, count + 1, "99"):
        with pytest.raises(UsageError, match="keep-base"):
            optimizing.optimize_to(str(tiny_image), None, keep_base=wrong, settings=settings)


def test_a_dry_run_writes_nothing(tiny_image: Path, tmp_path: Path) -> None:
    report = json.loads(optimize_command(tiny_image, tmp_path / "x.tar", "--dry-run", "--json").stdout)
    assert report["manifest"] == ""
    assert report["file_bytes_after"] <= report["file_bytes_before"]
    assert "not written" in optimize_command(tiny_image, "--dry-run").stdout
    assert list(tmp_path.iterdir()) == []
    assert "DST is missing: give one" in optimize_command(tiny_image, code=2).stderr
    assert "Example" in optimize_command("--help").stdout


def breaking(how: str) -> Callable[..., Iterator[bytes]]:
    """Return a writer of layer tars that fails, or writes one row otherwise than planned."""
    from layerkit.formats.tar import writer

    def tar(index: Any, content: Any) -> Iterator[bytes]:
        if how == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        index.uid[:] += 1
        yield from writer.layer_tar(index, content)  # type: ignore[misc]

    return tar


@pytest.mark.parametrize("kind", ["oci", "oci-archive", "docker-archive"])
@pytest.mark.parametrize("how", ["full", "wrong owner"])
def test_an_error_leaves_no_output(
    how: str, kind: str, tiny_image: Path, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerkit.pack.layer_tar", breaking(how))
    dst = tmp_path / "d/x.tar"
    dst.parent.mkdir()
    with pytest.raises((OSError, InvalidImage)):
        optimizing.optimize_to(str(tiny_image), f"{kind}:{dst}", settings=settings)
    assert list(dst.parent.iterdir()) == []


def test_a_stopped_run_leaves_no_output(tiny_image: Path, tmp_path: Path, settings: Settings) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("writing"):
            raise Cancelled("enough")

    dst = tmp_path / "d/x.tar"
    dst.parent.mkdir()
    with pytest.raises(Cancelled):
        optimizing.optimize_to(str(tiny_image), f"oci-archive:{dst}", settings=settings, progress=stop)
    assert list(dst.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("before", "after", "compared"),
    [("gzip", "gzip", "blobs"), ("none", "gzip", "files"), ("gzip", "zstd", "files"), ("none", "none", "blobs")],
)
def test_what_is_saved_compares_like_with_like(
    tiny_archive: Callable[..., Path], tmp_path: Path, before: str, after: str, compared: str
) -> None:
    words = ("optimize", tiny_archive("oci-archive", before), "--store", tmp_path / "store")
    # One layer at least has to be written anew, else all keep the compression that they have.
    report = answer(*words, f"oci:{tmp_path}/out:v1", "--compression", after)
    assert "rewrite" in [layer["action"] for layer in report["layers"]]
    assert report["compared"] == compared
    what = "bytes" if compared == "blobs" else "file_bytes"
    old, new = report[f"{what}_before"], report[f"{what}_after"]
    assert report["saved_percent"] == round(100 * (old - new) / old, 2)
    assert [layer["number"] for layer in report["layers"]] == list(range(1, report["layers_before"] + 1))


def test_a_plan_does_not_tell_what_it_cannot_know(tiny_archive: Callable[..., Path], tmp_path: Path) -> None:
    report = answer("optimize", tiny_archive(), "--dry-run", "--store", tmp_path / "store")
    assert (report["bytes_after"], report["compared"], report["manifest"]) == (None, "files", "")
    assert {layer["blob_bytes_after"] for layer in report["layers"] if layer["action"] == "rewrite"} == {None}
