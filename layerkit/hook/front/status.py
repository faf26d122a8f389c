"""What the status page shows, as plain values."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from layerkit.hook.config import Config
from layerkit.hook.queue.queue import JobRow, Stats

_PAGE = Path(__file__).with_name("status.html")


def job_view(row: JobRow) -> dict[str, object]:
    """Return a job as the API shows it; times are seconds since 1970."""
    return {
        "id": row.job,
        "digest": row.digest,
        "map": row.mapping,
        "options": row.options,
        "state": row.state,
        "attempts": row.attempts,
        "losses": row.losses,
        "not_before": row.not_before,
        "created": row.created,
        "started": row.started,
        "finished": row.finished,
        "why": row.why,
        "report": row.report,
        "targets": [{"registry": t.registry, "repository": t.repository, "tag": t.tag} for t in row.targets],
    }


def status_view(config: Config, stats: Stats, rows: Iterable[JobRow], *, draining: bool) -> dict[str, object]:
    """Return the whole page's data: figures, and for each image its layers and what each map costs."""
    names = {remap.mapping: remap.name for remap in config.remaps}
    images: dict[str, dict[str, object]] = {}
    for row in rows:
        if row.state == "skipped" or row.report.get("children"):
            continue  # artifacts, and indexes whose manifests have jobs of their own
        image = images.setdefault(row.digest, {"digest": row.digest, "names": [], "layers": [], "maps": []})
        shown = image["names"]
        assert isinstance(shown, list)
        for target in row.targets:
            name = f"{target.repository}:{target.tag}" if target.tag else target.repository
            if name not in shown:
                shown.append(name)
        layers = row.report.get("layers")
        if isinstance(layers, list) and _read(layers) >= _read(image["layers"]):
            image["layers"] = layers  # of the map that had to read most: later ones find all of it known
        maps = image["maps"]
        assert isinstance(maps, list)
        maps.append(
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


def _read(layers: object) -> int:
    return sum(not each["kept"] for each in layers) if isinstance(layers, list) else 0


def page(nonce: str) -> bytes:
    """Return the page; its script runs only under ``nonce``."""
    return _PAGE.read_bytes().replace(b"{{nonce}}", nonce.encode("ascii"))


__all__ = ["job_view", "page", "status_view"]
