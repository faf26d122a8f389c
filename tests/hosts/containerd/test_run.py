"""A real containerd with layerkit as its snapshotter: images, containers, maps, and what stock does instead."""

from __future__ import annotations

import concurrent.futures
import hashlib
import io
import json
import os
import signal
import stat
import struct
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import judge
import made_images
import pytest
import runnable
from engines import Engine, containerd, containerd_version, short_folder
from kernel_mounts import mounts_below
from needs import need_root, need_tool
from programs import command, run, wait_for
from snapshot_client import Process, mounted, snapshotter, unmount

from layerkit.hosts.containerd.config_toml import proxy_plugin

NAME = "layerkit.example/ctd:1"
MAP = "0:100000:65536"
_NET_RAW = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
_DATA = os.urandom(24 << 20)
_CONTAINERS = int(os.environ.get("LAYERKIT_TEST_CONTAINERS", "20"))


@dataclass
class Host:
    """A containerd and its snapshotter."""

    engine: Engine
    process: Process
    folder: Path

    def run(self, name: str, script: str, *, shift: int = 0, image: str = NAME, keep: bool = False) -> str:
        """Run a shell script in a container, mapped if there is a shift."""
        maps: tuple[object, ...] = ()
        if shift:
            extent = f"0:{shift}:65536"
            maps = ("--remap-labels", "--uidmap", extent, "--gidmap", extent)
        flags: tuple[object, ...] = ("--detach", "--null-io") if keep else ("--rm",)
        flags = (*flags, "--snapshotter", "layerkit", "--runc-root", self.folder / "runc", *maps)
        return self.engine("run", *flags, image, name, "/bin/sh", "-c", script)

    def again(self) -> None:
        """Start the snapshotter that was killed; containerd tries its socket again within 3 seconds."""
        self.process.start()
        wait_for(lambda: self.engine.run("snapshot", "--snapshotter", "layerkit", "ls").returncode == 0)

    def kill(self, *names: str) -> None:
        for name in names:
            self.engine("task", "kill", "--signal", "SIGKILL", name)
        for name in names:
            self.engine("task", "delete", "--force", name)
            self.engine("container", "delete", name)

    def clear(self) -> None:
        """Remove what a test that failed left running."""
        for name in self.engine("container", "ls", "-q").split():
            self.engine.run("task", "kill", "--signal", "SIGKILL", name)
            self.engine.run("task", "delete", "--force", name)
            self.engine.run("container", "delete", name)

    def empty(self) -> None:
        """Remove images and see that nothing of them stays."""
        self.clear()
        for image in self.engine("image", "ls", "-q").split():
            self.engine("image", "rm", "--sync", image)
        assert os.listdir(self.process.root / "snapshots") == []
        assert mounts_below(self.process.run) == []


def _busybox() -> bytes:
    return Path("/usr/bin/busybox").resolve().read_bytes()


def _layers() -> list[bytes]:
    """Return a base with busybox, setuid and capable programs, and a layer of a large file."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, mode in (("bin", 0o755), ("proc", 0o555), ("sys", 0o555), ("dev", 0o755), ("tmp", 0o1777)):
            archive.addfile(made_images.special(name, tarfile.DIRTYPE, mode=mode))
        for name, mode, owner, caps in (
            ("bin/busybox", 0o755, 0, b""), ("bin/ping", 0o755, 0, _NET_RAW), ("bin/su", 0o4755, 0, b""),
            ("bin/own", 0o2750, 1000, b""),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            data = _busybox() if name == "bin/busybox" else b"#!/bin/sh\n"
            info.size, info.mode, info.uid, info.gid = len(data), mode, owner, owner
            if caps:
                info.pax_headers = {"SCHILY.xattr.security.capability": caps.decode()}
            archive.addfile(info, io.BytesIO(data))
        for name in ("sh", "stat", "id", "cat", "sleep", "chown", "ls", "touch", "md5sum", "ping6", "seq"):
            archive.addfile(made_images.special(f"bin/{name}", tarfile.SYMTYPE, "busybox", mode=0o777))
    big = io.BytesIO()
    with tarfile.open(fileobj=big, mode="w") as archive:
        info = tarfile.TarInfo("data")
        info.size, info.uid, info.gid = len(_DATA), 33, 33
        archive.addfile(info, io.BytesIO(_DATA))
    return [out.getvalue(), big.getvalue()]


def named(entry: dict[str, Any], name: str) -> dict[str, Any]:
    """Return an entry of index.json under the whole name that containerd takes for it."""
    return entry | {"annotations": {"io.containerd.image.name": name}}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_tool("busybox")
    layout = made_images.Layout()
    layout.list(named(layout.image(*_layers()), NAME))
    return layout.archive(tmp_path_factory.mktemp("image") / "image.tar")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    need_root()
    need_tool("containerd", "ctr", "runc", "setpriv")
    with short_folder() as folder, snapshotter(folder) as process:
        folder.chmod(0o711)  # root of a container is nobody here, and has to get to its root filesystem
        config = proxy_plugin("layerkit", process.socket, unpack=containerd_version() >= (2, 0))
        with containerd(folder, config=config) as engine:
            yield Host(engine, process, folder)


@pytest.fixture
def imported(host: Host, archive: Path) -> Iterator[Host]:
    host.engine("image", "import", "--snapshotter", "layerkit", archive)
    yield host
    host.empty()


@pytest.fixture
def added(host: Host, archive: Path) -> Iterator[Host]:
    layerkit(host, "containerd", "add", archive, "--name", NAME)
    yield host
    host.empty()


def layerkit(host: Host, *words: object) -> str:
    env = {"CONTAINERD_ADDRESS": host.engine.address}
    return run(*command(*words), "--store", host.process.store, env=env).stdout


_LOOK = "stat -c '%n %a %u %g' /bin/busybox /bin/su /bin/own /data /tmp /; id -u; cat /proc/self/uid_map"


def _seen(shift: int) -> list[str]:
    lines = [
        "/bin/busybox 755 0 0", "/bin/su 4755 0 0", "/bin/own 2750 1000 1000", "/data 644 33 33", "/tmp 1777 0 0",
        "/ 755 0 0", "0",
    ]  # fmt: skip
    return [*lines, f"0 {shift} 65536" if shift else "0 0 4294967295"]


@pytest.mark.parametrize("way", ["imported", "added"])
def test_two_maps_of_one_image(request: pytest.FixtureRequest, way: str, tmp_path: Path) -> None:
    """Unpacked by containerd, or never unpacked: owners are right inside and outside, setuid and caps stay."""
    host: Host = request.getfixturevalue(way)
    for shift in (0, 100_000, 300_000):
        seen = [" ".join(line.split()) for line in host.run(f"look-{shift}", _LOOK, shift=shift).splitlines()]
        assert seen == _seen(shift)
        script = "touch /made; chown 5:6 /made /data; stat -c '%u %g' /made /data; md5sum < /data; sleep 100"
        host.run(f"c-{shift}", script, shift=shift, keep=True)
        info = json.loads(host.engine("container", "info", f"c-{shift}"))
        assert info["Snapshotter"] == "layerkit"
        root = host.folder / f"state/io.containerd.runtime.v2.task/default/c-{shift}/rootfs"
        wait_for(partial(_has_group, root / "made", shift + 6))
        facts = (root / "made").stat()
        assert (facts.st_uid, facts.st_gid) == (shift + 5, shift + 6)
        assert stat.S_IMODE((root / "bin/su").stat().st_mode) == 0o4755
        assert (root / "bin/su").stat().st_uid == shift
        caps = os.getxattr(root / "bin/ping", "security.capability")
        assert struct.unpack_from("<I", caps, 4)[0] == 1 << 13
        assert (struct.unpack_from("<I", caps, 20)[0] if len(caps) == 24 else 0) == shift
        # A chown of 24 MB took no bytes.
        if shift:
            assert int(_usage(host, f"c-{shift}")) < 1 << 20
    host.kill("c-0", "c-100000", "c-300000")


def _has_group(path: Path, gid: int) -> bool:
    return path.exists() and path.stat().st_gid == gid


def _usage(host: Host, key: str) -> str:
    """Return the bytes of a container's snapshot."""
    [row] = [info for info in host.process.client.walk() if info.name.endswith(f"/{key}")]
    return str(host.process.client.usage(row.name).size)


def test_stock_remap_loses_what_ours_keeps(imported: Host) -> None:
    """containerd 1.x chowns a copy of the root filesystem itself: setuid, setgid and capabilities go."""
    host = imported
    maps = ("--uidmap", MAP, "--gidmap", MAP)
    script = "stat -c '%a' /bin/su /bin/own"
    flags = ("--rm", "--runc-root", host.folder / "runc", "--snapshotter", "overlayfs", *maps)
    stock = host.engine("run", *flags, NAME, "s1", "/bin/sh", "-c", script)
    ours = host.run("o1", script, shift=100_000)
    assert ours.split() == ["4755", "2750"]
    version = host.engine("version")
    if "1.6" in version or "1.7" in version:
        assert stock.split() == ["755", "750"]


def test_added_image_brings_no_content(added: Host) -> None:
    """The layers are in layerkit's store, and nowhere else."""
    host = added
    sizes = [line.split()[1:3] for line in host.engine("content", "ls").splitlines()[1:]]
    assert len(sizes) == 2 and all(unit in ("B", "KiB") or size.endswith(("B", "KiB")) for size, unit in sizes)
    listed = host.engine("snapshot", "--snapshotter", "layerkit", "ls")
    assert listed.count("Committed") == 2
    # Under another namespace of containerd too, and once more under another name.
    layerkit(host, "containerd", "add", f"store:{NAME}", "--namespace", "other", "--name", "other:1")
    layerkit(host, "containerd", "add", f"store:{NAME}", "--name", NAME)
    flags = ("--rm", "--runc-root", host.folder / "runc", "--snapshotter", "layerkit")
    text = host.engine("--namespace", "other", "run", *flags, "other:1", "o1", "/bin/sh", "-c", "id -u")
    assert text.strip() == "0"
    assert len([info for info in host.process.client.walk() if info.kind == 3]) == 2
    host.engine("--namespace", "other", "image", "rm", "--sync", "other:1")
    assert host.run("still", "id -u").strip() == "0"


def test_content_of_an_image_that_was_added_survives_gc(added: Host) -> None:
    host = added
    host.engine("image", "rm", "--sync", "nothing:1", code=0)
    host.engine("content", "prune", "references", code=0)
    assert host.run("after", "id -u").strip() == "0"


def test_many_maps_and_containers_at_once(added: Host) -> None:
    """20 maps, 20 containers started at once; the snapshotter is killed while they start, and again later."""
    host = added
    host.run("first", "id -u", shift=100_000)
    names = [f"m{number}" for number in range(_CONTAINERS)]
    script = "touch /mine; md5sum < /data > /sum; sleep 1000"

    def start(name: str) -> None:
        host.run(name, script, shift=100_000 * (1 + int(name[1:])), keep=True)

    with concurrent.futures.ThreadPoolExecutor(_CONTAINERS) as pool:
        list(pool.map(start, names))
    base = host.folder / "state/io.containerd.runtime.v2.task/default"
    roots = [base / name / "rootfs" for name in names]
    wait_for(lambda: all((root / "sum").exists() and (root / "sum").stat().st_size for root in roots))
    assert len({(root / "sum").read_text() for root in roots}) == 1
    assert [(root / "mine").stat().st_uid for root in roots] == [100_000 * (1 + n) for n in range(_CONTAINERS)]
    # What a further map costs: no copy of anything.
    disk = sum(p.lstat().st_blocks * 512 for p in host.process.root.rglob("*"))
    assert disk < 0.01 * len(_DATA) * _CONTAINERS, disk
    # kill -9 of the snapshotter: containers go on, and all is there when it comes back.
    host.process.stop(signal.SIGKILL)
    for number, root in enumerate(roots):
        (root / "while-away").write_text("written")
        assert (root / "data").stat().st_uid == 33 + 100_000 * (1 + number)
    host.again()
    host.run("later", "id -u", shift=100_000)
    host.kill(*names)


def test_container_starts_again_after_the_snapshotter_came_back(added: Host) -> None:
    """A container whose task ended is started again over the snapshot that it has."""
    host = added
    host.run("again", "touch /first; sleep 1000", shift=100_000, keep=True)
    root = host.folder / "state/io.containerd.runtime.v2.task/default/again/rootfs"
    wait_for(lambda: (root / "first").exists())
    host.engine("task", "kill", "--signal", "SIGKILL", "again")
    host.engine("task", "delete", "--force", "again")
    host.process.stop(signal.SIGKILL)
    for target in reversed(mounts_below(host.process.run)):
        subprocess.run(["umount", target], check=True)
    host.again()
    host.engine("task", "start", "--detach", "--null-io", "again")
    wait_for(lambda: (root / "first").exists())
    assert (root / "first").stat().st_uid == 100_000
    host.kill("again")


def test_image_of_100_layers(host: Host, tmp_path: Path) -> None:
    layers = [_layers()[0]]
    for number in range(99):
        files = ((f"l{number}", str(number).encode()), ("last", str(number).encode()))
        layers.append(made_images.tar(*files))
    layout = made_images.Layout()
    layout.list(named(layout.image(*layers), "layerkit.example/hundred:1"))
    file = layout.archive(tmp_path / "hundred.tar")
    script = "cat /last; echo; seq 0 98 | while read n; do cat /l$n; done | md5sum; stat -c %u /l50"
    wanted = hashlib.md5("".join(map(str, range(99))).encode(), usedforsecurity=False).hexdigest()
    for way in ("import", "add"):
        if way == "import":
            host.engine("image", "import", "--snapshotter", "layerkit", file)
        else:
            layerkit(host, "containerd", "add", file, "--name", "layerkit.example/hundred:1")
        for shift in (0, 200_000):
            text = host.run(f"h-{way}-{shift}", script, shift=shift, image="layerkit.example/hundred:1")
            assert text.split() == ["98", wanted, "-", "0"]
        host.empty()


def test_views_and_diffs(added: Host, tmp_path: Path) -> None:
    """What ctr offers besides running: a view of an image, and what a container changed as a layer.

    Not ``ctr image mount``: that of 1.6 unpacks for overlayfs, whatever ``--snapshotter`` says.
    """
    host = added
    snapshots = ("snapshot", "--snapshotter", "layerkit")
    top = next(line.split()[0] for line in host.engine(*snapshots, "ls").splitlines() if line.count("sha256:") == 2)
    (tmp_path / "m").mkdir()
    command = host.engine(*snapshots, "view", "--target", tmp_path / "m", "look", top)
    subprocess.run(["sh", "-c", command], check=True)
    try:
        assert (tmp_path / "m/data").read_bytes() == _DATA
        with pytest.raises(OSError, match="Read-only"):
            (tmp_path / "m/new").touch()
    finally:
        unmount(tmp_path / "m")
    host.engine.run(*snapshots, "rm", "look")  # it has no root label: gc may have been quicker
    host.run("changed", "touch /made; sleep 1000", keep=True)
    root = host.folder / "state/io.containerd.runtime.v2.task/default/changed/rootfs"
    wait_for(lambda: (root / "made").exists())
    diff = host.engine(*snapshots, "diff", "changed").encode(errors="surrogateescape")
    with tarfile.open(fileobj=io.BytesIO(diff)) as archive:
        assert "made" in archive.getnames() and "data" not in archive.getnames()
    host.kill("changed")


@pytest.mark.parametrize("way", ["import", "add"])
def test_judged_by_the_kernel(host: Host, tiny: ModuleType, tmp_path: Path, way: str) -> None:
    """Every entry of an image with all kinds of them, under a map, against a tree that the kernel maps.

    That tree is umoci's, or what containerd unpacked: it lets files inherit default ACLs where umoci does not.
    """
    need_tool("umoci", "skopeo")
    layout = runnable.build(tiny, tmp_path / "layout")
    plain, extents = tmp_path / "plain", ((0, 100_000, 65_536),)  # umoci wants a simple tag
    subprocess.run(["skopeo", "copy", "-q", f"oci:{layout}:{runnable.NAME}", f"oci:{plain}:x"], check=True)
    if way == "import":
        archive = tmp_path / "image.tar"
        subprocess.run(["skopeo", "copy", "-q", f"oci:{plain}:x", f"oci-archive:{archive}:x"], check=True)
        host.engine("image", "import", "--snapshotter", "layerkit", "--base-name", "judged", archive)
    else:
        layerkit(host, "containerd", "add", f"oci:{plain}:x", "--name", "judged:x")
    client = host.process.client
    top = [info for info in client.walk() if info.kind == 3][-1].name
    labels = {f"containerd.io/snapshot/{side}mapping": MAP for side in ("uid", "gid")}
    if way == "import":
        with mounted(client.view("plain", top), tmp_path / "m") as root:
            subprocess.run(["cp", "-a", root, tmp_path / "copy"], check=True)
        client.remove("plain")
        judged = judge.mapped(tmp_path / "copy", tmp_path / "shown", extents)
    else:
        judged = judge.unpacked(f"{plain}:x", tmp_path, extents)
    with judged as shown:
        wanted = judge.snapshot(shown)
    with mounted(client.view("judged", top, labels), tmp_path / "m") as root:
        found = judge.snapshot(root)
    client.remove("judged")
    host.empty()
    # The root is in no layer: each makes it with the time of the run.
    assert judge.differences(found, wanted, skip=frozenset({b"."})) == []
