"""User namespaces as descriptors, and the few system calls that have no other test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from needs import need_root
from page_cache import cached_bytes, drop, resident_bytes
from programs import KIT

from layerkit.linux import mounts, userns
from layerkit.linux import syscalls as sc
from layerkit.linux.durable import sync_filesystem
from layerkit.model.errors import UsageError

UIDS = ((0, 100_000, 1000), (1000, 300_000, 1))
GIDS = ((0, 200_000, 65_536),)


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    need_root()
    before, processes = descriptors(), children()
    yield
    # Threads that other tests of this process left may close theirs meanwhile; new ones are ours.
    assert not descriptors() - before
    assert not children() - processes


def descriptors() -> set[tuple[str, str]]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
    return found


def children() -> set[str]:
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
            found.update((task / "children").read_text().split())
    return found


def maps_of(fd: int) -> tuple[str, str]:
    """Return the maps of a namespace as a process inside sees them."""
    code = (
        "import os, ctypes\n"
        f"assert ctypes.CDLL(None).setns({fd}, 0) == 0\n"
        "print(open('/proc/self/uid_map').read(), '|', open('/proc/self/gid_map').read())"
    )
    out = subprocess.run(
        [sys.executable, "-I", "-c", code], pass_fds=[fd], capture_output=True, text=True, check=True
    ).stdout
    uid, _, gid = out.partition("|")
    return " ".join(uid.split()), " ".join(gid.split())


def test_the_descriptor_has_the_maps() -> None:
    with sc.closing(userns.userns_fd(UIDS, GIDS)) as fd:
        assert maps_of(fd) == ("0 100000 1000 1000 300000 1", "0 200000 65536")
        assert not os.get_inheritable(fd)


def test_an_idmapped_clone_shows_both_maps(tmp_path: Path) -> None:
    for uid, gid in ((5, 6), (1000, 7)):
        path = tmp_path / str(uid)
        path.touch()
        os.chown(path, uid, gid)
    with sc.closing(mounts.idmapped_clone(tmp_path, UIDS, GIDS)) as fd:
        assert [(s.st_uid, s.st_gid) for s in (os.stat(f"/proc/self/fd/{fd}/{n}") for n in ("5", "1000"))] == [
            (100_005, 200_006),
            (300_000, 200_007),
        ]


@pytest.mark.parametrize(
    ("extents", "match"),
    [
        ([], "maps nothing"),
        ([(0, 10, 10), (5, 50, 1)], "refuses uid_map '0 10 10, 5 50 1'"),
        ([(0, 2**32 - 1, 1)], "refuses uid_map"),
        ([(i, 10_000_000 + 2 * i, 1) for i in range(341)], "341 ranges"),
        ([(2_000_000 + i, 4_000_000_000 + 2 * i, 1) for i in range(340)], "bytes"),
    ],
)
def test_maps_that_the_kernel_refuses(extents: list[tuple[int, int, int]], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        userns.userns_fd(extents, GIDS)


def test_as_many_ranges_as_fit_a_page() -> None:
    extents = [(i, 100_000 + 2 * i, 1) for i in range(250)]
    with sc.closing(userns.userns_fd(extents, extents)) as fd:
        assert maps_of(fd)[0].split()[-3:] == ["249", "100498", "1"]


def test_from_many_threads_while_others_wait_for_any_child() -> None:
    # In a process without any other child, where nobody else waits for one.
    here = {**os.environ, "PYTHONPATH": str(KIT)}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=120, env=here)
    assert done.returncode == 0, done.stderr


def wait_for_any_child() -> None:
    """A stranger's waitpid(-1) must not get our child, nor a SIGCHLD handler hear of it."""
    heard = []
    signal.signal(signal.SIGCHLD, lambda *_: heard.append(1))
    problems: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(10):
                os.close(userns.userns_fd(UIDS, GIDS))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
    assert problems == []
    assert heard == []


def test_rights() -> None:
    assert userns.in_initial_userns()
    assert userns.can_mount()
    assert userns.is_privileged()


def test_errors_name_the_call_and_the_path(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="umount: Invalid argument") as caught:
        sc.umount2(tmp_path)
    assert caught.value.filename == str(tmp_path)
    with pytest.raises(FileNotFoundError, match="open_tree"):
        sc.open_tree(tmp_path / "none")
    with pytest.raises(OSError, match="erofs: mount"):
        (tmp_path / "bad").write_bytes(bytes(4096))
        mounts.erofs_file(tmp_path / "bad")
    with mounts.Context("overlay") as context, pytest.raises(OSError, match=r"nonsense=1 \(.*nonsense"):
        # The words in brackets are the kernel's own, read from the context.
        context.text("nonsense", "1")


def test_copy_run(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(os.urandom(3_000_000))
    with (tmp_path / "a").open("rb") as a, (tmp_path / "b").open("wb") as b:
        assert sc.copy_run(sc.Run(a.fileno(), 0, 0, 4_000_000), b.fileno()) == 3_000_000
        assert sc.copy_run(sc.Run(a.fileno(), 5, 3_000_000, 1000), b.fileno(), in_kernel=False) == 1000
        sync_filesystem(b.fileno())
    data = (tmp_path / "a").read_bytes()
    assert (tmp_path / "b").read_bytes() == data + data[5:1005]


@pytest.mark.usefixtures("caches_stay")
class TestPageCache:
    def test_residency_follows_what_was_read(self, tmp_path: Path) -> None:
        path = tmp_path / "f"
        size = 1_000_001
        path.write_bytes(os.urandom(size))
        with path.open("rb") as f:
            os.fsync(f.fileno())
        drop(path)
        assert resident_bytes(path) == (0, size)
        with path.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            os.pread(f.fileno(), 1, 8192)
        assert resident_bytes(path) == (4096, size)
        assert cached_bytes(path) == 4096
        path.read_bytes()
        assert resident_bytes(path) == (size, size)

    def test_empty_and_page_sized_files(self, tmp_path: Path) -> None:
        for size in (0, 1, 4096, 4097):
            (tmp_path / "f").write_bytes(bytes(size))
            assert resident_bytes(tmp_path / "f") == (size, size)


if __name__ == "__main__":
    wait_for_any_child()
