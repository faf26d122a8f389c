"""``flatten`` as people use it, judged by umoci, skopeo and podman."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from judge import differences, snapshot, umoci
from made_images import Layout
from needs import need_root, need_tool
from programs import Cli
from tar_blocks import END, folder, hardlink, member

import layerkit

ROOT_FOLDER = frozenset([b"."])


def config_of(layout: Path) -> dict[str, Any]:
    def blob(digest: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((layout / "blobs" / digest.replace(":", "/")).read_text())
        return found

    return blob(blob(json.loads((layout / "index.json").read_text())["manifests"][0]["digest"])["config"]["digest"])


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_umoci_sees_the_same_tree(cli: Cli, tiny_image: Path, tmp_path: Path, compression: str) -> None:
    need_root()
    need_tool("umoci", "skopeo", "zstd")
    out = tmp_path / "out"
    report = cli.json("flatten", tiny_image, f"oci:{out}:flat", "--compression", compression)
    assert report["schema"] == "layerkit.flatten.v1"
    assert report["layers_after"] == 1 < report["layers_before"]
    assert report["whiteouts"] == 0
    image = f"{out}:flat"
    if compression == "zstd":  # umoci does not read it: the tar must be the one of the others
        blobs = Path("blobs/sha256")
        packed = out / blobs / report["layer"].partition(":")[2]
        plain = cli.json("flatten", tiny_image, f"oci:{tmp_path / 'p'}:flat", "--compression", "none")
        want_tar = (tmp_path / "p" / blobs / plain["layer"].partition(":")[2]).read_bytes()
        assert subprocess.run(["zstd", "-dc", packed], check=True, capture_output=True).stdout == want_tar
        image = f"{tmp_path / 'p'}:flat"
    want, got = snapshot(umoci(f"{tiny_image}:latest", tmp_path / "a")), snapshot(umoci(image, tmp_path / "b"))
    assert len(want) > 20
    assert differences(got, want) == []
    before, after = config_of(tiny_image), config_of(out)
    assert after["config"] == before["config"]
    assert sum(not s.get("empty_layer") for s in after.get("history", [{}])) == 1
    seen = json.loads(subprocess.run(
        ["skopeo", "inspect", f"oci:{out}:flat"], check=True, capture_output=True, text=True
    ).stdout)  # fmt: skip
    assert seen["Layers"] == [report["layer"]]
    subprocess.run(["skopeo", "copy", "--quiet", f"oci:{out}:flat", f"dir:{tmp_path / 'd'}"], check=True)
    assert cli.json("inspect", out)["tree_digest"] == report["tree_digest"]


def test_layers_of_the_base_stay_and_whiteouts_hold_against_them(
    cli: Cli, tiny_image: Path, tmp_path: Path
) -> None:
    need_root()
    need_tool("umoci")
    want = snapshot(umoci(f"{tiny_image}:latest", tmp_path / "in"))
    before = cli.json("inspect", tiny_image)
    count = len(before["layers"])
    whiteouts = 0
    for keep in range(1, count):
        out = tmp_path / f"out{keep}"
        report = cli.json("flatten", tiny_image, f"oci:{out}:t", "--keep-base", keep)
        after = cli.json("inspect", out)
        assert [r["digest"] for r in after["layers"]][:keep] == [r["digest"] for r in before["layers"]][:keep]
        assert len(after["layers"]) == keep + 1
        assert after["tree_digest"] == before["tree_digest"]
        assert differences(snapshot(umoci(f"{out}:t", tmp_path / f"tree{keep}")), want) == []
        whiteouts += report["whiteouts"]
    assert whiteouts > 0
    middle = cli.json("flatten", tiny_image, tmp_path / "m.tar", "--from", 2, "--to", 3)
    assert middle["merged"] == [2, 3]
    assert middle["layers_after"] == count - 1
    base = tmp_path / "base"
    cli("flatten", tiny_image, f"oci:{base}:b", "--to", 2)
    cli("flatten", f"oci:{base}:b", f"oci:{base}:same", "--keep-base", f"oci:{base}:b", code=2)
    assert "only 0 of its" in cli("flatten", tiny_image, tmp_path / "n.tar", "--keep-base", base, code=2).stderr
    assert not (tmp_path / "n.tar").exists()


@pytest.mark.parametrize("stored", [False, True])
def test_a_file_of_the_base_that_gets_another_name_brings_its_data(stored: bool, tmp_path: Path) -> None:
    need_root()
    need_tool("umoci")
    layout = Layout()
    layers = (
        folder(b".") + member(b"a", b"one" * 500) + member(b"b", b"two") + END,
        folder(b".") + member(b"c", b"three") + END,
        folder(b".") + hardlink(b"again", b"a") + member(b"d", b"four") + END,
    )
    layout.list(layout.image(*layers), "x")
    source = f"oci:{layout.folder(tmp_path / 'in')}:x"
    settings = layerkit.Settings(store=tmp_path / "store")
    if stored:
        with layerkit.open_image(source, settings=settings) as image:
            image.remap(None)
    layerkit.flatten(source, f"oci:{tmp_path / 'out'}:x", keep_base=1, settings=settings)
    want = snapshot(umoci(f"{tmp_path / 'in'}:x", tmp_path / "tree"))
    assert want[b"./again"].links == (b"./a", b"./again")
    assert differences(snapshot(umoci(f"{tmp_path / 'out'}:x", tmp_path / "flat")), want) == []


def test_the_same_input_gives_the_same_bytes(cli: Cli, tiny_image: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        cli("flatten", tiny_image, f"oci-archive:{tmp_path / name}:t")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    cli("flatten", tiny_image, f"oci:{tmp_path / 'c'}:t", env={"SOURCE_DATE_EPOCH": "86400"})
    assert config_of(tmp_path / "c")["created"] == "1970-01-02T00:00:00Z"
    cli("flatten", tiny_image, f"oci:{tmp_path / 'd'}:t", "--created", "yesterday", code=2)
    cli("flatten", tiny_image, f"oci:{tmp_path / 'd'}:t", "--compression", "xz", code=2)
    cli("flatten", tiny_image, f"oci:{tmp_path / 'd'}:t", "--from", "99", code=2)
    assert not (tmp_path / "d").exists()


def test_podman_loads_a_flattened_docker_archive(
    cli: Cli, tiny_archive: Callable[..., Path], tmp_path: Path
) -> None:
    need_root()
    need_tool("podman")
    out = tmp_path / "flat.tar"
    cli("flatten", tiny_archive("docker-archive", devices=False), f"docker-archive:{out}:example.com/flat:1")
    # podman allows 50 characters for it, and pytest's folders are longer.
    run = Path(tempfile.mkdtemp(prefix="lk-", dir="/tmp"))
    podman: list[str | Path] = ["podman", "--root", tmp_path / "root", "--runroot", run, "--storage-driver", "vfs"]
    loaded = subprocess.run([*podman, "load", "-i", out], capture_output=True, text=True, check=False)
    try:
        assert loaded.returncode == 0, loaded.stderr
        assert "example.com/flat:1" in loaded.stdout
    finally:
        subprocess.run([*podman, "system", "reset", "--force"], check=False, capture_output=True)
        shutil.rmtree(run, ignore_errors=True)


def test_a_full_disk_or_a_damaged_layer_leaves_nothing(
    cli: Cli, tiny_archive: Callable[..., Path], tmp_path: Path
) -> None:
    need_root()
    need_tool("mkfs.ext4")
    disk, small, temporary = tmp_path / "disk", tmp_path / "small", tmp_path / "temporary"
    with disk.open("wb") as f:
        f.truncate(1 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", disk], check=True)
    for each in (small, temporary):
        each.mkdir()
    image = tmp_path / "big"
    make_big(image)
    subprocess.run(["mount", "-o", "loop", disk, small], check=True)
    try:
        for where in ("oci:{}/new:t", "oci-archive:{}/new.tar", "docker-archive:{}/new.tar:n"):
            done = cli("flatten", image, where.format(small), code=1, env={"TMPDIR": str(temporary)})
            assert "No space left" in done.stderr
            assert os.listdir(small) == ["lost+found"]
        for words in (("copy",), ("remap", "--form=portable", "--uid-map=0:1000:1000")):
            target = f"oci:{small}/new:t"
            done = cli(words[0], image, target, *words[1:], code=1, env={"TMPDIR": str(temporary)})
            assert "No space left" in done.stderr
            assert os.listdir(small) == ["lost+found"]
        done = cli("flatten", image, tmp_path / "new.tar", code=1, env={"TMPDIR": str(small)})
        assert "No space left" in done.stderr
        assert os.listdir(small) == ["lost+found"]
    finally:
        subprocess.run(["umount", small], check=True)
    assert os.listdir(temporary) == []
    data = bytearray(tiny_archive("oci-archive", "none").read_bytes())
    data[data.index(b"#!/bin/sh")] ^= 1
    (tmp_path / "bad.tar").write_bytes(data)
    cli("flatten", tmp_path / "bad.tar", tmp_path / "new.tar", code=3)
    assert not (tmp_path / "new.tar").exists()


def make_big(folder: Path) -> None:
    """Write an image with 3 MB that do not compress."""
    from made_images import Layout, tar

    layout = Layout()
    layout.list(layout.image(tar(("a", os.urandom(2 << 20))), tar(("b", os.urandom(1 << 20)))), "t")
    layout.folder(folder)


def test_a_result_with_another_tree_is_never_written(
    tiny_image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import layerkit
    from layerkit.model.entry import Kind
    from layerkit.model.trees.diff import LayerDiff, diff
    from layerkit.usecases import flatten as flattening

    def forgetful(*words: Any, **more: Any) -> LayerDiff:
        made = diff(*words, **more)
        made.index.kind[made.index.kind == Kind.WHITEOUT] = Kind.FIFO
        return made

    monkeypatch.setattr(flattening, "diff", forgetful)
    with pytest.raises(layerkit.LayerkitError, match="nothing was written"):
        layerkit.flatten(str(tiny_image), f"oci:{tmp_path / 'out'}:t", keep_base="1")
    assert not (tmp_path / "out").exists()


def test_progress_can_stop_the_work(tiny_image: Path, tmp_path: Path) -> None:
    import layerkit
    from layerkit.model.errors import Cancelled

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("writing"):
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        layerkit.flatten(str(tiny_image), f"oci:{tmp_path / 'out'}:t", progress=stop)
    mapping = layerkit.mapping(["0:100000:65536"])
    assert mapping is not None
    with pytest.raises(Cancelled):
        layerkit.remap(str(tiny_image), f"oci:{tmp_path / 'out'}:t", mapping, progress=stop)
    assert not (tmp_path / "out").exists()
