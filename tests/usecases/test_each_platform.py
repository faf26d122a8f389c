"""``--all-platforms`` of optimize and flatten, ``--strict`` and ``--jobs``: as people use them."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path

import pytest
from made_images import INDEX, Layout, dump, special, tar
from needs import need_tool
from programs import answer, run_layerkit

from layerkit.api.open import open_image

BIG = b"data " * 4000


@pytest.fixture
def multi(tmp_path: Path) -> Path:
    """Return an archive with an index of three platforms and a build attestation, its files in two layers each."""
    layout = Layout()
    parts = []
    for arch, variant in (("amd64", ""), ("arm64", ""), ("arm", "v7")):
        text = f"{arch}{variant}".encode() + BIG
        image = layout.image(tar(("a", text), ("gone", BIG)), tar(("a", text), (".wh.gone", b"")), arch=arch,
                             variant=variant)  # fmt: skip
        platform = {"os": "linux", "architecture": arch, **({"variant": variant} if variant else {})}
        parts.append(image | {"platform": platform})
    attestation = layout.image(tar(("x", b"")), arch="unknown")
    parts.append(attestation | {
        "platform": {"os": "unknown", "architecture": "unknown"},
        "annotations": {"vnd.docker.reference.type": "attestation-manifest",
                        "vnd.docker.reference.digest": parts[0]["digest"]},
    })  # fmt: skip
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": parts, "annotations": {"com.example.kept": "yes"}}
    layout.list(layout.put(dump(index), INDEX), "example.com/multi:1")
    return layout.archive(tmp_path / "multi.tar")


@pytest.mark.parametrize("command", ["optimize", "flatten"])
def test_all_platforms_become_one_index(command: str, multi: Path, tmp_path: Path) -> None:
    need_tool("skopeo")
    out = tmp_path / "out"
    report = answer(command, multi, f"oci:{out}:small", "--all-platforms")
    assert report["schema"] == f"layerkit.{command}-platforms.{'v2' if command == 'optimize' else 'v1'}"
    assert report["platforms"] == ["linux/amd64", "linux/arm64", "linux/arm/v7"]
    listed = json.loads((out / "index.json").read_text())["manifests"]
    assert [entry["digest"] for entry in listed] == [report["manifest"]]
    index = json.loads((out / "blobs" / report["manifest"].replace(":", "/")).read_text())
    # What speaks for the old digests stays behind; what describes the index comes along.
    assert len(index["manifests"]) == 3
    assert index["annotations"] == {"com.example.kept": "yes"}
    for name, part in zip(report["platforms"], report["images"], strict=True):
        with open_image(str(multi), platform=name) as old, open_image(f"oci:{out}:small", platform=name) as new:
            assert str(new.image.descriptor.digest) == part["manifest"]
            assert new.image.platform == old.image.platform
            assert new.tree().digest() == old.tree().digest()
            assert sum(x.descriptor.size for x in new.image.layers) < sum(
                x.descriptor.size for x in old.image.layers
            )
    subprocess.run(["skopeo", "copy", "-q", "--all", f"oci:{out}:small", f"oci:{tmp_path / 'copy'}:x"], check=True)
    again = answer(command, multi, f"oci:{tmp_path / 'b'}:small", "--all-platforms", "-j1")
    assert again["manifest"] == report["manifest"]


def test_all_platforms_under_one_map(multi: Path, tmp_path: Path) -> None:
    need_tool("skopeo")
    out = tmp_path / "out"
    words = (multi, f"oci:{out}:mapped", "--all-platforms", "--form", "portable", "--uid-map", "0:100000:65536")
    report = answer("remap", *words)
    assert report["schema"] == "layerkit.remap-platforms.v1"
    assert report["platforms"] == ["linux/amd64", "linux/arm64", "linux/arm/v7"]
    for name in report["platforms"]:
        with open_image(f"oci:{out}:mapped", platform=name) as image, open_image(str(multi), platform=name) as old:
            assert (image.tree().uid == old.tree().uid + 100_000).all()
    raw = subprocess.run(
        ["skopeo", "inspect", "--raw", f"oci:{out}:mapped"], capture_output=True, text=True, check=True
    )
    assert len(json.loads(raw.stdout)["manifests"]) == 3
    assert "all-platforms" in run_layerkit("remap", multi, f"oci:{out}:x", *words[2:3], *words[5:], code=2).stderr


def test_what_has_one_platform_or_room_for_one_is_refused(multi: Path, tiny_image: Path, tmp_path: Path) -> None:
    done = run_layerkit("optimize", multi, f"docker-archive:{tmp_path / 'o.tar'}:x", "--all-platforms", code=2)
    assert "can hold one platform" in done.stderr
    for more in (["--platform", "linux/arm64"],):
        assert (
            "cannot be used together"
            in run_layerkit("flatten", multi, tmp_path / "o.tar", "--all-platforms", *more, code=2).stderr
        )
    assert not (tmp_path / "o.tar").exists()
    # A layout of one image is an index of one platform.
    out = tmp_path / "one.tar"
    assert len(answer("optimize", tiny_image, out, "--all-platforms")["images"]) == 1
    plan = answer("optimize", multi, "--all-platforms", "--dry-run")
    assert plan["manifest"] == ""
    assert [x["layers_after"] for x in plan["images"]] == [1, 1, 1]
    assert "not written" in run_layerkit("optimize", multi, "--all-platforms", "--dry-run").stdout


def test_a_broken_platform_leaves_nothing(multi: Path, tmp_path: Path) -> None:
    with tarfile.open(multi) as archive:
        names = [m.name for m in archive.getmembers() if m.name.startswith("blobs/")]
        data = {name: archive.extractfile(name).read() for name in names}  # type: ignore[union-attr]
    layers = [name for name, content in data.items() if content[:2] == b"\x1f\x8b"]
    damaged = multi.read_bytes().replace(data[layers[2]], bytes(len(data[layers[2]])))
    multi.write_bytes(damaged)
    out = tmp_path / "d" / "out.tar"
    out.parent.mkdir()
    run_layerkit("optimize", multi, out, "--all-platforms", code=3)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("form", ["portable", "layer"])
def test_strict_refuses_overlay_xattrs_in_every_form(form: str, tmp_path: Path) -> None:
    layout = Layout()
    own = special("d", tarfile.DIRTYPE, mode=0o755, pax_headers={"SCHILY.xattr.user.overlay.opaque": "y"})
    layout.list(layout.image(tar(own, ("a", BIG))))
    source, out = layout.archive(tmp_path / "image.tar"), tmp_path / "out"
    words = ("--form", form, "--uid-map", "0:100000:65536")
    done = run_layerkit("remap", source, f"oci:{out}:x", *words, "--strict", code=3)
    assert "refused under --strict" in done.stderr
    assert not out.exists()
    run_layerkit("remap", source, f"oci:{out}:x", *words)


@pytest.mark.parametrize("words", [("--compression-level", 0), ("--compression-level", 10), ("--jobs", 0)])
def test_levels_and_threads_that_do_not_exist(words: tuple[object, ...], tiny_image: Path, tmp_path: Path) -> None:
    run_layerkit("flatten", tiny_image, tmp_path / "o.tar", *words, code=2)
    assert not (tmp_path / "o.tar").exists()


def test_what_packed_a_layer_is_on_record(tiny_image: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = answer("flatten", tiny_image, f"oci:{out}:x", "--compression-level", 9)
    assert report["compressor"].startswith("zlib-ng ")
    assert report["compressor"].endswith("level 9 blocks 262144")
    with open_image(f"oci:{out}:x") as image:
        assert image.image.layers[0].descriptor.annotations == {"io.layerkit.compressor": report["compressor"]}
