"""One job, done: a manifest looked at, remapped for one map, its artifact published beside it.

A task is a value and :func:`execute` a function of a module, so that any ``concurrent.futures.Executor`` can run
it: threads, processes, or other machines. Errors come back as outcomes, never as exceptions: those of layerkit do
not survive pickling. Doing a task twice, or on two machines at once, gives the same artifact once: the same
image and map give the same bytes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from layerkit.formats.oci import documents as oci
from layerkit.formats.oci import images as oci_images
from layerkit.formats.oci import index_artifact
from layerkit.formats.oci import remap_artifact as artifact
from layerkit.formats.oci.images import no_image, wanted
from layerkit.hook.queue.jobs import Outcome
from layerkit.hook.work.access import Access, client_of
from layerkit.hook.work.layers import index_of, layer_tasks
from layerkit.idmap import Mapping
from layerkit.images.registry.names import RegistryRef
from layerkit.images.registry.sink import RegistrySink
from layerkit.linux import configuration
from layerkit.model.digest import Digest
from layerkit.model.errors import LayerkitError, LossyResult, NotFound, UnmappedId, UnsafeEntry, UsageError
from layerkit.model.image import Image
from layerkit.model.limits import Limits
from layerkit.usecases.attach import AttachOptions, made, put, signer_of, statement
from layerkit.usecases.published_indexes import put_indexes

if TYPE_CHECKING:
    from layerkit.formats.oci.intoto import Attestation
    from layerkit.images.registry.client import Repository
    from layerkit.usecases.attach import Made

# Trying again with the same image and map gives the same answer.
_PERMANENT = (UnmappedId, UnsafeEntry, LossyResult, UsageError)
_MAX_EXISTING = 256


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker is to do.

    Attributes:
        digest: of a manifest or index.
        mapping: canonical text of the id map.
        rendering: ``erofs`` or ``tar``.
        namespace: ``trusted`` or ``user``.
        targets: the repositories that have the image and get the artifact.
        store: folder of the local store of whoever does it; indexes are kept there.
        platforms: of an index, those to remap; empty takes all of linux.
        again: make it anew even where the registry has it.
        indexes: also publish the indexes of the layers, where there are none.
        statement: also attach a statement to the artifact.
        sign_key: signs that statement; None leaves it unsigned.
        shared: repository of the first target's registry in which indexes of layers are shared, "" for none.
    """

    digest: Digest
    mapping: str
    rendering: str
    namespace: str
    targets: tuple[tuple[Access, str], ...]
    store: Path
    platforms: tuple[str, ...] = ()
    again: bool = False
    indexes: bool = False
    statement: bool = False
    sign_key: Path | None = None
    shared: str = ""


def execute(task: Task) -> Outcome:
    """Do ``task``; never raises but for what ends the process."""
    start = time.monotonic()
    try:
        done = _execute(task)
    except NotFound as error:
        return Outcome("gone", str(error))
    except LayerkitError as error:
        return Outcome("failed", str(error), permanent=isinstance(error, _PERMANENT))
    except Exception as error:
        # A job that finds a fault of ours must end as a dead letter with its words, not take the worker with it.
        return Outcome("failed", f"{type(error).__name__}: {error}")
    report = {**done.report, "seconds": round(time.monotonic() - start, 4)}
    return Outcome(done.state, done.why, done.permanent, done.children, report)


def _execute(task: Task) -> Outcome:
    limits = configuration.limits()
    access, name = task.targets[0]
    client = client_of(access, limits)
    before = _traffic(task, limits)
    repository = client.repository(f"{access.host}/{name}")
    entry, data = repository.manifest(task.digest)
    if entry.media_type in oci.INDEX_TYPES:
        children = wanted(data, entry, task.platforms, limits)
        return Outcome("done" if children else "skipped", "" if children else "no image for the wanted platforms",
                       children=children, report={"children": [str(each) for each in children]})  # fmt: skip
    if why := no_image(data, entry, limits):
        return Outcome("skipped", why)
    missing = [
        (each, repo)
        for each in task.targets
        for repo in (client_of(each[0], limits).repository(f"{each[0].host}/{each[1]}"),)
        if task.again or not has_artifact(repo, task, limits)
    ]
    if not missing:
        return Outcome("done", report={**_cost(task, limits, before), "existing": True})
    image = oci_images.build_image(
        f"{access.host}/{name}@{task.digest}", data, entry, repository.fetch, str(repository), limits=limits
    )
    report = _remap(task, image, [repo for _, repo in missing], limits)
    return Outcome("done", report={**report, **_cost(task, limits, before)})


def _remap(task: Task, image: Image, sinks: Sequence[Repository], limits: Limits) -> dict[str, object]:
    from layerkit.model.trees.merge import merge
    from layerkit.store.local import LocalStore

    limits.check("layers_per_image", len(image.layers), image.name)
    access, name = task.targets[0]
    with LocalStore.open(task.store, create=True, limits=limits) as store, store.hold():
        wanted = layer_tasks(image, access, name, task.store, task.shared)
        got = [index_of(each, store, limits) for each in wanted]
        indexes, origins = [index for index, _ in got], [origin for _, origin in got]
        tree = merge(indexes, limits=limits)
        options = AttachOptions(
            Mapping.parse_canonical(task.mapping), task.rendering, task.namespace,
            statement=task.statement, sign_key=task.sign_key,
        )  # fmt: skip
        with made(image, tree, options) as result:
            for at, repository in enumerate(sinks):
                near = [each.repository for each in sinks[:at] if each.host == repository.host]
                ours = [task.shared] if task.shared and repository.host == access.host else []
                ref = RegistryRef(repository.host, repository.repository, digest=image.descriptor.digest)
                with RegistrySink(repository, ref, mount_from=[*near, *ours], attach_only=True) as sink:
                    put(result, sink, _statement(options, image, result, repository))
                    if task.indexes and not repository.referrers(
                        image.descriptor.digest, index_artifact.ARTIFACT_TYPE
                    ):
                        # Those that came from others of this fleet are vouched for by where it keeps them.
                        put_indexes(image, indexes, sink, vouched=True)
                    sink.commit()
            return {
                "artifact": str(result.descriptor.digest),
                "meta_bytes": result.blob.size,
                "data_bytes": tree.data_bytes,
                "entries": len(tree),
                "layers": [
                    {"digest": str(each.blob.digest), "size": each.blob.size, "kept": origin != "layer"}
                    for each, origin in zip(wanted, origins, strict=True)
                ],
                "layers_read": origins.count("layer"),
                "layers_kept": len(origins) - origins.count("layer"),
                "layers_shared": origins.count("shared"),
                # What a copy under other owners would have taken, once for each map.
                "bytes_avoided": max(0, tree.data_bytes - result.blob.size),
            }


def _statement(options: AttachOptions, image: Image, result: Made, repository: Repository) -> Attestation | None:
    """Return what is to be said of an artifact, None where nothing is, or something of the kind is there."""
    if not options.statement:
        return None
    said = statement(image, f"docker://{repository.name}@{image.descriptor.digest}", result, options.sign_key)
    return None if repository.referrers(result.descriptor.digest, said.descriptor.artifact_type) else said


def has_artifact(repository: Repository, task: Task, limits: Limits) -> bool:
    """Return whether the image has a remap artifact of this map and form already, attached to it and well-formed.

    What a node mounts it verifies by itself, so a forged one costs that node a remap of its own and nothing else.
    """
    for listed in repository.referrers(task.digest, artifact.ARTIFACT_TYPE)[:_MAX_EXISTING]:
        said = listed.annotations.get(artifact.MAP_KEY)
        if said is not None and said != task.mapping:
            continue
        with contextlib.suppress(LayerkitError):
            data = repository.fetch(listed, limits.manifest_bytes)
            found = artifact.parse(data, str(listed.digest), limits=limits)
            if (found.subject.digest, found.mapping, found.rendering, found.namespace) == (
                task.digest, task.mapping, task.rendering, task.namespace,
            ):  # fmt: skip
                return True
    return False


def _traffic(task: Task, limits: Limits) -> dict[str, int]:
    clients = {client_of(access, limits) for access, _ in task.targets}
    return {
        name: sum(getattr(client.traffic, name) for client in clients)
        for name in ("bytes_read", "bytes_written", "bytes_mounted")
    }


def _cost(task: Task, limits: Limits, before: dict[str, int]) -> dict[str, object]:
    """Return what a job moved over the wire; with threads as workers, jobs side by side share the count."""
    return {name: value - before[name] for name, value in _traffic(task, limits).items()}


__all__ = [
    "Access", "Task", "execute", "has_artifact", "no_image", "signer_of", "wanted",
]  # fmt: skip
