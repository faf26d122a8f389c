"""Use case: free what no image, no mount and no bundle of a store uses."""

from __future__ import annotations

from dataclasses import replace

from layerkit.hosts.mounts import mount as mounter
from layerkit.hosts.podman import layers as storage_layers
from layerkit.store import pins
from layerkit.store.gc import GcReport
from layerkit.store.local import LocalStore


def collect_garbage(store: LocalStore, *, dry_run: bool = False) -> GcReport:
    """Free what no image and no mount of ``store`` uses."""
    run = mounter.default_run(store.root)
    cleared = [] if dry_run else [*mounter.clear_stale(run), *pins.clear(store.root)]

    def in_use() -> tuple[set[str], set[str]]:
        records = mounter.active(run)
        layers, metas = pins.used(pins.live(store.root))
        over_folders = storage_layers.in_use(store.metas())
        return (
            {diff_id for record in records for diff_id in record.indexes} | layers | over_folders[0],
            {record.label["meta"] for record in records if "meta" in record.label} | metas | over_folders[1],
        )

    report = store.gc(in_use=in_use, dry_run=dry_run)
    return replace(report, removed=(*cleared, *report.removed))
