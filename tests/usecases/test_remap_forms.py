"""``remap --form portable`` and ``--form layer``, judged by umoci, podman and the kernel."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from judge import differences, snapshot, umoci
from judge import unpacked as mapped_by_kernel
from needs import need_root, need_tool
from programs import Cli

MAP = "0:100000:65536"


def test_umoci_sees_what_an_idmapped_mount_shows(cli: Cli, tiny_image: Path, tmp_path: Path) -> None:
    need_root()
    need_tool("umoci", "skopeo")
    out = tmp_path / "out"
    words = ("--form", "portable", "--uid-map", MAP)
    report = cli.json("remap", tiny_image, f"oci:{out}:p", *words)
    assert report["schema"] == "layerkit.remap.v1"
    before = cli.json("inspect", tiny_image)
    after = cli.json("inspect", out)
    assert len(after["layers"]) == len(before["layers"]) == report["layers"]
    assert min(row["id"] for row in after["uids"]) == 100_000
    umoci(f"{out}:p", tmp_path / "bundle")
    (tmp_path / "work").mkdir()
    with mapped_by_kernel(f"{tiny_image}:latest", tmp_path / "work", ((0, 100_000, 65536),)) as shown:
        want = snapshot(shown)
        assert len(want) > 20
        assert differences(snapshot(tmp_path / "bundle/rootfs"), want) == []
    again = cli.json("remap", tiny_image, f"oci:{tmp_path / 'again'}:p", *words)
    assert again["manifest"] == report["manifest"]
    subprocess.run(["skopeo", "copy", "--quiet", f"oci:{out}:p", f"dir:{tmp_path / 'd'}"], check=True)
    same = cli.json(
        "remap", tiny_image, f"oci:{tmp_path / 'id'}:p", "--form", "portable", "--uid-map", "0:0:4294967295"
    )
    assert same["how"] == "portable: 0 layers written anew"


def test_a_portable_image_goes_through_pipes(cli: Cli, tiny_archive: Any, tmp_path: Path) -> None:
    with tiny_archive("oci-archive", "gzip").open("rb") as f:
        cli("remap", "-", tmp_path / "o.tar", "--form", "portable", "--uid-map", MAP, stdin=f)
    cli("verify", tmp_path / "o.tar")


def test_the_form_layer_has_stubs_and_says_what_happens(cli: Cli, tiny_image: Path, tmp_path: Path) -> None:
    need_root()
    out = tmp_path / "out"
    words = ("--form", "layer", "--uid-map", MAP, "--compression", "none", "--json")
    done = cli("remap", tiny_image, f"oci:{out}:l", *words)
    assert "podman and containerd refuse" in done.stderr
    assert top_layer(out)["mediaType"] == "application/vnd.layerkit.meta.v1.tar"
    stock = tmp_path / "stock"
    done = cli("remap", tiny_image, f"oci:{stock}:l", *words, "--stock-media-type")
    assert "ZEROS" in done.stderr
    assert top_layer(stock)["mediaType"] == "application/vnd.oci.image.layer.v1.tar"
    assert top_layer(stock)["digest"] == top_layer(out)["digest"]


def test_the_kernel_shows_the_mapped_tree_through_the_form_layer(
    cli: Cli, tiny_archive: Callable[..., Path], tmp_path: Path
) -> None:
    need_root()
    need_tool("umoci", "tar")
    image = tmp_path / "image"
    subprocess.run(
        ["skopeo", "copy", "--quiet", f"oci-archive:{tiny_archive('oci-archive', 'gzip')}", f"oci:{image}:latest"],
        check=True,
    )
    out = tmp_path / "out"
    words = ("--form", "layer", "--uid-map", MAP, "--compression", "none", "--stock-media-type")
    cli("remap", image, f"oci:{out}:l", *words)
    upper, shown, work = tmp_path / "upper", tmp_path / "shown", tmp_path / "work"
    for folder in (upper, shown, work):
        folder.mkdir()
    blob = out / "blobs" / top_layer(out)["digest"].replace(":", "/")
    # As podman's storage does it: xattrs kept, trusted ones too.
    subprocess.run(
        ["tar", "-C", upper, "--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf", blob], check=True
    )
    with mapped_by_kernel(f"{image}:latest", work, ((0, 100_000, 65536),)) as judged:
        want = snapshot(judged)
        lower = work / "bundle/rootfs"
        options = f"ro,metacopy=on,redirect_dir=on,lowerdir={upper}:{lower}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, shown], check=True)
        try:
            lines = differences(snapshot(shown), want)
        finally:
            subprocess.run(["umount", shown], check=True)
    assert lines == []


@pytest.mark.parametrize(
    "words",
    [
        ("--form", "portable"),
        ("--form", "nonsense", "--uid-map", MAP),
        ("--form", "portable", "--uid-map", MAP, "--stock-media-type"),
    ],
)
def test_what_makes_no_sense_is_refused(cli: Cli, tiny_image: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    cli("remap", tiny_image, tmp_path / "o.tar", *words, code=2)
    assert not (tmp_path / "o.tar").exists()


def test_an_unmapped_owner_leaves_nothing(cli: Cli, tiny_image: Path, tmp_path: Path) -> None:
    words = ("--form", "portable", "--uid-map", "0:100000:1000")
    assert "outside the map" in cli("remap", tiny_image, f"oci:{tmp_path / 'o'}:t", *words, code=3).stderr
    assert not (tmp_path / "o").exists()
    cli("remap", tiny_image, f"oci:{tmp_path / 'o'}:t", *words, "--overflow-id", "65534")


def top_layer(layout: Path) -> dict[str, Any]:
    entry = json.loads((layout / "index.json").read_text())["manifests"][0]["digest"]
    manifest = json.loads((layout / "blobs" / entry.replace(":", "/")).read_text())
    layer: dict[str, Any] = manifest["layers"][-1]
    return layer
