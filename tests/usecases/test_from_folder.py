"""What changed in a folder, as a layer: umoci unpacks base and layer to what the folder holds."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import made_images
import pytest
from judge import data_extents, differences, snapshot, umoci
from needs import need_root, need_tool

import layerkit
from layerkit.formats.compression.decompress import Compression
from layerkit.model.errors import InvalidImage, LossyResult, UnmappedId, UsageError
from layerkit.pack import Packing

MAP = ["0:100000:65536"]


def opened(ref: Path | str, store: Path) -> layerkit.OpenImage:
    return layerkit.open_image(str(ref), settings=layerkit.Settings(store=store))


def layers(layout: Path, name: str) -> list[dict[str, object]]:
    index = json.loads((layout / "index.json").read_text())
    names = {m["annotations"]["org.opencontainers.image.ref.name"]: m["digest"] for m in index["manifests"]}
    manifest = json.loads((layout / "blobs" / names[name].replace(":", "/")).read_text())
    found: list[dict[str, object]] = manifest["layers"]
    return found


@pytest.fixture
def unpacked(tiny_image: Path, tmp_path: Path) -> Path:
    need_root()
    with opened(tiny_image, tmp_path / "store") as image:
        image.unpack(tmp_path / "root")
    return tmp_path / "root"


@pytest.mark.parametrize(
    ("which", "maps", "checksum"),
    [("tiny", None, False), ("tiny", None, True), ("tiny", MAP, False), ("tiny", MAP, True), ("app", MAP, True)],
)
def test_without_a_change_the_layer_is_empty(
    tiny_image: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    which: str,
    maps: list[str] | None,
    checksum: bool,
) -> None:
    need_root()
    source = tiny_image if which == "tiny" else request.getfixturevalue("app_image")
    mapping = layerkit.mapping(maps)
    with opened(source, tmp_path / "store") as image:
        image.unpack(tmp_path / "root", mapping)
        report = image.pack(
            tmp_path / "root",
            f"oci:{tmp_path / 'out'}:same",
            mapping,
            packing=Packing(Compression.NONE),
            checksum=checksum,
        )
    assert (report.added, report.changed, report.removed) == (0, 0, 0)
    assert (report.hashed_bytes > 0) == checksum
    blob = tmp_path / "out/blobs" / report.layer.replace(":", "/")
    assert blob.read_bytes() == bytes(1024)


def change(root: Path) -> None:
    """Do to a root filesystem all that there is to do."""
    (root / "new/deep").mkdir(parents=True)
    (root / "new/deep/file").write_bytes(b"new")
    os.link(root / "new/deep/file", root / "new/link")
    (root / "new/latin-\udce9").write_bytes(b"")
    with (root / "new/sparse").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(300 << 10)
        file.write(b"data")
    os.mkfifo(root / "new/fifo")
    os.mknod(root / "new/null", 0o20666, os.makedev(1, 3))
    os.symlink("../etc/passwd", root / "new/passwd")
    os.setxattr(root / "new/deep", "user.note", b"\0binary")
    os.chown(root / "new/deep/file", 7, 8)
    (root / "new/deep/file").chmod(0o4755)
    os.utime(root / "new/deep/file", ns=(1, 1234567890_123456789))
    some = next(p for p in sorted(root.rglob("*")) if p.is_file() and not p.is_symlink() and p.stat().st_nlink == 1)
    some.write_bytes(b"other content")
    linked = next(
        p for p in sorted(root.rglob("*")) if p.is_file() and not p.is_symlink() and p.stat().st_nlink > 1
    )
    linked.chmod(0o600)
    gone = next(p for p in sorted(root.rglob("*")) if p.is_dir() and not p.is_symlink() and any(p.iterdir()))
    shutil.rmtree(gone)
    gone.write_text("a file where a folder was")


@pytest.mark.parametrize("maps", [None, MAP], ids=["plain", "mapped"])
def test_umoci_unpacks_it_to_what_the_folder_holds(
    tiny_image: Path, tmp_path: Path, maps: list[str] | None
) -> None:
    need_root()
    need_tool("skopeo")
    mapping = layerkit.mapping(maps)
    with opened(tiny_image, tmp_path / "store") as image:
        image.unpack(tmp_path / "plain")
        image.unpack(tmp_path / "root", mapping)
        change(tmp_path / "plain")
        change(tmp_path / "root")
        if maps:
            for path in (tmp_path / "root", *(tmp_path / "root").rglob("*")):
                st = path.lstat()
                if st.st_uid < 100000:
                    times = (st.st_atime_ns, st.st_mtime_ns)
                    os.chown(path, st.st_uid + 100000, st.st_gid % 100000 + 100000, follow_symlinks=False)
                    if not path.is_symlink():
                        path.chmod(st.st_mode & 0o7777)
                    os.utime(path, ns=times, follow_symlinks=False)
        report = image.pack(tmp_path / "root", f"oci:{tmp_path / 'out'}:new", mapping)
    assert report.removed == 0 < report.added and report.changed
    subprocess.run(
        ["skopeo", "copy", "--quiet", f"oci:{tmp_path / 'out'}:new", f"dir:{tmp_path / 'copied'}"], check=True
    )
    shown = umoci(f"{tmp_path / 'out'}:new", tmp_path / "bundle")
    got, want = snapshot(shown), snapshot(tmp_path / "root")
    if maps:
        want = {p: s._replace(uid=s.uid - 100000, gid=s.gid - 100000) for p, s in want.items()}
        # The ids in ACLs and capabilities are held to account by the plain case.
        got, want = ({p: s._replace(xattrs=()) for p, s in t.items()} for t in (got, want))
    assert differences(got, want) == []
    # umoci fills holes.
    with opened(f"oci:{tmp_path / 'out'}:new", tmp_path / "store") as image:
        image.unpack(tmp_path / "again")
    assert sum(end - start for start, end in data_extents(tmp_path / "again/new/sparse")) < 1 << 19
    # Unchanged layers are the base's own blobs.
    assert layers(tmp_path / "out", "new")[:-1] == layers(tiny_image, "latest")


def test_what_is_removed_gets_whiteouts(tiny_image: Path, unpacked: Path, tmp_path: Path) -> None:
    victims = [p for p in sorted(unpacked.iterdir()) if p.is_dir()][:2]
    for victim in victims:
        shutil.rmtree(victim)
    with opened(tiny_image, tmp_path / "store") as image:
        report = image.pack(unpacked, f"oci:{tmp_path / 'out'}:new")
    assert (report.added, report.removed) == (0, 2)
    shown = umoci(f"{tmp_path / 'out'}:new", tmp_path / "bundle")
    assert differences(snapshot(shown), snapshot(unpacked)) == []


def test_the_same_folder_gives_the_same_bytes(tiny_image: Path, unpacked: Path, tmp_path: Path) -> None:
    change(unpacked)
    made = []
    for name in ("a", "b"):
        with opened(tiny_image, tmp_path / "store") as image:
            made.append(image.pack(unpacked, f"{tmp_path / name}.tar", created="1700000000").manifest)
    assert made[0] == made[1]
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_content_of_the_same_size_and_time_is_found_with_checksum(
    tiny_image: Path, unpacked: Path, tmp_path: Path
) -> None:
    path = next(
        p for p in sorted(unpacked.rglob("*")) if p.is_file() and not p.is_symlink() and p.stat().st_size > 3
    )
    st = path.stat()
    with path.open("r+b") as file:
        file.write(b"\xff\xfe\xfd")
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))
    with opened(tiny_image, tmp_path / "store") as image:
        assert image.pack(unpacked, f"oci:{tmp_path / 'out'}:fast").changed == 0
        assert image.pack(unpacked, f"oci:{tmp_path / 'out'}:sure", checksum=True).changed >= 1
        # It would be written as what it is not: the digest of its bytes is looked at.
        os.chown(path, 12, 12)
        os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))
        with pytest.raises(InvalidImage, match="--checksum"):
            image.pack(unpacked, f"oci:{tmp_path / 'none'}:fast")
    assert not (tmp_path / "none").exists() or not (tmp_path / "none/index.json").exists()


def test_what_a_layer_cannot_hold(tiny_image: Path, unpacked: Path, tmp_path: Path) -> None:
    with opened(tiny_image, tmp_path / "store") as image:
        with socket.socket(socket.AF_UNIX) as listener:
            here = Path.cwd()
            os.chdir(unpacked)
            try:
                listener.bind("socket")
            finally:
                os.chdir(here)
            report = image.pack(unpacked, f"oci:{tmp_path / 'out'}:socket")
        assert len(report.warnings) == 1 and "socket" in report.warnings[0]
        (unpacked / "socket").unlink()
        (unpacked / ".wh.x").touch()
        with pytest.raises(LossyResult, match=r"\.wh\."):
            image.pack(unpacked, f"oci:{tmp_path / 'no'}:one")
        (unpacked / ".wh.x").unlink()
        (unpacked / "mnt-of-another").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "t", str(unpacked / "mnt-of-another")], check=True)
        try:
            with pytest.raises(LossyResult, match="unmount"):
                image.pack(unpacked, f"oci:{tmp_path / 'no'}:one")
        finally:
            subprocess.run(["umount", str(unpacked / "mnt-of-another")], check=True)
        with pytest.raises(UnmappedId, match="outside the map"):
            image.pack(unpacked, f"oci:{tmp_path / 'no'}:one", layerkit.mapping(MAP))
        with pytest.raises(UsageError, match="no such folder"):
            image.pack(tmp_path / "nowhere", f"oci:{tmp_path / 'no'}:one")
    assert not (tmp_path / "no/index.json").exists()


def test_names_lead_nowhere_else(tiny_image: Path, unpacked: Path, tmp_path: Path) -> None:
    """A link to a folder outside is packed as the link that it is."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("secret")
    (unpacked / "way-out").symlink_to(tmp_path / "outside")
    with opened(tiny_image, tmp_path / "store") as image:
        image.pack(unpacked, f"oci:{tmp_path / 'out'}:new", packing=Packing(Compression.NONE))
    shown = umoci(f"{tmp_path / 'out'}:new", tmp_path / "bundle")
    assert os.readlink(shown / "way-out") == str(tmp_path / "outside")
    assert "secret" not in " ".join(made_images.below(shown))


def test_the_command(tiny_image: Path, unpacked: Path, tmp_path: Path) -> None:
    (unpacked / "new").write_text("x")
    command = [
        sys.executable, "-m", "layerkit.cli.main", "pack", str(unpacked), f"oci:{tmp_path / 'out'}:new",
        "--base", str(tiny_image), "--store", str(tmp_path / "store"), "--message", "a file of the site", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    assert said["schema"] == "layerkit.pack.v1"
    assert (said["added"], said["removed"]) == (1, 0)
    with opened(f"oci:{tmp_path / 'out'}:new", tmp_path / "store") as image:
        assert str(image.image.descriptor.digest) == said["manifest"]
        history = json.loads(image.image.config).get("history", [])
        assert not history or history[-1]["created_by"] == "a file of the site"
