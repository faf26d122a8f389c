"""A root filesystem on disk: as umoci and the kernel show it, sharing what it can, whole or not there."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import made_images
import ordinary_users
import pytest
from disks import disk
from judge import Shown, data_extents, differences, snapshot, unpacked
from needs import need_root, need_tool
from programs import command, wait_for

import layerkit
from layerkit.model.errors import Cancelled, StoreError, UnsupportedHost, UsageError

MAP = ["0:100000:65536"]
EXTENTS = ((0, 100000, 65536),)
IDENTITY = ((0, 0, 65536),)
# umoci makes what an image leaves out with the time of the run.
UNTOLD = frozenset({b"."})
_FIEMAP, _EXTENT_SHARED = 0xC020660B, 0x2000


@pytest.fixture(scope="module")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with disk(tmp_path_factory.mktemp("disk"), "xfs", size=2 << 30) as target:
        yield target


def unpack(image: Path | str, target: Path, store: Path, maps: list[str] | None = None, **more: str):  # type: ignore[no-untyped-def]
    settings = layerkit.Settings(store=store, data=more.pop("data", "auto"))
    with layerkit.open_image(str(image), settings=settings) as opened:
        return opened.unpack(target, layerkit.mapping(maps), **more)  # type: ignore[arg-type]


def shared_bytes(path: Path) -> int:
    """Return how many bytes of ``path`` lie in shared extents (FIEMAP, Documentation/filesystems/fiemap.rst)."""
    count = 512
    buffer = ctypes.create_string_buffer(32 + 56 * count)
    struct.pack_into("=QQIIII", buffer, 0, 0, (1 << 64) - 1, 1, 0, count, 0)
    with path.open("rb") as file:
        fcntl.ioctl(file, _FIEMAP, buffer)
    mapped = struct.unpack_from("=I", buffer, 20)[0]
    extents = [struct.unpack_from("=QQQQQI", buffer, 32 + 56 * i) for i in range(mapped)]
    return sum(extent[2] for extent in extents if extent[5] & _EXTENT_SHARED)


def files(root: Path) -> list[Path]:
    return [p for p in root.rglob("*") if stat.S_ISREG(p.lstat().st_mode) and p.lstat().st_size]


Judged = dict[tuple[str, bool], dict[bytes, Shown]]


@pytest.fixture(scope="module")
def judged(tiny_image: Path, app_layout: Path, tmp_path_factory: pytest.TempPathFactory) -> Judged:
    """The trees of both images as umoci unpacks them (False), and through a kernel idmapped mount (True)."""
    need_root()
    need_tool("umoci")
    found = {}
    for name, layout in (("tiny", tiny_image), ("app", app_layout)):
        work = tmp_path_factory.mktemp("judge")
        with unpacked(f"{layout}:latest", work, EXTENTS) as shown:
            found[name, True] = snapshot(shown)
            found[name, False] = snapshot(work / "bundle/rootfs")
    return found


def seen(root: Path) -> dict[bytes, Shown]:
    """The snapshot of ``root`` without the names under which xfs shows ACLs a second time to root."""
    return {
        path: shown._replace(xattrs=tuple(p for p in shown.xattrs if not p[0].startswith(b"trusted.SGI_ACL_")))
        for path, shown in snapshot(root).items()
    }


WAYS = [
    *(("tiny", kind, data, mapped) for kind in ("ext4", "xfs") for data in ("tar", "objects") for mapped in (0, 1)),
    ("app", "ext4", "tar", 1),
    ("app", "xfs", "objects", 1),
]


@pytest.mark.parametrize(("name", "kind", "data", "mapped"), WAYS)
def test_as_umoci_and_the_kernel_show_it(
    tiny_image: Path,
    app_layout: Path,
    judged: Judged,
    tmp_path: Path,
    xfs: Path,
    name: str,
    mapped: int,
    data: str,
    kind: str,
) -> None:
    place = xfs if kind == "xfs" else tmp_path
    layout = tiny_image if name == "tiny" else app_layout
    target = place / f"{name}-{data}-{mapped}"
    report = unpack(layout, target, place / "store", MAP if mapped else None, data=data)
    assert differences(seen(target), judged[name, bool(mapped)], skip=UNTOLD) == []
    assert report.shared_bytes + report.copied_bytes <= report.data_bytes
    assert not list(place.glob(".*tmp"))
    if kind == "xfs" and data == "objects":
        assert report.copied_bytes == 0
        # A file that is all hole has no blocks to share.
        assert all(shared_bytes(path) for path in files(target) if path.stat().st_blocks)
    if kind == "ext4":
        assert report.shared_bytes == 0


def test_files_in_a_tar_share_the_blocks_that_fit(xfs: Path, tmp_path: Path) -> None:
    content = os.urandom(9000)
    # The first file's data begins at byte 512 of the tar, the second's at byte 4096.
    layout = made_images.Layout()
    layer = made_images.tar(("a", content[:3072]), ("b", content))
    layout.list(layout.image(layer), "one")
    folder = layout.folder(tmp_path / "image")
    report = unpack(f"{folder}:one", xfs / "fits", xfs / "fits-store", data="tar")
    assert (xfs / "fits/b").read_bytes() == content
    assert (report.shared_bytes, report.copied_bytes) == (8192, 3072 + 9000 - 8192)
    assert shared_bytes(xfs / "fits/b") == 8192
    assert shared_bytes(xfs / "fits/a") == 0


@pytest.mark.parametrize("data", ["tar", "objects"])
def test_bytes_stand_for_themselves(tiny_image: Path, xfs: Path, data: str) -> None:
    target = xfs / f"bytes-{data}"
    report = unpack(tiny_image, target, xfs / "store", data=data, copy="bytes")
    assert report.shared_bytes == 0
    assert not any(shared_bytes(path) for path in files(target))


def test_reflink_is_had_or_refused(tiny_image: Path, xfs: Path, tmp_path: Path) -> None:
    report = unpack(tiny_image, xfs / "reflink", xfs / "new-store", copy="reflink")
    assert report.data_backend == "objects"
    assert report.copied_bytes == 0 < report.shared_bytes
    with pytest.raises(UnsupportedHost, match="one xfs or btrfs filesystem"):
        unpack(tiny_image, xfs / "other", tmp_path / "store", copy="reflink")
    with pytest.raises(UsageError, match="without --data tar"):
        unpack(tiny_image, xfs / "other", xfs / "new-store", copy="reflink", data="tar")
    assert not (xfs / "other").exists()


@pytest.mark.parametrize("copy", ["auto", "bytes"])
@pytest.mark.parametrize("data", ["tar", "objects"])
def test_holes_stay_holes(tiny_image: Path, tmp_path: Path, data: str, copy: str) -> None:
    need_root()
    with layerkit.open_image(str(tiny_image)) as opened:
        want = {e.path: e for index in opened.indexes() for e in index.entries() if e.sparse is not None}
    assert want
    unpack(tiny_image, tmp_path / "root", tmp_path / "store", data=data, copy=copy)
    for path, entry in want.items():
        assert entry.sparse is not None
        runs = data_extents(tmp_path / "root" / os.fsdecode(path))
        stored, exact = sum(end - start for start, end in runs), sum(length for _, length in entry.sparse)
        assert exact <= stored <= exact + 2 * 4096 * len(entry.sparse)
        assert stored < entry.size
        content = (tmp_path / "root" / os.fsdecode(path)).read_bytes()
        assert hashlib.sha256(content).digest() == entry.sha256


def test_a_second_time_reads_no_blob(tiny_image: Path, tmp_path: Path) -> None:
    need_root()
    first = unpack(tiny_image, tmp_path / "1", tmp_path / "store")
    second = unpack(tiny_image, tmp_path / "2", tmp_path / "store", MAP)
    assert first.layers_read == first.layers > 0
    assert second.layers_read == 0
    # What is unpacked is no image of the store: gc takes its layers.
    assert layerkit.collect_garbage(tmp_path / "store")["freed_bytes"]


def test_a_place_that_is_taken_is_refused_untouched(tiny_image: Path, tmp_path: Path) -> None:
    need_root()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("full")
    for name, why in (
        ("full", "not empty"),
        ("file", "not a folder"),
        ("link", "symbolic link"),
        ("no/where", "no folder .*no to make it in"),
    ):
        with pytest.raises(UsageError, match=why):
            unpack(tiny_image, tmp_path / name, tmp_path / "store")
    with pytest.raises(UsageError, match="mount point"):
        unpack(tiny_image, Path("/proc"), tmp_path / "store")
    assert made_images.below(tmp_path / "full") == ["mine"]
    assert not os.listdir(tmp_path / "store/tar")
    (tmp_path / "full/mine").unlink()
    unpack(tiny_image, tmp_path / "full", tmp_path / "store")
    assert (tmp_path / "full/etc").is_dir()


def test_what_appears_meanwhile_is_not_touched(tiny_image: Path, tmp_path: Path) -> None:
    need_root()
    target = tmp_path / "root"
    settings = layerkit.Settings(store=tmp_path / "store")

    def put(what: str, done: int, total: int) -> None:
        if what == "files" and not target.exists():
            target.mkdir()
            (target / "mine").write_text("mine")

    with layerkit.open_image(str(tiny_image), settings=settings) as opened, pytest.raises(UsageError):
        opened.unpack(target, progress=put)
    assert made_images.below(target) == ["mine"]
    assert not list(tmp_path.glob(".root*"))


def test_a_full_disk_leaves_nothing(app_layout: Path, tmp_path: Path) -> None:
    with disk(tmp_path, "ext4", size=24 << 20) as small:
        before = sorted(os.listdir(small))
        with pytest.raises(StoreError, match="No space left"):
            unpack(app_layout, small / "root", tmp_path / "store")
        assert sorted(os.listdir(small)) == before


def test_a_cancelled_run_leaves_nothing(tiny_image: Path, tmp_path: Path) -> None:
    need_root()

    def stop(what: str, done: int, total: int) -> None:
        if what == "files":
            raise Cancelled("enough")

    settings = layerkit.Settings(store=tmp_path / "store")
    with layerkit.open_image(str(tiny_image), settings=settings) as opened, pytest.raises(Cancelled):
        opened.unpack(tmp_path / "root", progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


HELD = """
import sys, time
from pathlib import Path
from layerkit.cli.main import run
from layerkit.usecases.to_folder import Contents

begin, go, given = Contents.begin, Path(sys.argv.pop(1)), []

def held(self, inodes):
    fill = begin(self, inodes)

    def wait(*file):
        given.append(file)
        while len(given) > 100 and not go.exists():
            time.sleep(0.01)
        fill(*file)

    return wait

Contents.begin = held
run()
"""
"""``layerkit`` that writes the data of a hundred files, and more when the file of its first word is there."""


def test_a_killed_run_leaves_at_most_its_own_folder(tmp_path: Path) -> None:
    need_root()
    made = made_images.Layout()
    many = [(f"usr/{i}", b"%d" % i) for i in range(4000)]
    made.list(made.image(made_images.tar(made_images.special("usr", b"5", mode=0o755), *many)), "many")
    image = f"{made.folder(tmp_path / 'image')}:many"
    unpack(image, tmp_path / "warm", tmp_path / "store")
    target = tmp_path / "root"
    for number in (signal.SIGKILL, signal.SIGTERM):
        words = (tmp_path / "go", "unpack", image, target, "--store", tmp_path / "store")
        run = subprocess.Popen([sys.executable, "-c", HELD, *map(str, words)], stderr=subprocess.DEVNULL)
        wait_for(lambda: run.poll() is not None or list(tmp_path.glob(".root.*.layerkit-tmp/*/new/usr")))  # noqa: B023
        assert run.poll() is None
        with pytest.raises(StoreError, match="another process"):
            unpack(image, target, tmp_path / "store")
        run.send_signal(number)
        # The thread that writes ends what it has begun.
        (tmp_path / "go").touch()
        assert run.wait() == (130 if number == signal.SIGTERM else -signal.SIGKILL)
        assert not target.exists()
        left = list(tmp_path.glob(".root*"))
        assert len(left) == (number == signal.SIGKILL)
        (tmp_path / "go").unlink()
        if left:
            unpack(image, target, tmp_path / "store")
            assert not list(tmp_path.glob(".root*")), "the next run clears it"
            shutil.rmtree(target)
    unpack(image, target, tmp_path / "store")
    assert differences(snapshot(target), snapshot(tmp_path / "warm")) == []


@pytest.mark.parametrize("mode", [0o1777, 0o777], ids=["sticky", "open"])
def test_another_user_of_a_shared_folder_changes_nothing(tmp_path: Path, mode: int) -> None:
    """They make the staging folder first, come into ours, or where the folder lets them put theirs in its place."""
    need_root()
    made = made_images.Layout()
    etc, usr = (made_images.special(name, b"5", mode=0o755) for name in ("etc", "usr"))
    many = [(f"usr/{i}", b"%d" % i) for i in range(4000)]
    made.list(made.image(made_images.tar(etc, ("etc/passwd", b"root:x:0:0"), usr, *many)), "many")
    image = f"{made.folder(tmp_path / 'image')}:many"
    unpack(image, tmp_path / "warm", tmp_path / "store")
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    ready, told = os.pipe()
    attacker = os.fork()
    if attacker == 0:
        with contextlib.suppress(BaseException):
            _attack(shared, told)
        os._exit(0)
    try:
        assert os.read(ready, 1) == b"x"
        unpack(image, shared / "root", tmp_path / "store")
    finally:
        os.kill(attacker, signal.SIGKILL)
        os.waitpid(attacker, 0)
        os.close(ready)
        os.close(told)
    theirs = sorted(p.name for p in shared.iterdir() if p.stat().st_uid == OTHER)
    assert ".root.layerkit-tmp" in theirs
    # They did move it away where they could; emptied, it stays there.
    moved = shared / "moved0"
    assert moved.exists() == (mode == 0o777)
    assert mode == 0o1777 or os.listdir(moved) == []
    assert (shared / "root").stat().st_uid == 0
    assert differences(snapshot(shared / "root"), snapshot(tmp_path / "warm")) == []


OTHER = 65534


def _attack(shared: Path, told: int) -> None:
    """Do as another user what the folder allows, for as long as we live."""
    # From here on by relative names: the folders above are closed to others.
    os.chdir(shared)
    os.setgroups([])
    os.setresgid(OTHER, OTHER, OTHER)
    os.setresuid(OTHER, OTHER, OTHER)
    os.umask(0)
    Path(".root.layerkit-tmp").mkdir(mode=0o777)
    os.write(told, b"x")
    moved = 0
    while True:
        for name in [name for name in os.listdir(".") if name.startswith(".root.")]:
            with contextlib.suppress(OSError):
                # What lies in it: first of all theirs, in which somebody else may be writing.
                Path(name, "etc").rename(Path(name, "etc.orig"))
                Path(name, "etc").mkdir()
                Path(name, "etc/passwd").write_text("root::0:0:attacker")
            with contextlib.suppress(OSError):
                Path(name, "planted").mkdir()
            with contextlib.suppress(OSError):
                if os.stat(name).st_uid != OTHER:
                    Path(name).rename(f"moved{moved}")
                    moved += 1
                    Path(name, "new/etc").mkdir(parents=True)
                    Path(name, "new/etc/passwd").write_text("root::0:0:attacker")


def test_lost_data_is_an_error_and_no_folder(tiny_image: Path, tmp_path: Path) -> None:
    need_root()
    unpack(tiny_image, tmp_path / "1", tmp_path / "store", data="objects")
    victim = max((tmp_path / "store/objects").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    victim.unlink()
    with pytest.raises(StoreError, match="verify --repair"):
        unpack(tiny_image, tmp_path / "2", tmp_path / "store", data="objects")
    assert not (tmp_path / "2").exists()


def test_names_stay_below_the_folder(tmp_path: Path) -> None:
    """A link out of the image, and a lower folder that an upper layer makes a link, lead nowhere."""
    need_root()
    outside = tmp_path / "outside"
    outside.mkdir()
    layout = made_images.Layout()
    lower = made_images.tar(made_images.special("d", b"5", mode=0o755), ("d/f", b"below"))
    upper = made_images.tar(made_images.special("d", b"2", str(outside)), ("e", b"x"))
    layout.list(layout.image(lower, upper), "one")
    unpack(f"{layout.folder(tmp_path / 'image')}:one", tmp_path / "root", tmp_path / "store")
    assert os.readlink(tmp_path / "root/d") == str(outside)
    assert made_images.below(outside) == []


def test_rootless_in_a_user_namespace(tiny_archive, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    need_root()
    # The same umask as ours: a folder that is made for the way there has to be passable.
    image = tiny_archive("oci-archive", devices=False)
    for archive, name in ((image, "plain"), (tiny_archive("oci-archive"), "devices")):
        (tmp_path / f"{name}.tar").write_bytes(archive.read_bytes())
        (tmp_path / f"{name}.tar").chmod(0o644)
    said = ordinary_users.python(
        tmp_path,
        "import layerkit, layerkit.api.open, layerkit.usecases.to_folder, layerkit.model.trees.merge\n"
        "import layerkit.unpack, layerkit.store.fsck, layerkit.store.source, layerkit.images.oci.source\n"
        "import layerkit.images.oci.outer_tar, layerkit.images.docker.archive, layerkit.images.reference\n"
        "import numpy.ma  # by np.unique\n"
        "from layerkit.model.errors import LossyResult",
        """
settings = layerkit.Settings(store=Path("store"))
with layerkit.open_image("plain.tar", settings=settings) as image:
    report = image.unpack("plain")
    print(report.entries, os.stat("plain/etc").st_uid)
with layerkit.open_image("devices.tar", settings=settings) as image:
    try:
        image.unpack("devices")
    except LossyResult as error:
        print("lossy:", error)
print(sorted(os.listdir(".")))
""",
    )
    lines = said.splitlines()
    assert lines[0].split()[1] == "0"
    assert "device nodes" in lines[1]
    assert "devices'" not in lines[2].replace("devices.tar", "")
    unpack(tmp_path / "plain.tar", tmp_path / "ours", tmp_path / "our-store")
    got, want = snapshot(tmp_path / "plain"), snapshot(tmp_path / "ours")
    shift = {0: 4242} | {i: ordinary_users.SUBIDS + i - 1 for i in range(1, 65537)}
    assert {p: (s.mode, s.uid, s.gid, s.size, s.mtime_ns, s.sha256, s.links) for p, s in got.items()} == {
        p: (s.mode, shift[s.uid], shift[s.gid], s.size, s.mtime_ns, s.sha256, s.links) for p, s in want.items()
    }


def test_the_command_says_what_it_did(tiny_image: Path, tmp_path: Path) -> None:
    need_root()
    arguments = ("unpack", tiny_image, tmp_path / "root", "--store", tmp_path / "store")
    done = subprocess.run(command(*arguments, "--uid-map", MAP[0]), capture_output=True, text=True, check=True)
    assert "0 of" not in done.stdout and str(tmp_path / "root") in done.stdout
    again = subprocess.run(command(*arguments, "--json"), capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "not empty" in again.stderr and again.stdout == ""
    assert (tmp_path / "root/etc").stat().st_uid == 100000


def test_an_owner_outside_the_map_is_an_error_before_anything_is_made(tiny_image: Path, tmp_path: Path) -> None:
    need_root()
    with pytest.raises(layerkit.LayerkitError, match="outside the map"):
        unpack(tiny_image, tmp_path / "root", tmp_path / "store", ["0:100000:1"])
    assert not (tmp_path / "root").exists()
