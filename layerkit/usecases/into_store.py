"""Use case: an image into the store, with what a mount under a map needs."""

from __future__ import annotations

import time
from typing import NamedTuple

from layerkit.hosts.mounts import choose
from layerkit.idmap import Mapping
from layerkit.model.facts import TreeFacts
from layerkit.model.image import Image
from layerkit.model.limits import Limits
from layerkit.model.ports import ImageSource, Progress
from layerkit.model.reports import RemapReport
from layerkit.store import import_layers as importing
from layerkit.store import preparation as prepare
from layerkit.store.local import LocalStore, MetaEntry


class Brought(NamedTuple):
    """What is in the store now: the report on it, the ways chosen for this host, the tree's facts, and META."""

    report: RemapReport
    ways: choose.Ways
    facts: TreeFacts
    meta: MetaEntry


def bring(
    store: LocalStore,
    source: ImageSource,
    image: Image,
    name: str,
    mapping: Mapping | None,
    *,
    rendering: str,
    namespace: str,
    own_meta: bool,
    data: str,
    jobs: int,
    strict: bool,
    limits: Limits,
    progress: Progress | None,
) -> Brought:
    """Bring ``image`` into ``store`` under ``name``, and make META for ``mapping`` if it needs one of its own.

    Args:
        store: where to.
        source: where the blobs are; only those are read that the store lacks.
        image: what to bring.
        name: its name in the store.
        mapping: the id map; None keeps the owners.
        rendering: ``auto``, ``erofs``, ``directory`` or ``fuse``.
        namespace: ``auto``, ``trusted`` or ``user``.
        own_meta: write META for this map even where an idmapped mount of the shared one would do.
        data: ``auto``, ``tar`` or ``objects``.
        jobs: layers read at the same time.
        strict: refuse overlay xattrs that the image brings.
        limits: bounds on input.
        progress: told about the bytes read.

    Raises:
        UnmappedId: an owner outside the map.
    """
    start = time.monotonic()
    ways = choose.choose(
        store.root,
        mapping,
        rendering=rendering,
        data=data,
        namespace=namespace,
        own_meta=own_meta,
    )
    # gc must not take layers between their import and the row that says who needs them.
    with store.hold():
        read = importing.import_layers(
            source, image, store, ways.backend,
            limits=limits, jobs=jobs, progress=progress,
        )  # fmt: skip
        work = prepare.Preparation(store, image, limits=limits, strict=strict)
        facts = work.facts()
        if ways.one_meta and mapping is not None:
            work.check(mapping)
        entry = work.meta(None if ways.one_meta else mapping, ways.rendering, ways.namespace, progress=progress)
        store.add_image(image, [name], metas=[entry.key])
    own = 0 if ways.one_meta or mapping is None else entry.allocated_bytes
    report = RemapReport(
        name=name,
        manifest=str(image.descriptor.digest),
        map_text=mapping.canonical() if mapping else "",
        map_flags=mapping.flags() if mapping else "",
        next_ref=f"store:{name}",
        entries=facts.names,
        layers=len(image.layers),
        layers_read=read,
        data_bytes=facts.data_bytes,
        data_backend=ways.backend.value,
        rendering=ways.rendering.value,
        how="idmapped mount of shared metadata"
        if ways.idmap
        else "shared metadata, served under the map"
        if ways.one_meta and mapping
        else "own metadata"
        if mapping
        else "owners as they are",
        meta_bytes=own,
        shared_meta_bytes=entry.allocated_bytes - own,
        seconds=time.monotonic() - start,
        warnings=facts.warnings,
    )
    return Brought(report, ways, facts, entry)
