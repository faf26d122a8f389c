"""TODO."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from layerkit.usecases.settings import default_store, open_store

if TYPE_CHECKING:
    pass


def collect_garbage(store: Path | None = None, *, dry_run: bool = False) -> dict[str, object]:
    """Free what no image and no mount of ``store`` uses; return what was freed."""
    from layerkit.hosts.mounts import mount as mounter
    from layerkit.hosts.podman import layers as storage_layers
    from layerkit.store import pins

    path = store or default_store()
    run = mounter.default_run(path)
    cleared = [] if dry_run else mounter.clear_stale(run)
    with open_store(path) as held:
        if not dry_run:
            cleared += pins.clear(path)

        def in_use() -> tuple[set[str], set[str]]:
            records = mounter.active(run)
            layers, metas = pins.used(pins.live(path))
            over_folders = storage_layers.in_use(held.metas())
            return (
                {diff_id for record in records for diff_id in record.indexes} | layers | over_folders[0],
                {record.label["meta"] for record in records if "meta" in record.label} | metas | over_folders[1],
            )

        report = held.gc(in_use=in_use, dry_run=dry_run)
    return {"removed": [*cleared, *report.removed], "freed_bytes": report.freed_bytes}
