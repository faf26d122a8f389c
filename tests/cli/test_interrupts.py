"""Signals to the command: the first stops it, no other disturbs its clearing up, and none is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BEGIN = """
import os, signal, time
from layerkit.cli.interrupts import INTERRUPTS
from layerkit.model.errors import Cancelled
INTERRUPTS.install()
def send(which):
    os.kill(os.getpid(), which)
"""


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", BEGIN + script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_what_comes_while_it_clears_up_does_not_disturb() -> None:
    assert run("""
try:
    send(signal.SIGINT)
    time.sleep(9)
except Cancelled:
    for _ in range(3):
        send(signal.SIGTERM)
        send(signal.SIGINT)
        time.sleep(0.01)
    print("cleared")
    INTERRUPTS.ignore()
send(signal.SIGINT)
""") == "cleared\n"  # fmt: skip


def test_an_interrupt_in_a_destructor_is_not_lost() -> None:
    assert run("""
class Dies:
    def __del__(self):
        send(signal.SIGINT)
        len("a moment in which the handler runs")
try:
    Dies()
    time.sleep(9)
except Cancelled:
    print("stopped")
""") == "stopped\n"  # fmt: skip


def test_a_pool_is_left_with_all_its_threads_ended() -> None:
    assert run("""
import threading
from concurrent.futures import ThreadPoolExecutor
wait = threading.Event.wait
def interrupted(event, timeout=None):
    # What Thread.start waits for: the new thread runs, and its pool has not noted it yet.
    if threading.current_thread() is threading.main_thread():
        send(signal.SIGTERM)
    return wait(event, timeout)
left = []
def work():
    time.sleep(0.1)
    left.append("working")
threading.Event.wait = interrupted
try:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work)
        threading.Event.wait = wait
        time.sleep(9)
except Cancelled:
    print(*left, threading.active_count())
""") == "working 1\n"  # fmt: skip


def test_a_thread_that_has_just_started_is_noted_by_its_pool() -> None:
    assert run("""
import threading
from concurrent.futures import ThreadPoolExecutor
class Interrupted(set):
    def add(self, thread):
        send(signal.SIGTERM)
        super().add(thread)
try:
    with ThreadPoolExecutor(1) as pool:
        pool._threads = Interrupted()
        pool.submit(time.sleep, 0.1)
        time.sleep(9)
except Cancelled:
    print(threading.active_count())
""") == "1\n"  # fmt: skip


def test_other_errors_of_destructors_are_shown_as_ever() -> None:
    script = "class Dies:\n    def __del__(self):\n        raise KeyError('x')\nDies()\n"
    done = subprocess.run([sys.executable, "-c", BEGIN + script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "Exception ignored in" in done.stderr and "KeyError: 'x'" in done.stderr


def test_a_module_that_is_imported_is_imported_whole(tmp_path: Path) -> None:
    (tmp_path / "asks.py").write_text("import __main__, signal\n__main__.send(signal.SIGINT)\nwhole = True\n")
    assert run(f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(tmp_path)!r})
try:
    import asks
    time.sleep(9)
except Cancelled:
    print(asks.whole)
""") == "True\n"  # fmt: skip
