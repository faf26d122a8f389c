"""``layerkit which``: from a path in a real mount to the bytes and who shares them, and back."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from needs import need_root

import layerkit
from layerkit.cli import main as cli
from layerkit.hosts.adopted import mount as adopt
from layerkit.hosts.adopted.sources import find_unpacked
from layerkit.hosts.mounts import mount as mounter
from layerkit.store.local import LocalStore

MAPS = (["0:100000:65536"], ["0:200000:65536"])


def answer(capsys: pytest.CaptureFixture[str], store: Path, what: object) -> dict[str, Any]:
    cli.app()(["which", str(what), "--store", str(store), "--json"], standalone_mode=False)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found.pop("schema") == "layerkit.which.v1"
    return found


@pytest.mark.parametrize(("data", "rendering"), [("tar", "auto"), ("objects", "auto"), ("tar", "fuse")])
def test_there_and_back(
    tiny_image: Path,
    store_dir: Path,
    tmp_path: Path,
    data: str,
    rendering: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    need_root()
    settings = layerkit.Settings(store=store_dir, data=data)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    with layerkit.open_image(str(tiny_image), settings=settings) as image:
        with (
            image.mount(one, layerkit.mapping(MAPS[0]), upper=tmp_path / "up", rendering=rendering),
            image.mount(two, layerkit.mapping(MAPS[1]), rendering=rendering),
        ):
            tree = image.tree()
            nodes = [n for n in tree.nodes() if n.size and n.sha256 and n.nlink == 1 and tree.sparse[n.inode] < 0]
            node = max(nodes, key=lambda n: n.size)
            path = one / os.fsdecode(node.path)
            found = answer(capsys, store_dir, path)
            assert (found["kind"], found["size"], found["sha256"]) == (
                "path", node.size, f"sha256:{node.sha256.hex()}",
            )  # fmt: skip
            assert found["sharers"] == [
                {"target": str(two), "image": image.name, "map": "uid=0:200000:65536;gid=0:200000:65536"}
            ]
            place = found["place"]
            indexes = image.indexes()
            assert place["diff_id"] == str(indexes[place["layer"] - 1].diff_id)
            assert node.path in indexes[place["layer"] - 1].path.tolist()
            where, _, offset = found["data"].partition(" at ")
            with open(where, "rb") as file:
                file.seek(int(offset or 0))
                stored = file.read(node.size)
            assert hashlib.sha256(stored).digest() == node.sha256

            for name in (found["sha256"], found["sha256"][7:23], found["name"], found["name"][1:]):
                back = answer(capsys, store_dir, name)
                assert (back["kind"], back["sha256"], back["data"]) == ("content", found["sha256"], found["data"])
                assert any(p["path"] == place["path"] and p["visible"] for p in back["places"])
                assert {s["target"] for s in back["sharers"]} == {str(one), str(two)}
            assert answer(capsys, store_dir, place["diff_id"])["kind"] == "layer"
            assert answer(capsys, store_dir, place["blob"])["places"][0]["layer"] == place["layer"]
            assert answer(capsys, store_dir, place["manifest"])["kind"] == "image"

            os.chown(path, 7, 7)
            assert answer(capsys, store_dir, path)["upper"] == "metadata"
            path.write_text("other")
            changed = answer(capsys, store_dir, path)
            assert (changed["upper"], changed["sharers"], changed["sha256"]) == ("data", [], "")
            (one / "made").touch()
            assert answer(capsys, store_dir, one / "made")["upper"] == "made"
            assert answer(capsys, store_dir, one)["file"] == "folder"


def test_what_an_upper_layer_hides_is_said_so(
    tiny_image: Path, store_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need_root()
    with layerkit.open_image(str(tiny_image), settings=layerkit.Settings(store=store_dir)) as image:
        image.remap(layerkit.mapping(MAPS[0]))
        shown = {node.sha256 for node in image.tree().nodes()}
        hidden = next(
            e for index in image.indexes() for e in index.entries() if e.size and e.sha256 and e.sha256 not in shown
        )
    found = answer(capsys, store_dir, f"sha256:{hidden.sha256.hex()}")
    assert [place["visible"] for place in found["places"]] == [False] * len(found["places"])


def test_a_path_over_adopted_layers(store_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need_root()
    for name in ("bottom/d/f", "top/d/g"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    try:
        with LocalStore.open(store_dir) as store:
            for target, folders in (("one", ("top", "bottom")), ("two", ("bottom",))):
                ref = "folders:" + ":".join(str(tmp_path / name) for name in folders)
                adopt.mount_unpacked(find_unpacked(ref), tmp_path / target, layerkit.mapping(MAPS[0]), store)
        found = answer(capsys, store_dir, tmp_path / "one/d/f")
        assert (found["data"], found["place"]["layer"]) == (str(tmp_path / "bottom/d/f"), 1)
        assert found["sha256"] == f"sha256:{hashlib.sha256(b'bottom/d/f').hexdigest()}"
        assert [sharer["target"] for sharer in found["sharers"]] == [str(tmp_path / "two")]
        assert answer(capsys, store_dir, tmp_path / "one/d/g")["sharers"] == []
    finally:
        for target in ("one", "two"):
            mounter.umount(tmp_path / target, run=mounter.default_run(store_dir), lazy=True)


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("/no/such/path", layerkit.model.errors.UsageError),
        ("/etc", layerkit.model.errors.UsageError),
        ("sha256:" + "0" * 64, layerkit.model.errors.NotFound),
        ("00000000", layerkit.model.errors.NotFound),
        ("abc", layerkit.model.errors.UsageError),
    ],
)
def test_what_cannot_be_answered(store_dir: Path, what: str, error: type[Exception]) -> None:
    with LocalStore.open(store_dir):
        pass
    with pytest.raises(error):
        cli.app()(["which", what, "--store", str(store_dir)], standalone_mode=False)


def test_text_for_people(
    tiny_image: Path, store_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need_root()
    (tmp_path / "m").mkdir()
    with layerkit.open_image(str(tiny_image), settings=layerkit.Settings(store=store_dir)) as image:
        with image.mount(tmp_path / "m", layerkit.mapping(MAPS[0])):
            node = next(n for n in image.tree().nodes() if n.size and n.sha256)
            path = str(tmp_path / "m" / os.fsdecode(node.path))
            cli.app()(["which", path, "--store", str(store_dir)], standalone_mode=False)
            out = capsys.readouterr().out
    for word in ("layer", "from the bottom", "bytes at", "shared with", node.sha256.hex()):
        assert word in out
