"""One job, done: a manifest looked at, remapped for one map, its artifact published beside it.

A task is a value and :func:`execute` a function of a module, so that any ``concurrent.futures.Executor`` can run
it: threads, processes, or other machines. Errors come back as outcomes, never as exceptions: those of layerkit do
not survive pickling. Doing a task twice, or on two machines at once, gives the same artifact once: the same
image and map give the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from layerkit.formats.oci import documents as oci
from layerkit.formats.oci import remap_artifact as artifact
from layerkit.formats.oci.images import no_image, wanted
from layerkit.hook.config import Config
from layerkit.hook.queue import Key, Outcome, Target
from layerkit.hook.work.access import Place, place_in, traffic
from layerkit.hook.work.layers import Fleet
from layerkit.idmap import Mapping
from layerkit.images.registry.client import Repository
from layerkit.images.registry.names import RegistryRef
from layerkit.images.registry.sink import RegistrySink
from layerkit.images.registry.source import RegistrySource
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import LayerkitError, LossyResult, NotFound, UnmappedId, UnsafeEntry, UsageError
from layerkit.model.limits import Limits
from layerkit.model.ports import BlobReader
from layerkit.model.work import Destination, Work
from layerkit.unpack import find_indexes
from layerkit.usecases.attach import AttachOptions, attach
from layerkit.usecases.settings import Settings

# Trying again with the same image and map gives the same answer.
_PERMANENT = (UnmappedId, UnsafeEntry, LossyResult, UsageError)
_MAX_EXISTING = 256


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker is to do.

    Attributes:
        digest: of a manifest or index.
        options: the artifact that is wanted.
        targets: the repositories that have the image and get the artifact.
        fleet: where the indexes of the image's layers are found; its place is the first of ``targets``.
        platforms: of an index, those to remap; empty takes all of linux.
        again: make it anew even where the registry has it.
    """

    digest: Digest
    options: AttachOptions
    targets: tuple[Place, ...]
    fleet: Fleet
    platforms: tuple[str, ...] = ()
    again: bool = False


class _Source(RegistrySource):
    """An image that is gone where a blob of it is: a registry deletes both."""

    def open_blob(self, descriptor: Descriptor) -> BlobReader:
        return self.repository.open_blob(descriptor)


def _ref(place: Place, digest: Digest) -> RegistryRef:
    return RegistryRef(place.host, place.repository, digest=digest)


def task_of(config: Config, key: Key, wanted_in: Sequence[Target], *, anew: bool) -> Task:
    """Return what to do for a job.

    Raises:
        NotFound: settings have changed since it was stored, and none of its repositories is served.
    """
    served = [
        (registry, target.repository)
        for target in wanted_in
        if (registry := config.registries.get(target.registry)) and registry.serves(target.repository)
    ]
    if not served:
        raise NotFound("none of its repositories is served any more")
    wish = json.loads(key.options)
    shared, targets = config.index_repository(served[0][0]), tuple(place_in(*each) for each in served)
    return Task(
        key.digest,
        AttachOptions(
            Mapping.parse_canonical(key.mapping), wish["rendering"], wish["namespace"], statement=config.statements,
            sign_key=config.sign_key, indexes=config.publish_indexes,
        ),
        targets,
        Fleet(Settings(config.store), targets[0], place_in(served[0][0], shared) if shared else None),
        config.platforms,
        anew,
    )  # fmt: skip


def execute(task: Task) -> Outcome:
    """Do ``task``; never raises but for what ends the process."""
    start = time.monotonic()
    try:
        done = _execute(task)
    except Exception as error:
        return outcome_of(error)
    return replace(done, report={**done.report, "seconds": round(time.monotonic() - start, 4)})


def outcome_of(error: BaseException) -> Outcome:
    """Return what an error makes of a job."""
    match error:
        case NotFound():
            return Outcome("gone", str(error))
        case LayerkitError():
            return Outcome("failed", str(error), permanent=isinstance(error, _PERMANENT))
        case _:
            # A fault of ours must end as a dead letter with its words, not take the worker with it.
            return Outcome("failed", f"{type(error).__name__}: {error}")


def _execute(task: Task) -> Outcome:
    limits = task.fleet.settings.bounds
    before = traffic(task.targets, limits)
    source, over = look(task, limits)
    if over is not None:
        return over
    missing = [each for each in task.targets if task.again or not has_artifact(each.open(limits), task, limits)]
    report = _remap(task, source, missing, limits) if missing else {"existing": True}
    # With threads as workers, jobs side by side share the count.
    after = traffic(task.targets, limits)
    return Outcome("done", report={**report, **{name: value - before[name] for name, value in after.items()}})


def look(task: Task, limits: Limits) -> tuple[RegistrySource, Outcome | None]:
    """Return what has the task's digest, and what comes of it at once where that is no image to be remapped."""
    source = _Source(task.targets[0].open(limits), _ref(task.targets[0], task.digest))
    (entry,) = source.chosen()
    data = source.fetch(entry, limits.manifest_bytes)
    if entry.media_type not in oci.INDEX_TYPES:
        why = no_image(data, entry, limits)
        return source, Outcome("skipped", why) if why else None
    children = wanted(data, entry, task.platforms, limits)
    if not children:
        return source, Outcome("skipped", "no image for the wanted platforms", report={"children": []})
    return source, Outcome("done", children=children, report={"children": [str(each) for each in children]})


def _remap(task: Task, source: RegistrySource, missing: Sequence[Place], limits: Limits) -> dict[str, object]:
    image = source.image()

    def beside(at: int) -> Destination:
        """Return where the artifact goes in one of ``missing``; those before it have the blobs by then."""
        place, ref = missing[at], _ref(missing[at], task.digest)
        names = [each.repository for each in (*missing[:at], task.fleet.shared) if each and each.host == place.host]
        return Destination(
            lambda: RegistrySink(place.open(limits), ref, mount_from=names, attach_only=True),
            where=f"docker://{ref}", has_image=True,
        )  # fmt: skip

    with task.fleet.open() as fleet:
        work = Work(source, image, image.name, kept=fleet.store, limits=limits)
        found = find_indexes(work, fleet)
        report = attach(work, [beside(at) for at in range(len(missing))], task.options, found)
    return {
        "artifact": report.artifact,
        "meta_bytes": report.meta_bytes,
        "data_bytes": report.data_bytes,
        "entries": report.entries,
        "layers": [
            {"digest": str(layer.descriptor.digest), "size": layer.descriptor.size, "kept": origin != "layer"}
            for layer, origin in zip(image.layers, found.origins, strict=True)
        ],
        "layers_read": report.layers_read,
        "layers_kept": report.layers - report.layers_read,
        "layers_shared": found.origins.count("shared"),
        # What a copy under other owners would have taken, once for each map.
        "bytes_avoided": max(0, report.data_bytes - report.meta_bytes),
    }


def has_artifact(repository: Repository, task: Task, limits: Limits) -> bool:
    """Return whether the image has a remap artifact of this map and form already, attached to it and well-formed.

    What a node mounts it verifies by itself, so a forged one costs that node a remap of its own and nothing else.
    """
    options = task.options
    mapping = options.mapping.canonical()
    for listed in repository.referrers(task.digest, artifact.ARTIFACT_TYPE)[:_MAX_EXISTING]:
        said = listed.annotations.get(artifact.MAP_KEY)
        if said is not None and said != mapping:
            continue
        with contextlib.suppress(LayerkitError):
            data = repository.fetch(listed, limits.manifest_bytes)
            found = artifact.parse(data, str(listed.digest), limits=limits)
            if (found.subject.digest, found.mapping, found.rendering, found.namespace) == (
                task.digest, mapping, options.form, options.xattrs.value,
            ):  # fmt: skip
                return True
    return False
