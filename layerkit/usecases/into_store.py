"""Use case: an image into the store, with what a mount under a map needs; and that mount."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from layerkit.hosts.mounts import mount as mounter
from layerkit.hosts.mounts.spec import MountOptions, Ways, choose, data_layers
from layerkit.idmap import Mapping
from layerkit.model.facts import TreeFacts
from layerkit.model.reports import RemapReport
from layerkit.model.work import Work
from layerkit.store import preparation as prepare
from layerkit.store.import_layers import import_layers
from layerkit.store.local import LocalStore
from layerkit.store.metas import MetaEntry


class Brought(NamedTuple):
    """What is in the store now: the report on it, the ways chosen for this host, the tree's facts, and META."""

    report: RemapReport
    ways: Ways
    facts: TreeFacts
    meta: MetaEntry


def bring(work: Work, store: LocalStore, mapping: Mapping | None, options: MountOptions) -> Brought:
    """Bring the image into ``store`` under its name, and make META for ``mapping`` if it needs one of its own.

    Only those blobs are read that the store lacks.

    Raises:
        UnmappedId: an owner outside the map.
    """
    start, image = time.monotonic(), work.image
    ways = choose(store.root, mapping, options)
    # gc must not take layers between their import and the row that says who needs them.
    with store.hold():
        read = import_layers(work, store, ways.backend)
        ready = prepare.Preparation(store, image.diff_ids, limits=work.limits, strict=work.strict)
        facts = ready.facts()
        if ways.one_meta and mapping is not None:
            ready.check(mapping)
        entry = ready.meta(
            None if ways.one_meta else mapping, ways.rendering, ways.namespace, progress=work.progress
        )
        store.add_image(image, [work.name], metas=[entry.key])
    own = 0 if ways.one_meta or mapping is None else entry.allocated_bytes
    report = RemapReport(
        name=work.name,
        manifest=str(image.descriptor.digest),
        map_text=mapping.canonical() if mapping else "",
        map_flags=mapping.flags() if mapping else "",
        next_ref=f"store:{work.name}",
        entries=facts.names,
        layers=len(image.layers),
        layers_read=read,
        data_bytes=facts.data_bytes,
        data_backend=ways.backend.value,
        rendering=ways.rendering.value,
        how=_how(ways, mapping),
        meta_bytes=own,
        shared_meta_bytes=entry.allocated_bytes - own,
        seconds=time.monotonic() - start,
        warnings=facts.warnings,
    )
    return Brought(report, ways, facts, entry)


def _how(ways: Ways, mapping: Mapping | None) -> str:
    if ways.idmap:
        return "idmapped mount of shared metadata"
    if mapping is None:
        return "owners as they are"
    return "shared metadata, served under the map" if ways.one_meta else "own metadata"


def mount(
    work: Work, store: LocalStore, target: Path, mapping: Mapping | None, options: MountOptions
) -> RemapReport:
    """Mount the image under ``mapping`` at ``target``.

    Raises:
        UnmappedId: an owner outside the map.
        UnsupportedHost: this host or user cannot mount it so; the hint says what can.
    """
    # Held until the mount's record says what it uses: gc must not come in between.
    with store.hold():
        report, ways, facts, entry = bring(work, store, mapping, options)
        label = {
            "image": work.name, "manifest": report.manifest, "map": report.map_text, "meta": entry.key,
            "layers": ",".join(facts.data_layers), "backend": ways.backend.value,
        }  # fmt: skip
        spec = options.spec(target, ways, mapping, entry, data_layers(store, ways.backend, facts))
        mounter.mount(replace(spec, label=label), run=mounter.default_run(store.root))
    return report
