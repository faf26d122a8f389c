"""``copy`` between references: same digests, attached artifacts, all platforms, archives that others load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from image_kit import INDEX, Layout, attach, below, digest, dump, tar
from support import need_tool


@pytest.fixture
def cli(store_dir: Path) -> Callable[..., Any]:
    """Return a runner of ``layerkit`` that gives the parsed JSON of a success, the message of a failure."""

    def run(*words: object, code: int = 0) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "layerkit.cli.main", *map(str, words), "--json"],
            env={**os.environ, "LAYERKIT_STORE": str(store_dir)}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return json.loads(done.stdout) if code == 0 else done.stderr

    return run


def multi(path: Path) -> tuple[Path, dict[str, Any], dict[str, dict[str, Any]]]:
    """Write a layout with an index for two platforms, things attached to each part, and a stranger."""
    layout = Layout()
    amd, arm = layout.image(tar(("a", b"1"))), layout.image(tar(("a", b"2")), arch="arm64", variant="v8")
    entries = [
        amd | {"platform": {"os": "linux", "architecture": "amd64"}},
        arm | {"platform": {"os": "linux", "architecture": "arm64", "variant": "v8"}},
    ]
    index = layout.put(dump({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}), INDEX)
    layout.list(index, "multi")
    stranger = layout.list(layout.image(tar(("b", b"3"))), "other")
    made = {"amd": attach(layout, amd, b"sbom"), "index": attach(layout, index, b"signature")}
    made["deep"] = attach(layout, made["amd"], b"signature of the sbom")
    made["stranger"] = attach(layout, stranger, b"not ours")
    signature = layout.image(tar(("s", b"4")), x=1)
    made["cosign"] = layout.list(signature, amd["digest"].replace(":", "-") + ".sig")
    made |= {"amd image": amd, "arm image": arm}
    layout.folder(path)
    return path, index, made


def listed(layout: Path) -> list[str]:
    return [m["digest"] for m in json.loads((layout / "index.json").read_text())["manifests"]]


def test_one_platform_with_what_is_attached_to_it(cli: Callable[..., Any], tmp_path: Path) -> None:
    source, _, made = multi(tmp_path / "in")
    out = tmp_path / "out"
    report = cli("copy", f"oci:{source}:multi", f"oci:{out}:one", "--platform", "linux/amd64")
    assert report["schema"] == "layerkit.copy.v1"
    assert report["manifest"] == made["amd image"]["digest"]
    want = [made[name]["digest"] for name in ("amd image", "amd", "cosign", "deep")]
    assert sorted(listed(out)) == sorted(want)
    assert sorted(report["attached"]) == sorted(want[1:])
    for name in below(out / "blobs/sha256"):
        assert digest((out / "blobs/sha256" / name).read_bytes()) == f"sha256:{name}"


def test_all_platforms_with_what_is_attached_to_any(cli: Callable[..., Any], tmp_path: Path) -> None:
    need_tool("skopeo")
    source, index, made = multi(tmp_path / "in")
    out = tmp_path / "out"
    report = cli("copy", f"oci:{source}:multi", f"oci:{out}:all", "--all-platforms")
    assert report["manifest"] == index["digest"]
    assert report["images"] == [made["amd image"]["digest"], made["arm image"]["digest"]]
    assert made["stranger"]["digest"] not in listed(out)
    assert {made[n]["digest"] for n in ("amd", "index", "deep", "cosign")} == set(report["attached"])
    subprocess.run(["skopeo", "copy", "--all", "--quiet", f"oci:{out}:all", f"dir:{tmp_path / 'd'}"], check=True)
    again = cli("copy", f"oci:{source}:multi", f"oci:{out}:all", "--all-platforms")
    assert again["blobs"] == 0
    cli("copy", f"oci:{source}:multi", f"oci-archive:{tmp_path / 'x.tar'}:all", "--all-platforms")
    back = cli("copy", f"oci-archive:{tmp_path / 'x.tar'}:all", f"oci:{tmp_path / 'back'}:all", "--all-platforms")
    assert back["manifest"] == index["digest"]
    assert "single images" in cli(
        "copy", f"oci:{source}:multi", f"docker-archive:{tmp_path / 'no.tar'}:n:t", "--all-platforms", code=2
    )
    assert not (tmp_path / "no.tar").exists()


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_archives_go_there_and_back(cli: Callable[..., Any], tiny_image: Path, tmp_path: Path, kind: str) -> None:
    need_tool("skopeo")
    archive = f"{kind}:{tmp_path / 'x.tar'}:example.com/a:t"
    first = cli("copy", tiny_image, archive)
    back = cli("copy", archive, f"oci:{tmp_path / 'back'}:t", "--all-platforms")
    assert (back["manifest"] == first["manifest"]) or kind == "docker-archive"
    before, after = cli("inspect", tiny_image), cli("inspect", tmp_path / "back")
    assert before["tree_digest"] == after["tree_digest"]
    assert [r["digest"] for r in before["layers"]] == [r["digest"] for r in after["layers"]]
    source = f"docker-archive:{tmp_path / 'x.tar'}" if kind == "docker-archive" else archive
    subprocess.run(["skopeo", "copy", "--quiet", source, f"dir:{tmp_path / 'd'}"], check=True)


def test_a_damaged_or_absent_blob_leaves_nothing(cli: Callable[..., Any], tmp_path: Path) -> None:
    source, _, made = multi(tmp_path / "in")
    manifest = json.loads((source / "blobs" / made["arm image"]["digest"].replace(":", "/")).read_text())
    blob = source / "blobs" / manifest["layers"][0]["digest"].replace(":", "/")
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    cli("copy", f"oci:{source}:multi", f"oci:{tmp_path / 'out'}:t", "--all-platforms", code=3)
    blob.unlink()
    cli("copy", f"oci:{source}:multi", f"oci:{tmp_path / 'out'}:t", "--all-platforms", code=3)
    assert not (tmp_path / "out").exists()
    assert cli("copy", f"oci:{source}:multi", f"oci:{tmp_path / 'out'}:t", "--platform", "linux/amd64")["blobs"]
