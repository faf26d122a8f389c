"""Snapshots with mapped owners, and layers that lie in layerkit's store, over the socket and with real mounts."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import stat
import struct
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import made_images
import pytest
from engines import short_folder
from kernel_mounts import mounts_below
from needs import need_root, need_tool
from page_cache import drop, resident_bytes
from programs import run_layerkit
from snapshot_client import ACTIVE, COMMITTED, Client, Process, mounted, refused, snapshotter

from layerkit.api import open as api
from layerkit.model.digest import Digest
from layerkit.model.image import chain_ids

REF = "containerd.io/snapshot.ref"
NET_RAW = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)  # cap_net_raw=ep, revision 2
_BIG = os.urandom(3 << 20)
_NO_IDMAP = "import layerkit.hosts.containerd.snapshots.layers as L; L.Layers.idmap = False"
_NO_EROFS = f"{_NO_IDMAP}; from layerkit.linux.probe import Features; Features.erofs = False"
_SECONDS_OF_CHAOS = float(os.environ.get("LAYERKIT_TEST_CHAOS_SECONDS", "4"))


def labels(*extents: str, gid: str = "") -> dict[str, str]:
    text = ",".join(extents)
    return {"containerd.io/snapshot/uidmapping": text, "containerd.io/snapshot/gidmapping": gid or text}


MAPPED = labels("0:100000:65536")


@pytest.fixture
def process() -> Iterator[Process]:
    need_root()
    need_tool("setpriv")
    with short_folder() as folder, snapshotter(folder) as process:
        yield process


@pytest.fixture
def client(process: Process) -> Client:
    return process.client


def fill(root: Path) -> None:
    """Write a layer with what is easily lost: owners, setuid, a capability, an ACL, hard links."""
    for name, uid in (("root-owned", 0), ("user-owned", 1000)):
        (root / name).write_text(name)
        os.chown(root / name, uid, uid)
    (root / "setuid").write_text("#!")
    os.chown(root / "setuid", 7, 8)
    (root / "setuid").chmod(0o4755)
    (root / "ping").write_text("#!")
    os.setxattr(root / "ping", "security.capability", NET_RAW)
    os.link(root / "user-owned", root / "second-name")
    (root / "empty").touch()
    (root / "folder").mkdir()
    (root / "folder" / "link").symlink_to("../root-owned")
    (root / "big").write_bytes(_BIG)


def committed(client: Client, place: Path, name: str, parent: str = "", write: Any = fill) -> str:
    with mounted(client.prepare(f"{name}-prepare", parent), place) as root:
        write(root)
    client.commit(name, f"{name}-prepare")
    return name


def check_filled(root: Path, shift: int) -> None:
    for name, uid in (("root-owned", 0), ("user-owned", 1000), ("second-name", 1000), ("empty", 0), ("folder", 0)):
        facts = (root / name).lstat()
        assert (facts.st_uid, facts.st_gid) == (uid + shift, uid + shift), name
    assert (root / "user-owned").stat().st_ino == (root / "second-name").stat().st_ino
    assert (root / "root-owned").read_text() == "root-owned" == (root / "folder" / "link").read_text()
    assert (root / "big").read_bytes() == _BIG
    facts = (root / "setuid").stat()
    assert (facts.st_mode, facts.st_uid, facts.st_gid) == (stat.S_IFREG | 0o4755, 7 + shift, 8 + shift)
    # Revision 3 says whose root the capability is for; the kernel shows 0 as revision 2.
    found = os.getxattr(root / "ping", "security.capability")
    assert struct.unpack_from("<II", found)[1] == 1 << 13
    assert (struct.unpack_from("<I", found, 20)[0] if len(found) == 24 else 0) == shift


@pytest.mark.parametrize("inject", ["", _NO_IDMAP, _NO_EROFS], ids=["idmapped", "own-meta", "directory"])
def test_maps_of_unpacked_layers(process: Process, tmp_path: Path, inject: str) -> None:
    """Each way of remapping that a host may leave shows the same."""
    if inject:
        process.stop()
        process.start(inject=inject)
    client = process.client
    base = committed(client, tmp_path / "m", "base")
    top = committed(
        client, tmp_path / "m", "top", base,
        lambda root: ((root / "empty").unlink(), (root / "folder/link").unlink(), (root / "new").write_text("new")),
    )  # fmt: skip
    for shift in (100_000, 300_000):
        wanted = labels(f"0:{shift}:65536")
        with mounted(client.prepare(f"base-{shift}", base, wanted), tmp_path / "m") as root:
            check_filled(root, shift)
            facts = root.stat()
            assert (facts.st_uid, facts.st_gid, stat.S_IMODE(facts.st_mode)) == (shift, shift, 0o755)
        with mounted(client.view(f"top-{shift}", top, wanted), tmp_path / "m") as root:
            assert not (root / "empty").exists() and os.listdir(root / "folder") == []
            assert (root / "new").read_text() == "new" and (root / "new").stat().st_uid == shift
            assert (root / "big").read_bytes() == _BIG
        assert client.usage(f"base-{shift}").inodes == 1
    # What it costs: next to nothing, against the layer's bytes.
    client.cleanup()
    assert _disk(process.root / "meta") < 0.02 * 2 * len(_BIG)


def _disk(folder: Path) -> int:
    return sum(p.lstat().st_blocks * 512 for p in folder.rglob("*"))


def test_changes_in_a_mapped_snapshot(client: Client, process: Process, tmp_path: Path) -> None:
    base = committed(client, tmp_path / "m", "base")
    with mounted(client.prepare("c", base, MAPPED), tmp_path / "m") as root:
        os.chown(root / "big", 100_005, 100_005)
        (root / "big").chmod(0o600)
        (root / "root-owned").write_text("changed")
        (root / "setuid").unlink()
        (root / "made").write_text("made")
        assert (root / "big").read_bytes() == _BIG
    # chown and chmod copied no data up.
    assert client.usage("c").size < 65536
    with mounted(client.mounts("c"), tmp_path / "m") as root:
        assert (root / "big").stat().st_uid == 100_005 and (root / "big").read_bytes() == _BIG
        assert (root / "root-owned").read_text() == "changed" and not (root / "setuid").exists()
    with mounted(client.view("plain", base), tmp_path / "m") as root:
        check_filled(root, 0)


def test_commit_of_a_mapped_snapshot(client: Client, tmp_path: Path) -> None:
    base = committed(client, tmp_path / "m", "base")
    with mounted(client.prepare("c", base, MAPPED), tmp_path / "m") as root:
        os.chown(root / "big", 100_005, 100_005)
        (root / "made").write_text("made")
        os.chown(root / "made", 100_001, 100_001)
    client.commit("image", "c")
    for key, wanted in (("same", MAPPED), ("none", {})):
        with mounted(client.prepare(key, "image", wanted), tmp_path / "m") as root:
            assert (root / "made").stat().st_uid == 100_001 and (root / "made").read_text() == "made"
            assert (root / "big").stat().st_uid == 100_005 and (root / "big").read_bytes() == _BIG
            assert (root / "user-owned").stat().st_uid == 101_000
    with refused("INVALID_ARGUMENT") as text:
        client.prepare("other", "image", labels("0:300000:65536"))
    assert "0:100000:65536" in text[0]


def test_several_ranges_and_maps_that_cannot_be(client: Client, tmp_path: Path) -> None:
    base = committed(client, tmp_path / "m", "base")
    several = labels("0:100000:1000", "1000:500000:1", "1001:101001:1000", gid="0:200000:2000")
    with mounted(client.prepare("several", base, several), tmp_path / "m") as root:
        facts = (root / "user-owned").stat()
        assert (facts.st_uid, facts.st_gid) == (500_000, 201_000)
        assert (root / "setuid").stat().st_uid == 100_007
    with refused("INVALID_ARGUMENT") as text:
        client.prepare("short", base, labels("0:100000:100"))
    assert "second-name: uid 1000" in text[0]
    for broken in (
        labels("0:1"), labels("x:1:2"), labels("0:1:0"), labels("0:0:10", "5:20:10"), labels("0:4294967290:10"),
        {"containerd.io/snapshot/uidmapping": "0:1:1"},
    ):  # fmt: skip
        with refused("INVALID_ARGUMENT"):
            client.prepare("broken", base, broken)
    assert sorted(info.name for info in client.walk()) == ["base", "several"]
    with mounted(client.prepare("new", "", MAPPED), tmp_path / "m") as root:
        assert root.stat().st_uid == 100_000


@pytest.mark.usefixtures("caches_stay")
def test_page_cache_grows_once(client: Client, tmp_path: Path) -> None:
    base = committed(client, tmp_path / "m", "base")
    with ExitStack() as stack:
        roots = []
        for shift in (100_000, 300_000):
            found = client.prepare(f"c{shift}", base, labels(f"0:{shift}:65536"))
            roots.append(stack.enter_context(mounted(found, tmp_path / str(shift))))
        drop(roots[0] / "big")
        assert resident_bytes(roots[1] / "big")[0] == 0
        (roots[0] / "big").read_bytes()
        assert resident_bytes(roots[1] / "big") == (len(_BIG), len(_BIG))


# Layers in layerkit's store


def _layer(files: dict[str, tuple[bytes, int, dict[str, bytes]]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, (data, uid, xattrs) in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.uid, info.gid, info.mode = len(data), uid, uid, 0o755
            info.pax_headers = {
                f"SCHILY.xattr.{key}": value.decode("utf-8", "surrogateescape") for key, value in xattrs.items()
            }
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
def chain(process: Process, tmp_path: Path) -> list[str]:
    """Bring an image of three layers into the store that the snapshotter looks at; return its chain_ids."""
    layers = [
        _layer({"one": (b"1" * 5000, 0, {}), "ping": (b"#!", 0, {"security.capability": NET_RAW})}),
        _layer({"two": (b"2" * 5000, 1000, {}), "one": (b"over", 5, {})}),
        _layer({"three": (_BIG, 7, {}), ".wh.two": (b"", 0, {})}),
    ]
    layout = made_images.Layout()
    layout.list(layout.image(*layers), "stored")
    with api.open_image(
        f"oci:{layout.folder(tmp_path / 'layout')}:stored", settings=api.Settings(store=process.store)
    ) as image:
        image.remap(None)
    return chain_ids([Digest.of(layer) for layer in layers])


def adopt(client: Client, chain: list[str]) -> str:
    """Ask for a chain as containerd does when it unpacks; return the backend's name for the top."""
    parent = ""
    for number, ref in enumerate(chain):
        with refused("ALREADY_EXISTS"):
            client.prepare(f"extract-{number} {ref}", parent, {REF: ref})
        found = client.walk(f'labels."{REF}"=={ref},parent=="{parent}"')
        assert [info.kind for info in found] == [COMMITTED]
        parent = found[0].name
    return parent


def test_chain_in_the_store(client: Client, process: Process, chain: list[str], tmp_path: Path) -> None:
    top = adopt(client, chain)
    assert adopt(client, chain) == top  # of another namespace of containerd: the same snapshots
    assert len(client.walk()) == 3
    assert client.usage(top).size == 0 and _disk(process.root / "snapshots") == 0
    for key, wanted, shift in (("plain", {}, 0), ("a", MAPPED, 100_000), ("b", labels("0:300000:65536"), 300_000)):
        with mounted(client.prepare(key, top, wanted), tmp_path / "m") as root:
            assert sorted(os.listdir(root)) == ["one", "ping", "three"]
            assert {name: (root / name).stat().st_uid - shift for name in os.listdir(root)} == {
                "one": 5, "ping": 0, "three": 7,
            }  # fmt: skip
            assert (root / "one").read_bytes() == b"over" and (root / "three").read_bytes() == _BIG
            assert len(os.getxattr(root / "ping", "security.capability")) == (24 if shift else 20)
            (root / "three").chmod(0o711)
            (root / "new").write_text("new")
    with refused("INVALID_ARGUMENT"):
        client.prepare("short", top, labels("0:100000:6"))
    # A chain that nobody has is unpacked as ever.
    other = "sha256:" + hashlib.sha256(b"other").hexdigest()
    assert client.prepare(f"extract-9 {other}", top, {REF: other})


def test_layers_above_a_chain_in_the_store(client: Client, chain: list[str], tmp_path: Path) -> None:
    """An image shares its base with one of the store, and its own layer is unpacked on top."""
    base = adopt(client, chain[:2])
    above = committed(client, tmp_path / "m", "above", base)
    for key, wanted, shift in (("plain", {}, 0), ("a", MAPPED, 100_000)):
        with mounted(client.prepare(key, above, wanted), tmp_path / "m") as root:
            check_filled(root, shift)
            assert (root / "two").stat().st_uid == 1000 + shift and (root / "two").read_bytes() == b"2" * 5000
            assert (root / "one").read_bytes() == b"over"
            (root / "one").chmod(0o600)
            assert (root / "one").read_bytes() == b"over"
    assert client.usage("a").size < 65536


def test_store_keeps_what_snapshots_need(
    client: Client, process: Process, chain: list[str], tmp_path: Path
) -> None:
    top = adopt(client, chain)
    with api.open_store(process.store) as store:
        names = [name for stored in store.images() for name in stored.names]
        own = [name for name in names if not name.startswith("snapshotter-")]
        assert len(names) == 2
        store.remove_image(own[0])
    api.collect_garbage(process.store)
    with mounted(client.prepare("c", top, MAPPED), tmp_path / "m") as root:
        assert (root / "three").read_bytes() == _BIG
    client.remove("c")
    for info in reversed(client.walk()):
        client.remove(info.name)
    client.cleanup()
    api.collect_garbage(process.store)
    with api.open_store(process.store) as store:
        assert store.images() == []
    assert mounts_below(process.run) == []
    # Without the image nothing says "already exists" any more.
    assert client.prepare(f"extract {chain[0]}", "", {REF: chain[0]})


def test_a_store_that_cannot_be_read_stops_nothing(
    client: Client, process: Process, chain: list[str], tmp_path: Path
) -> None:
    (process.store / "version.json").write_text("{")
    assert client.prepare(f"extract {chain[0]}", "", {REF: chain[0]})
    assert "not asked for layers" in process.log()


def test_further_maps_of_the_real_image(client: Client, process: Process, app_image: Path, tmp_path: Path) -> None:
    with api.open_image(f"oci-archive:{app_image}", settings=api.Settings(store=process.store)) as image:
        data = image.remap(None).data_bytes
        top = adopt(client, chain_ids(image.image.diff_ids))
    client.prepare("first", top, MAPPED)
    before = _disk(process.root) + _disk(process.store)
    for number in range(20):
        wanted = labels(f"0:{200_000 + 100_000 * number}:65536")
        found = client.prepare(f"c{number}", top, wanted)
        with mounted(found, tmp_path / "m") as root:
            assert (root / "opt/app/main.py").stat().st_uid == 201_000 + 100_000 * number
    assert (_disk(process.root) + _disk(process.store) - before) / 20 < 0.01 * data


def test_only_root_and_only_one(process: Process, tmp_path: Path) -> None:
    assert stat.S_IMODE(process.socket.stat().st_mode) == 0o600
    for words, said in (
        (("--root", process.root, "--address", tmp_path / "s"), "another snapshotter runs on it"),
        (("--root", tmp_path / "r", "--address", process.socket), "another process answers there"),
        (("--root", tmp_path / "r,x", "--address", tmp_path / "s"), "cannot stand in mount options"),
        (("--root", tmp_path / "r", "--address", tmp_path / ("s" * 100)), "at most 107 bytes"),
        (("--root", tmp_path / "r", "--address", tmp_path), "not a socket"),
    ):
        flags = (*words, "--run", tmp_path / "x")
        assert said in run_layerkit("snapshotter", *flags, code=2).stderr
    assert process.client.walk() == []


# Kills


def test_folders_without_a_row(client: Client, process: Process, tmp_path: Path) -> None:
    for name in ("1", "2", "new-7", "rm-8", "junk"):
        (process.root / "snapshots" / name / "left").mkdir(parents=True)
    with mounted(client.prepare("a"), tmp_path / "m") as root:
        assert os.listdir(root) == []
    client.cleanup()
    assert os.listdir(process.root / "snapshots") == ["1"]


def test_reboot(client: Client, process: Process, chain: list[str], tmp_path: Path) -> None:
    """All mounts and /run are gone: containers that are started again find their snapshots."""
    top, base = adopt(client, chain), committed(client, tmp_path / "m", "base")
    above = committed(client, tmp_path / "m", "above", base, lambda root: (root / "empty").unlink())
    for key, parent in (("of-store", top), ("of-folders", above)):
        with mounted(client.prepare(key, parent, MAPPED), tmp_path / "m") as root:
            (root / "kept").write_text(key)
    process.stop(signal.SIGKILL)
    for target in reversed(mounts_below(process.run)):
        subprocess.run(["umount", target], check=True)
    shutil.rmtree(process.run)
    process.start()
    for key, name in (("of-store", "three"), ("of-folders", "big")):
        with mounted(process.client.mounts(key), tmp_path / "m") as root:
            assert (root / "kept").read_text() == key and (root / name).read_bytes() == _BIG
            assert (root / name).stat().st_uid >= 100_000


def test_kill_at_any_moment(process: Process, chain: list[str], tmp_path: Path) -> None:
    """Four clients work; the process is killed again and again; each time a whole state is found."""
    client = process.client
    top, base = adopt(client, chain), committed(client, tmp_path / "m", "base")
    place = tmp_path / "running"
    end, stop = time.monotonic() + _SECONDS_OF_CHAOS, threading.Event()
    kills = checked = 0
    with mounted(client.prepare("running", base, MAPPED), place):
        done: list[tuple[str, str]] = []  # what the service said it did, in its order
        while kills < 3 or not checked or time.monotonic() < end:
            stop.clear()
            threads = [
                threading.Thread(target=_work, args=(process, n, kills, base, top, done, stop)) for n in range(4)
            ]
            for thread in threads:
                thread.start()
            time.sleep(0.05 + 0.03 * (kills % 8 if checked else kills))
            stop.set()
            process.process.kill()
            for thread in threads:
                thread.join()
            process.stop(signal.SIGKILL)
            check_filled(place, 100_000)  # the container goes on
            (place / f"written-{kills}").write_text("while nobody serves")
            process.start()
            kills += 1
            checked += _check_whole(process, done)
        assert checked
        check_filled(place, 100_000)
    for info in reversed(process.client.walk()):
        process.client.remove(info.name)
    process.client.cleanup()
    assert os.listdir(process.root / "snapshots") == os.listdir(process.root / "meta") == []
    assert os.listdir(process.root / "index") == [] == mounts_below(process.run)


def _work(
    process: Process,
    number: int,
    turn: int,
    base: str,
    top: str,
    done: list[tuple[str, str]],
    stop: threading.Event,
) -> None:
    import grpc

    client = Client(process.socket)
    try:
        for count in range(10_000):
            if stop.is_set():
                return
            key = f"{turn}-{number}-{count}"
            parent = (base, top)[count % 2]
            client.prepare(key, parent, labels(f"0:{100_000 * (1 + count % 5)}:65536"))
            done.append(("active", key))
            if count % 3 == 0:
                done.append(("going", key))  # a kill may swallow the answer
                client.remove(key)
                done.append(("gone", key))
            elif count % 3 == 1:
                client.prepare(f"{key}-layer", base)
                client.commit(f"{key}-committed", f"{key}-layer")
                done.append(("committed", f"{key}-committed"))
            else:
                client.cleanup()
    except grpc.RpcError as error:
        assert error.code().name in ("UNAVAILABLE", "CANCELLED", "UNKNOWN"), error
    finally:
        client.close()


def _check_whole(process: Process, done: list[tuple[str, str]]) -> int:
    """Compare what is there with what was promised; empty ``done``."""
    client = process.client
    found = {info.name: info for info in client.walk()}
    for what, name in done:
        if what == "gone":
            assert name not in found
            continue
        if what != "going" and ("going", name) not in done:
            assert found[name].kind == (ACTIVE if what == "active" else COMMITTED), name
    folders = set(os.listdir(process.root / "snapshots"))
    in_store = sum(info.name.startswith("layerkit/") for info in found.values())
    # No folder without a row, no row without its folder.
    assert len(folders) == len(found) - in_store and all(name.isdigit() for name in folders)
    for name, info in found.items():
        if info.kind == ACTIVE and name != "running":
            client.mounts(name)
            client.remove(name)
    count = len(done)
    done.clear()
    return count
