"""The one renderer: results on standard output, progress and notes on standard error, reports as HTML pages.

A page needs nothing but itself: no network, no other file.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from layerkit.cli.options import Json, Quiet
from layerkit.model.errors import show_lines, show_path

if TYPE_CHECKING:
    from layerkit.model.ports import Progress
    from layerkit.model.reports import RemapReport, Report
    from layerkit.usecases.analyze import AnalyzeReport
    from layerkit.usecases.each_platform import PlatformsReport


@dataclass(frozen=True, slots=True)
class Output:
    """How a command answers.

    Attributes:
        json: one JSON document on standard output, and nothing else there.
        quiet: nothing on standard error but errors.
        dst: reference of the result; where that is standard output, an archive is all that goes there.
    """

    json: Json = False
    quiet: Quiet = False
    dst: str | None = None

    def toward(self, dst: str | None) -> Output:
        """Return the same for a command whose result goes to ``dst``."""
        return replace(self, dst=dst)

    @property
    def holds_archive(self) -> bool:
        """Return whether standard output holds an archive."""
        return self.dst is not None and self.dst.rpartition(":")[2] == "-"

    def note(self, *texts: str) -> None:
        """Print lines for people on standard error."""
        for text in texts:
            note(text, quiet=self.quiet)

    def warn(self, warnings: Iterable[str]) -> None:
        """Print warnings, each once, on standard error."""
        self.note(*(f"warning: {text}" for text in dict.fromkeys(warnings)))

    def told(self, schema: str, body: Mapping[str, object], warnings: Iterable[str] = ()) -> bool:
        """Print ``warnings``, and ``body`` as JSON where that is wanted; return whether no text is."""
        self.warn(warnings)
        if self.json:
            emit_json(schema, body, sys.stderr if self.holds_archive else sys.stdout)
        return self.json

    def answered(
        self,
        schema: str,
        report: Report,
        pairs: Sequence[tuple[str, object]],
        warnings: Iterable[str] = (),
        archived: str = "",
    ) -> bool:
        """Tell a report: as JSON, else as ``pairs``, else, beside an archive, in the line ``archived`` if any.

        Returns:
            Whether ``pairs`` were printed.
        """
        if self.told(schema, report.to_dict(), warnings):
            return False
        if not self.holds_archive:
            fields(pairs)
        elif archived:
            self.note(archived)
        return not self.holds_archive  # fmt: skip

    @contextmanager
    def progress(self) -> Iterator[Progress | None]:
        """Give a progress callback that draws bars on a terminal, or None where nobody watches."""
        if self.quiet or not sys.stderr.isatty():
            yield None
            return
        with _bars() as step:
            yield step


def human(size: float) -> str:
    """Return ``size`` bytes in the unit people would choose: ``0 B``, ``12.3 MB`` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.5 else f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError(size)


_VERSIONS = {"analyze": 2, "inspect": 2, "optimize": 2, "optimize-platforms": 2, "remap-plan": 2}
"""Of schemas that changed. 2: layers are numbered from 1, and what a plan cannot know is null."""


def emit_json(schema: str, body: Mapping[str, object], file: TextIO | None = None) -> None:
    """Print ``body`` as one JSON document that names its ``schema`` and version."""
    name = f"layerkit.{schema}.v{_VERSIONS.get(schema, 1)}"
    print(json.dumps({"schema": name, **body}, indent=2, default=_plain), file=file)


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return show_path(value)
    return str(value)


def note(text: str, *, quiet: bool = False) -> None:
    """Print a line for people on standard error."""
    if not quiet:
        print(show_lines(text), file=sys.stderr)


def line(text: object) -> None:
    """Print a line of the result."""
    print(shown(text))


def next_mount(result: RemapReport, out: Output) -> None:
    """Say how to mount what ``result`` is about."""
    name = show_path(result.next_ref)
    # A name of the image's own choice, to be pasted into a shell: one that cannot be typed gives way to the digest.
    ref = shlex.quote(name) if name == result.next_ref else f"store:{result.manifest}"
    out.note(f"\nnext: layerkit mount {ref} TARGET {result.map_flags}".rstrip())


def shown(value: object) -> str:
    """Return ``value`` as text that a terminal only prints; a tuple or list is several lines.

    Everything shown passes here, since images choose their own names and platforms.
    """
    if isinstance(value, (list, tuple)):
        return "\n".join(shown(each) for each in value)
    return show_path(str(value))


def table(
    title: str, headings: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()
) -> None:
    """Print a table; on a pipe as plain text as wide as it needs, so that nothing is cut.

    A cell that is a tuple or list has several lines.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 200)
    out = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column, heading in enumerate(headings):
        out.add_column(heading, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        # Text, not str: a name with brackets in it must not be read as markup.
        out.add_row(*(Text(shown(cell)) for cell in row))
    console.print(out)


def fields(pairs: Sequence[tuple[str, object]]) -> None:
    """Print names and values in two aligned columns; a value that is a tuple or list has several lines."""
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        lines = shown(value).split("\n")
        print(f"{name:<{width}}  {lines[0]}")
        for line in lines[1:]:
            print(f"{'':<{width}}  {line}")


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    with Bars(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(), console=Console(stderr=True), transient=True,
    ) as bars:  # fmt: skip
        tasks: dict[str, object] = {}

        def step(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(escape(show_path(what)), total=total or None)
            bars.update(tasks[what], completed=done, total=total or None)  # type: ignore[arg-type]

        yield step


def warnings_of(report: PlatformsReport) -> Iterator[str]:
    """Yield the warnings on the images of all platforms."""
    return (warning for one in report.images for warning in one.warnings)


def show_platforms(schema: str, report: PlatformsReport, out: Output) -> None:
    """Print what was made of a multi-platform image."""
    if out.told(schema, report.to_dict(), warnings_of(report)):
        return
    if report.manifest and out.holds_archive:
        out.note(f"{report.manifest}: {len(report.images)} platforms")
        return
    fields([("index", f"{report.name or out.dst}  {report.manifest or 'not written (--dry-run)'}")])
    table(
        "",
        ["PLATFORM", "LAYERS", "BEFORE", "BLOBS", "BEFORE", "MANIFEST"],
        [
            (name, x.layers_after, x.layers_before, "" if x.bytes_after is None else human(x.bytes_after),
             human(x.bytes_before), x.manifest)
            for name, x in zip(report.platforms, report.images, strict=True)
        ],
        right=(1, 2, 3, 4),
    )  # fmt: skip


PATHS_SHOWN = 50_000
"""The worst paths that a page holds: more of them only make it slow to open."""


def analysis_page(report: AnalyzeReport) -> str:
    """Return the page of an analysis, the same bytes for the same report."""
    body = report.to_dict()
    body["name"] = show_path(report.name)
    body["paths"] = [path.to_dict() for path in report.paths[:PATHS_SHOWN]]
    body["paths_left_out"] = max(0, len(report.paths) - PATHS_SHOWN)
    return page("report.html", body)


def page(template: str, body: Mapping[str, object]) -> str:
    """Return the page ``template`` of this package with ``body`` as its data, which cannot break out of it.

    Every name in it comes from an image and may be made to do so. The data is JSON in a script element that is
    never run, with all that HTML could take for markup escaped (WHATWG HTML, 4.12.1.3, restrictions for contents of
    script elements), and the page's script writes names as text only.
    """
    from importlib import resources

    text = json.dumps(body, separators=(",", ":"), ensure_ascii=True)
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    html = resources.files("layerkit.cli").joinpath(template).read_text("utf-8")
    before, _, after = html.partition("@DATA@")
    return before + text + after


def write_page(path: Path, text: str) -> None:
    """Write a page, so that it is there whole or not at all."""
    from layerkit.linux.durable import whole_file

    with whole_file(path) as file:
        file.write(text.encode("ascii"))
