"""``optimize --metadata-only``, judged by podman on a store with metacopy: the same files from fewer bytes."""

from __future__ import annotations

import functools
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import judge
import pytest
from engines import Engine, podman
from made_images import Layout
from needs import need_root, need_tool
from programs import run_layerkit

from layerkit.model.errors import UnsafeEntry

optimize = functools.partial(run_layerkit, "optimize")

# Data of several blocks, too long for an inode or a stub that does not pay.
DATA = {name: (name.encode() * 9000)[:9000] for name in ("a", "b", "h", "x", "moved", "keep", "new")}


def member(name: str, content: bytes | None = None, **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.mtime, info.mode = 1_700_000_000, 0o644
    if content is None:
        info.type, info.mode = tarfile.DIRTYPE, 0o755
    else:
        info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content or b""


def link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, b"", type=tarfile.LNKTYPE, linkname=target)


def layer(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return an image whose layers repeat files: chowned, chmodded, linked, moved, in an opaque folder."""
    base = layer(
        member("d"), member("d/a", DATA["a"]), member("d/b", DATA["b"]), member("d/h1", DATA["h"]),
        link("d/h2", "d/h1"), member("d/tiny", b"1"), member("old"), member("old/sub"),
        member("old/sub/moved", DATA["moved"]), member("op"), member("op/keep", DATA["keep"]),
        member("op/gone", b"1"),
    )  # fmt: skip
    chown = layer(
        member("d", uid=7), member("d/a", DATA["a"], uid=7, gid=8), member("d/b", DATA["new"], uid=7),
        member("d/h1", DATA["h"], uid=7), link("d/h2", "d/h1"), member("d/tiny", b"1", uid=7),
    )  # fmt: skip
    move = layer(
        member("old"), member("old/.wh.sub", b""), member("new"), member("new/moved", DATA["moved"], mode=0o600),
        member("op", mode=0o700), member("op/.wh..wh..opq", b""), member("op/keep", DATA["keep"], uid=9),
    )  # fmt: skip
    chmod = layer(
        member("d"), member("d/a", DATA["a"], mode=0o4755, uid=7, pax_headers={"SCHILY.xattr.user.k": "v"}),
        member("d/h1", DATA["h"], uid=3), member("new"), member("new/moved", DATA["moved"], mode=0o640),
    )  # fmt: skip
    layout = Layout()
    layout.list(layout.image(base, chown, move, chmod), "example.com/stubs:1")
    return layout.archive(tmp_path / "image.tar")


@pytest.fixture(scope="module")
def metacopy_podman() -> Iterator[Engine]:
    need_root()
    need_tool("podman", "runc")
    with podman(storage='[storage.options.overlay]\nmountopt = "nodev,metacopy=on"') as engine:
        yield engine


def shown(engine: Engine, archive: Path) -> dict[bytes, judge.Shown]:
    """Return the files of the image as podman mounts it."""
    loaded = engine("load", "-i", archive)
    name = loaded.strip().splitlines()[-1].split(": ", 1)[1].split(",")[0]
    mounted = Path(engine("image", "mount", name).strip())
    try:
        found = judge.snapshot(mounted)
        # No layer has an entry of the root folder, so its time is that of the load.
        del found[b"."]
        return found
    finally:
        engine("image", "umount", name)
        engine("rmi", "--force", name)


def test_podman_with_metacopy_shows_the_same_files(image: Path, tmp_path: Path, metacopy_podman: Engine) -> None:
    want = shown(metacopy_podman, image)
    assert want[b"./new/moved"].mode & 0o777 == 0o640
    out = tmp_path / "stubs.tar"
    done = optimize(image, f"oci-archive:{out}", "--metadata-only", "--stock-media-type", "--json")
    report = json.loads(done.stdout)
    assert [x["action"] for x in report["layers"]] == ["keep", "stubs", "stubs", "stubs"]
    assert report["layers"][0]["digest_after"] == report["layers"][0]["digest_before"]
    # What is left is d/b, whose content is new, and what is too small to pay.
    assert [x["file_bytes_after"] for x in report["layers"][1:]] == [9001, 0, 0]
    assert "ZEROS" in done.stderr
    assert "metacopy=on" in " ".join(report["warnings"])
    got = shown(metacopy_podman, out)
    assert judge.differences(got, want) == []
    assert got[b"./new/moved"].sha256 == want[b"./new/moved"].sha256
    again = tmp_path / "again.tar"
    optimize(image, f"oci-archive:{again}", "--metadata-only", "--stock-media-type", "--jobs", 1)
    assert again.read_bytes() == out.read_bytes()


def test_without_metacopy_podman_shows_no_file_of_zeros(image: Path, tmp_path: Path) -> None:
    need_root()
    need_tool("podman", "runc")
    out = tmp_path / "stubs.tar"
    done = optimize(image, f"oci-archive:{out}", "--metadata-only")
    assert "podman and containerd refuse" in done.stderr
    with podman() as engine:
        loaded = engine("load", "-i", out)
        name = loaded.strip().splitlines()[-1].split(": ", 1)[1]
        mounted = Path(engine("image", "mount", name).strip())
        assert (mounted / "d/b").read_bytes() == DATA["new"]
        with pytest.raises(PermissionError):
            (mounted / "d/a").stat()
        engine("image", "umount", name)


def test_the_plan_and_what_makes_no_sense(image: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kept = json.loads(optimize(image, "--metadata-only", "--keep-base", 2, "--dry-run", "--json").stdout)
    assert [x["action"] for x in kept["layers"]] == ["keep", "keep", "stubs", "stubs"]
    assert kept["base_cost_bytes"] == 2 * 9000
    assert "needs --metadata-only" in optimize(image, out, "--stock-media-type", code=2).stderr


def test_overlay_xattrs_of_the_image_are_refused(tmp_path: Path) -> None:
    big = DATA["a"]
    own = {"SCHILY.xattr.trusted.overlay.opaque": "y"}
    layout = Layout()
    layout.list(layout.image(layer(member("a", big)), layer(member("d", pax_headers=own), member("a", big, uid=1))))
    source = layout.archive(tmp_path / "image.tar")
    out = tmp_path / "out"
    assert "of its own" in optimize(source, f"oci:{out}", "--metadata-only", code=UnsafeEntry.exit_code).stderr
    assert not out.exists()
