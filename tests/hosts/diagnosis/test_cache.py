"""``layerkit cache``: what the kernel holds of mounts that share data, and of copies that do not."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import browser
import pytest
from needs import need_root, need_tool
from page_cache import drop, locked_in, resident_bytes
from programs import Cli

import layerkit
from layerkit.cli import render
from layerkit.hosts.adopted import mount as adopt
from layerkit.hosts.adopted.sources import find_unpacked
from layerkit.hosts.diagnosis.cache import CachedFile, CacheReport, MountCache, cache_report
from layerkit.hosts.mounts import mount as mounter
from layerkit.store.local import LocalStore

SIZE = 3 << 20


def asked(store: Path, *words: object) -> dict[str, Any]:
    found: dict[str, Any] = Cli(store).json("cache", *words)
    return found


@contextmanager
def three(store: Path, tmp_path: Path, big: Path) -> Iterator[list[Path]]:
    """Mount layers that hold the file ``big`` three times, each under another map."""
    targets = [tmp_path / name for name in ("one", "two", "three")]
    try:
        with LocalStore.open(store) as held:
            for i, target in enumerate(targets, 1):
                target.mkdir()
                mapping = layerkit.mapping([f"0:{100000 * i}:65536"])
                adopt.mount_unpacked(find_unpacked(f"folders:{big.parent}"), target, mapping, held)
        yield targets
    finally:
        for target in targets:
            if os.path.ismount(target):
                mounter.umount(target, run=mounter.default_run(store), lazy=True)


@pytest.fixture
def big(tmp_path: Path) -> Path:
    path = tmp_path / "layer/big"
    path.parent.mkdir()
    path.write_bytes(os.urandom(SIZE))
    (path.parent / "small").write_bytes(b"x" * 5000)
    return path


@pytest.mark.usefixtures("caches_stay")
def test_one_memory_for_three_mounts(store_dir: Path, tmp_path: Path, big: Path) -> None:
    need_root()
    with three(store_dir, tmp_path, big) as targets:
        drop(*big.parent.iterdir())
        cold = asked(store_dir, *targets)
        assert (cold["seen"], cold["memory"]) == (0, 0)
        # Read through one mount, it is in memory for all.
        with locked_in(targets[1] / "big"):
            found = asked(store_dir, *targets)
        assert [m["resident"] for m in found["mounts"]] == [SIZE] * 3
        assert [m["shared"] for m in found["mounts"]] == [SIZE] * 3
        assert (found["seen"], found["memory"], found["saved"]) == (3 * SIZE, SIZE, 2 * SIZE)
        assert found["by_sharers"] == [[3, SIZE]]
        assert (found["top"][0]["path"], found["top"][0]["mounts"]) == ("big", 3)
        # Looking brought nothing in.
        assert resident_bytes(big.parent / "small")[0] == 0


@pytest.mark.usefixtures("caches_stay")
def test_copies_share_nothing(store_dir: Path, tmp_path: Path, big: Path) -> None:
    need_root()
    copy = tmp_path / "copy"
    shutil.copytree(big.parent, copy)
    for path in (big, copy / "big"):
        path.read_bytes()
    found = asked(store_dir, big.parent, copy)
    assert found["saved"] == 0
    assert [m["shared"] for m in found["mounts"]] == [0, 0]
    assert found["memory"] >= 2 * SIZE


@pytest.mark.usefixtures("caches_stay")
def test_the_overlays_of_others_are_looked_through(store_dir: Path, tmp_path: Path, big: Path) -> None:
    need_root()
    (tmp_path / "empty").mkdir()
    targets = []
    try:
        for name in ("a", "b"):
            target, upper, work = (tmp_path / f"{name}{kind}" for kind in ("", "-up", "-work"))
            for folder in (target, upper, work):
                folder.mkdir()
            options = f"lowerdir={tmp_path / 'empty'}:{big.parent},upperdir={upper},workdir={work}"
            subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, target], check=True)
            targets.append(target)
        (targets[1] / "small").write_bytes(b"y" * 5000)
        (targets[0] / "big").read_bytes()
        found = asked(store_dir, *targets)
        assert found["saved"] == SIZE
        assert found["mounts"][1]["resident"] - found["mounts"][1]["shared"] == 5000
    finally:
        for target in targets:
            subprocess.run(["umount", target], check=True)


@pytest.mark.parametrize("data", ["tar", "objects"])
@pytest.mark.usefixtures("caches_stay")
def test_mounts_of_images(tiny_image: Path, store_dir: Path, tmp_path: Path, data: str) -> None:
    need_root()
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    settings = layerkit.Settings(store=store_dir, data=data)
    with layerkit.open_image(str(tiny_image), settings=settings) as image:
        with (
            image.mount(tmp_path / "one", layerkit.mapping(["0:100000:65536"]), upper=tmp_path / "up"),
            image.mount(tmp_path / "two", layerkit.mapping(["0:200000:65536"])),
        ):
            nodes = [n for n in image.tree().nodes() if n.size and n.sha256]
            for node in nodes:
                (tmp_path / "one" / os.fsdecode(node.path)).read_bytes()
            report = cache_report([tmp_path / "one", tmp_path / "two"], store_dir)
            assert report.mounts[0].resident == report.mounts[1].resident > 0
            assert report.mounts[0].shared == report.mounts[0].resident
            changed = nodes[0]
            with (tmp_path / "one" / os.fsdecode(changed.path)).open("ab") as file:
                file.write(b"more")
            report = cache_report([tmp_path / "one", tmp_path / "two"], store_dir)
            assert report.mounts[0].resident - report.mounts[0].shared >= changed.size


def test_what_cannot_be_looked_at(store_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(layerkit.model.errors.NotFound):
        cache_report([tmp_path / "absent"], store_dir)
    (tmp_path / "file").touch()
    with pytest.raises(layerkit.model.errors.UsageError, match="not a folder"):
        cache_report([tmp_path / "file"], store_dir)
    with pytest.raises(layerkit.model.errors.UsageError, match="twice"):
        cache_report([tmp_path, tmp_path / "."], store_dir)


def test_the_page_in_a_browser(tmp_path: Path) -> None:
    need_tool("chromium")
    hostile = "</script><img src=x onerror=alert(1)>"
    report = CacheReport(
        mounts=tuple(MountCache(f"/srv/{i}", hostile, "uid=0:1:2", 3, 100_000, 60_000, 60_000) for i in range(5)),
        seen=300_000, memory=60_000, by_sharers=((5, 60_000),),
        top=(CachedFile(hostile, "sha256:1", 100_000, 60_000, 5),), warnings=(hostile,),
    )  # fmt: skip
    text = render.page("cache.html", report.to_dict())
    assert text.isascii()
    assert text.count("</script>") == 2
    assert "<img" not in text
    page = tmp_path / "page.html"
    page.write_text(text)
    dom = browser.dom(page, tmp_path / "profile")
    assert "5 mounts against one copy: 300 kB seen, 60.0 kB of memory" in dom
    assert dom.count('class="shared"') >= 6
    assert 'aria-label="as copies: as copies 300 kB"' in dom
    assert "<td>5.00</td>" in dom or "<b>5.00</b>" in dom
    assert "<img" not in dom
