"""The Python API for optimizing in two steps: look at the plan, then apply it to a place of your choice.

::

    with layerkit.open_image("oci:images:app") as image:
        plan = layerkit.optimize(image, keep_base="oci:images:base")
        if plan.saved_file_bytes > 50_000_000:
            plan.apply("oci:images:app-small")

What the layers hold is read once, for the plan.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from layerkit.api.rewrite import base_of
from layerkit.model.work import NOWHERE, Destination
from layerkit.usecases.settings import RewriteOptions

if TYPE_CHECKING:
    from layerkit.api.open import OpenImage
    from layerkit.model.ports import ImageSink, Progress
    from layerkit.usecases.optimize import OptimizeOptions, OptimizeReport, Planned


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
