"""Shards of a batch: each layer is indexed by one of them, whoever has the images that need it.

Nobody coordinates, and nothing is durable but the registry. Each shard says in the repository of indexes which
layers its images need; each reads what all of them say and indexes the layers that are its own: those for which its
hash with the layer's ``diff_id`` is the highest of all shards. Then it waits for the layers of others it needs.
One that shows no sign of life for too long is taken for lost: its layers pass to those that are left, and what
these do not do either is left to whoever needs it: no shard waits for ever, and nothing is left undone.

What a shard says is a claim like the indexes beside it: it can make others read layers of repositories that they
serve, and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, as_completed
from dataclasses import dataclass, replace

import zstandard

from layerkit.formats.oci import documents as oci
from layerkit.formats.strict_json import dumps, load_object
from layerkit.hook.config import Config, Registry
from layerkit.hook.queue import Wish
from layerkit.hook.work.access import place_in
from layerkit.hook.work.executors import open_executor
from layerkit.hook.work.layers import Fleet, LayerTask, SharedIndexes, publish
from layerkit.hook.work.tasks import Task, has_artifact, look, task_of
from layerkit.images.registry.names import RegistryRef
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import InvalidImage, LayerkitError, NotFound, RegistryError
from layerkit.model.image import Layer
from layerkit.usecases.settings import Settings

PLAN_TYPE = "application/vnd.layerkit.wanted-layers.v1"
_BLOB_TYPE = PLAN_TYPE + "+zstd"
_BEAT_KEY = "io.layerkit.wanted.beat"
_PLAN_BYTES = 256 << 20
_ASKED_AT_ONCE = 16
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_LOOKS = 4
"""So often within ``wait_seconds`` a shard shows itself, and is looked for: one look that fails is no silence."""
_PATIENCE = 30
"""So many times ``wait_seconds`` a shard may show life and get nothing done; one that hangs holds up nobody."""

_log = logging.getLogger("layerkit.hook.shards")
_published: set[tuple[str, Digest]] = set()


@dataclass(frozen=True, slots=True)
class Want:
    """A layer that an image of some shard needs, and a repository that has its blob."""

    diff_id: Digest
    blob: Descriptor
    repository: str


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a run this is.

    Attributes:
        run: names the run: the same for all its shards, and when it is repeated.
        part: from 0.
        parts: how many there are.
        wait_seconds: how long a shard may show no sign of life before it is taken for lost.
    """

    run: str = ""
    part: int = 0
    parts: int = 1
    wait_seconds: float = 60.0

    def tag(self, part: int) -> str:
        """Return the tag under which shard ``part`` says what it needs."""
        return f"wanted-{self.run}-{part}-of-{self.parts}"


def owner(diff_id: Digest, shards: Iterable[int]) -> int:
    """Return which of ``shards`` indexes a layer: when one is lost, only its layers change hands."""
    return max(shards, key=lambda part: hashlib.sha256(f"{part} {diff_id}".encode()).digest())


class Meeting:
    """One shard among the others, in one registry."""

    def __init__(
        self,
        shared: SharedIndexes,
        shard: Shard,
        serves: Callable[[str], bool],
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Nothing is asked yet.

        Indexes and plans are in ``shared``; ``serves`` says which repositories this shard may read from. ``clock``
        gives seconds since 1970; it is compared with that of other machines, so it need not be exact.
        """
        self._shared, self._shard, self._serves, self._limits = shared, shard, serves, shared.limits
        self._clock, self._sleep = clock, sleep
        self._start = clock()
        self._wanted: dict[Digest, Want] = {}
        self._needed: set[Digest] = set()
        self._alive = set(range(shard.parts))
        self._heard = {shard.part}
        self._looked = dict.fromkeys(range(shard.parts), self._start)
        self._silent = dict.fromkeys(range(shard.parts), 0)
        self._progress = dict(self._looked)
        self._said, self._shown, self._showing = oci.EMPTY_DESCRIPTOR, False, threading.Lock()
        self._beats: dict[int, float] = {}
        self._moved: set[Digest] = set()
        self._waiting: dict[int, deque[Digest]] = {}

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """Show the others, while the block runs, that this shard is at work.

        Raises:
            RegistryError: the registry does not take it.
        """
        self._show()
        over = threading.Event()

        def beat() -> None:
            while not over.wait(self._shard.wait_seconds / _LOOKS):
                with contextlib.suppress(LayerkitError):  # there is another beat before this one is missed
                    self._show()

        thread = threading.Thread(target=beat, daemon=True, name="shard-beat")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def say(self, wants: Mapping[Digest, Want]) -> None:
        """Publish what the images of this shard need.

        Raises:
            RegistryError: the registry does not take it.
        """
        self._wanted.update(wants)
        self._needed = set(wants)
        body = {"layers": [
            {"diff_id": str(w.diff_id), "media_type": w.blob.media_type, "digest": str(w.blob.digest),
             "size": w.blob.size, "repository": w.repository} for w in wants.values()
        ]}  # fmt: skip
        data = zstandard.ZstdCompressor(level=3).compress(dumps(body))
        blob = Descriptor.of(_BLOB_TYPE, data)
        self._shared.put_blob(blob, data)
        self._said = blob
        self._show()

    def _show(self) -> None:
        # One at a time: a beat that was begun before the list was there must not arrive after it, and hide it.
        with self._showing:
            if not self._shown:
                self._shared.put_blob(oci.EMPTY_DESCRIPTOR, oci.EMPTY_JSON)
                self._shown = True
            beat = {_BEAT_KEY: repr(self._clock())}
            manifest = oci.manifest_json(
                oci.EMPTY_DESCRIPTOR, [self._said], artifact_type=PLAN_TYPE, annotations=beat
            )
            self._shared.repository.put_manifest(manifest, oci.MANIFEST, self._shard.tag(self._shard.part))

    def meet(self, submit: Callable[[Want], Future[bool]]) -> int:
        """Index the layers that are this shard's, and wait for those of others that it needs.

        Args:
            submit: has a layer indexed and published, unless it is already.

        Returns:
            How many layers were this shard's.
        """
        running: dict[Future[bool], Digest] = {}
        given: set[Digest] = set()
        pause = _FIRST_PAUSE
        changed = True
        while True:
            if changed:
                for diff_id in self._share_out(given):
                    given.add(diff_id)
                    running[submit(self._wanted[diff_id])] = diff_id
            changed = self._hear() | self._miss()
            progress = changed | self._ask()
            for future in [each for each in running if each.done()]:
                # What failed is tried by the job of an image that needs it, and that says why.
                self._needed.discard(running.pop(future))
                progress = True
            if not changed and not self._needed and not running and self._heard >= self._alive:
                return len(given)
            if not progress:
                pause = min(2 * pause, _LONGEST_PAUSE, self._shard.wait_seconds / _LOOKS)
                self._sleep(pause)
            else:
                pause = _FIRST_PAUSE

    def _share_out(self, given: set[Digest]) -> list[Digest]:
        """Say anew who indexes what; return what has come to this shard."""
        ours = []
        self._waiting = {}
        for diff_id in self._wanted:
            if diff_id in given:
                continue
            part = owner(diff_id, self._alive)
            if part == self._shard.part:
                ours.append(diff_id)
            elif diff_id in self._needed:
                self._waiting.setdefault(part, deque()).append(diff_id)
        return ours

    def _hear(self) -> bool:
        """Read what other shards need, of those that were not heard yet; return whether there was something."""
        new = False
        for part in sorted(self._alive - self._heard):
            wants = self._plan(part)
            if wants is not None:
                self._heard.add(part)
                self._works([part])
                self._wanted |= {each: wants[each] for each in wants if each not in self._wanted}
                new = True
        return new

    def _seen(self, part: int) -> tuple[float, Descriptor] | None:
        """Return when another shard has last shown itself, and what it says; None if it has not."""
        what = f"{self._shared.repository}:{self._shard.tag(part)}"
        try:
            _, data = self._shared.repository.manifest(self._shard.tag(part))
            manifest = oci.parse_manifest(data, what, limits=self._limits)
            beat = float(manifest.annotations.get(_BEAT_KEY, "nan"))
            if manifest.artifact_type != PLAN_TYPE or len(manifest.layers) != 1 or not math.isfinite(beat):
                raise InvalidImage(f"{what}: want artifactType {PLAN_TYPE}, a time and one blob")
        except NotFound:
            return None
        except (LayerkitError, ValueError) as error:
            _log.warning("a shard cannot be understood", extra={"shard": part, "error": str(error)})
            return None
        return beat, manifest.layers[0]

    def _plan(self, part: int) -> dict[Digest, Want] | None:
        """Return what another shard needs, None where it does not say so yet."""
        seen = self._seen(part)
        # One of an earlier run does not listen any more.
        if seen is None or seen[0] < self._start - self._shard.wait_seconds or seen[1].media_type != _BLOB_TYPE:
            return None
        what = f"{self._shared.repository}: what shard {part} needs"
        try:
            packed = self._shared.repository.blob(seen[1], _PLAN_BYTES)
            if not 0 <= zstandard.frame_content_size(packed) <= _PLAN_BYTES:
                raise InvalidImage(f"{what}: claims to be larger than {_PLAN_BYTES} bytes")
            plain = zstandard.ZstdDecompressor().decompress(packed, max_output_size=_PLAN_BYTES)
            listed = load_object(plain, what, self._limits).get("layers")
            if not isinstance(listed, list):
                raise InvalidImage(f"{what}: want layers")
            wants = [self._want(each) for each in listed]
        except (LayerkitError, zstandard.ZstdError, KeyError, TypeError, ValueError) as error:
            _log.warning("a shard cannot be understood", extra={"shard": part, "error": str(error)})
            return None
        return {want.diff_id: want for want in wants if self._serves(want.repository)}

    def _want(self, value: object) -> Want:
        if not isinstance(value, dict):
            raise InvalidImage("a layer that is wanted: want an object")
        blob = Descriptor(str(value["media_type"]), Digest.parse(str(value["digest"])), int(value["size"]))
        return Want(Digest.parse(str(value["diff_id"])), blob, str(value["repository"]))

    def _ask(self) -> bool:
        """Look whether others have published what is needed here; return whether some have."""
        some = False
        for part, waiting in self._waiting.items():
            for _ in range(min(len(waiting), _ASKED_AT_ONCE)):
                diff_id = waiting.popleft()
                if self._shared.has(diff_id):
                    self._needed.discard(diff_id)
                    self._works([part])
                    some = True
                else:
                    waiting.append(diff_id)
        return some

    def _miss(self) -> bool:
        """Take shards for lost that show no sign of life; return whether their layers change hands."""
        now, changed = self._clock(), False
        for part in sorted(self._alive - {self._shard.part}):
            waiting = self._waiting.get(part, ())
            early = now - self._looked[part] < self._shard.wait_seconds / _LOOKS
            if early or (part in self._heard and not waiting):
                continue
            seen, self._looked[part] = self._seen(part), now
            if seen is not None and seen[0] > self._beats.get(part, self._start - self._shard.wait_seconds):
                # It reads a large layer, or looks through many images.
                self._beats[part], self._silent[part] = seen[0], 0
            else:
                self._silent[part] += 1
            hangs = now - self._progress[part] > _PATIENCE * self._shard.wait_seconds
            if self._silent[part] < _LOOKS and not hangs:
                continue
            _log.warning("a shard shows no sign of life; going on without it", extra={"shard": part})
            self._alive.discard(part)
            changed = True
            # Once: a layer that two shards in turn do not bring about is left to the images that need it.
            self._needed -= self._moved & set(waiting)
            self._moved |= set(waiting)
        if changed:
            self._works(self._progress)
        return changed

    def _works(self, parts: Iterable[int]) -> None:
        """Take note that these shards are at work: their time begins anew."""
        now = self._clock()
        for part in parts:
            self._looked[part], self._silent[part], self._progress[part] = now, 0, now


def run_name(config: Config, refs: Iterable[RegistryRef], parts: int) -> str:
    """Return the name that all shards give their run without talking: of what is asked and how many they are."""
    maps = sorted(f"{each.mapping} {each.rendering} {each.namespace}" for each in config.remaps)
    text = "\n".join([str(parts), *maps, *sorted({str(ref) for ref in refs})])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def index_together(config: Config, shard: Shard, wishes: Sequence[Wish], registries: Sequence[str]) -> None:
    """Return when the layers of the images in ``wishes`` are indexed, or nobody is left to wait for.

    ``registries`` are the names of all that any shard has images in, in the same order for each of them.
    """
    for name in registries:
        registry = config.registries[name]
        if not config.index_repository(registry):
            continue
        ours = [wish for wish in wishes if wish.target.registry == name]
        try:
            _index_in(config, registry, shard, ours)
        except (RegistryError, BrokenExecutor) as error:
            # The jobs read what is missing, as they would without other shards.
            _log.warning("layers are not shared between shards", extra={"registry": name, "error": str(error)})


def _index_in(config: Config, registry: Registry, shard: Shard, wishes: Sequence[Wish]) -> None:
    settings, indexes = Settings(config.store), place_in(registry, config.index_repository(registry))
    shared = Fleet(settings, indexes, indexes).shared_indexes()
    assert shared is not None
    executor = open_executor(config.engine, min(config.workers, registry.concurrency), tls=config.engine_tls)
    meeting = Meeting(shared, shard, registry.serves)
    try:

        def submit(want: Want) -> Future[bool]:
            fleet = Fleet(settings, place_in(registry, want.repository), indexes)
            return executor.submit(publish, LayerTask(fleet, Layer(want.blob, want.diff_id)))

        with meeting.present():
            meeting.say(_survey(config, executor, wishes))
            meeting.meet(submit)
    except BaseException:
        # An interrupt must not wait for layers that are being read.
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    executor.shutdown(cancel_futures=True)


def _survey(config: Config, executor: Executor, wishes: Sequence[Wish]) -> dict[Digest, Want]:
    """Return the layers that are needed for ``wishes`` and not indexed yet."""
    images: dict[tuple[Digest, str], list[Task]] = {}
    for wish in wishes:
        with contextlib.suppress(LayerkitError):
            task = task_of(config, wish.key, [wish.target], anew=wish.again)
            images.setdefault((wish.key.digest, wish.target.repository), []).append(task)
    found: dict[Digest, Want] = {}
    for future in as_completed([executor.submit(survey, tuple(tasks)) for tasks in images.values()]):
        for want in future.result():
            found.setdefault(want.diff_id, want)
    return found


def survey(tasks: tuple[Task, ...]) -> list[Want]:
    """Return the layers of an image that have no shared index and that one of ``tasks``, for several maps, needs.

    What goes wrong here goes wrong again in the job, which says so.
    """
    task, missing = tasks[0], []
    limits, shared = task.fleet.settings.bounds, task.fleet.shared_indexes()
    with contextlib.suppress(LayerkitError):
        source, over = look(task, limits)
        if over is not None:
            parts = [tuple(replace(each, digest=child) for each in tasks) for child in over.children]
            return [want for part in parts for want in survey(part)]
        for layer in source.image().layers:
            key = (str(shared.repository) if shared else "", layer.diff_id)
            if key not in _published and shared is not None and shared.has(layer.diff_id):
                _published.add(key)
            if key not in _published:
                missing.append(Want(layer.diff_id, layer.descriptor, task.targets[0].repository))
        if not missing or any(each.again or not has_artifact(source.repository, each, limits) for each in tasks):
            return missing
    return []
