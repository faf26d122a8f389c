"""``layerkit copyups``: what a writable mount copied up, at what cost, and whether for anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import Output, fields, human, table
from layerkit.model.errors import UsageError

if TYPE_CHECKING:
    from layerkit.hosts.diagnosis.copyups import CopyUp, CopyUpReport

_SHOWN = 20


def copyups(
    mount: Annotated[Path, typer.Argument(metavar="MOUNT", help="A writable overlay, ours or anybody's.")],
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Watch who opens files for writing, and who writes, until Ctrl-C (as root)."),
    ] = False,
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=0, metavar="N", help="With --watch: for so long.")
    ] = None,
    store: o.StoreDir = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Say what is in the upper of a mount: copied up without data, with it (as a clone or in bytes), or made there.

    A file that was opened for writing and never written to was copied for nothing: a copy at the first write would
    have saved it. Where the upper's filesystem can share blocks with the layers', copying up is a clone and free.

    Examples:
    `layerkit copyups /srv/root`

    `layerkit copyups /srv/root --watch --seconds 60 --json`
    """
    from layerkit.hosts.diagnosis import copyups as looking

    if seconds is not None and not watch:
        raise UsageError("--seconds means something only with --watch")
    out, where = Output(json, quiet), o.store_dir(store)
    if watch:
        out.note(f"watching {mount}" + ("; Ctrl-C ends it" if seconds is None else f" for {seconds:g} s"))
        report = _until_stopped(mount, where, seconds)
    else:
        report = looking.look(mount, where)
    out.warn(report.warnings)
    if not out.told("copyups", report.to_dict()):
        _show(report)


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


def _show(report: CopyUpReport) -> None:
    from layerkit.hosts.diagnosis.copyups import DATA, MADE, METADATA

    fields([
        ("upper", f"{report.upper} (on {report.filesystem})"),
        ("without data", f"{report.count(METADATA)} files: chmod and chown alone"),
        ("with data", f"{report.count(DATA)} files, {human(report.copied_bytes)} copied, "
                      f"{human(report.cloned_bytes)} shared as clones"),
        ("made there", f"{report.count(MADE)} files"),
        ("for nothing", f"{human(report.needless_bytes)} of the copies were never written to"),
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
        fields([("a lazy copy-up", f"would not have touched {human(lazy)} of these")])


def _way(file: CopyUp) -> str:
    if file.shared < 0:
        return "not told"
    if not file.size:
        return "empty"
    return "bytes" if not file.shared else "clone" if file.shared >= file.allocated else "part clone"
