"""``layerkit doctor``, ``which``, ``cache``, ``copyups``: what a host can do, what its mounts hold and share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import Output, fields, human, line, page, table, write_page
from layerkit.model.errors import UsageError

if TYPE_CHECKING:
    from layerkit.hosts.diagnosis.copyups import CopyUp, CopyUpReport
    from layerkit.hosts.diagnosis.which import Place, Which

_SHOWN = 20
_UPPER = {
    "metadata": "only its metadata was copied up; its data is still the layer's",
    "data": "copied up with its data; no other mount shares it",
    "made": "made in this mount; no layer has it",
}


def doctor(store: o.StoreDir = None, json: o.Json = False) -> None:
    """Probe this host and the store's filesystem, and say which way of remapping fits best.

    For each container runtime it says what to use: the kernel's idmapped mounts, or layerkit and how to switch
    it on, or neither and why. It also says whether opening a file for writing copies its data there. Every
    feature is tried; the kernel's version decides nothing.

    Example: `layerkit doctor --store /srv/layerkit`
    """
    from layerkit.hosts.diagnosis.doctor import examine

    report = examine(o.store_dir(store))
    if Output(json).told("doctor", report.to_dict()):
        return
    table(
        "",
        ["FEATURE", "HERE", "WHAT FOR", "IF ABSENT"],
        [(r.feature, "yes" if r.present else "no", r.why, "" if r.present else r.hint) for r in report.rows],
    )
    fields(report.conclusions())
    table(
        "",
        ["RUNTIME", "BEST HERE", "WHY", "HOW", "COPY-UP"],
        [
            (
                r.name + (f" {r.version}" if r.version else " (not installed)"),
                r.answer, r.why, r.how, "unknown" if r.clone is None else "a clone" if r.clone else "a copy",
            )
            for r in report.runtimes
        ],
    )  # fmt: skip


def which(
    what: Annotated[
        str,
        typer.Argument(
            metavar="PATH|OBJECT",
            help="A path in a mount of layerkit. Or a file content, layer or image: `sha256:HEX`, the first 8 or "
            "more digits of it, or the short name of data, `/:x/NAME`.",
        ),
    ],
    store: o.StoreDir = None,
    json: o.Json = False,
) -> None:
    """Show which image, layer and blob a file comes from, where its bytes are, and which mounts share them.

    Examples:
    `layerkit which /mnt/usr/bin/python3`

    `layerkit which sha256:5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03 --json`
    """
    from layerkit.hosts.diagnosis.which import which as find

    with o.open_store(store) as held:
        answer = find(what, held)
    if not Output(json).told("which", answer.to_dict()):
        _show_places(answer)


def _show_places(answer: Which) -> None:
    pairs: list[tuple[str, object]] = []
    if answer.kind == "path":
        pairs.append(("file", f"{answer.file}, {human(answer.size)}"))
        pairs.append(("mount", f"{answer.mount}, map {answer.map or 'none'}"))
        if answer.upper:
            pairs.append(("upper", _UPPER[answer.upper]))
        if answer.place is not None:
            pairs.append(("image", f"{answer.place.image} {answer.place.manifest}".strip()))
            pairs.append(("layer", _layer(answer.place)))
    elif answer.kind == "content":
        pairs.append(("content", human(answer.size)))
    if answer.sha256:
        pairs += [("sha256", answer.sha256), ("short name", answer.name)]
    if answer.data:
        pairs.append(("bytes at", answer.data))
    if answer.sharers:
        who = [f"{s.target} ({s.image}, map {s.map or 'none'})" for s in answer.sharers]
        pairs.append(("shared with" if answer.kind == "path" else "mounted at", who))
    elif answer.kind == "path" and answer.sha256:
        pairs.append(("shared with", "no other mount"))
    fields(pairs)
    if answer.places:
        rows = [
            (p.image, p.layer or "", p.diff_id[:19], p.path, "" if p.visible else "hidden")
            for p in answer.places[:_SHOWN]
        ]
        table("", ["IMAGE", "LAYER", "DIFF ID", "PATH", ""], rows, right=(1,))
        if len(answer.places) > _SHOWN:
            line(f"and {len(answer.places) - _SHOWN} more (--json lists all)")


def _layer(place: Place) -> str:
    names = [f"{place.layer} from the bottom", place.diff_id and f"diff_id {place.diff_id}",
             place.blob and f"blob {place.blob}"]  # fmt: skip
    return ", ".join(filter(None, names))


def cache(
    mounts: Annotated[list[Path], typer.Argument(metavar="MOUNT...", help="Mount points of any runtime.")],
    html: o.Html = None,
    top: Annotated[int, typer.Option("--top", min=0, metavar="N", help="Files to list.")] = 10,
    store: o.StoreDir = None,
    out: Output = Output(),
) -> None:
    """Show how much of each mount is in the page cache, and how much of that several mounts share.

    No file is read for this, so the cache stays as it is. Each file is looked up through its own mount. For
    overlays of other runtimes, the mount options tell where the layers are.

    Example: `layerkit cache /srv/one /srv/two /srv/three --html cache.html`
    """
    from layerkit.hosts.diagnosis.cache import cache_report

    with out.progress() as step:
        report = cache_report(mounts, o.store_dir(store), top=top, progress=step)
    if html is not None:
        write_page(html, page("cache.html", report.to_dict()))
        out.note(f"wrote {html}")
    if out.told("cache", report.to_dict(), report.warnings):
        return
    rows = [
        (m.target, m.image or m.map, *map(human, (m.size, m.resident, m.shared, m.resident - m.shared)))
        for m in report.mounts
    ]
    table("", ["MOUNT", "IMAGE", "SIZE", "IN MEMORY", "SHARED", "ITS OWN"], rows, right=(2, 3, 4, 5))
    fields([
        ("seen by all", human(report.seen)),
        ("memory", f"{human(report.memory)} (with a copy for each mount: {human(report.seen)})"),
        ("saved", human(report.saved)),
    ])  # fmt: skip
    if report.top:
        files = [(f.mounts, human(f.resident), human(f.size), f.path) for f in report.top]
        table("", ["MOUNTS", "IN MEMORY", "SIZE", "PATH"], files, right=(0, 1, 2))


def copyups(
    mount: Annotated[Path, typer.Argument(metavar="MOUNT", help="A writable overlay of any runtime.")],
    watch: Annotated[
        bool,
        typer.Option("--watch", help="As root: watch who opens files for writing and who writes, until Ctrl-C."),
    ] = False,
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=0, metavar="N", help="With --watch: how long.")
    ] = None,
    store: o.StoreDir = None,
    out: Output = Output(),
) -> None:
    """Show what is in a mount's upper: files copied up with or without their data, and files made there.

    A file that was opened for writing but never written to was copied up for nothing. Where the upper's
    filesystem can share blocks with the layers' filesystem, a copy-up is a clone and costs nothing.

    Examples:
    `layerkit copyups /srv/root`

    `layerkit copyups /srv/root --watch --seconds 60 --json`
    """
    from layerkit.hosts.diagnosis import copyups as looking

    if seconds is not None and not watch:
        raise UsageError("--seconds needs --watch")
    where = o.store_dir(store)
    if watch:
        out.note(f"watching {mount}" + ("; Ctrl-C ends it" if seconds is None else f" for {seconds:g} s"))
        report = _until_stopped(mount, where, seconds)
    else:
        report = looking.look(mount, where)
    if not out.told("copyups", report.to_dict(), report.warnings):
        _show_copyups(report)


def _until_stopped(mount: Path, store: Path, seconds: float | None) -> CopyUpReport:
    import signal

    from layerkit.hosts.diagnosis import copyups as looking

    # Ctrl-C is how a watch ends, not an interruption of it.
    old = {each: signal.signal(each, signal.default_int_handler) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        return looking.watch(mount, store, seconds)
    finally:
        for each, handler in old.items():
            signal.signal(each, handler)


def _show_copyups(report: CopyUpReport) -> None:
    from layerkit.hosts.diagnosis.copyups import DATA, MADE, METADATA

    fields([
        ("upper", f"{report.upper} (on {report.filesystem})"),
        ("without data", f"{report.count(METADATA)} files: chmod and chown alone"),
        ("with data", f"{report.count(DATA)} files, {human(report.copied_bytes)} copied, "
                      f"{human(report.cloned_bytes)} shared as clones"),
        ("made there", f"{report.count(MADE)} files"),
        ("for nothing", f"{human(report.needless_bytes)} were copied and never written to"),
    ])  # fmt: skip
    rows = [
        (_way(file), "yes" if file.written else "no", human(file.size), human(file.copied), file.path)
        for file in report.files[:_SHOWN]
        if file.kind == DATA
    ]
    if rows:
        table("", ["COPIED UP AS", "WRITTEN", "SIZE", "COPIED", "PATH"], rows, right=(2, 3))
    if report.opened is not None:
        opened = [
            (x.opens, "yes" if x.written else "no", "yes" if x.copied_up else "no", human(x.size),
             ", ".join(x.programs), x.path)
            for x in report.opened[:_SHOWN]
        ]  # fmt: skip
        head = ["OPENS", "WRITTEN", "COPIED UP", "SIZE", "BY", "PATH"]
        table("opened for writing while watched", head, opened, right=(0, 3))
        lazy = sum(x.size for x in report.opened if x.copied_up and not x.written)
        fields([("for nothing", f"{human(lazy)} of these were copied up and not written to")])


def _way(file: CopyUp) -> str:
    if file.shared < 0:
        return "unknown"
    if not file.size:
        return "empty"
    return "bytes" if not file.shared else "clone" if file.shared >= file.allocated else "part clone"
