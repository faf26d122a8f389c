"""The queue: its rules against a model, leases, and processes that are killed at any moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from layerkit.hook.config import Remap
from layerkit.hook.queue import Claim, Holders, Key, Outcome, Policy, Queue, Target, Wish
from layerkit.model.digest import Digest
from layerkit.model.errors import NotFound, StoreError

MAP = "uid=0:100000:65536;gid=0:100000:65536"
POLICY = Policy(attempts=3, losses=4, first_seconds=2, most_seconds=10, lease_seconds=30, recheck_seconds=100)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def key(number: int, mapping: str = MAP) -> Key:
    return Key(Digest.of(b"%d" % number), mapping, "{}", 1)


def wish(number: int, repository: str = "app", **more: bool) -> Wish:
    return Wish(key(number), Target("main", repository), **more)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(tmp_path: Path, clock: Clock) -> Queue:
    return Queue(tmp_path / "q", POLICY, clock=clock, chance=lambda: 1.0)


DONE = Outcome("done", report={"bytes_read": 5, "layers_read": 1})
FAILED = Outcome("failed", "HTTP 503")


def test_the_same_wish_is_one_job_whoever_tells_it(queue: Queue) -> None:
    first, second, other = queue.add([wish(1), wish(1), wish(2)])
    assert first.new and other.new and not second.new
    assert first.job == second.job != other.job
    assert len({key(1).job, key(1, "uid=0:5:1;gid=0:5:1").job, Key(key(1).digest, MAP, "x", 1).job,
                Key(key(1).digest, MAP, "{}", 2).job}) == 4  # fmt: skip
    (claim,) = queue.claim(1)
    assert queue.add([wish(1)])[0].state == "running"
    assert queue.finish(claim, DONE) == "done"
    assert queue.add([wish(1)])[0] == (claim.job, "done", False)
    assert [c.job for c in queue.claim(5)] == [other.job]
    assert queue.stats().totals["bytes_read"] == 5


def test_another_repository_makes_a_done_job_run_for_that_one(queue: Queue) -> None:
    queue.add([wish(1)])
    (claim,) = queue.claim(1)
    queue.add([wish(1, "copy")])
    assert queue.finish(claim, DONE) == "waiting"
    (claim,) = queue.claim(1)
    assert [t.repository for t in claim.targets] == ["copy"]
    assert queue.finish(claim, DONE) == "done"
    assert queue.add([wish(1, "third")])[0].state == "waiting"


def test_a_done_job_is_looked_at_again_after_a_while(queue: Queue, clock: Clock) -> None:
    queue.add([wish(1)])
    queue.finish(queue.claim(1)[0], DONE)
    clock.now += 99
    assert queue.add([wish(1)])[0].state == "done"
    clock.now += 1
    assert queue.add([wish(1)])[0].state == "waiting"
    assert queue.claim(1)[0].targets == (Target("main", "app"),)


def test_gone_comes_back_with_a_new_push_and_dead_only_when_asked(queue: Queue) -> None:
    queue.add([wish(1), wish(2)])
    first, second = sorted(queue.claim(2), key=lambda c: c.key != key(1))
    queue.finish(first, Outcome("gone", "404"))
    queue.finish(second, Outcome("failed", "owner 7 is outside the map", permanent=True))
    assert queue.job(second.job).state == "dead"
    assert [a.state for a in queue.add([wish(1), wish(2)])] == ["waiting", "dead"]
    assert queue.add([wish(2, again=True)])[0].state == "waiting"
    assert queue.job(second.job).why == ""


def test_failures_wait_longer_each_time_and_end_as_dead(queue: Queue, clock: Clock) -> None:
    queue.add([wish(1)])
    for attempt, delay in ((1, 2.0), (2, 4.0)):
        (claim,) = queue.claim(1)
        assert claim.attempt == attempt
        assert queue.finish(claim, FAILED) == "waiting"
        clock.now += delay - 0.1
        assert queue.claim(1) == []
        clock.now += 0.1
    assert queue.finish(queue.claim(1)[0], FAILED) == "dead"
    assert queue.job(claim.job).why == "HTTP 503"
    assert queue.retry() == 1
    assert queue.retry([claim.job]) == 0
    (claim,) = queue.claim(1)
    assert claim.attempt == 1
    # A success after failures is a success, without the words of the first error.
    assert queue.finish(claim, DONE) == "done"
    assert queue.job(claim.job).why == ""


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_delays_are_bounded_and_spread(attempt: int, chance: float) -> None:
    assert 0.5 * POLICY.first_seconds <= POLICY.delay(attempt, chance) <= POLICY.most_seconds
    assert POLICY.delay(attempt + 1, chance) >= POLICY.delay(attempt, chance)


def test_a_lease_ends_without_heartbeat_and_its_old_holder_changes_nothing(queue: Queue, clock: Clock) -> None:
    queue.add([wish(1), wish(2)])
    first, second = queue.claim(2)
    clock.now += 29
    assert queue.heartbeat([first]) == set()
    clock.now += 2
    assert queue.recover() == 1
    (again,) = queue.claim(5)
    assert again.job == second.job and again.attempt == 1
    assert queue.heartbeat([second, again]) == {second.job}
    assert queue.finish(second, DONE) == ""
    assert queue.job(second.job).state == "running"
    assert queue.finish(again, DONE) == "done"
    assert queue.finish(again, FAILED) == ""


def test_a_lease_that_is_renewed_in_the_last_moment_is_kept(
    queue: Queue, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder was slow, and beats after another one has read that its lease is over."""
    queue.add([wish(1)])
    claims = queue.claim(1)
    clock.now += 31

    def alive(_: Holders, __: str) -> bool:
        assert queue.heartbeat(claims) == set()
        return True

    with monkeypatch.context() as patch:
        patch.setattr(Holders, "sweep", lambda _: None)
        patch.setattr(Holders, "alive", alive)
        assert queue.recover() == 0
    assert queue.finish(claims[0], DONE) == "done"


def test_a_job_that_kills_its_worker_each_time_is_dead_in_the_end(queue: Queue, clock: Clock) -> None:
    queue.add([wish(1)])
    for _ in range(POLICY.losses):
        assert len(queue.claim(1)) == 1
        clock.now += 31
        assert queue.recover() == 1
    assert queue.claim(1) == []
    assert "ended 4 times" in queue.jobs("dead")[0].why


def test_released_jobs_cost_no_attempt(queue: Queue) -> None:
    queue.add([wish(1)])
    queue.release(queue.claim(1))
    assert queue.claim(1)[0].attempt == 1


def test_the_urgent_come_first(queue: Queue) -> None:
    queue.add([wish(n) for n in range(5)])
    queue.add([wish(9, urgent=True), wish(3, urgent=True)])
    assert {c.key for c in queue.claim(2)} == {key(9), key(3)}


def test_an_index_becomes_a_job_for_each_manifest(queue: Queue) -> None:
    queue.add([wish(1)])
    children = tuple(key(n).digest for n in (2, 3))
    queue.finish(queue.claim(1)[0], Outcome("done", children=children))
    claims = queue.claim(5)
    assert {c.key.digest for c in claims} == set(children)
    assert {c.targets for c in claims} == {(Target("main", "app"),)}


def test_a_run_that_found_it_in_place_keeps_what_is_known(queue: Queue) -> None:
    queue.add([wish(1)])
    queue.finish(queue.claim(1)[0], Outcome("done", report={"layers": [1], "meta_bytes": 5, "layers_read": 1}))
    queue.add([wish(1, again=True)])
    (claim,) = queue.claim(1)
    assert claim.anew
    queue.finish(claim, Outcome("done", report={"existing": True, "bytes_read": 2}))
    assert queue.job(claim.job).report == {
        "layers": [1], "meta_bytes": 5, "layers_read": 1, "existing": True, "bytes_read": 2,
    }  # fmt: skip
    assert not queue.claim(1)


def test_what_is_no_image_is_none_for_every_map(queue: Queue) -> None:
    other = Wish(key(1, "uid=0:5:1;gid=0:5:1"), Target("main", "app"))
    queue.add([wish(1), other, wish(2)])
    queue.finish(queue.claim(1)[0], Outcome("skipped", "an artifact"))
    assert queue.stats().states == {"skipped": 2, "waiting": 1}


def test_prune_forgets_the_done_and_keeps_the_dead(queue: Queue, clock: Clock) -> None:
    queue.add([wish(1), wish(2), wish(3)])
    a, b, _ = queue.claim(3)
    queue.finish(a, DONE)
    queue.finish(b, Outcome("failed", permanent=True))
    clock.now += 50
    assert queue.prune(60) == 0
    assert queue.prune(40) == 1
    assert queue.stats().states == {"dead": 1, "running": 1}
    with pytest.raises(NotFound):
        queue.job(a.job)


def test_a_newer_queue_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    Queue(tmp_path).close()
    import sqlite3

    with sqlite3.connect(tmp_path / "queue.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="version 99"):
        Queue(tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/queue.sqlite").write_bytes(b"no database" * 999)
    with pytest.raises(StoreError, match="not a database"):
        Queue(tmp_path / "d")


class Model(RuleBasedStateMachine):
    """The queue against a dictionary: nothing is lost, nothing done twice, and no lease is held by two."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory(prefix="lk-hook-model-")
        self.clock = Clock()
        self.queue = Queue(Path(self.folder.name), POLICY, clock=self.clock, chance=lambda: 0.0)
        self.wished: dict[str, set[str]] = {}
        self.served: dict[str, set[str]] = {}
        self.held: dict[str, Claim] = {}
        self.old: list[Claim] = []

    def teardown(self) -> None:
        self.queue.close()
        self.folder.cleanup()

    @rule(
        number=st.integers(0, 4), repository=st.sampled_from(["a", "b"]), again=st.booleans(), urgent=st.booleans()
    )
    def add(self, number: int, repository: str, again: bool, urgent: bool) -> None:
        before = self.queue.states([key(number).job]).get(key(number).job)
        (added,) = self.queue.add([wish(number, repository, again=again, urgent=urgent)])
        assert added.new == (added.job not in self.wished)
        self.wished.setdefault(added.job, set()).add(repository)
        if added.state != before:  # an end was undone: this repository is to be served anew
            assert added.state == "waiting"
            self.served.setdefault(added.job, set()).discard(repository)

    @rule(count=st.integers(0, 3))
    def claim(self, count: int) -> None:
        for claim in self.queue.claim(count):
            assert claim.job not in self.held, "two hold one lease"
            self.held[claim.job] = claim

    @rule(data=st.data(), state=st.sampled_from(["done", "failed", "gone", "skipped"]))
    def finish(self, data: st.DataObject, state: str) -> None:
        if not self.held:
            return
        job = data.draw(st.sampled_from(sorted(self.held)))
        claim = self.held.pop(job)
        self.old.append(claim)
        after = self.queue.finish(claim, Outcome(state))
        assert after
        if state != "failed":
            self.served.setdefault(job, set()).update(t.repository for t in claim.targets)

    @rule(data=st.data())
    def old_tokens_do_nothing(self, data: st.DataObject) -> None:
        if self.old:
            assert self.queue.finish(data.draw(st.sampled_from(self.old)), DONE) == ""

    @rule()
    def release(self) -> None:
        self.queue.release(self.held.values())
        self.old += self.held.values()
        self.held.clear()

    @rule(seconds=st.floats(0, 40), beat=st.booleans())
    def wait(self, seconds: float, beat: bool) -> None:
        if beat:
            assert self.queue.heartbeat(self.held.values()) == set()
        self.clock.now += seconds
        self.queue.recover()
        running = {row.job for row in self.queue.jobs("running", 99)}
        self.old += [c for job, c in self.held.items() if job not in running]
        self.held = {job: c for job, c in self.held.items() if job in running}

    @rule()
    def restart(self) -> None:
        """A new process takes over at once what the ended one held."""
        self.queue.close()
        self.queue = Queue(Path(self.folder.name), POLICY, clock=self.clock, chance=lambda: 0.0)
        assert self.queue.recover() == len(self.held)
        self.old += self.held.values()
        self.held.clear()

    @invariant()
    def nothing_is_lost(self) -> None:
        rows = {row.job: row for row in self.queue.jobs(limit=99)}
        assert rows.keys() == self.wished.keys()
        for job, row in rows.items():
            assert {t.repository for t in row.targets} == self.wished[job]
            assert (row.state == "running") == (job in self.held)
            if row.state == "done":
                assert self.served[job] >= self.wished[job], "done, and a repository was not served"


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=25 * int(os.environ.get("LAYERKIT_TEST_FUZZ", "1")),
                              stateful_step_count=40, deadline=None)  # fmt: skip

CHILD = textwrap.dedent("""
    import random, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[3])
    from layerkit.hook.queue import Outcome, Policy, Queue
    import test_queue as t
    queue = Queue(Path(sys.argv[1]), Policy(losses=10**6), chance=lambda: 0.0)
    log, n, rng = open(sys.argv[2], "a", buffering=1), int(sys.argv[4]), random.Random()
    queue.recover()
    while True:
        queue.add([t.wish(n), t.wish(n + 1), t.wish(n // 2)])
        log.write(f"added {n}\\n")
        n += 2
        for claim in queue.claim(2):
            if queue.finish(claim, Outcome("done", report={"layers_read": 1})) == "done":
                log.write(f"done {claim.job}\\n")
        queue.recover()
""")


def test_kill_at_any_moment_loses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    rng = random.Random(5)
    rounds = 6 * int(os.environ.get("LAYERKIT_TEST_FUZZ", "1"))
    for turn in range(rounds):
        children = [
            subprocess.Popen([sys.executable, "-c", CHILD, tmp_path / "q", log, Path(__file__).parent,
                              str(turn * 100_000 + which * 50_000)])
            for which in range(2)
        ]  # fmt: skip
        start = time.monotonic()
        before = log.stat().st_size
        while log.read_bytes()[before:].count(b"added") < 2 and time.monotonic() - start < 60:
            time.sleep(0.02)
        time.sleep(rng.uniform(0.02, 0.4))
        for child in children:
            child.send_signal(signal.SIGKILL)
            child.wait()
    queue = Queue(tmp_path / "q", Policy(losses=10**6))
    lines = [line.split() for line in log.read_text().splitlines() if line.count(" ") == 1]
    added = [int(n) for what, n in lines if what == "added" and n.isdigit()]
    assert len(added) > rounds
    known = queue.states([key(m).job for n in added for m in (n, n + 1, n // 2)])
    assert set(known.values()) <= {"waiting", "running", "done"}
    assert len(known) == len({m for n in added for m in (n, n + 1, n // 2)})
    # The dead processes' jobs are free at once, long before their leases end.
    queue.recover()
    assert queue.stats().states.get("running", 0) == 0
    while claims := queue.claim(500):
        for claim in claims:
            assert queue.finish(claim, Outcome("done", report={"layers_read": 1})) == "done"
    stats = queue.stats()
    assert stats.states.keys() == {"done"}
    # Every end was counted once: no job came to its end twice.
    assert stats.totals["layers_read"] == stats.states["done"]
    assert stats.depth == 0 and stats.oldest_seconds == 0
    assert list((tmp_path / "q/owners").iterdir())  # our own
    queue.close()
    assert not list((tmp_path / "q/owners").iterdir())


def test_options_have_one_text() -> None:
    assert Remap("m", rendering="tar").options == Remap("n", "x", "tar").options
    assert Remap("m", rendering="tar").options == '{"namespace":"trusted","rendering":"tar"}'
