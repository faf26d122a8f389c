"""Copy-up as it is: a clone where the filesystem can, bytes elsewhere; and what was copied for nothing."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from disks import disk
from needs import need_root
from programs import command, run_layerkit, wait_for

import layerkit
from layerkit.hosts.adopted import mount as adopt
from layerkit.hosts.adopted.sources import find_unpacked
from layerkit.hosts.diagnosis import copyups
from layerkit.hosts.mounts import mount as mounter
from layerkit.hosts.mounts.spec import MountOptions
from layerkit.linux.syscalls import blocks_of
from layerkit.model.errors import NotFound, UsageError
from layerkit.store.local import LocalStore

asked = functools.partial(run_layerkit, "copyups")

SIZE = 8 << 20


@contextmanager
def writable(place: Path) -> Iterator[Path]:
    """Mount a layer with some files under a map, with an upper beside it."""
    layer, target = place / "layer", place / "m"
    layer.mkdir()
    target.mkdir()
    for name in ("read-write", "written", "mapped", "owner", "untouched"):
        (layer / name).write_bytes(os.urandom(SIZE))
    written(*layer.iterdir())
    time.sleep(0.02)
    with LocalStore.open(place / "store") as store:
        adopt.mount_unpacked(
            find_unpacked(f"folders:{layer}"),
            target,
            layerkit.mapping(["0:100000:65536"]),
            store,
            MountOptions(upper=place / "up"),
        )
    try:
        yield target
    finally:
        mounter.umount(target, run=mounter.default_run(place / "store"), lazy=True)


def change(target: Path) -> None:
    """Open one file for writing and leave it, write to others, and change one owner."""
    import mmap

    os.close(os.open(target / "read-write", os.O_RDWR))
    with (target / "written").open("r+b") as file:
        file.write(b"x" * 4096)
    with (target / "mapped").open("r+b") as file, mmap.mmap(file.fileno(), 4096) as memory:
        memory[:5] = b"hello"
    os.chown(target / "owner", 5, 5)
    (target / "made").write_bytes(b"made")
    written(*(target / name for name in ("read-write", "written", "mapped", "made")))


def written(*files: Path) -> None:
    """Have files on their disk, without a wait for what all others on the machine write."""
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_an_open_for_writing_takes_no_block_where_files_can_share_them(tmp_path: Path, kind: str) -> None:
    with disk(tmp_path, kind, size=512 << 20) as place, writable(place) as target:
        subprocess.run(["sync", "-f", place], check=True)
        os.close(os.open(target / "read-write", os.O_RDWR))
        found = blocks_of(str(place / "up/read-write"))
        assert found is not None
        assert (found.mapped, found.mapped - found.shared) == (SIZE, 0)
        change(target)
        report = copyups.look(target, place / "store")
        files = {file.path: file for file in report.files}
        assert report.filesystem == kind
        assert (files["read-write"].kind, files["read-write"].written, files["read-write"].copied) == (
            "data",
            False,
            0,
        )
        # Of the file that was written to only the blocks of the write are new.
        assert files["written"].written
        assert 4096 <= files["written"].allocated - files["written"].shared <= 1 << 20
        assert report.needless_bytes == 0
        assert report.cloned_bytes > 2 * SIZE


def test_elsewhere_it_is_all_of_the_file(tmp_path: Path) -> None:
    need_root()
    with writable(tmp_path) as target:
        change(target)
        report = copyups.look(target, tmp_path / "store")
        files = {file.path: file for file in report.files}
        assert {name: (file.kind, file.written) for name, file in files.items()} == {
            "read-write": ("data", False), "written": ("data", True), "mapped": ("data", True),
            "owner": ("metadata", False), "made": ("made", True),
        }  # fmt: skip
        if files["read-write"].shared >= 0 and report.filesystem in ("ext4", "tmpfs"):
            assert files["read-write"].shared == 0
            assert report.needless_bytes >= SIZE
            assert report.copied_bytes >= 3 * SIZE
        assert files["owner"].copied == 0


def watched(target: Path, store: Path, work: Callable[[], object]) -> copyups.CopyUpReport:
    """Watch from before ``work`` until after it, however long either takes."""
    over = threading.Event()

    def then() -> None:
        wait_for(_marked)
        (fd,) = _marked()
        try:
            work()
        finally:
            # The watch asks at each event whether it is over. It takes several at once; when it has taken the first
            # of these two it is through with all before.
            for last in (False, True):
                wait_for(lambda: fcntl.ioctl(fd, termios.FIONREAD, bytes(4)) == bytes(4))
                if last:
                    over.set()
                os.close(os.open(target / "made", os.O_WRONLY | os.O_CREAT))

    worker = threading.Thread(target=then)
    worker.start()
    report = copyups.watch(target, store, 120, stop=over.is_set)
    worker.join()
    return report


def _marked() -> list[int]:
    """Return the descriptors of this process by which the kernel tells of something."""
    found = []
    for path in Path("/proc/self/fdinfo").iterdir():
        with contextlib.suppress(OSError):
            if any(line.startswith("fanotify") and "mask:" in line for line in path.read_text().splitlines()):
                found.append(int(path.name))
    return found


def test_watching(tmp_path: Path) -> None:
    need_root()
    with writable(tmp_path) as target:
        os.close(os.open(target / "untouched", os.O_RDWR))  # copied up before
        report = watched(target, tmp_path / "store", lambda: change(target))
        assert report.opened is not None
        seen = {x.path: x for x in report.opened}
        assert {name: (x.written, x.copied_up) for name, x in seen.items()} == {
            "read-write": (False, True), "written": (True, True), "mapped": (True, True), "made": (True, False),
        }  # fmt: skip
        assert seen["read-write"].opens == 1
        own = Path(f"/proc/{os.getpid()}/comm").read_text().strip()
        assert seen["read-write"].programs == (own,)


def test_watching_a_container_in_namespaces_of_its_own(tmp_path: Path) -> None:
    """A container sees the overlay under another path, in a mount namespace that we are not in."""
    need_root()
    with writable(tmp_path) as target:
        script = f"read go; mount --bind {target} /mnt; exec 3<>/mnt/read-write; echo x >> /mnt/written"
        inside = subprocess.Popen(["unshare", "--mount", "sh", "-c", script], stdin=subprocess.PIPE)
        report = watched(target, tmp_path / "store", lambda: inside.communicate(b"go\n", 120))
        assert inside.wait() == 0
        assert report.opened is not None
        by_name = {Path(x.path).name: x for x in report.opened}
        assert (by_name["read-write"].opens, by_name["read-write"].written) == (1, False)
        assert by_name["written"].written


def test_the_command(tmp_path: Path) -> None:
    need_root()
    with writable(tmp_path) as target:
        change(target)
        store = ("--store", tmp_path / "store")
        found: dict[str, Any] = json.loads(asked(target, *store, "--json").stdout)
        assert (found["schema"], len(found["files"])) == ("layerkit.copyups.v1", 5)
        assert found["needless_bytes"] == sum(
            SIZE for f in found["files"] if f["path"] == "read-write" and not f["shared"]
        )
        text = asked(target, *store).stdout
        assert "read-write" in text
        assert "5 files" not in text
        watched = json.loads(asked(target, *store, "--watch", "--seconds", "0.2", "--json").stdout)
        assert watched["opened"] == []
        assert "--watch" in asked(target, *store, "--seconds", "1", code=2).stderr


def watches(pid: int) -> bool:
    """Return whether a process has asked the kernel for events, and waits for more than it was told."""
    if not Path(f"/proc/{pid}/wchan").read_text().startswith("poll_schedule_timeout"):
        return False
    # It sleeps, so its descriptors stay.
    return any(os.readlink(path) == "anon_inode:[fanotify]" for path in Path(f"/proc/{pid}/fd").iterdir())


def test_a_watch_ends_with_an_interrupt_and_answers(tmp_path: Path) -> None:
    need_root()
    with writable(tmp_path) as target:
        words = command("copyups", target, "--watch", "--json", "--store", tmp_path / "store")
        watching = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert watching.stderr is not None
        assert "Ctrl-C" in watching.stderr.readline()
        wait_for(lambda: watches(watching.pid))
        os.close(os.open(target / "read-write", os.O_RDWR))
        wait_for(lambda: watches(watching.pid))
        watching.send_signal(2)
        out, _ = watching.communicate(timeout=120)
        assert [x["path"] for x in json.loads(out)["opened"]] == ["read-write"]


def test_overlays_of_others(tmp_path: Path) -> None:
    need_root()
    for name in ("lower", "up", "work", "m"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower/f").write_bytes(os.urandom(SIZE))
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/up,workdir={tmp_path}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, tmp_path / "m"], check=True)
    try:
        os.close(os.open(tmp_path / "m/f", os.O_RDWR))
        (file,) = copyups.look(tmp_path / "m", tmp_path / "store").files
        assert (file.kind, file.written) == ("data", False)
    finally:
        subprocess.run(["umount", tmp_path / "m"], check=True)


def test_what_has_no_upper(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        copyups.look(tmp_path / "absent", tmp_path)
    with pytest.raises(UsageError, match="name the mount point of an overlay"):
        copyups.look(Path("/proc"), tmp_path)
