"""Real tools write images that every source reads alike, and accept what the sinks write."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from needs import need_root, need_tool

from layerkit.formats.oci import documents as oci
from layerkit.formats.oci import remap_artifact as artifact
from layerkit.images import transfer
from layerkit.images.open import open_sink, open_source
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest

Tool = Callable[..., str]


def run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def skopeo(*command: object) -> str:
    return run("skopeo", "--insecure-policy", *command)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Tool, Tool]]:
    """An image of two layers, built by buildah; returns a folder with its copies, buildah and podman."""
    need_root()
    need_tool("buildah", "skopeo", "podman", "umoci")
    path = tmp_path_factory.mktemp("tools")
    # podman refuses a run folder of more than 50 characters, which one below pytest's folder is.
    runroot = tempfile.mkdtemp(prefix="lk-")
    stores = ("--storage-driver", "vfs", "--root", path / "root", "--runroot", runroot)

    def buildah(*command: object) -> str:
        return run("buildah", *stores, *command)

    def podman(*command: object) -> str:
        return run("podman", *stores, *command)

    parent = "scratch"
    for name in ("base", "app"):
        (path / name / name).mkdir(parents=True)
        (path / name / name / "data").write_bytes(name.encode() * 20_000)
        container = buildah("from", parent).strip()
        buildah("add", container, path / name, "/")
        buildah("config", "--cmd", "/x", "--label", "Key=1", "--label", "key=2", container)
        buildah("commit", "--disable-compression=false", container, f"tool/{name}:v1")
        buildah("rm", container)
        parent = f"tool/{name}:v1"
    for form in ("oci", "oci-archive", "docker-archive"):
        buildah(
            "push", "tool/app:v1", f"{form}:{path}/{form}" + (":tool/app:v1" if form == "docker-archive" else ":v1")
        )
    yield path, buildah, podman
    for image in ("tool/app:v1", "tool/base:v1"):
        subprocess.run(["buildah", *stores, "rmi", "-f", image], capture_output=True)
    shutil.rmtree(runroot, ignore_errors=True)


def _read(text: str) -> tuple[list[str], dict[str, Any]]:
    source = open_source(text)
    try:
        image = source.image()
        for layer in image.layers:
            data = b"".join(map(bytes, transfer.blob_chunks(source, layer.descriptor)))
            assert Digest.of(data) == layer.descriptor.digest
        return [str(d) for d in image.diff_ids], json.loads(image.config)
    finally:
        source.close()


def test_every_form_gives_the_same_image(made: tuple[Path, Tool, Tool]) -> None:
    path, _, podman = made
    podman("save", "--format", "docker-archive", "-o", path / "podman.tar", "tool/app:v1")
    podman("save", "--format", "oci-archive", "-o", path / "podman-oci.tar", "tool/app:v1")
    podman("save", "-m", "--format", "docker-archive", "-o", path / "both.tar", "tool/app:v1", "tool/base:v1")
    skopeo("copy", f"oci:{path}/oci:v1", f"docker-archive:{path}/skopeo.tar:x:y")
    skopeo("copy", "--format", "v2s2", f"oci:{path}/oci:v1", f"dir:{path}/v2s2")
    run("gzip", "-k", path / "podman.tar")
    run("zstd", "-q", "-k", path / "podman.tar")
    want = _read(f"oci:{path}/oci:v1")
    assert len(want[0]) == 2
    for text in (
        "oci-archive:{}/oci-archive:v1",
        "{}/oci",
        "{}/oci-archive",
        "{}/docker-archive",
        "docker-archive:{}/docker-archive:tool/app:v1",
        "{}/podman.tar",
        "{}/podman.tar.gz",
        "{}/podman.tar.zst",
        "{}/podman-oci.tar",
        "{}/skopeo.tar:x:y",
        "{}/both.tar:localhost/tool/app:v1",
        "{}/both.tar:@0",
    ):
        assert _read(text.format(path)) == want, text
    assert _read(f"{path}/both.tar:localhost/tool/base:v1")[0] == want[0][:1]


def test_legacy_layout_made_from_a_real_one(made: tuple[Path, Tool, Tool]) -> None:
    """What docker wrote before 1.10: the same folders without manifest.json, layers in place of links."""
    path, _, _ = made
    legacy = path / "legacy"
    with tarfile.open(path / "docker-archive") as archive:
        # Debian 12's Python 3.11.2 has no filters yet.
        if hasattr(tarfile, "data_filter"):
            archive.extractall(legacy, filter="data")
        else:
            archive.extractall(legacy)
    (legacy / "manifest.json").unlink()
    for link in legacy.glob("*/layer.tar"):
        data = link.read_bytes()
        link.unlink()
        link.write_bytes(data)
    run("tar", "-C", legacy, "-cf", path / "legacy.tar", ".")
    diff_ids, config = _read(f"{path}/legacy.tar")
    want, full = _read(f"{path}/oci")
    assert diff_ids == want
    assert (config["os"], config["architecture"]) == (full["os"], full["architecture"])


def _copy(source_text: str, target: str, name: str, *, attach: bool = False) -> str:
    source, sink = open_source(source_text), open_sink(target)
    try:
        image = source.image()
        transfer.copy_image(source, sink, image, name)
        if attach:
            meta = Descriptor(artifact.META_EROFS, Digest.of(b"meta"), 4)
            found = artifact.RemapArtifact(
                image.descriptor, (meta,), "u 0:1000:10", "trusted", "erofs", image.diff_ids
            )
            data, entry = found.encode()
            sink.put_blob(meta, [b"meta"])
            sink.put_blob(oci.EMPTY_DESCRIPTOR, [oci.EMPTY_JSON])
            sink.put_manifest(entry, data)
        sink.commit()
        return str(image.descriptor.digest)
    finally:
        sink.abort()
        source.close()


@pytest.mark.parametrize("attach", [False, True], ids=["image", "with-artifact"])
@pytest.mark.parametrize("form", ["oci", "oci-archive"])
@pytest.mark.parametrize("origin", ["oci", "docker-archive"])
def test_skopeo_reads_what_is_written(
    made: tuple[Path, Tool, Tool], origin: str, form: str, attach: bool, tmp_path: Path
) -> None:
    path, _, _ = made
    digest = _copy(f"{path}/{origin}", f"{form}:{tmp_path}/out", "v1", attach=attach)
    seen = json.loads(skopeo("inspect", f"{form}:{tmp_path}/out:v1"))
    assert seen["Digest"] == digest
    assert seen["Labels"]["Key"] == "1"
    skopeo("copy", f"{form}:{tmp_path}/out:v1", f"oci:{tmp_path}/again:v1")
    assert _read(f"{tmp_path}/again") == _read(f"{path}/{origin}")
    if not attach:
        skopeo("inspect", f"{form}:{tmp_path}/out")  # without a tag skopeo wants a single entry
    raw = skopeo("inspect", "--raw", f"{form}:{tmp_path}/out:v1").encode()
    assert str(Digest.of(raw)) == digest


@pytest.mark.parametrize("attach", [False, True], ids=["image", "with-artifact"])
def test_umoci_reads_what_is_written(made: tuple[Path, Tool, Tool], attach: bool, tmp_path: Path) -> None:
    path, _, _ = made
    _copy(f"{path}/oci", f"oci:{tmp_path}/out", "v1", attach=attach)
    assert run("umoci", "list", "--layout", tmp_path / "out").split() == ["v1"]
    run("umoci", "stat", "--image", f"{tmp_path}/out:v1")
    run("umoci", "unpack", "--image", f"{tmp_path}/out:v1", tmp_path / "bundle")
    assert (tmp_path / "bundle/rootfs/app/data").read_bytes() == b"app" * 20_000
    # What umoci writes into our layout must be read again, and it must leave the artifact where it is.
    (tmp_path / "bundle/rootfs/added").write_bytes(b"x")
    run("umoci", "repack", "--image", f"{tmp_path}/out:v2", tmp_path / "bundle")
    assert len(_read(f"oci:{tmp_path}/out:v2")[0]) == 3
    source = open_source(f"oci:{tmp_path}/out:v1")
    digest = source.image().descriptor.digest
    assert len(source.referrers(digest, artifact.ARTIFACT_TYPE)) == int(attach)
    source.close()


@pytest.mark.parametrize("form", ["oci-archive", "docker-archive"])
def test_podman_loads_what_is_written(made: tuple[Path, Tool, Tool], form: str, tmp_path: Path) -> None:
    path, _, podman = made
    name = "localhost/loaded:v1"
    _copy(f"{path}/oci", f"{form}:{tmp_path}/out.tar", name, attach=form == "docker-archive")
    podman("pull", "-q", f"{form}:{tmp_path}/out.tar" + (f":{name}" if form == "docker-archive" else ""))
    if form == "docker-archive":
        podman("load", "-q", "-i", tmp_path / "out.tar")
        assert name in podman("images", "--format", "{{.Repository}}:{{.Tag}}")
        skopeo("copy", f"docker-archive:{tmp_path}/out.tar:{name}", f"oci:{tmp_path}/again:v1")
        assert _read(f"{tmp_path}/again") == _read(f"{path}/oci")
        podman("rmi", "-f", name)


def test_writing_beside_images_of_other_tools(made: tuple[Path, Tool, Tool], tmp_path: Path) -> None:
    path, _, _ = made
    run("umoci", "init", "--layout", tmp_path / "lay")
    run("umoci", "new", "--image", f"{tmp_path}/lay:empty")
    skopeo("copy", f"oci:{path}/oci:v1", f"oci:{tmp_path}/lay:theirs")
    _copy(f"{path}/docker-archive", f"oci:{tmp_path}/lay", "ours")
    _copy(f"{path}/oci", f"oci:{tmp_path}/lay", "theirs")
    assert sorted(run("umoci", "list", "--layout", tmp_path / "lay").split()) == ["empty", "ours", "theirs"]
    assert _read(f"oci:{tmp_path}/lay:empty")[0] == []
    for name in ("ours", "theirs"):
        skopeo("inspect", f"oci:{tmp_path}/lay:{name}")
    run("umoci", "gc", "--layout", tmp_path / "lay")
    assert _read(f"oci:{tmp_path}/lay:ours") == _read(f"{path}/oci")


def test_a_list_of_platforms_from_buildah(made: tuple[Path, Tool, Tool], tmp_path: Path) -> None:
    _, buildah, _ = made
    buildah("manifest", "create", "multi")
    try:
        for arch, variant in (("arm64", "v8"), ("arm", "v6"), ("arm", "v7"), ("s390x", "")):
            container = buildah("from", "scratch").strip()
            buildah("config", "--arch", arch, *(("--variant", variant) if variant else ()), container)
            (tmp_path / "id").write_text(arch + variant)
            buildah("add", container, tmp_path / "id", "/")
            buildah("commit", "--manifest", "multi", container)
            buildah("rm", container)
        for kind in ("oci", "v2s2"):
            target = f"oci:{tmp_path}/multi-{kind}:m"
            buildah("manifest", "push", "--all", "--format", kind, "multi", target)
    finally:
        buildah("manifest", "rm", "multi")
    from layerkit.model.descriptor import Platform

    source = open_source(f"oci:{tmp_path}/multi-oci:m")
    found = {}
    for text in ("linux/arm/v7", "linux/arm64", "linux/arm/v6", "linux/s390x", "linux/arm"):
        image = source.image(Platform.parse(text))
        found[text] = str(image.platform)
        arch, _, variant = text.partition("/")[2].partition("/")
        wanted = ["--override-arch", arch, *(["--override-variant", variant] if variant else [])]
        theirs = run("skopeo", "--insecure-policy", *wanted, "inspect", "--config", f"oci:{tmp_path}/multi-oci:m")
        if text != "linux/arm":  # skopeo then looks at the host's own variant
            assert json.loads(theirs)["rootfs"]["diff_ids"] == [str(d) for d in image.diff_ids]
    assert found["linux/arm"] == "linux/arm/v7"
    source.close()
