"""``layerkit cache``: what mounts have in the page cache, and share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import Output, fields, human, table


def cache(
    mounts: Annotated[list[Path], typer.Argument(metavar="MOUNT...", help="Mount points, ours or anybody's.")],
    html: o.Html = None,
    top: Annotated[int, typer.Option("--top", min=0, metavar="N", help="Files to name.")] = 10,
    store: o.StoreDir = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Say how much of each mount is in the page cache, and how much of that is one memory for several of them.

    Nothing is read for it, so nothing comes into the cache. Each mount is asked file by file through its own path;
    of another runtime's overlays the layers are found by their mount options.

    Example: `layerkit cache /srv/one /srv/two /srv/three --html cache.html`
    """
    from layerkit.hosts.diagnosis.cache import cache_report

    out = Output(json, quiet)
    with out.progress() as step:
        report = cache_report(mounts, o.store_dir(store), top=top, progress=step)
    out.warn(report.warnings)
    if html is not None:
        from layerkit.cli import pages

        pages.write(html, pages.page("cache.html", report.to_dict()))
        out.note(f"wrote {html}")
    if out.told("cache", report.to_dict()):
        return
    rows = [
        (m.target, m.image or m.map, *map(human, (m.size, m.resident, m.shared, m.resident - m.shared)))
        for m in report.mounts
    ]
    table("", ["MOUNT", "IMAGE", "SIZE", "IN MEMORY", "SHARED", "ITS OWN"], rows, right=(2, 3, 4, 5))
    fields([
        ("seen by all", human(report.seen)),
        ("memory", f"{human(report.memory)} (as copies for each mount it would be {human(report.seen)})"),
        ("saved", human(report.saved)),
    ])  # fmt: skip
    if report.top:
        files = [(f.mounts, human(f.resident), human(f.size), f.path) for f in report.top]
        table("", ["MOUNTS", "IN MEMORY", "SIZE", "PATH"], files, right=(0, 1, 2))
