"""Random layers through every command that writes an image or a tree, judged by umoci before and after."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
from pathlib import Path

import judge
import pytest
from judge import Shown, differences, snapshot
from made_images import Layout
from needs import need_root, need_tool
from random_tars import Stack

import layerkit

FUZZ = int(os.environ.get("LAYERKIT_TEST_FUZZ", "1"))


def umoci(folder: Path, target: Path) -> dict[bytes, Shown]:
    """What umoci unpacks from the image in the layout ``folder``, its layers' blobs as they are."""
    blobs = folder / "blobs"
    entry = json.loads((folder / "index.json").read_text())["manifests"][0]
    manifest = json.loads((blobs / entry["digest"].replace(":", "/")).read_text())
    again = Layout()
    tars = [gzip.decompress((blobs / b["digest"].replace(":", "/")).read_bytes()) for b in manifest["layers"]]
    again.list(again.image(*tars), "x")
    again.folder(target / "plain")
    return snapshot(judge.umoci(f"{target / 'plain'}:x", target / "bundle"))


def change(root: Path, chance: random.Random) -> None:
    """Change a few things below ``root``, of every kind that people do."""
    paths = [os.path.join(a, name) for a, b, c in os.walk(os.fsencode(root)) for name in b + c]
    for _ in range(chance.randint(0, 5) if paths else 0):
        path = chance.choice(paths)
        if not os.path.lexists(path):
            continue
        is_folder = os.path.isdir(path) and not os.path.islink(path)
        what = chance.choice(("mode", "remove", "rename", "xattr", "time", "replace", "owner", "link", "new"))
        if what == "mode" and not os.path.islink(path):
            os.chmod(path, chance.choice((0o755, 0o4711, 0)))
        elif what in ("remove", "replace"):
            if is_folder:
                shutil.rmtree(path)
            else:
                os.unlink(path)
            if what == "replace" and is_folder:
                Path(os.fsdecode(path)).write_bytes(b"was a folder")
            elif what == "replace":
                os.mkdir(path)
        elif what == "rename":
            moved = os.path.join(os.fsencode(root), b"moved%d" % chance.randint(0, 9))
            if not os.path.lexists(moved):
                os.rename(path, moved)
        elif what == "xattr" and os.path.isfile(path) and not os.path.islink(path):
            os.setxattr(path, "user.new", b"1")
        elif what == "time":
            os.utime(path, ns=(0, chance.randint(0, 2**60)), follow_symlinks=False)
        elif what == "owner":
            os.lchown(path, 77, 5)
        elif what == "link" and not is_folder:
            again = os.path.join(os.fsencode(root), b"link%d" % chance.randint(0, 99))
            if not os.path.lexists(again):
                os.link(path, again, follow_symlinks=False)
        elif what == "new" and is_folder:
            Path(os.fsdecode(path), "new").write_bytes(b"new")


@pytest.mark.parametrize("seed", range(8 * FUZZ))
def test_the_tree_stays_what_umoci_sees(seed: int, tmp_path: Path) -> None:
    need_root()
    need_tool("umoci")
    layers, chance = Stack(seed).layers, random.Random(seed)
    layout = Layout()
    layout.list(layout.image(*layers), "x")
    source = f"oci:{layout.folder(tmp_path / 'in')}:x"
    settings = layerkit.Settings(store=tmp_path / "store")
    want = umoci(tmp_path / "in", tmp_path / "judge")
    places = range(1, len(layers) + 1)
    first = chance.choice(places)
    last = chance.choice(places[first - 1 :])
    (tmp_path / "m").mkdir()

    def to(name: str) -> str:
        return f"oci:{tmp_path / name}:x"

    with layerkit.open_image(source, settings=settings) as image:
        layerkit.optimize(image).apply(to("optimized"))
        layerkit.optimize(image, keep_base=chance.randint(0, len(layers))).apply(to("optimized-above"))
        layerkit.flatten(source, to("flat"), settings=settings)
        layerkit.flatten(source, to("flat-above"), keep_base=chance.randint(0, len(layers) - 1), settings=settings)
        layerkit.flatten(source, to("flat-range"), from_layer=str(first), to_layer=str(last), settings=settings)
        for name in ("optimized", "optimized-above", "flat", "flat-above", "flat-range"):
            assert differences(umoci(tmp_path / name, tmp_path / f"judge-{name}"), want) == [], name
        for rendering in ("erofs", "directory"):
            with image.mount(tmp_path / "m", rendering=rendering):
                assert differences(snapshot(tmp_path / "m"), want) == [], rendering
        image.unpack(tmp_path / "r")
        assert differences(snapshot(tmp_path / "r"), want) == []
        change(tmp_path / "r", chance)
        image.pack(tmp_path / "r", to("packed"))
    changed = snapshot(tmp_path / "r")
    assert differences(umoci(tmp_path / "packed", tmp_path / "judge-packed"), changed) == []
    with layerkit.open_image(to("packed"), settings=settings) as image:
        image.unpack(tmp_path / "r2")
        assert differences(snapshot(tmp_path / "r2"), changed) == []
