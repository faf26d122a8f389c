"""The kernel as judge: what a mount of ours shows equals umoci's tree through a kernel idmapped mount."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from judge import Shown, data_extents, differences, snapshot, unpacked
from memcg import cache_bytes, memory_group, run_in
from needs import missing, need_root, need_tool
from page_cache import cached_bytes, drop, resident_bytes

import layerkit
from layerkit.model.entry import Kind

MAP = ["0:100000:65536"]
EXTENTS = ((0, 100000, 65536),)
WAYS = [
    pytest.param("tar", "erofs", False, id="tar-erofs-idmapped"),
    pytest.param("tar", "erofs", True, id="tar-erofs-own"),
    pytest.param("objects", "erofs", False, id="objects-erofs-idmapped"),
    pytest.param("objects", "directory", True, id="objects-directory-own"),
    pytest.param("tar", "directory", True, id="tar-directory-own"),
    pytest.param("objects", "directory", False, id="objects-directory-idmapped"),
    pytest.param("tar", "fuse", False, id="tar-fuse"),
    pytest.param("objects", "fuse", False, id="objects-fuse"),
]
# umoci makes what an image leaves out with the time of the run.
UNTOLD = frozenset({b"."})


@pytest.fixture(scope="module")
def judged_tiny(tiny_image: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bytes, Shown]:
    need_root()
    need_tool("umoci")
    with unpacked(f"{tiny_image}:latest", tmp_path_factory.mktemp("judge"), EXTENTS) as shown:
        return snapshot(shown)


@pytest.fixture(scope="module")
def judged_app(app_layout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bytes, Shown]:
    need_root()
    need_tool("umoci")
    with unpacked(f"{app_layout}:latest", tmp_path_factory.mktemp("judge"), EXTENTS) as shown:
        return snapshot(shown)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for the module, so that the second way of mounting finds what the first one brought."""
    return tmp_path_factory.mktemp("judge-store") / "store"


def mounted(image: Path, store: Path, target: Path, data: str, rendering: str, own: bool) -> layerkit.Mounted:
    target.mkdir(exist_ok=True)
    settings = layerkit.Settings(store=store, data=data)
    with layerkit.open_image(str(image), settings=settings) as opened:
        return opened.mount(target, layerkit.mapping(MAP), rendering=rendering, own_meta=own)


@pytest.mark.parametrize("name", ["tiny", "app"])
@pytest.mark.parametrize(("data", "rendering", "own"), WAYS)
def test_an_image_as_umoci_and_the_kernel_show_it(
    name: str, data: str, rendering: str, own: bool, request: pytest.FixtureRequest, store: Path, tmp_path: Path
) -> None:
    image = request.getfixturevalue("tiny_image" if name == "tiny" else "app_layout")
    want = request.getfixturevalue(f"judged_{name}")
    with mounted(image, store, tmp_path / "m", data, rendering, own):
        assert differences(snapshot(tmp_path / "m"), want, skip=UNTOLD) == []


@pytest.mark.parametrize(("data", "rendering", "own"), WAYS)
def test_holes_stay_holes(
    tiny_image: Path, store: Path, tmp_path: Path, data: str, rendering: str, own: bool
) -> None:
    need_root()
    with layerkit.open_image(str(tiny_image)) as opened:
        want = {
            entry.path: entry for index in opened.indexes() for entry in index.entries() if entry.sparse is not None
        }
    assert want
    with mounted(tiny_image, store, tmp_path / "m", data, rendering, own):
        for path, entry in want.items():
            assert entry.kind is Kind.REG and entry.sparse is not None
            runs = data_extents(tmp_path / "m" / os.fsdecode(path))
            # A filesystem rounds to its blocks, so runs may be wider by less than one at each end.
            stored = sum(end - start for start, end in runs)
            exact = sum(length for _, length in entry.sparse)
            assert exact <= stored <= exact + 2 * 4096 * len(entry.sparse)
            assert stored < entry.size


@pytest.mark.parametrize("data", ["tar", "objects"])
@pytest.mark.parametrize("own", [False, True], ids=["idmapped", "own"])
@pytest.mark.usefixtures("caches_stay")
def test_second_map_reads_the_cache_of_the_first(
    app_layout: Path, store: Path, tmp_path: Path, data: str, own: bool
) -> None:
    settings = layerkit.Settings(store=store, data=data)
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir()
    second.mkdir()
    with layerkit.open_image(str(app_layout), settings=settings) as opened:
        with (
            opened.mount(first, layerkit.mapping(["0:200000:65536"]), own_meta=own),
            opened.mount(second, layerkit.mapping(["0:300000:65536"]), own_meta=own),
        ):
            program = next(p for p in (first / "usr/bin").glob("python3.*") if not p.is_symlink())
            there = second / program.relative_to(first)
            drop(there)
            assert resident_bytes(there)[0] == 0
            program.read_bytes()
            resident, size = resident_bytes(there)
            assert size > 1 << 20
            assert resident >= size
            assert first.lstat().st_uid == 200000
            assert second.lstat().st_uid == 300000


@pytest.mark.parametrize("data", ["tar", "objects"])
@pytest.mark.usefixtures("caches_stay")
def test_ten_maps_cache_the_bytes_once(app_layout: Path, store: Path, tmp_path: Path, data: str) -> None:
    settings = layerkit.Settings(store=store, data=data)
    made: list[layerkit.Mounted] = []
    with layerkit.open_image(str(app_layout), settings=settings) as opened:
        try:
            for i in range(10):
                (tmp_path / str(i)).mkdir()
                made.append(opened.mount(tmp_path / str(i), layerkit.mapping([f"0:{100000 * (i + 1)}:65536"])))
            files = [p for p in (made[0].target / "usr").rglob("*") if p.is_file() and not p.is_symlink()]
            read = sum(p.lstat().st_size for p in files)
            drop(*files, *(store / "tar").iterdir())
            with memory_group(data) as group:
                if group is None:
                    missing("needs a memory cgroup")
                run_in(group, reader(made[0].target / "usr"))
                once = cache_bytes(group)
                for mount in made[1:]:
                    run_in(group, reader(mount.target / "usr"))
                ten_times = cache_bytes(group)
            backing = sum(cached_bytes(path) for path in (store / "tar").iterdir())
        finally:
            for mount in made:
                mount.umount()
    assert read > 50 << 20
    # Pages are whole, and folders and inodes of META take some too.
    assert read <= once < 1.25 * read
    assert ten_times < 1.3 * read
    assert backing < read / 20


def reader(folder: Path) -> list[str]:
    """Return a command that reads every file below ``folder``."""
    return ["find", str(folder), "-type", "f", "-exec", "cat", "--", "{}", "+"]


def test_programs_run_from_twenty_mounts_at_once(app_layout: Path, store: Path, tmp_path: Path) -> None:
    settings = layerkit.Settings(store=store)
    made: list[layerkit.Mounted] = []
    with layerkit.open_image(str(app_layout), settings=settings) as opened:
        try:
            for i in range(20):
                (tmp_path / str(i)).mkdir()
                made.append(opened.mount(tmp_path / str(i), layerkit.mapping([f"0:{100000 * (i + 1)}:65536"])))
            # ctypes maps libffi, a shared library, from the mount.
            code = "import ctypes, json, os; print(json.dumps([os.stat('/etc/passwd').st_uid]))"
            running = [
                subprocess.Popen(
                    ["chroot", str(m.target), "/usr/bin/python3", "-c", code],
                    stdout=subprocess.PIPE,
                )
                for m in made
            ]
            for i, process in enumerate(running):
                out, _ = process.communicate(timeout=300)
                assert process.returncode == 0
                assert out.strip() == b"[%d]" % (100000 * (i + 1))
        finally:
            for mount in made:
                mount.umount()


def test_disk_per_map(app_layout: Path, tmp_path: Path) -> None:
    need_root()
    settings = layerkit.Settings(store=tmp_path / "store")
    with layerkit.open_image(str(app_layout), settings=settings) as opened:
        idmapped = opened.remap(layerkit.mapping(["0:100000:65536"]))
        own = opened.remap(layerkit.mapping(["0:200000:65536"]), own_meta=True)
    assert idmapped.meta_bytes == 0
    assert 0 < own.meta_bytes <= 230 * own.entries
    assert own.layers_read == 0


def test_two_stores_make_the_same_bytes(app_layout: Path, tmp_path: Path) -> None:
    need_root()
    images = []
    for name in ("a", "b"):
        settings = layerkit.Settings(store=tmp_path / name)
        with layerkit.open_image(str(app_layout), settings=settings) as opened:
            opened.remap(layerkit.mapping(MAP), own_meta=True)
        images.append(
            {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).glob("meta/*/meta.erofs")}
        )
    assert len(images[0]) == 2
    assert images[0] == images[1]
