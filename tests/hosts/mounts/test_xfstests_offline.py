"""What xfstests (tests/overlay) and fsck.overlay check of layers that were written offline, over what we write.

Each test is named after its number there; what it checks is said in our words. Two things are looked at: an upper
that ``finalize`` wrote to, and a META.
"""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from judge import Shown, differences, snapshot
from kernel_mounts import overlay

import layerkit
from layerkit.hosts.finalize import finalize as fz

pytestmark = pytest.mark.usefixtures("as_root")

OPAQUE, REDIRECT, METACOPY = (f"trusted.overlay.{name}" for name in ("opaque", "redirect", "metacopy"))
ORIGIN, IMPURE = "trusted.overlay.origin", "trusted.overlay.impure"


class Layers:
    """A lower, an upper and a mount point."""

    def __init__(self, work: Path) -> None:
        self.work, self.lower, self.upper, self.target = work, work / "lower", work / "upper", work / "m"
        for folder in (self.lower, self.upper, work / "wk"):
            folder.mkdir()
        for name in ("a/b/c", "keep", "gone/inner"):
            (self.lower / name).mkdir(parents=True)
        for name in ("a/file", "a/b/file", "a/b/c/deep", "keep/one", "keep/two", "gone/inner/x", "top", "top2"):
            (self.lower / name).write_text(name * 30)
        os.link(self.lower / "keep/one", self.lower / "keep/hard")

    @property
    def writable(self) -> dict[str, object]:
        return {"lowerdir": self.lower, "upperdir": self.upper, "workdir": self.work / "wk", "metacopy": "on"}

    @property
    def data_only(self) -> dict[str, object]:
        return {"lowerdir": f"{self.upper}::{self.lower}", "ro": ""}

    @property
    def stacked(self) -> dict[str, object]:
        return {"lowerdir": f"{self.upper}:{self.lower}", "metacopy": "on", "ro": ""}

    def change(self, script: str) -> None:
        with overlay(self.target, **self.writable):
            subprocess.run(["sh", "-ec", script], cwd=self.target, check=True)

    def finalize(self, *, root_whiteouts: bool = True) -> fz.FinalizeReport:
        return fz.finalize(self.upper, str(self.lower), keep_root_whiteouts=root_whiteouts)

    def whiteouts(self) -> list[Path]:
        return [p for p in self.upper.rglob("*") if stat.S_ISCHR(p.lstat().st_mode) and p.lstat().st_rdev == 0]

    def attribute(self, path: Path, name: str) -> bytes | None:
        return (
            os.getxattr(path, name, follow_symlinks=False)
            if name in os.listxattr(path, follow_symlinks=False)
            else None
        )


@pytest.fixture
def layers(tmp_path: Path) -> Layers:
    return Layers(tmp_path)


def test_045_no_whiteout_without_something_to_hide(layers: Layers) -> None:
    layers.change("chown -R 3:3 .; rm a/file top; rm -r gone")
    os.mknod(layers.upper / "orphan", stat.S_IFCHR, 0)
    os.mknod(layers.upper / "keep/orphan", stat.S_IFCHR, 0)
    layers.finalize()
    assert sorted(p.name for p in layers.whiteouts()) == ["gone", "top"]
    assert all((layers.lower / p.relative_to(layers.upper)).exists() for p in layers.whiteouts())
    fz.undo_file(layers.upper).unlink()
    layers.finalize(root_whiteouts=False)
    assert layers.whiteouts() == []


def test_046_every_redirect_has_a_target_of_its_kind(layers: Layers) -> None:
    layers.change("chown -R 3:3 .; mv a/b moved; mv keep/one a/renamed; mv keep/two keep/three")
    layers.finalize()
    seen = 0
    for path in layers.upper.rglob("*"):
        redirect = layers.attribute(path, REDIRECT)
        if path.is_dir():
            assert redirect is None, path
            assert layers.attribute(path, OPAQUE) == b"y"
        elif layers.attribute(path, METACOPY) is not None:
            assert redirect is not None
            target = layers.lower / os.fsdecode(redirect[1:])
            assert redirect.startswith(b"/") and target.is_file() and not target.is_symlink()
            assert target.stat().st_size == path.stat().st_size
            seen += 1
    assert seen == 9


def unlinked(tree: dict[bytes, Shown]) -> dict[bytes, Shown]:
    return {path: each._replace(links=()) for path, each in tree.items()}


def test_049_two_folders_with_one_redirect(layers: Layers) -> None:
    """A renamed folder copied offline: both point at one lower folder; each becomes a whole one."""
    layers.change("chown 3:3 a; mv a/b moved; touch moved/own")
    subprocess.run(["cp", "-a", layers.upper / "moved", layers.upper / "copy"], check=True)
    assert layers.attribute(layers.upper / "copy", REDIRECT) == layers.attribute(layers.upper / "moved", REDIRECT)
    with overlay(layers.target, **layers.stacked):
        before = snapshot(layers.target)
    assert {b"./moved/c/deep", b"./copy/c/deep", b"./moved/own", b"./copy/own"} <= before.keys()
    layers.finalize(root_whiteouts=False)
    for options in (layers.stacked, layers.data_only):
        with overlay(layers.target, **options):
            # Before, the two were one inode of the lower; links they never were.
            assert differences(unlinked(snapshot(layers.target)), unlinked(before)) == []
            (layers.target / "copy/c/deep").read_text()


def test_031_a_folder_of_stale_whiteouts_can_be_removed(layers: Layers) -> None:
    layers.change("rm -r gone/inner; rm keep/one keep/two keep/hard")
    # The lower has changed since: what the whiteouts were for is not there any more.
    for name in ("one", "two", "hard"):
        (layers.lower / "keep" / name).unlink()
    layers.finalize()
    assert layers.whiteouts() == []
    with overlay(layers.target, **layers.writable):
        assert os.listdir(layers.target / "keep") == []
        (layers.target / "keep").rmdir()
        (layers.target / "gone").rmdir()
        (layers.target / "keep").mkdir()
        assert os.listdir(layers.target / "keep") == []


def test_056_folders_with_entries_from_elsewhere_are_marked(layers: Layers) -> None:
    layers.change("chown -R 3:3 a; mv keep/one a/b/one; mv a/b/c/deep top2")
    layers.finalize()
    for path in [layers.upper, *layers.upper.rglob("*")]:
        if path.is_dir() and any(layers.attribute(child, ORIGIN) for child in path.iterdir()):
            assert layers.attribute(path, IMPURE) == b"y", path


@pytest.mark.parametrize("way", ["writable", "stacked", "data_only"])
def test_038_041_the_folder_says_the_inode_that_stat_says(layers: Layers, way: str) -> None:
    layers.change("chown -R 3:3 a; mv keep/one a/b/one; mv a/b/c/deep a/out")
    layers.finalize()
    with overlay(layers.target, **getattr(layers, way)):
        for folder, _, _ in os.walk(layers.target):
            with os.scandir(folder) as entries:
                wrong = [e.name for e in entries if e.inode() != os.lstat(e.path).st_ino]
            assert wrong == [], folder


def test_057_an_absolute_redirect_through_an_opaque_ancestor(layers: Layers) -> None:
    """The way of the redirect leads through names that are opaque in the upper: the data is found all the same."""
    layers.change("chown -R 3:3 a; mv a/b/c/deep a/b/c/again; rm -r gone; mkdir gone; mv a/b/c gone/c")
    layers.finalize()
    again = layers.upper / "gone/c/again"
    assert layers.attribute(again, REDIRECT) == b"/a/b/c/deep"
    assert layers.attribute(layers.upper / "a/b", OPAQUE) == layers.attribute(layers.upper / "gone", OPAQUE) == b"y"
    for options in (layers.stacked, layers.writable, layers.data_only):
        with overlay(layers.target, **options):
            assert (layers.target / "gone/c/again").read_text() == "a/b/c/deep" * 30
            assert not (layers.target / "a/b/c").exists()
            assert not (layers.target / "gone/inner").exists()


def test_011_026_private_xattrs_are_not_shown(layers: Layers) -> None:
    layers.change("chown -R 3:3 .")
    layers.finalize()
    with overlay(layers.target, **layers.data_only):
        for path in [layers.target, *layers.target.rglob("*")]:
            assert not [n for n in os.listxattr(path, follow_symlinks=False) if ".overlay." in n]


def test_018_033_hard_links_made_in_the_upper_are_one_inode(layers: Layers) -> None:
    layers.change("chown 3:3 a")
    layers.finalize()
    for options in (layers.stacked, layers.data_only):
        with overlay(layers.target, **options):
            one, hard = (layers.target / "keep" / name for name in ("one", "hard"))
            assert one.stat().st_ino == hard.stat().st_ino
            assert one.stat().st_nlink == 2
    with overlay(layers.target, **layers.writable):
        (layers.target / "keep/hard").unlink()
        assert (layers.target / "keep/one").read_text() == "keep/one" * 30


@pytest.mark.parametrize("rendering", ["erofs", "directory"])
def test_045_046_056_a_meta_of_ours(tiny_image: Path, tmp_path: Path, rendering: str) -> None:
    """No whiteout, no redirect on a folder, no stub without its data, nothing of the kernel's own bookkeeping."""
    settings = layerkit.Settings(store=tmp_path / "store", data="objects")
    with layerkit.open_image(str(tiny_image), settings=settings) as image:
        image.remap(layerkit.mapping(["0:100000:65536"]), rendering=rendering, own_meta=True)
    objects = tmp_path / "store/objects"
    stubs = 0
    with meta_folder(tmp_path, rendering) as meta:
        for path in [meta, *meta.rglob("*")]:
            shown = path.lstat()
            assert not (stat.S_ISCHR(shown.st_mode) and shown.st_rdev == 0), path
            names = [n for n in os.listxattr(path, follow_symlinks=False) if n.startswith("trusted.overlay.")]
            own = {n for n in names if not n.startswith("trusted.overlay.overlay.")}
            if stat.S_ISREG(shown.st_mode) and shown.st_size:
                assert own == {REDIRECT, METACOPY}, path
                target = objects / os.fsdecode(os.getxattr(path, REDIRECT)[1:])
                assert target.stat().st_size == shown.st_size
                stubs += 1
            else:
                assert own == set(), path
    assert stubs > 10


@contextmanager
def meta_folder(work: Path, rendering: str) -> Iterator[Path]:
    """Give the META as the kernel will see it."""
    if rendering == "directory":
        (root,) = work.glob("store/meta/*/root")
        yield root
        return
    image = next(iter(sorted(work.glob("store/meta/*/meta.erofs"))))
    (work / "erofs").mkdir()
    subprocess.run(["mount", "-t", "erofs", "-o", "ro", image, work / "erofs"], check=True)
    try:
        yield work / "erofs"
    finally:
        subprocess.run(["umount", work / "erofs"], check=True)
