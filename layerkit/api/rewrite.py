"""The Python API for making other images out of one: flatten, optimize, portable remap, META as a layer, copy.

::

    report = layerkit.flatten("oci:images:app", "oci-archive:flat.tar")
    with layerkit.open_image("oci:images:app") as image:
        plan = layerkit.optimize(image, keep_base="oci:images:base")
        if plan.saved_file_bytes > 50_000_000:
            plan.apply("oci:images:app-small")

To optimize takes two steps: look at the plan, then apply it; what the layers hold is read once, for the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, TypeVar, Unpack, overload

from layerkit.api.open import OpenImage, open_image
from layerkit.model.errors import UsageError
from layerkit.model.work import NOWHERE, Destination, Work
from layerkit.usecases.settings import KeptBase, RewriteOptions, Settings, kept

if TYPE_CHECKING:
    from layerkit.idmap import Mapping
    from layerkit.model.image import Image
    from layerkit.model.ports import ImageSink, Progress
    from layerkit.model.reports import RemapReport
    from layerkit.usecases.copy import CopyReport
    from layerkit.usecases.each_platform import PlatformsReport
    from layerkit.usecases.flatten import FlattenReport
    from layerkit.usecases.optimize import OptimizeOptions, OptimizeReport, Planned

R = TypeVar("R")


class Rewriting(TypedDict, total=False):
    """What every function takes, by keyword, that writes an image anew from one reference to another.

    ``compression``, ``level``, ``jobs`` and ``created`` are those of :meth:`RewriteOptions.of`; for the others see
    :class:`Route`.
    """

    platform: str | None
    settings: Settings | None
    compression: str
    level: int | None
    jobs: int | None
    created: str | None
    progress: Progress | None


@dataclass(frozen=True, slots=True)
class Route:
    """From which reference an image comes, and to which what is made of it goes.

    Attributes:
        src: reference of the image.
        dst: reference of the result; None writes nothing.
        settings: store and limits.
        platform: ``os/arch[/variant]``; None takes this host's.
        all_platforms: do it to the image of every platform; one index of the results goes to ``dst``, and
            ``images`` of the report are the reports on each.
        progress: told of bytes read and written; what it raises ends the work.
    """

    src: str
    dst: str | None
    settings: Settings
    platform: str | None = None
    all_platforms: bool = False
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Refuse one platform and all of them."""
        if self.all_platforms and self.platform is not None:
            raise UsageError("--all-platforms and --platform cannot be used together; give one of them")

    def go(self, do: Callable[[Work, Destination], R]) -> R | PlatformsReport:
        """Do ``do`` to the image, or to each, and return what it returns; of several a report on all of them.

        Raises:
            NotFound: no such image.
            UsageError: all platforms, where there is one.
        """
        settings, limits = self.settings, self.settings.bounds
        if not self.all_platforms:
            with (
                open_image(self.src, platform=self.platform, settings=settings) as opened,
                opened.kept(self.progress) as work,
            ):
                return do(replace(work, name=self.src), settings.destination(self.dst, opened.source))
        from layerkit.images import reference
        from layerkit.images.open import open_source
        from layerkit.usecases.each_platform import each_platform

        if reference.parse(self.src).transport == "store":
            raise UsageError(f"{self.src}: the store holds images of one platform; --all-platforms wants an index")
        with (
            closing(open_source(self.src, limits=limits, registry=settings.registry)) as source,
            kept(settings) as layers,
        ):

            def one(image: Image, to: Destination) -> R:
                work = Work(source, image, self.src, layers, limits, self.progress, settings.strict)
                return do(work, to)

            return each_platform(source, settings.destination(self.dst, source), one, limits)


def rewriting(src: str, dst: str | None, all_platforms: bool, how: Rewriting) -> tuple[Route, RewriteOptions]:
    """Return what the keyword arguments ``how`` mean."""
    words = RewriteOptions.of(
        how.pop("compression", "gzip"), how.pop("level", None), how.pop("jobs", None), how.pop("created", None)
    )
    settings = how.pop("settings", None) or Settings()
    route = Route(src, dst, settings, how.pop("platform", None), all_platforms, how.pop("progress", None))
    if how:
        raise TypeError(f"unexpected keyword arguments: {', '.join(how)}")
    return route, words


def base_of(keep_base: str | int | None, settings: Settings) -> KeptBase | None:
    """Return what counts the layers of the base that ``keep_base`` names, or is the number of.

    A number that is also a file is a reference. What is returned raises ``UsageError`` for more layers than there
    are, or another image's base.
    """
    if keep_base is None:
        return None
    text = str(keep_base)
    is_number = text.isascii() and text.lstrip("-").isdigit() and not Path(text).exists()

    def count(image: Image) -> int:
        if is_number:
            if not 0 <= int(text) <= len(image.layers):
                raise UsageError(f"--keep-base {text}: the image has {len(image.layers)} layers")
            return int(text)
        with open_image(text, platform=str(image.platform), settings=settings) as opened:
            base = opened.image.diff_ids
        same = 0
        while same < min(len(base), len(image.layers)) and image.diff_ids[same] == base[same]:
            same += 1
        if same < len(base):
            raise UsageError(
                f"--keep-base {text}: only {same} of its {len(base)} layers are the lowest ones of the image; "
                "it was built on another version of it"
            )
        return len(base)

    return count


@overload
def flatten(
    src: str, dst: str, *, from_layer: str | None = None, to_layer: str | None = None,
    keep_base: str | int | None = None, all_platforms: Literal[False] = False, **how: Unpack[Rewriting],
) -> FlattenReport: ...  # fmt: skip
@overload
def flatten(
    src: str, dst: str, *, from_layer: str | None = None, to_layer: str | None = None,
    keep_base: str | int | None = None, all_platforms: Literal[True], **how: Unpack[Rewriting],
) -> PlatformsReport: ...  # fmt: skip
def flatten(
    src: str,
    dst: str,
    *,
    from_layer: str | None = None,
    to_layer: str | None = None,
    keep_base: str | int | None = None,
    all_platforms: bool = False,
    **how: Unpack[Rewriting],
) -> FlattenReport | PlatformsReport:
    """Merge layers of the image ``src`` into one, and write the image to ``dst``.

    The first layer that is meant and the last are numbers from 1 or digests, see :class:`.flatten.FlattenOptions`;
    ``keep_base`` is the reference of an image whose layers stay as they are (or their number). For
    ``all_platforms`` see :class:`Route`, and for the others :class:`Rewriting`.

    Raises:
        UsageError: layers that are not there, or a base that is not the image's.
        InvalidImage: a damaged image.
    """
    from layerkit.usecases import flatten as use_case

    route, rewrite = rewriting(src, dst, all_platforms, how)
    base = base_of(keep_base, route.settings)
    options = use_case.FlattenOptions(rewrite, from_layer, to_layer, base)
    return route.go(lambda work, to: use_case.flatten(work, to, options))


@overload
def remap(
    src: str, dst: str, mapping: Mapping, *, form: str = "portable", stock_media_type: bool = False,
    all_platforms: Literal[False] = False, **how: Unpack[Rewriting],
) -> RemapReport: ...  # fmt: skip
@overload
def remap(
    src: str, dst: str, mapping: Mapping, *, form: str = "portable", stock_media_type: bool = False,
    all_platforms: Literal[True], **how: Unpack[Rewriting],
) -> PlatformsReport: ...  # fmt: skip
def remap(
    src: str,
    dst: str,
    mapping: Mapping,
    *,
    form: str = "portable",
    stock_media_type: bool = False,
    all_platforms: bool = False,
    **how: Unpack[Rewriting],
) -> RemapReport | PlatformsReport:
    """Write the image ``src`` under ``mapping`` to ``dst`` in a form that needs no layerkit to run.

    The form ``artifact`` is :meth:`OpenImage.attach`. ``form`` and ``stock_media_type`` are those of
    :class:`~layerkit.usecases.remap.RemapOptions`; for ``all_platforms`` see :class:`Route`, and for the others
    :class:`Rewriting`.

    Raises:
        UnmappedId: an owner outside the map.
        UsageError: no such form.
    """
    from layerkit.usecases import remap as use_case

    route, rewrite = rewriting(src, dst, all_platforms, how)
    options = use_case.RemapOptions(mapping, rewrite, form, stock_media_type)
    return route.go(lambda work, to: use_case.remap(work, to, options))


def copy(
    src: str,
    dst: str,
    *,
    all_platforms: bool = False,
    platform: str | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> CopyReport:
    """Copy the image ``src`` to ``dst`` byte for byte, with the artifacts that are attached to it.

    ``all_platforms`` copies the whole index where ``src`` names one, and what is attached to any part of it; see
    :class:`Route` for the other arguments.

    Raises:
        NotFound: no such image, or none for the platform.
        InvalidImage: a blob is missing or damaged.
    """
    from layerkit.images import reference
    from layerkit.images.open import open_source
    from layerkit.usecases import copy as use_case

    chosen = settings or Settings()
    route = Route(src, dst, chosen, platform, all_platforms, progress)
    if all_platforms and reference.parse(src).transport != "store":
        with closing(open_source(src, limits=chosen.bounds, registry=chosen.registry)) as source:
            return use_case.copy(source, None, chosen.destination(dst, source), chosen.bounds, progress)
    with open_image(src, platform=route.platform, settings=chosen) as opened:
        to = chosen.destination(dst, opened.source)
        return use_case.copy(opened.source, opened.image, to, chosen.bounds, progress)


@dataclass(frozen=True, slots=True)
class Plan:
    """What an optimize would do to an image; nothing was written yet. Good while the image is open.

    Attributes:
        image: that was looked at.
        report: what would become of each layer; digests and sizes of blobs are known once it is applied.
    """

    image: OpenImage
    report: OptimizeReport
    _planned: Planned = field(repr=False)
    _options: OptimizeOptions = field(repr=False)

    @property
    def saved_file_bytes(self) -> int:
        """Return the bytes of files, uncompressed, that the result would not hold any more."""
        return self.report.file_bytes_before - self.report.file_bytes_after

    @property
    def changes(self) -> bool:
        """Return whether the result would be another image at all."""
        return any(layer.action != "keep" for layer in self.report.layers)

    def apply(
        self,
        dst: str | ImageSink,
        *,
        name: str = "",
        stock_media_type: bool = False,
        compression: str = "gzip",
        level: int | None = None,
        jobs: int | None = None,
        created: str | None = None,
        progress: Progress | None = None,
    ) -> OptimizeReport:
        """Write the result; it is read back and compared before any of it becomes visible.

        ``dst`` is a reference, or a sink of your own, which is committed (aborted on an error). ``name`` is that of
        the image there; "" is what ``dst`` says, else the image's own. ``stock_media_type`` gives layers with stubs
        the standard media type, dangerous on most runtimes. For ``compression``, ``level``, ``jobs`` and
        ``created`` see :meth:`~layerkit.usecases.settings.RewriteOptions.of`; ``progress`` raises
        :class:`layerkit.Cancelled` to stop.

        Raises:
            InvalidImage: a blob is damaged, or the result is not right; nothing is written then.
        """
        from layerkit.usecases import optimize as use_case

        options = replace(
            self._options, rewrite=RewriteOptions.of(compression, level, jobs, created),
            stock_media_type=stock_media_type,
        )  # fmt: skip
        if isinstance(dst, str):
            to = self.image.settings.destination(dst, self.image.source)
        else:
            sink = dst
            to = Destination(lambda: sink)
        if name:
            to = replace(to, name=name)
        with self.image.kept(progress) as work:
            return use_case.optimize(work, to, options, self._planned)


def optimize(
    image: OpenImage,
    *,
    keep_base: str | int | None = None,
    metadata_only: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Return how ``image`` would lose the bytes that its layers hold twice or hide; nothing is written.

    ``image`` must stay open until the plan was applied. ``keep_base`` is the reference of an image whose layers are
    not touched (or their number, from the bottom); ``metadata_only`` is that of
    :class:`~layerkit.usecases.optimize.OptimizeOptions`; ``progress`` raises :class:`layerkit.Cancelled` to stop.

    Raises:
        UsageError: a base that is not the image's.
        InvalidImage: a damaged image.
    """
    from layerkit.usecases import optimize as use_case

    options = use_case.OptimizeOptions(RewriteOptions.of(), base_of(keep_base, image.settings), metadata_only)
    with image.kept(progress) as work:
        planned = use_case.plan_optimize(work, options)
        return Plan(image, use_case.optimize(work, NOWHERE, options, planned), planned, options)
