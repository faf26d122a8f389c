"""``layerkit mount --rendering fuse``: the server comes with the mount, ends with it, and is missed if it dies."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import page_cache
import pytest
from kernel_mounts import mounts_below
from needs import missing, need_root
from programs import command, run_layerkit, wait_for

import layerkit
from layerkit.api import open as api
from layerkit.hosts.mounts import mount as mounter
from layerkit.hosts.mounts import served
from layerkit.linux import fuse
from layerkit.linux import mounts as kernel_mounts
from layerkit.model.errors import StoreError, UnmappedId, UsageError

MAP = layerkit.mapping(["0:100000:65536"])


@pytest.fixture(autouse=True)
def _host() -> None:
    need_root()
    if not Path(fuse.DEVICE).exists():
        missing("needs /dev/fuse")


@pytest.fixture
def store(store_dir: Path) -> Iterator[Path]:
    yield store_dir
    run = mounter.default_run(store_dir)
    for record in mounter.active(run):
        mounter.umount(Path(record.target), run=run, lazy=True)


def mount(
    image: Path, store: Path, target: Path, *, upper: Path | None = None, to: int = 100000, data: str = "auto"
) -> layerkit.Mounted:
    target.mkdir(exist_ok=True)
    with layerkit.open_image(str(image), settings=layerkit.Settings(store=store, data=data)) as opened:
        return opened.mount(target, layerkit.mapping([f"0:{to}:65536"]), rendering="fuse", upper=upper)


def locks(store: Path) -> list[Path]:
    return list(mounter.default_run(store).glob("mnt-*/records/*.server"))


def servers(lock: Path) -> list[int]:
    """Return the processes that hold ``lock`` open."""
    wanted, found = lock.stat().st_ino, []
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):
            if any(os.stat(f"{folder}/{name}").st_ino == wanted for name in os.listdir(folder)):
                found.append(int(folder.parent.name))
    return found


def gone(pid: int) -> bool:
    """Return whether a process has ended; whether somebody has asked how does not matter."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_it_ends_with_the_mount_and_one_file_serves_all_maps(tiny_image: Path, store: Path, tmp_path: Path) -> None:
    first = mount(tiny_image, store, tmp_path / "1")
    second = mount(tiny_image, store, tmp_path / "2", to=200000)
    assert (first.report.rendering, first.report.meta_bytes, second.report.meta_bytes) == ("fuse", 0, 0)
    assert [path.lstat().st_uid for path in (tmp_path / "1", tmp_path / "2")] == [100000, 200000]
    metas = [path.name for path in (store / "meta").rglob("*") if path.is_file()]
    assert sorted(metas) == ["info.json", "tree.fuse"]
    of_both = {lock: servers(lock) for lock in locks(store)}
    assert [len(pids) for pids in of_both.values()] == [3, 3]
    first.umount()
    # The server of the second, which came later, has no copy of the first mount that would keep it.
    (left,) = locks(store)
    for lock, pids in of_both.items():
        if lock != left:
            wait_for(lambda pids=pids: all(map(gone, pids)), "a server lives on without its mount")  # type: ignore[misc]
    assert not any(map(gone, of_both[left]))
    second.umount()
    wait_for(lambda: all(map(gone, of_both[left])), "a server lives on without its mount")
    assert not locks(store)
    assert not mounts_below(tmp_path)


def test_an_upper_can_be_used_again_while_other_servers_live(tiny_image: Path, store: Path, tmp_path: Path) -> None:
    """A server in our mount namespace, or in a copy of it, would hold the upper of every mount made before it."""
    writable = mount(tiny_image, store, tmp_path / "1", upper=tmp_path / "upper")
    other = mount(tiny_image, store, tmp_path / "2")
    (tmp_path / "1/new").write_text("new")
    assert (tmp_path / "1/new").read_text() == "new"
    writable.umount()
    with mount(tiny_image, store, tmp_path / "1", upper=tmp_path / "upper"):
        assert (tmp_path / "1/new").read_text() == "new"
    other.umount()


def test_it_ends_with_the_mount_namespace(tiny_image: Path, store: Path, tmp_path: Path) -> None:
    """The mount is never unmounted: the shell that it was made in just ends."""
    (tmp_path / "m").mkdir()
    words = ["mount", tiny_image, tmp_path / "m", "--rendering", "fuse", "--store", store, "--uid-map", "0:1:65535"]
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", '"$@" && echo there && read go', "sh", *command(*words)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as shell:  # fmt: skip
        assert shell.stdout is not None
        assert shell.stdin is not None
        said = ""
        while "there" not in said:
            said += shell.stdout.readline() or pytest.fail(f"the shell ended: {said}")
        (lock,) = locks(store)
        pids = servers(lock)
        assert len(pids) == 3
        shell.stdin.write("go\n")
    wait_for(lambda: all(map(gone, pids)), "the server keeps the namespace, and the namespace the server")


def test_killed_servers_are_missed(tiny_image: Path, store: Path, tmp_path: Path) -> None:
    target = tmp_path / "m"
    mount(tiny_image, store, target)
    file = next(path for path in target.rglob("*") if path.is_file() and path.stat().st_size > 1000)
    want = file.read_bytes()
    open_file = os.open(file, os.O_RDONLY)
    (lock,) = locks(store)
    assert [row["server"] for row in api.mounts(store=store)] == [""]
    # A worker alone is replaced.
    os.kill(max(servers(lock)), signal.SIGKILL)
    wait_for(lambda: len([pid for pid in servers(lock) if not gone(pid)]) == 3, "no other took its place")
    page_cache.drop_all(page_cache.ALL)
    assert file.read_bytes() == want
    for pid in sorted(servers(lock)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not served.is_served(lock), "the lock stays")
    page_cache.drop_all(page_cache.NAMES)
    # What is open goes on; what is asked for anew is an error, and never zeros.
    assert os.pread(open_file, len(want), 0) == want
    os.close(open_file)
    with pytest.raises(OSError) as error:
        os.listxattr(target / "no-such-name-so-far")
    assert error.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    assert [row["server"] for row in api.mounts(store=store)] == ["killed"]
    done = run_layerkit("mounts", "--store", store)
    assert "were killed; unmount it and mount it again" in " ".join(done.stderr.split())
    api.umount(target, store=store)
    assert not locks(store)
    with mount(tiny_image, store, target):
        assert file.read_bytes() == want


@pytest.mark.parametrize("step", ["fuse.mount", "fuse.open_tree_root", "mounts.overlay", "mounts.attach"])
def test_a_mounter_killed_in_between_leaves_nothing_that_gc_does_not_clear(
    tiny_image: Path, store: Path, tmp_path: Path, step: str
) -> None:
    mount(tiny_image, store, tmp_path / "m", data="objects").umount()
    module, _, name = step.partition(".")
    pid = os.fork()
    if pid == 0:
        place = {"fuse": fuse, "mounts": kernel_mounts}[module]
        setattr(place, name, lambda *_, **__: os._exit(9))
        mount(tiny_image, store, tmp_path / "m", data="objects")
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    left = locks(store)
    assert len(left) == 1
    wait_for(lambda: not served.is_served(left[0]), "the server waits for ever")
    assert not mounts_below(tmp_path)
    api.collect_garbage(store)
    assert not locks(store)


def test_gc_keeps_what_is_served_and_frees_it_afterwards(tiny_image: Path, store: Path, tmp_path: Path) -> None:
    mounted = mount(tiny_image, store, tmp_path / "m")
    with api.open_store(store) as held:
        held.remove_image(mounted.report.name)
    api.collect_garbage(store)
    assert [path.name for path in store.glob("meta/*/tree.fuse")] == ["tree.fuse"]
    page_cache.drop_all(page_cache.NAMES)
    assert sum(1 for _ in (tmp_path / "m").rglob("*")) > 5
    mounted.umount()
    api.collect_garbage(store)
    assert not list(store.glob("meta/*"))


def test_a_tree_that_is_damaged_is_an_error_and_leaves_nothing(
    tiny_image: Path, store: Path, tmp_path: Path
) -> None:
    mount(tiny_image, store, tmp_path / "m").umount()
    (tree,) = store.glob("meta/*/tree.fuse")
    data = tree.read_bytes()
    tree.chmod(0o600)
    tree.write_bytes(b"XX" + data[2:])
    with pytest.raises(StoreError, match="no tree to serve"):
        mount(tiny_image, store, tmp_path / "m")
    assert not mounts_below(tmp_path)
    assert not locks(store)


def test_a_server_that_hangs_is_an_error_and_leaves_nothing(
    tiny_image: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "_PROGRAM", "import time; time.sleep(60)")
    monkeypatch.setattr(served, "_START_SECONDS", 0.2)
    with pytest.raises(StoreError, match=r"did not start within 0\.2 s"):
        mount(tiny_image, store, tmp_path / "m")
    assert not mounts_below(tmp_path)
    assert not locks(store)


def test_owners_of_a_squash_and_outside_the_map(tiny_image: Path, store: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with layerkit.open_image(str(tiny_image), settings=layerkit.Settings(store=store)) as opened:
        with pytest.raises(UnmappedId):
            opened.mount(tmp_path / "m", layerkit.mapping(["0:5:1"]), rendering="fuse")
        squash = layerkit.mapping(["0:5:1"], overflow_id=7)
        with opened.mount(tmp_path / "m", squash, rendering="fuse"):
            owners = {path.lstat().st_uid for path in (tmp_path / "m").rglob("*")}
        assert owners == {5, 7}


def test_it_is_not_for_the_classic_stacking(store: Path, tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    layer.mkdir()
    with pytest.raises(UsageError, match="data-only"):
        api.mount_unpacked(f"folders:{layer}", tmp_path, MAP, stacking="classic", rendering="fuse", store=store)
