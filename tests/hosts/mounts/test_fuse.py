"""Metadata served by our FUSE server, under a real overlay: equal to the folder it was read from, in everything."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fuse_counter import counting_mount
from judge import differences, snapshot
from kernel_mounts import mounts_below
from needs import missing, need_root
from programs import wait_for

from layerkit.api import open as api
from layerkit.formats.meta.fuse_tree import FuseTree, write_tree
from layerkit.hosts.mounts.served import Keeper
from layerkit.hosts.podman import mount_program
from layerkit.linux import fuse, mounts
from layerkit.linux import syscalls as sc
from layerkit.linux.syscalls import closing
from layerkit.metaonly import metadata_layer
from layerkit.model.errors import InvalidImage, UnsupportedHost

from trees import file, folder, tree_of  # isort: skip

MAP = ((0, 100000, 5000), (5000, 300000, 60536))
CAPABILITY = struct.pack("<5I", 0x0200_0001, 1 << 10, 0, 0, 0)


@pytest.fixture(autouse=True)
def _root() -> None:
    need_root()
    if not Path(fuse.DEVICE).exists():
        missing("needs /dev/fuse")


def make_layer(root: Path) -> None:
    """Make a folder with one of everything."""
    (root / "bin").mkdir(parents=True)
    tool = root / "bin/tool"
    tool.write_bytes(b"#!/bin/sh\necho ran\n")
    os.chown(tool, 5, 7)
    tool.chmod(0o6755)
    os.setxattr(tool, "security.capability", CAPABILITY)
    os.link(tool, root / "bin/again")
    (root / "empty").touch()
    os.symlink("../" * 100 + "far", root / "link")
    os.lchown(root / "link", 12, 13)
    os.mkfifo(root / "fifo")
    os.mknod(root / "device", 0o600 | 0o060000, os.makedev(259, 70000))
    data = root / "data"
    data.write_bytes(os.urandom(300_000))
    os.setxattr(data, "user.note", b"\0\xff")
    os.utime(data, ns=(0, -1_500_000_001))
    subprocess.run(["setfacl", "-m", "u:1234:rw,g:4321:r", data], check=True)
    shared = root / "shared"
    shared.mkdir(0o2775)
    shared.chmod(0o3775)
    subprocess.run(["setfacl", "-d", "-m", "u:6000:rwx", shared], check=True)
    os.chown(shared, 6000, 0)
    many = root / "many"
    many.mkdir()
    for number in range(1500):
        (many / f"{number:04}-{'n' * (number % 200)}").write_bytes(b"x" * (number % 3))
    (root / os.fsdecode(b"odd \xff\n\\name")).write_bytes(b"odd")
    os.chown(root, 3, 4)


def run_program(store: Path, options: str, target: Path, code: int = 0) -> str:
    target.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "layerkit.cli.mount_program_main", "-o", options, str(target)],
        env={**os.environ, "LAYERKIT_STORE": str(store)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stderr


@contextmanager
def mounted(store: Path, options: str, target: Path) -> Iterator[str]:
    said = run_program(store, options, target)
    try:
        yield said
    finally:
        subprocess.run(["umount", target], check=True)


def map_words(extents: tuple[tuple[int, int, int], ...] = MAP) -> str:
    text = ":".join(f"{c}:{h}:{n}" for c, h, n in extents)
    return f"uidmapping={text}:,gidmapping={text}:"


@pytest.mark.parametrize("rendering", ["fuse", "directory"])
def test_all_attributes_and_bytes_are_those_of_the_folder(rendering: str, tmp_path: Path) -> None:
    layer, target = tmp_path / "layer", tmp_path / "m"
    make_layer(layer)
    want = snapshot(layer)
    with mounted(tmp_path / "store", f"lowerdir={layer},rendering={rendering}", target):
        assert differences(snapshot(target), want) == []
        assert subprocess.run([target / "bin/tool"], capture_output=True, check=True).stdout == b"ran\n"


@pytest.mark.parametrize("rendering", ["fuse", "directory"])
def test_a_map_shows_what_an_idmapped_mount_shows(rendering: str, tmp_path: Path) -> None:
    layer, target, judge = tmp_path / "layer", tmp_path / "m", tmp_path / "judge"
    make_layer(layer)
    judge.mkdir()
    with closing(mounts.idmapped_clone(layer, MAP, MAP)) as fd:
        mounts.attach(fd, judge)
    try:
        with mounted(tmp_path / "store", f"lowerdir={layer},{map_words()},rendering={rendering}", target):
            assert differences(snapshot(target), snapshot(judge)) == []
    finally:
        subprocess.run(["umount", judge], check=True)


def test_layers_merge_as_the_kernel_merges_them(tmp_path: Path) -> None:
    base, middle, top = (tmp_path / name for name in ("base", "middle", "top"))
    make_layer(base)
    (middle / "many").mkdir(parents=True)
    os.setxattr(middle / "many", "trusted.overlay.opaque", b"y")
    (middle / "many/only").write_bytes(b"only")
    os.mknod(middle / "data", 0o020000, 0)
    (middle / "bin").mkdir()
    (middle / "bin/tool").write_bytes(b"another")
    (top / "bin").mkdir(parents=True)
    os.mknod(top / "bin/tool", 0o020000, 0)
    judge, target, both = tmp_path / "judge", tmp_path / "m", f"lowerdir={top}:{middle}:{base}"
    judge.mkdir()
    subprocess.run(["mount", "-t", "overlay", "-o", both, "overlay", judge], check=True)
    try:
        with mounted(tmp_path / "store", f"{both},rendering=fuse", target):
            want = snapshot(judge)
            assert differences(snapshot(target), want) == []
            assert sorted(os.listdir(target / "many")) == ["only"]
        # podman's own way to write what is removed, which the kernel does not know.
        (top / "bin/tool").unlink()
        (top / "bin/.wh.tool").touch()
        (middle / "data").unlink()
        (middle / ".wh.data").touch()
        os.removexattr(middle / "many", "trusted.overlay.opaque")
        (middle / "many/.wh..wh..opq").touch()
        with mounted(tmp_path / "store2", both, target):
            assert differences(snapshot(target), want, skip=frozenset({b"./many", b"./bin", b"."})) == []
    finally:
        subprocess.run(["umount", judge], check=True)


def test_writes_go_to_the_upper_and_reads_stay_where_the_data_is(tmp_path: Path) -> None:
    layer, target, upper = tmp_path / "layer", tmp_path / "m", tmp_path / "c/diff"
    make_layer(layer)
    upper.mkdir(parents=True)
    (tmp_path / "c/work").mkdir()
    before = snapshot(layer)
    words = f"lowerdir={layer},upperdir={upper},workdir={tmp_path}/c/work,volatile,{map_words()}"
    with mounted(tmp_path / "store", words, target):
        assert (target.stat().st_uid, target.stat().st_gid) == (100003, 100004)
        with (target / "data").open("ab") as out:
            out.write(b"more")
        os.unlink(target / "bin/again")
        assert not os.listxattr(target, follow_symlinks=False)
    assert differences(snapshot(layer), before) == []
    assert (upper / "data").stat().st_size == 300_004
    # Without a map the same folder is what the image would hold; with another one it is refused.
    with mounted(tmp_path / "store", words.partition(",volatile")[0], target):
        assert ((target / "data").stat().st_uid, target.stat().st_uid) == (0, 3)
        assert (target / "data").read_bytes().endswith(b"more")
        assert sorted(os.listdir(target / "bin")) == ["tool"]
        with pytest.raises(OSError, match="Read-only"):
            (target / "x").touch()
    said = run_program(tmp_path / "store", words.replace("0:100000:5000", "0:110000:5000"), target, 2)
    assert "commit the container" in said


def test_names_that_are_not_there_never_reach_the_layers(tmp_path: Path) -> None:
    layer, shown, target = tmp_path / "layer", tmp_path / "fuse", tmp_path / "m"
    (layer / "a/b").mkdir(parents=True)
    (layer / "a/b/file").write_bytes(b"file")
    shown.mkdir()
    with counting_mount(layer, shown) as server:
        with mounted(tmp_path / "store", f"lowerdir={shown},rendering=fuse", target):
            server.requests.clear()
            for number in range(500):
                for place in ("", "a/", "a/b/"):
                    assert not (target / f"{place}no-{number}").exists()
            assert server.requests["LOOKUP"] == 0
            assert (target / "a/b/file").read_bytes() == b"file"
            assert server.requests["LOOKUP"] > 0


def test_a_hundred_layers_and_twenty_maps_at_once(tmp_path: Path) -> None:
    layers = [tmp_path / f"l{number:03}" for number in range(100)]
    for number, layer in enumerate(layers):
        (layer / "d").mkdir(parents=True)
        (layer / f"d/own-{number}").write_bytes(b"%d" % number)
        (layer / "shared").write_bytes(b"from %d" % number)
    lower = ":".join(map(str, layers))
    targets = [tmp_path / f"m{number:02}" for number in range(20)]
    run_program(tmp_path / "store", f"lowerdir={lower},{map_words(((0, 5000, 10),))}", targets[0])
    started = []
    for number, target in enumerate(targets[1:], 1):
        target.mkdir()
        words = f"lowerdir={lower},{map_words(((0, 10000 * (number + 1), 10),))}"
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "layerkit.cli.mount_program_main", "-o", words, str(target)],
                env={**os.environ, "LAYERKIT_STORE": str(tmp_path / "store")},
            )
        )
    assert [process.wait(60) for process in started] == [0] * 19
    try:
        for number, target in enumerate(targets):
            assert (target / "shared").stat().st_uid == (10000 * (number + 1) if number else 5000)
            assert (target / "shared").read_bytes() == b"from 0"
            assert len(os.listdir(target / "d")) == 100
            assert (target / "d/own-99").read_bytes() == b"99"
        # One tree for all of them.
        assert len(list((tmp_path / "store/meta").iterdir())) == 1
    finally:
        for target in targets:
            subprocess.run(["umount", "--lazy", target], check=False)


def _answers(tmp_path: Path, kind: type[fuse.Answers] = fuse.Answers) -> fuse.Answers:
    tree = tree_of([folder(b""), file(b"stub", b"x" * 5000), file(b"none"), file(b"slow", b"s")])
    path = tmp_path / "tree"
    with path.open("wb") as out:
        write_tree(metadata_layer(tree), out)
    served = FuseTree(path.read_bytes(), "tree")
    return kind(served, {0: 0}, {0: 0}, served.xattr_sets())


def test_a_stub_without_an_overlay_is_an_error_and_never_zeros(tmp_path: Path) -> None:
    target = tmp_path / "m"
    target.mkdir()
    with Keeper(_answers(tmp_path)) as keeper:
        attach(keeper, target)
    try:
        assert (target / "stub").stat().st_size == 5000
        assert (target / "none").read_bytes() == b""
        with pytest.raises(OSError) as error:
            (target / "stub").read_bytes()
        assert error.value.errno == errno.EIO
        with pytest.raises(OSError):
            (target / "new").touch()
    finally:
        subprocess.run(["umount", target], check=True)
    _gone(keeper.pid)


def attach(keeper: Keeper, target: Path) -> None:
    with closing(keeper.mount()) as root, closing(sc.open_tree(root)) as fd:
        mounts.attach(fd, target)


def _gone(pid: int) -> None:
    """Wait for the end of a keeper; it is our child here."""
    wait_for(lambda: os.waitpid(pid, os.WNOHANG) != (0, 0), "the server lives on without its mount")


class _Stuck(fuse.Answers):
    """Takes the first request for ``slow`` and answers it never."""

    note = mmap.mmap(-1, 4096)
    """Shared by all processes: who took it. Files are none in the namespace that a server lives in."""

    def _lookup(self, row: int, body: bytes) -> bytes:
        if body == b"slow\0" and not self.note[0]:
            struct.pack_into("=BI", self.note, 0, 1, os.getpid())
            time.sleep(600)
        return super()._lookup(row, body)


def test_what_a_killed_worker_had_taken_is_answered_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "m"
    target.mkdir()
    with Keeper(_answers(tmp_path, _Stuck)) as keeper:
        attach(keeper, target)
    sizes: list[int] = []
    asker = threading.Thread(target=lambda: sizes.append((target / "slow").stat().st_size), daemon=True)
    try:
        asker.start()
        wait_for(lambda: _Stuck.note[0])
        os.kill(struct.unpack_from("=BI", _Stuck.note)[1], 9)
        asker.join(120)
        assert sizes == [1]
    finally:
        subprocess.run(["umount", "--lazy", target], check=True)
    _gone(keeper.pid)


def test_a_death_between_the_two_mounts_leaves_nothing(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        with Keeper(_answers(tmp_path)) as keeper:
            (tmp_path / "keeper").write_text(str(keeper.pid))
            keeper.mount()
            os._exit(9)
    os.waitpid(pid, 0)
    server = Path(f"/proc/{(tmp_path / 'keeper').read_text()}/stat")

    def ended() -> bool:
        with contextlib.suppress(OSError):
            return server.read_text().rpartition(")")[2].split()[0] == "Z"
        return True

    wait_for(ended, "the server lives on")
    assert not mounts_below(tmp_path)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Killed while it reads layers, writes the tree, starts the server, mounts: the next finds a whole state."""
    layer, target, store = tmp_path / "layer", tmp_path / "m", tmp_path / "store"
    make_layer(layer)
    target.mkdir()
    others = set(_named(b"layerkit-fuse"))
    command = [sys.executable, "-m", "layerkit.cli.mount_program_main", "-o", f"lowerdir={layer},{map_words()}"]
    early = late = number = 0
    delay = 0.05
    while number < 40 and not (early > 5 and late > 5):
        number += 1
        child = subprocess.Popen(
            [*command, str(target)], env={**os.environ, "LAYERKIT_STORE": str(store)}, start_new_session=True
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(delay)
        child.kill()
        child.wait()
        if mounts_below(tmp_path):
            late += 1
            # Killed after all was done, or not killed at all: then it is whole.
            assert (target / "data").stat().st_uid == 100000
            subprocess.run(["umount", target], check=True)
            delay *= 0.8
        else:
            early += 1
            delay *= 1.15 if late else 1.5
        if early == 3:
            # From here on the tree is there, and the moments are those of server and mount.
            run_program(store, f"lowerdir={layer},{map_words()}", target)
            subprocess.run(["umount", target], check=True)
    assert early and late
    wait_for(lambda: not set(_named(b"layerkit-fuse")) - others, "servers without a mount")
    with mounted(store, f"lowerdir={layer},{map_words()}", target):
        judge = tmp_path / "judge"
        judge.mkdir()
        with closing(mounts.idmapped_clone(layer, MAP, MAP)) as fd:
            mounts.attach(fd, judge)
        try:
            assert differences(snapshot(target), snapshot(judge)) == []
        finally:
            subprocess.run(["umount", judge], check=True)
    # Nothing of the runs that were ended stays; one that reads layers may outlive the program by a moment.

    def collected() -> bool:
        api.collect_garbage(store)
        return not list((store / "tmp").iterdir())

    wait_for(collected)
    assert len(list((store / "meta").iterdir())) == 1


def _named(name: bytes) -> Iterator[int]:
    """Give the living processes that call themselves ``name``."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (process / "stat").read_bytes()
            if b"(%s)" % name in state and state.rpartition(b")")[2].split()[0] not in (b"Z", b"X"):
                yield int(process.name)


def test_a_kernel_that_refuses_is_told_with_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, target = tmp_path / "layer", tmp_path / "m"
    make_layer(layer)
    target.mkdir()

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EINVAL, "overlay: datadir+")

    monkeypatch.setattr(mounts, "overlay", refuse)
    options = f"lowerdir={layer},{map_words()}"
    with pytest.raises(UnsupportedHost, match=r"Linux 6\.8.*setup podman --undo"):
        mount_program.mount(options, target, tmp_path / "store")
    assert not mounts_below(tmp_path)
    assert not list(target.iterdir())


@pytest.mark.parametrize("damage", ["short", "magic", "version", "facts", "offset"])
def test_a_damaged_tree_is_refused(damage: str, tmp_path: Path) -> None:
    _answers(tmp_path)
    data = bytearray((tmp_path / "tree").read_bytes())
    if damage == "short":
        data = data[:100]
    elif damage == "magic":
        data[0] ^= 1
    elif damage == "version":
        data[8] = 9
    elif damage == "facts":
        data[66] ^= 0xFF
    else:
        data[40:48] = struct.pack("<Q", 1 << 40)
    with pytest.raises(InvalidImage):
        FuseTree(bytes(data), "tree")
