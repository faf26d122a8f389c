"""Shards among each other: who indexes what, how long one waits. A registry and a clock in memory."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import zstandard
from made_images import LAYER, tar
from registry_fake import Fake, Handler, fake_registry

from layerkit.formats.oci import documents as oci
from layerkit.hook.batch.shards import PLAN_TYPE, Meeting, Shard, Want, owner
from layerkit.hook.work.layers import SharedIndexes
from layerkit.images.registry.client import RegistryClient
from layerkit.images.registry.options import RegistryOptions, Retry
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import RegistryError
from layerkit.model.limits import DEFAULT
from layerkit.unpack import index_layer

WAIT = 60.0


class Clock:
    """Time that passes when somebody waits; ``then`` runs at each wait."""

    def __init__(self) -> None:
        self.now, self.waits = 1_000_000.0, 0
        self.then: list[object] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.waits += 1
        assert self.waits < 1000, "waits for ever"
        for step in list(self.then):
            step()  # type: ignore[operator]


def layer(number: int) -> tuple[Want, bytes]:
    data = tar((f"etc/file{number}", b"%d" % number))
    return Want(Digest.of(data), Descriptor(LAYER, Digest.of(data), len(data)), "team/app"), data


class Site:
    def __init__(self, fake: Fake, client: RegistryClient) -> None:
        self.fake = fake
        self.shared = SharedIndexes(client.repository(f"{fake.host}/layerkit/indexes"), DEFAULT)
        self.clock = Clock()
        self.done: list[Digest] = []
        made = [layer(n) for n in range(24)]
        self.layers = {want.diff_id: data for want, data in made}
        self.by_id = {want.diff_id: want for want, _ in made}

    def meeting(self, part: int, parts: int = 2) -> Meeting:
        shard = Shard("run", part, parts, WAIT)
        serves = "team/app".__eq__
        return Meeting(self.shared, shard, serves, clock=self.clock, sleep=self.clock.sleep)

    def submit(self, want: Want) -> Future[bool]:
        """Index a layer at once and publish it."""
        self.done.append(want.diff_id)
        self.publish(want)
        future: Future[bool] = Future()
        future.set_result(True)
        return future

    def publish(self, want: Want) -> None:
        reader = _Bytes(io.BytesIO(self.layers[want.diff_id]))
        assert self.shared.save(index_layer(reader, want.blob, want.diff_id, limits=DEFAULT))

    def owned(self, part: int, parts: int = 2) -> set[Digest]:
        return {each for each in self.by_id if owner(each, range(parts)) == part}


class _Bytes:
    def __init__(self, file: object) -> None:
        self._file = file

    def readinto(self, buffer: memoryview, /) -> int:
        return self._file.readinto(buffer)  # type: ignore[attr-defined, no-any-return]

    def close(self) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "auth.json").write_text("{}")
    options = RegistryOptions(authfile=tmp_path / "auth.json", tls_verify=False, retry=Retry(2, 0.001, 0.01))
    with fake_registry() as fake, contextlib.closing(RegistryClient(options)) as client:
        yield Site(fake, client)


def test_a_lost_shard_passes_on_its_own_layers_and_no_others() -> None:
    layers = [Digest.of(b"%d" % n) for n in range(2000)]
    before = {each: owner(each, range(5)) for each in layers}
    after = {each: owner(each, (0, 1, 2, 4)) for each in layers}
    assert all(after[each] == part for each, part in before.items() if part != 3)
    shares = np.array(list(Counter(after.values()).values()))
    assert shares.min() > 0.8 * 500 and shares.max() < 1.2 * 500


def test_each_does_its_own_and_what_others_need(site: Site) -> None:
    """One finds the other's list, indexes its own layers of both, and ends when those of the other are there."""
    ours = {d: w for d, w in site.by_id.items() if d in list(site.by_id)[:12]}
    theirs = {d: w for d, w in site.by_id.items() if d not in ours}
    other = site.meeting(1)
    with other.present():
        other.say(theirs)
        one = site.meeting(0)
        # The other one works as time passes.
        left = sorted(site.owned(1))

        def work() -> None:
            if left:
                site.publish(site.by_id[left.pop()])

        site.clock.then.append(work)
        with one.present():
            one.say(ours)
            assert one.meet(site.submit) == len(site.owned(0))
    assert sorted(site.done) == sorted(site.owned(0))
    needed = site.owned(1) & set(ours)
    assert all(site.shared.has(each) for each in needed)


def test_one_who_needs_nothing_does_its_part_for_those_who_come_later(site: Site) -> None:
    other, one = site.meeting(1), site.meeting(0)

    def come_late() -> None:
        if site.clock.waits == 3:
            other.say(site.by_id)

    site.clock.then.append(come_late)
    with one.present():
        one.say({})
        assert one.meet(site.submit) == len(site.owned(0))
    assert sorted(site.done) == sorted(site.owned(0))


def test_a_registry_that_is_away_for_a_moment_ends_no_sign_of_life(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, shown = Meeting(site.shared, Shard("run", 0, 1, 0.04), bool), threading.Semaphore(0)
    calls = itertools.count()

    def show() -> None:
        shown.release()
        if next(calls) in (1, 2):
            raise RegistryError("registry.example", 503, "away", temporary=True)

    monkeypatch.setattr(one, "_show", show)
    with one.present():
        for _ in range(5):
            assert shown.acquire(timeout=10)


def test_a_blob_that_the_registry_does_not_see_for_a_moment_ends_nothing(site: Site) -> None:
    """docker-registry, while others write the same blob: neither lists nor indexes are refused for good."""
    refused: list[str] = []

    def before(handler: Handler) -> bool:
        if handler.command != "PUT" or "/manifests/" not in handler.path or handler.path in refused:
            return False
        refused.append(handler.path)
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.error(400, "MANIFEST_BLOB_UNKNOWN")
        return True

    site.fake.before = before
    one = site.meeting(0)
    one.say(site.by_id)
    assert site.meeting(1)._plan(0) == site.by_id
    want = next(iter(site.by_id.values()))
    site.publish(want)
    assert site.shared.has(want.diff_id) and len(refused) == 2


def test_a_beat_that_comes_late_does_not_hide_what_is_needed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    one, put = site.meeting(0), site.shared.repository.put_manifest
    one._show()
    slow, said = threading.Event(), threading.Event()

    def put_manifest(data: bytes, media_type: str, tag: str = "") -> Descriptor:
        if threading.current_thread() is beat:
            slow.set()
            said.wait(0.5)
        return put(data, media_type, tag)

    monkeypatch.setattr(site.shared.repository, "put_manifest", put_manifest)
    beat = threading.Thread(target=one._show)
    beat.start()
    assert slow.wait(10)
    one.say(site.by_id)
    said.set()
    beat.join()
    assert site.meeting(1)._plan(0) == site.by_id


def test_one_look_that_fails_makes_nobody_lost(site: Site) -> None:
    """The registry fails for a while just when all of the wait has passed; the other one is at work."""
    start, one, other = site.clock.now, site.meeting(0), site.meeting(1)

    def before(handler: Handler) -> bool:
        away = handler.command == "GET" and "/manifests/wanted-" in handler.path
        if not away or not WAIT <= site.clock.now - start < WAIT + 10:
            return False
        handler.error(500, "UNKNOWN")
        return True

    def works() -> None:
        other._show()
        if site.clock.now - start > 1.5 * WAIT and (left := sorted(site.owned(1) - set(published))):
            published.append(left[0])
            site.publish(site.by_id[left[0]])

    published: list[Digest] = []
    site.fake.before = before
    other.say({})
    site.clock.then.append(works)
    with one.present():
        one.say(site.by_id)
        assert one.meet(site.submit) == len(site.owned(0))
    assert sorted(site.done) == sorted(site.owned(0)) and sorted(published) == sorted(site.owned(1))


def test_one_who_never_comes_is_waited_for_once(site: Site) -> None:
    start = site.clock.now
    one = site.meeting(0)
    with one.present():
        one.say(site.by_id)
        assert one.meet(site.submit) == len(site.by_id)
    assert sorted(site.done) == sorted(site.by_id)
    assert WAIT < site.clock.now - start < 1.5 * WAIT


def test_one_who_shows_life_is_waited_for_and_one_who_hangs_is_not_for_ever(site: Site) -> None:
    """A large layer takes its time; a shard that does nothing but show itself is lost in the end."""
    other = site.meeting(1)
    other.say({})
    site.clock.then.append(other._show)
    start, one = site.clock.now, site.meeting(0)
    with one.present():
        one.say(site.by_id)
        one.meet(site.submit)
    assert sorted(site.done) == sorted(site.by_id)
    assert 10 * WAIT < site.clock.now - start < 50 * WAIT


def test_a_layer_that_nobody_can_index_is_left_to_the_images(site: Site) -> None:
    """Two shards in turn do not publish it: then the job of whoever needs it is to say why."""
    diff_id, want = next(iter(site.by_id.items()))
    order: list[int] = []
    while len(order) < 8:
        order.append(owner(diff_id, set(range(8)) - set(order)))
    for part in order[:-1]:
        site.meeting(part, 8).say({})  # all are at their end, and silent from now on
    start, last = site.clock.now, site.meeting(order[-1], 8)
    with last.present():
        last.say({diff_id: want})
        assert last.meet(site.submit) == 0
    assert site.done == [] and 2 * WAIT < site.clock.now - start < 5 * WAIT


def test_a_worker_that_dies_over_a_layer_is_not_asked_again(site: Site) -> None:
    def fails(want: Want) -> Future[bool]:
        site.done.append(want.diff_id)
        future: Future[bool] = Future()
        future.set_exception(OSError("a worker died"))
        return future

    one = site.meeting(0, 1)
    with one.present():
        one.say(site.by_id)
        assert one.meet(fails) == len(site.by_id)
    assert sorted(site.done) == sorted(site.by_id)


def test_what_shards_say_is_held_to_what_is_served(site: Site) -> None:
    """A list can neither name other repositories nor be of an earlier run; nonsense counts as silence."""
    foreign = {d: Want(d, w.blob, "secret/app") for d, w in site.by_id.items()}
    other = site.meeting(1)
    other.say(foreign)
    one = site.meeting(0)
    with one.present():
        one.say({})
        assert one.meet(site.submit) == 0
    assert site.done == []
    # The same list, an hour later.
    other.say(site.by_id)
    site.clock.now += 3600
    later = site.meeting(0)
    with later.present():
        later.say({})
        assert later.meet(site.submit) == 0
    bomb = zstandard.ZstdCompressor().compress(bytes(300 << 20))
    liar = b"\x28\xb5\x2f\xfd\xe0" + (1 << 50).to_bytes(8, "little") + b"\x01\0\0"
    for data in (b"", b"{", zstandard.compress(b"[]"), zstandard.compress(b'{"layers": [1]}'), bomb, liar,
                 zstandard.compress(json.dumps({"layers": [{"diff_id": "x"}]}).encode())):  # fmt: skip
        blob = Descriptor(PLAN_TYPE + "+zstd", Digest.of(data), len(data))
        site.shared.repository.put_blob(blob, [data])
        beat = {"io.layerkit.wanted.beat": repr(site.clock.now)}
        said = oci.manifest_json(oci.EMPTY_DESCRIPTOR, [blob], artifact_type=PLAN_TYPE, annotations=beat)
        site.shared.repository.put_manifest(said, oci.MANIFEST, Shard("run", 0, 2, WAIT).tag(1))
        assert site.meeting(0)._plan(1) is None, data[:20]
