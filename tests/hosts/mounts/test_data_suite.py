"""An image's data in each of its backends, below each rendering of its metadata: what is mounted is the image."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from judge import Shown, differences, mapped, snapshot
from kernel_mounts import mounts_below
from made_images import Layout, special
from needs import missing, need_root, need_tool
from page_cache import resident_bytes

import layerkit
from layerkit.linux import fuse

BACKENDS = ("tar", "objects", "adopted")
RENDERINGS = ("erofs", "directory", "fuse")
every = [pytest.mark.parametrize("data", BACKENDS), pytest.mark.parametrize("rendering", RENDERINGS)]
pytestmark = every
EXTENTS = ((0, 100_000, 65_536),)
BIG = os.urandom(300_000)


def layer(*members: tuple[str, bytes, dict[str, object]] | tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            for field, value in member[2].items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(member[1]))
    return out.getvalue()


def layers() -> list[bytes]:
    """Two layers, bottom first; the upper one replaces a file of the lower one."""
    return [
        layer(
            special(".", tarfile.DIRTYPE, mode=0o755, mtime=5),
            special("etc", tarfile.DIRTYPE, mode=0o750, uid=3),
            ("etc/conf", b"first", {"uid": 1000, "gid": 1001, "mode": 0o640, "mtime": 7}),
            ("etc/big", BIG, {"mode": 0o604, "mtime": 8}), ("etc/same", b"twice", {}),
            ("etc/empty", b"", {"uid": 9}),
            special("etc/again", tarfile.LNKTYPE, "etc/big"), special("etc/link", tarfile.SYMTYPE, "conf", uid=4),
        ),
        layer(
            special("bin", tarfile.DIRTYPE, mode=0o755),
            ("bin/tool", b"#!/bin/sh\necho ran\n", {"mode": 0o755, "uid": 5}), ("bin/same", b"twice", {"mtime": 1}),
            special("etc", tarfile.DIRTYPE, mode=0o700, uid=2), ("etc/conf", b"second", {"uid": 1, "mtime": 9}),
        ),
    ]  # fmt: skip


class Image:
    """The image as a layout, as folders that a runtime unpacked, and as it is to be seen under the map."""

    def __init__(self, folder: Path) -> None:
        layout = Layout()
        made = layers()
        layout.list(layout.image(*made), "it")
        self.layout = layout.folder(folder / "layout")
        self.folders, whole = [folder / "0", folder / "1"], folder / "whole"
        extract = ["tar", "-x", "-p", "--numeric-owner", "-C"]
        for where, data in [*zip(self.folders, made, strict=True), (whole, made[0]), (whole, made[1])]:
            where.mkdir(exist_ok=True)
            subprocess.run([*extract, where], input=data, check=True)
        # What the second layer does not say of its root is the first one's; unpacking has changed its time.
        for root in (self.folders[1], whole):
            root.chmod(0o755)
            os.utime(root, (5, 5))
        with mapped(whole, folder / "shown", EXTENTS) as shown:
            self.want: dict[bytes, Shown] = snapshot(shown)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    need_root()
    need_tool("tar")
    if not Path(fuse.DEVICE).exists():
        missing("needs /dev/fuse")
    return Image(tmp_path_factory.mktemp("data"))


Mount = Callable[..., AbstractContextManager[Path]]


@pytest.fixture
def mount(data: str, rendering: str, image: Image, tmp_path: Path) -> Mount:
    """Return what mounts the image at a new folder; one store for all mounts of a test."""

    @contextmanager
    def at(name: str, first: int = 100_000, upper: Path | None = None) -> Iterator[Path]:
        target, mapping = tmp_path / name, layerkit.mapping([f"0:{first}:65536"])
        target.mkdir()
        store = tmp_path / "store"
        if data == "adopted":
            folders = "folders:" + ":".join(str(folder) for folder in reversed(image.folders))
            layerkit.mount_unpacked(
                folders,
                target,
                mapping,
                rendering="auto" if rendering == "erofs" else rendering,
                store=store,
                upper=upper,
            )
        else:
            with layerkit.open_image(
                str(image.layout), settings=layerkit.Settings(store=store, data=data)
            ) as opened:
                opened.mount(target, mapping, rendering=rendering, upper=upper)
        try:
            yield target
        finally:
            layerkit.umount(target, store=store)

    return at


def test_names_owners_and_bytes_are_the_images(image: Image, mount: Mount, tmp_path: Path) -> None:
    with mount("m") as target:
        assert differences(snapshot(target), image.want) == []
        assert subprocess.run([target / "bin/tool"], capture_output=True, check=True).stdout == b"ran\n"
        with pytest.raises(OSError, match="Read-only"):
            (target / "new").touch()
    assert mounts_below(tmp_path) == []


@pytest.mark.usefixtures("caches_stay")
def test_two_maps_share_the_pages_of_the_data(image: Image, mount: Mount) -> None:
    with mount("one") as one, mount("two", 300_000) as two:
        assert (one / "etc/big").read_bytes() == BIG
        resident, size = resident_bytes(two / "etc/big")
        assert (size, resident >= size) == (len(BIG), True)
        assert ((one / "etc/conf").stat().st_uid, (two / "etc/conf").stat().st_uid) == (100_001, 300_001)


def test_writing_goes_to_the_upper_alone(image: Image, mount: Mount, tmp_path: Path) -> None:
    with mount("m", upper=tmp_path / "upper") as target:
        with (target / "etc/big").open("r+b") as file:
            file.write(b"changed")
        (target / "etc/conf").unlink()
        os.chown(target / "etc/same", 100_777, 100_777)
        assert (target / "etc/big").read_bytes() == b"changed" + BIG[7:]
        assert (target / "etc/same").read_bytes() == b"twice"
    with mount("again") as target:
        assert differences(snapshot(target), image.want) == []
