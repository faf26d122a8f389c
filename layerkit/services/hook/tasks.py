"""One job, done: a manifest looked at, remapped for one map, its artifact published beside it.

A task is a value and :func:`execute` a function of a module, so that any ``concurrent.futures.Executor`` can run
it: threads, processes, or other machines. Errors come back as outcomes, never as exceptions: those of layerkit do
not survive pickling. Doing a task twice, or on two machines at once, gives the same artifact once: the same
image and map give the same bytes.
"""

from __future__ import annotations

import contextlib
import re
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2

from layerkit.errors import LayerkitError, LossyResult, NotFound, RegistryError, UnmappedId, UnsafeEntry, UsageError
from layerkit.formats import artifact, oci, oci_images
from layerkit.idmap import Mapping
from layerkit.limits import Limits, from_environment
from layerkit.model.descriptor import Descriptor, Platform
from layerkit.model.digest import Digest
from layerkit.model.image import Image
from layerkit.services.hook.jobs import Outcome

if TYPE_CHECKING:
    from layerkit.attach import Made
    from layerkit.formats.intoto import Attestation, Signer
    from layerkit.model.index import Index
    from layerkit.stores.local import LocalStore
    from layerkit.stores.registry.client import RegistryClient, Repository

# Trying again with the same image and map gives the same answer.
_PERMANENT = (UnmappedId, UnsafeEntry, LossyResult, UsageError)
_LAYER_PREFIXES = ("application/vnd.oci.image.layer.", "application/vnd.docker.image.rootfs.")
_MAX_EXISTING = 256
_ATTACHED = re.compile(r"sha(?:256|512)-[0-9a-f]{64,128}(\..*)?")


@dataclass(frozen=True, slots=True)
class Access:
    """How a registry is reached; plain values, as it travels to workers."""

    host: str
    tls_verify: bool | None = None
    authfile: Path | None = None
    cert_dir: Path | None = None


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
    limits = from_environment()
    access, name = task.targets[0]
    client = _client(access, limits)
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
        for repo in (_client(each[0], limits).repository(f"{each[0].host}/{each[1]}"),)
        if task.again or not has_artifact(repo, task, limits)
    ]
    if not missing:
        return Outcome("done", report={**_cost(task, limits, before), "existing": True})
    image = oci_images.build_image(
        f"{access.host}/{name}@{task.digest}", data, entry, repository.fetch, str(repository), limits=limits
    )
    report = _remap(task, image, repository, [repo for _, repo in missing], limits)
    return Outcome("done", report={**report, **_cost(task, limits, before)})


def _remap(
    task: Task, image: Image, source: Repository, sinks: Sequence[Repository], limits: Limits
) -> dict[str, object]:
    from layerkit.attach import made
    from layerkit.emit.erofs import build_meta
    from layerkit.emit.tar import write_tar
    from layerkit.merge import merge
    from layerkit.metaonly import Namespace
    from layerkit.stores.local import LocalStore

    with LocalStore.open(task.store, create=True, limits=limits) as store, store.hold():
        indexes, layers = _indexes(image, source, store, limits)
        tree = merge(indexes, limits=limits)
        render = build_meta if task.rendering == "erofs" else write_tar
        with made(
            image, tree, Mapping.parse_canonical(task.mapping), render=render, rendering=task.rendering,
            namespace=Namespace(task.namespace), strict=False,
        ) as result:  # fmt: skip
            for at, sink in enumerate(sinks):
                near = [each.repository for each in sinks[:at] if each.host == sink.host]
                _publish(result, sink, near, _statement(task, image, result, sink) if task.statement else None)
                if task.indexes:
                    _publish_indexes(image, indexes, sink, near)
            return {
                "artifact": str(result.descriptor.digest),
                "meta_bytes": result.blob.size,
                "data_bytes": tree.data_bytes,
                "entries": len(tree),
                "layers": layers,
                "layers_read": sum(not layer["kept"] for layer in layers),
                "layers_kept": sum(bool(layer["kept"]) for layer in layers),
                # What a copy under other owners would have taken, once for each map.
                "bytes_avoided": max(0, tree.data_bytes - result.blob.size),
            }


def _publish(result: Made, sink: Repository, near: Sequence[str], said: Attestation | None) -> None:
    """Bring an artifact into a repository: blobs first, the manifest last, so that what is visible is whole."""
    if sink.blob_size(oci.EMPTY_DESCRIPTOR.digest) is None:
        sink.put_blob(oci.EMPTY_DESCRIPTOR, [oci.EMPTY_JSON], mount_from=near)
    if sink.blob_size(result.blob.digest) is None:
        sink.put_blob(result.blob, _Chunks(result), mount_from=near)
    # A statement may come before what it is about (distribution-spec, "Pushing Manifests with Subject"): then
    # nobody sees the artifact without it.
    if said is not None and not sink.referrers(result.descriptor.digest, said.descriptor.artifact_type):
        sink.put_blob(said.blob, [said.data])
        sink.put_manifest(said.manifest, said.descriptor.media_type)
    sink.put_manifest(result.manifest, result.descriptor.media_type)


def _statement(task: Task, image: Image, result: Made, sink: Repository) -> Attestation:
    from importlib.metadata import version

    from layerkit.formats import intoto

    found = artifact.parse(result.manifest, f"artifact {result.descriptor.digest}")
    where = f"docker://{sink.name}@{image.descriptor.digest}"
    payload = intoto.statement(image, where, result.descriptor, found, version("layerkit"))
    return intoto.attestation(payload, result.descriptor, signer_of(task.sign_key) if task.sign_key else None)


@cache
def signer_of(key: Path) -> Signer:
    """Return what signs with the private key in the file ``key``; read once in each process.

    Raises:
        UsageError: no key that can be used.
    """
    from layerkit.stores.keys import FileSigner

    return FileSigner(key)


def _publish_indexes(image: Image, indexes: Sequence[Index], sink: Repository, near: Sequence[str]) -> None:
    """Attach the indexes of an image's layers to it, so that others need not read them either."""
    from layerkit.formats import index_artifact

    if sink.referrers(image.descriptor.digest, index_artifact.ARTIFACT_TYPE):
        return
    blobs = []
    for place, index in enumerate(indexes):
        blob, data = index_artifact.encode(index, indexes[:place])
        blobs.append(blob)
        if sink.blob_size(blob.digest) is None:
            sink.put_blob(blob, [data], mount_from=near)
    manifest, descriptor = index_artifact.build(image, blobs)
    sink.put_manifest(manifest, descriptor.media_type)


class _Chunks:
    """The bytes of an artifact's blob, as often as an upload begins again."""

    def __init__(self, result: Made) -> None:
        self._result = result

    def __iter__(self) -> Iterator[bytes]:
        return self._result.chunks()


def _indexes(
    image: Image, source: Repository, store: LocalStore, limits: Limits
) -> tuple[list[Index], list[dict[str, object]]]:
    """Return the layers' indexes, bottom first; each is read by one worker of this store only."""
    from layerkit.unpack import index_layer

    limits.check("layers_per_image", len(image.layers), image.name)
    indexes, layers = [], []
    for layer in image.layers:
        index = store.load_index(layer.diff_id)
        kept = index is not None
        if index is None:
            with store.layer_lock(layer.diff_id):
                # Another worker may have read it while this one waited.
                index = store.load_index(layer.diff_id)
                kept = index is not None
                if index is None:
                    reader = source.open_blob(layer.descriptor)
                    try:
                        index = index_layer(reader, layer.descriptor, layer.diff_id, limits=limits)
                    finally:
                        reader.close()
                    store.save_index(index)
        indexes.append(index)
        layers.append({"digest": str(layer.descriptor.digest), "size": layer.descriptor.size, "kept": kept})
    return indexes, layers


def no_image(data: bytes, entry: Descriptor, limits: Limits) -> str:
    """Return why the manifest ``data`` has no root filesystem to remap, "" if it has one.

    This is what keeps the hook from working on its own output, by what a manifest is and not by how it is tagged:
    artifacts (ours, signatures, statements) have an artifactType, another config, or layers that are no tar.
    """
    manifest = oci.parse_manifest(data, str(entry.digest), media_type=entry.media_type, limits=limits)
    if manifest.artifact_type:
        return f"an artifact ({manifest.artifact_type})"
    if manifest.config.media_type not in (oci.CONFIG, oci.DOCKER_CONFIG):
        return f"an artifact ({manifest.config.media_type})"
    for layer in manifest.layers:
        if not layer.media_type.startswith(_LAYER_PREFIXES):
            return f"not an image of layers ({layer.media_type})"
    return ""


def wanted(data: bytes, entry: Descriptor, platforms: Sequence[str], limits: Limits) -> tuple[Digest, ...]:
    """Return the manifests of the index ``data`` that are to be remapped, nested indexes among them."""
    index = oci.parse_index(data, str(entry.digest), media_type=entry.media_type, limits=limits)
    asked = [Platform.parse(text) for text in platforms]
    found: dict[Digest, None] = {}
    for each in index.manifests:
        platform = each.platform
        if not oci.is_image(each):
            continue
        if platform is not None and (platform.os != "linux" if not asked else platform not in asked):
            continue
        found[each.digest] = None
    return tuple(found)


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


def resolve(access: Access, repository: str, tag: str) -> Digest:
    """Return the digest that a tag means now.

    Raises:
        NotFound: no such tag.
        RegistryError: the registry does not answer.
    """
    return _client(access, from_environment()).repository(f"{access.host}/{repository}").resolve(tag).digest


def all_tags(access: Access, repository: str) -> list[str]:
    """Return the tags of a repository, without those that only attach something to an image.

    Raises:
        NotFound: no such repository.
        RegistryError: the registry does not answer.
    """
    tags = _client(access, from_environment()).repository(f"{access.host}/{repository}").tags()
    return [tag for tag in tags if not _ATTACHED.fullmatch(tag)]


def upstream(access: Access) -> tuple[str, ssl.SSLContext]:
    """Return the URL of a registry, up to before ``/v2``, and how TLS to it is checked.

    Raises:
        RegistryError: it does not answer, so that nobody knows whether it speaks TLS.
    """
    from layerkit.stores.registry.hosts import base_url, endpoints

    client = _client(access, from_environment())
    endpoint = endpoints(access.host, "", client.options)[-1]
    try:
        scheme = client.transport.scheme(endpoint)
    except httpx2.TransportError as error:
        raise RegistryError(access.host, 0, f"the registry does not answer: {error}", temporary=True) from None
    return base_url(endpoint, scheme).removesuffix("/v2"), endpoint.ssl_context()


@cache
def _client(access: Access, limits: Limits) -> RegistryClient:
    """Return this process's client for a registry: connections and tokens are used again."""
    from layerkit.stores.registry.client import RegistryClient
    from layerkit.stores.registry.options import RegistryOptions, Retry

    # Few attempts here: the queue tries again, later, and lets other jobs go first.
    options = RegistryOptions(
        authfile=access.authfile, tls_verify=access.tls_verify, cert_dir=access.cert_dir, mirrors=False,
        retry=Retry(attempts=3, most_seconds=5.0),
    )  # fmt: skip
    return RegistryClient(options, limits=limits)


def _traffic(task: Task, limits: Limits) -> dict[str, int]:
    clients = {_client(access, limits) for access, _ in task.targets}
    return {
        name: sum(getattr(client.traffic, name) for client in clients)
        for name in ("bytes_read", "bytes_written", "bytes_mounted")
    }


def _cost(task: Task, limits: Limits, before: dict[str, int]) -> dict[str, object]:
    """Return what a job moved over the wire; with threads as workers, jobs side by side share the count."""
    return {name: value - before[name] for name, value in _traffic(task, limits).items()}


__all__ = [
    "Access", "Task", "all_tags", "execute", "has_artifact", "no_image", "resolve", "signer_of", "upstream",
    "wanted",
]  # fmt: skip
