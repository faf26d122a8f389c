from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from layerkit.model.errors import StoreError
from layerkit.store.layout import Layout
from layerkit.store.locks import Locks
from layerkit.store.spool import Spool, dead


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "locks"
    path.mkdir()
    return path


def test_shared_holds_nest_and_keep_exclusive_out(folder: Path) -> None:
    one, two = Locks(folder), Locks(folder)
    with one.shared(), one.shared(), two.shared():
        with pytest.raises(StoreError, match="this process still uses"), one.exclusive(0):
            pass
    with one.shared():
        with pytest.raises(StoreError, match="another layerkit process"), two.exclusive(0.1):
            pass
    with two.exclusive(0):
        with two.shared():  # what a repair does
            pass
        with pytest.raises(StoreError), one.exclusive(0.1):
            pass
    with one.exclusive(0):
        pass


def test_exclusive_waits_for_a_thread(folder: Path) -> None:
    locks = Locks(folder)
    locks.acquire_shared()
    released, alone = threading.Event(), threading.Event()

    def release() -> None:
        released.set()
        locks.release_shared()

    threading.Timer(0.1, release).start()
    with locks.exclusive(120):
        assert released.is_set(), "it had waited"
        done: list[bool] = []

        def hold() -> None:
            with locks.shared():
                done.append(alone.is_set())

        thread = threading.Thread(target=hold)
        thread.start()
        thread.join(0.1)
        assert done == []
        alone.set()
    thread.join()
    assert done == [True], "the other waited in turn"


def test_named_locks_exclude_threads_and_can_be_taken_again_by_their_own(folder: Path) -> None:
    locks = Locks(folder)
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(20):
            with locks.named("layer-x"), locks.named("layer-x"):
                inside += 1
                most = max(most, inside)
                time.sleep(0.0005)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert locks.holds == 0
    with locks.exclusive(0):
        assert locks.clear() == ["layer-x"]


def test_a_named_lock_holds_the_store(folder: Path) -> None:
    locks, other = Locks(folder), Locks(folder)
    with locks.named("layer-x"), pytest.raises(StoreError), other.exclusive(0):
        pass


CHILD = """
import sys, time
from pathlib import Path
from layerkit.store.layout import Layout
from layerkit.store.locks import Locks
from layerkit.store.spool import Spool
layout = Layout(Path(sys.argv[1]))
locks = Locks(layout.locks)
with locks.named("layer-x"):
    spool = Spool(layout)
    spool.path("x").write_text("x")
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_dead_process_releases_its_locks_and_its_folder_is_known_as_dead(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "store")
    layout.create_folders()
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(layout.root)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == b"held\n"
        mine = Spool(layout)
        mine.path("y").write_text("y")
        assert dead(layout) == []
        with pytest.raises(StoreError), Locks(layout.locks).exclusive(0):
            pass
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
    with Locks(layout.locks).exclusive(0):
        found = dead(layout)
    assert [path.name.startswith(f"{child.pid}-") for path in found] == [True, True]
    mine.close()
    assert sorted(layout.tmp.iterdir()) == found
    mine.close()
