"""An image that was opened: what can be asked of it, and done with it.

This is where adapters (transports, the store, the kernel) meet the use cases. Everything imported here is
light; numpy and the rest come when a call needs them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from layerkit.model.errors import UsageError
from layerkit.model.work import Work
from layerkit.usecases.settings import RewriteOptions, Settings, default_store, kept

if TYPE_CHECKING:
    from layerkit.idmap import Mapping
    from layerkit.model.image import Image
    from layerkit.model.index import Index
    from layerkit.model.ports import ImageSource, Progress
    from layerkit.model.reports import InspectReport, RemapReport, VerifyReport
    from layerkit.model.tree import Tree
    from layerkit.pack import Packing
    from layerkit.unpack import Found
    from layerkit.usecases.analyze import AnalyzeReport
    from layerkit.usecases.from_folder import PackReport
    from layerkit.usecases.to_folder import UnpackReport


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount that was made; leaving it as a context manager unmounts it.

    Attributes:
        target: where.
        report: what was made for it.
    """

    target: Path
    report: RemapReport
    _store_path: Path = field(repr=False)

    def umount(self) -> None:
        """Unmount it."""
        umount(self.target, store=self._store_path)

    def __enter__(self) -> Mounted:
        return self

    def __exit__(self, *_: object) -> None:
        self.umount()


class OpenImage:
    """An image that was opened for reading.

    Attributes:
        name: the one that the image has, or gets, in the store.
        source: where its blobs are.
        image: manifest, config and layers.
        settings: what it was opened with.
        limits: the bounds on what is read of it.
    """

    def __init__(
        self, name: str, source: ImageSource, image: Image, settings: Settings, resources: contextlib.ExitStack
    ) -> None:
        """Use :func:`open_image`."""
        self.name, self.source, self.image = name, source, image
        self.settings, self.limits = settings, settings.bounds
        self._resources = resources

    def __enter__(self) -> OpenImage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def store_path(self) -> Path:
        """Return the folder of the store that this image is brought into."""
        return self.settings.store_path

    def close(self) -> None:
        """Release files and temporary data."""
        self._resources.close()

    def work(self, progress: Progress | None = None) -> Work:
        """Return the image as the use cases take it, with nothing kept of its layers."""
        return Work(
            self.source, self.image, self.name, limits=self.limits, progress=progress,
            strict=self.settings.strict, jobs=self.settings.jobs,
        )  # fmt: skip

    @contextlib.contextmanager
    def kept(self, progress: Progress | None = None) -> Iterator[Work]:
        """Give the image as the use cases take it, with what the store keeps of its layers."""
        with kept(self.settings) as layers:
            yield replace(self.work(progress), kept=layers)

    def indexes(self, *, progress: Progress | None = None) -> list[Index]:
        """Return the index of every layer, bottom first: kept ones, and blobs read for the others."""
        from layerkit.unpack import find_indexes

        with self.kept(progress) as work:
            return list(find_indexes(work).indexes)

    def tree(self, *, progress: Progress | None = None) -> Tree:
        """Return the merged root filesystem, with container ids. Nothing is stored."""
        from layerkit.model.trees.merge import merge

        return merge(self.indexes(progress=progress), limits=self.limits)

    def inspect(self, mapping: Mapping | None = None, *, progress: Progress | None = None) -> InspectReport:
        """Return what the image holds and what ``mapping`` would do to it.

        Indexes that are published are taken at their word; the report's warnings say so.
        """
        from layerkit.usecases.inspect import inspect

        return inspect(self.work(), self._find_indexes(progress), mapping)

    def analyze(self, *, progress: Progress | None = None) -> tuple[AnalyzeReport, list[Index]]:
        """Return where the image's bytes go, and the indexes that it was seen from (for ``sharing``)."""
        from layerkit.usecases.analyze import analyze, layer_history

        indexes = self.indexes(progress=progress)
        history = layer_history(self.image.config, len(indexes))
        return analyze(self.name, self.image, indexes, history, limits=self.limits), indexes

    def verify(self, *, progress: Progress | None = None) -> VerifyReport:
        """Read every blob and check it; make every attached remap artifact again and compare.

        Raises:
            InvalidImage: something is not what it promises to be.
        """
        from layerkit.usecases.verify import verify

        return verify(self.work(progress))

    def remap(
        self,
        mapping: Mapping | None,
        *,
        rendering: str | None = None,
        namespace: str = "auto",
        own_meta: bool = False,
        progress: Progress | None = None,
    ) -> RemapReport:
        """Bring the image into the store and make what a mount under ``mapping`` needs; None keeps the owners.

        The other arguments are those of :class:`~layerkit.hosts.mounts.choose.MountOptions`.

        Raises:
            UnmappedId: an owner outside the map.
        """
        from layerkit.hosts.mounts.choose import MountOptions
        from layerkit.usecases.into_store import bring

        options = MountOptions(rendering, self.settings.data, namespace, own_meta)
        with self.settings.open_store() as store:
            return bring(self.work(progress), store, mapping, options).report

    def mount(
        self,
        target: str | Path,
        mapping: Mapping | None = None,
        *,
        upper: Path | None = None,
        work: Path | None = None,
        rendering: str | None = None,
        own_meta: bool = False,
        progress: Progress | None = None,
    ) -> Mounted:
        """Mount the image under ``mapping`` at ``target``; read-only unless ``upper`` is given.

        The other arguments are those of :class:`~layerkit.hosts.mounts.choose.MountOptions`.

        Raises:
            UnsupportedHost: this host or user cannot mount it so; the hint says what can.
        """
        from layerkit.hosts.mounts.choose import MountOptions
        from layerkit.usecases.into_store import mount

        options = MountOptions(rendering, self.settings.data, own_meta=own_meta, upper=upper, work=work)
        with self.settings.open_store() as store:
            report = mount(self.work(progress), store, Path(target), mapping, options)
        return Mounted(Path(target), report, self.store_path)

    def unpack(
        self,
        target: str | Path,
        mapping: Mapping | None = None,
        *,
        copy: str = "auto",
        progress: Progress | None = None,
    ) -> UnpackReport:
        """Write the root filesystem under ``mapping`` to the new or empty folder ``target``, whole or not at all.

        ``copy`` is one of :class:`~layerkit.usecases.to_folder.Copy`; ``progress`` may raise ``Cancelled``.

        Raises:
            LossyResult: the filesystem, or a process without privileges, cannot hold an entry exactly.
            UnmappedId: an owner outside the map.
        """
        from layerkit.usecases.to_folder import UnpackOptions, unpack

        options = UnpackOptions(mapping, copy, self.settings.data)
        with self.settings.open_store() as store:
            return unpack(self.work(progress), store, Path(target), options)

    def pack(
        self,
        folder: str | Path,
        dst: str,
        mapping: Mapping | None = None,
        *,
        packing: Packing | None = None,
        created: str | None = None,
        message: str = "",
        checksum: bool = False,
        progress: Progress | None = None,
    ) -> PackReport:
        """Write this image with what changed in ``folder`` since it as one more layer to ``dst``.

        ``packing`` is gzip if None; ``created`` is that of :meth:`~layerkit.usecases.settings.RewriteOptions.of`;
        the others are those of :class:`~layerkit.usecases.from_folder.PackOptions`. ``progress`` may raise
        ``Cancelled``.

        Raises:
            UnmappedId: an owner in the folder that is outside the map.
            LossyResult: something that a layer cannot hold.
        """
        from layerkit.usecases.from_folder import PackOptions, pack

        rewrite = RewriteOptions.of(created=created)
        if packing is not None:
            rewrite = replace(rewrite, packing=packing)
        options = PackOptions(rewrite, mapping, message, checksum)
        with self.kept(progress) as work:
            return pack(Path(folder), work, self.settings.destination(dst, self.source), options)

    def attach(
        self,
        mapping: Mapping | None,
        dst: str,
        *,
        rendering: str = "auto",
        namespace: str = "auto",
        statement: bool = False,
        sign_key: Path | None = None,
        progress: Progress | None = None,
    ) -> RemapReport:
        """Copy the image to ``dst`` as it is, and attach META for ``mapping`` to it as an OCI artifact.

        Indexes that are published are taken at their word; the report's warnings say so. ``dst`` is ``docker://…``,
        ``oci:DIR[:TAG]`` or ``oci-archive:FILE[:TAG]``, ``-`` for an archive on standard output; the other
        arguments are those of :class:`~layerkit.usecases.attach.AttachOptions`.

        Raises:
            UnmappedId: an owner outside the map.
        """
        if mapping is None:
            raise UsageError("nothing to remap: give a map with --uid-map C:H:N, or --subuid-name NAME")
        from layerkit.usecases.attach import AttachOptions, attach

        options = AttachOptions(mapping, rendering, namespace, self.settings.strict, statement, sign_key)
        found = self._find_indexes(progress)
        return attach(self.work(progress), [self.settings.destination(dst, self.source)], options, found)

    def _find_indexes(self, progress: Progress | None) -> Found:
        """Return the indexes for something that is looked at or published, and not mounted by it."""
        from layerkit.model.work import NOBODY
        from layerkit.unpack import find_indexes
        from layerkit.usecases.published_indexes import PublishedIndexes

        with self.kept(progress) as work:
            return find_indexes(work, PublishedIndexes(work) if self.settings.published else NOBODY)


def umount(target: str | Path, *, store: Path | None = None) -> None:
    """Unmount what layerkit mounted at ``target`` over ``store``.

    Raises:
        NotFound: layerkit mounted nothing there.
    """
    from layerkit.hosts.mounts import mount as mounter

    mounter.umount(Path(target), run=mounter.default_run(store or default_store()))
