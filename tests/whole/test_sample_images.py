"""The sample images: byte-identical everywhere, and what foreign tools make of them."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from needs import need_root, need_tool

KINDS = [("oci", "gzip"), ("oci", "zstd"), ("oci", "none"), ("docker-archive", "none")]


@pytest.mark.parametrize(("kind", "compression"), KINDS)
def test_tiny_has_its_pinned_digests(
    tiny: ModuleType, pinned_digests: dict[str, Any], tmp_path: Path, kind: str, compression: str
) -> None:
    made = tiny.build(tmp_path / "image", kind=kind, compression=compression)
    assert made == pinned_digests[f"{kind}-{compression}"]


def test_tiny_archives_are_the_same_bytes_twice(tiny: ModuleType, tmp_path: Path) -> None:
    for kind in ("oci-archive", "docker-archive"):
        tiny.build(tmp_path / "a", kind=kind)
        tiny.build(tmp_path / "b", kind=kind)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tiny_has_every_kind_of_entry(tiny: ModuleType) -> None:
    types = set()
    for data in tiny.layers():
        assert len(data) % 512 == 0
        at = 0
        while data[at]:
            size = int(data[at + 124 : at + 135], 8)
            types.add(data[at + 156 : at + 157])
            at += 512 + -(-size // 512) * 512
    assert types == {b"0", b"1", b"2", b"3", b"5", b"6", b"x"}


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_foreign_tools_read_tiny(tiny_archive: Callable[..., Path], tmp_path: Path, compression: str) -> None:
    need_tool("skopeo")
    # skopeo unpacks an archive with its owners, which only root can.
    kind = "oci-archive" if os.geteuid() == 0 else "oci"
    source = f"{kind}:{tiny_archive(kind, compression)}"
    # Decompressing on the way makes the foreign tool check the diff_ids.
    target = tmp_path / "dir"
    command = ["skopeo", "copy", "--quiet", "--insecure-policy", "--dest-decompress"]
    subprocess.run([*command, source, f"dir:{target}"], check=True)
    layers = {hashlib.sha256(path.read_bytes()).hexdigest() for path in target.iterdir()}
    config = json.loads(subprocess.check_output(["skopeo", "inspect", "--config", source]))
    assert {diff_id[7:] for diff_id in config["rootfs"]["diff_ids"]} <= layers


def test_podman_loads_the_docker_archive(tiny_archive: Callable[..., Path]) -> None:
    need_root()
    need_tool("podman")
    # podman refuses a run folder of more than 50 characters, which tmp_path is.
    with tempfile.TemporaryDirectory(prefix="lk-") as folder:
        podman = ["podman", "--root", f"{folder}/r", "--runroot", f"{folder}/rr", "--storage-driver", "vfs"]
        out = subprocess.run(
            [*podman, "load", "-q", "-i", str(tiny_archive("docker-archive"))],
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert "layerkit.example/tiny:latest" in out.stdout


def _members(archive: Path) -> tuple[dict[str, Any], list[list[tarfile.TarInfo]]]:
    """Return the config of an OCI archive and the members of its layers."""
    with tarfile.open(archive) as outer:

        def blob(digest: str) -> Any:
            return outer.extractfile("blobs/sha256/" + digest.removeprefix("sha256:"))

        index = json.load(outer.extractfile("index.json"))  # type: ignore[arg-type]
        manifest = json.load(blob(index["manifests"][0]["digest"]))
        layers = []
        for layer in manifest["layers"]:
            with tarfile.open(fileobj=blob(layer["digest"]), mode="r:*") as tar:
                layers.append(tar.getmembers())
        return json.load(blob(manifest["config"]["digest"])), layers


def test_app_is_a_real_image(app_image: Path) -> None:
    config, layers = _members(app_image)
    assert len(layers) >= 5
    assert len(config["rootfs"]["diff_ids"]) == len(layers)
    everything = [member for layer in layers for member in layer]
    assert len(everything) > 10_000
    assert sum(member.size for member in everything) > 100 << 20
    assert any(member.islnk() for member in everything)
    assert any(member.mode & stat.S_ISUID for member in everything)
    keys = {key for member in everything for key in member.pax_headers}
    assert "SCHILY.xattr.security.capability" in keys
    assert "SCHILY.xattr.system.posix_acl_access" in keys
    assert "SCHILY.xattr.system.posix_acl_default" in keys
    # The layers after the application's hold its files once more, under other owners and modes.
    files = [{m.name for m in layer if m.isreg()} for layer in layers]
    owners = [{m.uid for m in layer if m.name.startswith("opt/app/")} for layer in layers]
    chowned = [row for row, uids in enumerate(owners) if 1000 in uids]
    assert chowned
    assert len(files[chowned[0]] & set().union(*files[: chowned[0]])) > 1000
