"""From events to stored jobs: which registry, whether allowed, which digest; one commit for many requests.

Nothing is acknowledged before it is on disk. Requests that come at the same time share one commit, as each costs a
flush of the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field

from layerkit.hook.config import Config, Registry
from layerkit.hook.front.events import Event
from layerkit.hook.front.guard import Token
from layerkit.hook.queue import Added, Queue, Target, Wish
from layerkit.hook.telemetry import Metrics
from layerkit.hook.work.worker import QueueWorker
from layerkit.model.digest import Digest
from layerkit.model.errors import NotFound

Resolve = Callable[[Registry, str, str], Digest]
"""Asks a configured registry for the digest of (repository, tag); raises NotFound or RegistryError."""

_RESOLVED_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of a request: the jobs with their states, and why events were left out."""

    jobs: tuple[Added, ...]
    ignored: tuple[str, ...]


@dataclass(slots=True)
class Service:
    """The parts of a running hook, behind whichever door; one for each event loop.

    Attributes:
        config: of the hook.
        queue: of its jobs.
        resolve: asks what a tag means.
        metrics: of this process.
        token: that clients must show.
        worker: works the queue off here; None leaves that to other processes.
        draining: whether it is about to end.
    """

    config: Config
    queue: Queue
    resolve: Resolve
    metrics: Metrics
    token: Token
    worker: QueueWorker | None
    draining: bool = False
    _pending: list[Wish] = field(default_factory=list)
    _stored: asyncio.Future[list[Added]] | None = None
    _some: asyncio.Event = field(default_factory=asyncio.Event)
    _slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_RESOLVED_AT_ONCE))

    def wake(self) -> None:
        """Have the queue looked at now."""
        if self.worker is not None:
            self.worker.wake()

    @contextlib.asynccontextmanager
    async def running(self, *others: Coroutine[object, object, None]) -> AsyncIterator[None]:
        """Store and work while the block runs, and do ``others``; then let the worker end in order."""
        tasks = [asyncio.create_task(each) for each in (self._store_pending(), *others)]
        if self.worker is not None:
            self.worker.start()
        try:
            yield
        finally:
            self.draining = True
            if self.worker is not None:
                await asyncio.to_thread(self.worker.stop)
            for task in tasks:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _store_pending(self) -> None:
        """Store what is pending, for ever; cancel it to stop."""
        while True:
            await self._some.wait()
            self._some.clear()
            pending, stored, self._pending, self._stored = self._pending, self._stored, [], None
            if stored is None:
                continue
            try:
                stored.set_result(await asyncio.to_thread(self.queue.add, pending))
            except Exception as error:
                stored.set_exception(error)
            except BaseException:
                stored.set_exception(RuntimeError("stopped"))
                raise

    async def store(self, wishes: list[Wish]) -> list[Added]:
        """Store ``wishes``; return when they are on disk."""
        if not wishes:
            return []
        stored: asyncio.Future[list[Added]] = self._stored or asyncio.get_running_loop().create_future()
        self._stored, start = stored, len(self._pending)
        self._pending += wishes
        self._some.set()
        # One who goes away must not end the commit of the others.
        return (await asyncio.shield(stored))[start : start + len(wishes)]

    async def take(self, events: Sequence[Event], registry: str = "", *, again: bool = False) -> Taken:
        """Make jobs of ``events``, all of them stored when this returns, with ``again`` also what came to an end.

        ``registry`` is the name in the path of the request, "" if there is none.

        Raises:
            RegistryError: a tag cannot be resolved now; nothing is stored.
        """
        found = await asyncio.gather(*(self._wishes(event, registry, again) for event in events))
        for event, (_, why) in zip(events, found, strict=True):
            self.metrics.events(event.kind, "ignored", bool(why))
        added = await self.store(list(dict.fromkeys(wish for wishes, _ in found for wish in wishes)))
        if events:
            self.metrics.events(events[0].kind, "new", sum(each.new for each in added))
            self.metrics.events(events[0].kind, "known", sum(not each.new for each in added))
        return Taken(tuple(added), tuple(why for _, why in found if why))

    async def _wishes(self, event: Event, named: str, again: bool) -> tuple[list[Wish], str]:
        """Return the jobs of an event, or why it is left out."""
        registry = self.config.registry_for(named, event.host)
        if registry is None:
            return [], f"{named or event.host or 'no name'}: no registry of that name is configured"
        if not registry.serves(event.repository):
            return [], f"{event.repository}: not among the repositories of {registry.name} that are served"
        digest = event.digest
        if digest is None:
            async with self._slots:
                try:
                    digest = await asyncio.to_thread(self.resolve, registry, event.repository, event.tag)
                except NotFound:
                    return [], f"{event.repository}:{event.tag}: not in the registry"
        target = Target(registry.name, event.repository, event.tag)
        return [Wish(key, target, again=again) for key in self.config.keys(digest)], ""
