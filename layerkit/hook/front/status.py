"""What the status page shows, as plain values."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from layerkit.hook.config import Config
from layerkit.hook.queue.jobs import JobRow, Stats

_PAGE = Path(__file__).with_name("status.html")


def status_view(config: Config, stats: Stats, rows: Iterable[JobRow], *, draining: bool) -> dict[str, object]:
    """Return the whole page's data: figures, and for each image its layers and what each map costs."""
    names = {remap.mapping: remap.name for remap in config.remaps}
    images: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.state == "skipped" or row.report.get("children"):
            continue  # artifacts, and indexes whose manifests have jobs of their own
        image = images.setdefault(row.digest, {"digest": row.digest, "names": [], "layers": [], "maps": []})
        shown = (f"{each.repository}:{each.tag}" if each.tag else each.repository for each in row.targets)
        image["names"] = list(dict.fromkeys([*image["names"], *shown]))
        layers: Any = row.report.get("layers", [])
        if _read(layers) >= _read(image["layers"]) and layers:
            image["layers"] = layers  # of the map that had to read most: later ones find all of it known
        image["maps"].append(
            {
                "name": names.get(row.mapping, row.mapping),
                "job": row.job,
                "state": row.state,
                "attempts": row.attempts,
                "why": row.why,
                "seconds": (row.finished - row.started) if row.finished and row.started else None,
                **{name: row.report.get(name, 0) for name in ("meta_bytes", "bytes_read", "bytes_avoided")},
            }
        )
    return {
        "states": stats.states,
        "depth": stats.depth,
        "oldest_seconds": stats.oldest_seconds,
        "totals": stats.totals,
        "draining": draining,
        "maps": [remap.name for remap in config.remaps],
        "registries": [registry.name for registry in config.registries.values()],
        "images": list(images.values()),
    }


def _read(layers: list[dict[str, object]]) -> int:
    return sum(not each["kept"] for each in layers)


def page(nonce: str) -> bytes:
    """Return the page; its script runs only under ``nonce``."""
    return _PAGE.read_bytes().replace(b"{{nonce}}", nonce.encode("ascii"))


__all__ = ["page", "status_view"]
