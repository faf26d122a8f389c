"""What a shard does before its jobs: have every layer that its images need indexed, by it or by another shard."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, as_completed
from contextlib import suppress
from dataclasses import replace

from layerkit.formats.oci import documents as oci
from layerkit.formats.oci.images import no_image, wanted
from layerkit.hook.batch.shards import Meeting, Shard, Want
from layerkit.hook.config import Config, Registry
from layerkit.hook.queue.jobs import Wish
from layerkit.hook.work.access import place_in
from layerkit.hook.work.executors import open_executor
from layerkit.hook.work.layers import Fleet, LayerTask, publish
from layerkit.hook.work.tasks import Task, has_artifact, task_of
from layerkit.images.registry.names import RegistryRef
from layerkit.model.digest import Digest
from layerkit.model.errors import LayerkitError, RegistryError
from layerkit.model.image import Layer
from layerkit.usecases.settings import Settings

_log = logging.getLogger("layerkit.hook.fleet")
_published: set[tuple[str, Digest]] = set()


def run_name(config: Config, refs: Iterable[RegistryRef], parts: int) -> str:
    """Return the name that all shards give their run without talking: of what is asked and how many they are."""
    maps = sorted(f"{each.mapping} {each.rendering} {each.namespace}" for each in config.remaps)
    text = "\n".join([str(parts), *maps, *sorted({str(ref) for ref in refs})])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def index_together(config: Config, shard: Shard, wishes: Sequence[Wish], registries: Sequence[str]) -> None:
    """Return when the layers of the images in ``wishes`` are indexed, or nobody is left to wait for.

    Args:
        config: of this shard.
        shard: which one it is.
        wishes: its jobs.
        registries: names of all that any shard has images in, in the same order for each of them.
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
    meeting = Meeting(shared, shard, registry.serves, settings.bounds)
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
        with suppress(LayerkitError):
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
    try:
        return _image_wants(tasks)
    except LayerkitError:
        return []


def _image_wants(tasks: tuple[Task, ...]) -> list[Want]:
    task = tasks[0]
    limits, shared = task.settings.bounds, task.fleet.shared_indexes()
    source = task.source(limits)
    (entry,) = source.chosen()
    data = source.fetch(entry, limits.manifest_bytes)
    if entry.media_type in oci.INDEX_TYPES:
        children = wanted(data, entry, task.platforms, limits)
        return [want for child in children for want in survey(tuple(replace(each, digest=child) for each in tasks))]
    if no_image(data, entry, limits):
        return []
    missing = []
    for layer in source.image().layers:
        key = (str(shared.repository) if shared else "", layer.diff_id)
        if key in _published:
            continue
        if shared is not None and shared.has(layer.diff_id):
            _published.add(key)
        else:
            missing.append(Want(layer.diff_id, layer.descriptor, task.targets[0].repository))
    if missing and all(not each.again and has_artifact(source.repository, each, limits) for each in tasks):
        return []
    return missing


__all__ = ["index_together", "run_name", "survey"]
