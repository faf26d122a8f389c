"""The Python API: open an image, look at its tree, remap it, mount it.

::

    with layerkit.open_image("oci:images:app") as image:
        mapping = layerkit.mapping(["0:100000:65536"])
        with image.mount("/mnt", mapping):
            ...

This is where adapters (transports, the store, the kernel) meet the use cases. Everything imported here is light;
numpy and the rest come when a call needs them. What makes images out of images is in ``rewrite``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from layerkit.model.errors import UsageError
from layerkit.model.work import Work
from layerkit.usecases.settings import MapOptions, RewriteOptions, Settings, default_store, kept, open_store

if TYPE_CHECKING:
    from layerkit.hosts.adopted.mount import AdoptReport
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


def mapping(
    uid_map: Sequence[str] | None = None,
    gid_map: Sequence[str] | None = None,
    *,
    subuid_name: str | None = None,
    overflow_id: int | None = None,
    squash: bool = False,
) -> Mapping | None:
    """Return the id map that the texts give, or None if there are none.

    The arguments are those of :class:`~layerkit.usecases.settings.MapOptions`, ``("0:100000:65536",)`` for example.

    Raises:
        UsageError: malformed, overlapping or contradictory.
    """
    return MapOptions(tuple(uid_map or ()), tuple(gid_map or ()), subuid_name, overflow_id, squash).mapping()


def open_image(ref: str, *, platform: str | None = None, settings: Settings | None = None) -> OpenImage:
    """Open the image that ``ref`` names; use the result as a context manager, or close it.

    Args:
        ref: ``oci:DIR[:TAG]``, ``oci-archive:FILE[:TAG]``, ``docker-archive:FILE[:NAME]``,
            ``docker://HOST/NAME[:TAG|@DIGEST]``, ``store:NAME``, a bare file or folder, or ``-`` for an archive
            on standard input.
        platform: ``os/arch[/variant]``; None takes this host's.
        settings: store, limits and the rest.

    Raises:
        NotFound: nothing there, or no image of that name or platform.
        InvalidImage: malformed, or not what its digests promise.
    """
    from layerkit.images import reference
    from layerkit.images.open import open_source
    from layerkit.model.descriptor import Platform

    chosen = settings or Settings()
    parsed = reference.with_choice(reference.parse(ref))
    with contextlib.ExitStack() as stack:
        source: ImageSource
        name = ""
        if parsed.transport == "store":
            from layerkit.store.source import StoreSource

            store = stack.enter_context(chosen.open_store(create=False))
            source = StoreSource(store, parsed.name)
            names = store.stored_image(parsed.name).names
            name = parsed.name if parsed.name in names or not names else names[0]
        else:
            source = open_source(parsed, limits=chosen.bounds, registry=chosen.registry)
        stack.callback(source.close)
        image = source.image(Platform.parse(platform) if platform else None)
        return OpenImage(name or _store_name(parsed.path, image.name), source, image, chosen, stack.pop_all())


def _store_name(path: str, name: str) -> str:
    """Return what an image called ``name`` at ``path`` is to be called in the store."""
    if ":" in name or "/" in name:
        return name
    # A bare tag says too little: every second archive has an image called "latest".
    file = "stdin" if path == "-" else os.path.basename(os.path.abspath(path))
    stem = file
    for suffix in (".gz", ".zst", ".tgz", ".tzst", ".tar"):
        stem = stem.removesuffix(suffix)
    stem = stem or "image"
    return f"{stem}:{name}" if name else stem


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
        """Return how many bytes each layer adds, duplicates and hides, and the indexes used (for ``sharing``)."""
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

        The other arguments are those of :class:`~layerkit.hosts.mounts.spec.MountOptions`.

        Raises:
            UnmappedId: an owner outside the map.
        """
        from layerkit.hosts.mounts.spec import MountOptions
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

        The other arguments are those of :class:`~layerkit.hosts.mounts.spec.MountOptions`.

        Raises:
            UnsupportedHost: this host or user cannot mount it so; the hint says what can.
        """
        from layerkit.hosts.mounts.spec import MountOptions
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
        """Write this image to ``dst``, with the changes in ``folder`` as one more layer.

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
        """Copy the image unchanged to ``dst``, and attach META for ``mapping`` to it as an OCI artifact.

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


def mount_unpacked(
    ref: str,
    target: str | Path,
    mapping: Mapping | None = None,
    *,
    stacking: str = "auto",
    rendering: str | None = None,
    own_meta: bool = False,
    upper: Path | None = None,
    work: Path | None = None,
    reread: bool = False,
    store: Path | None = None,
    progress: Progress | None = None,
) -> AdoptReport:
    """Mount a runtime's unpacked layers under ``mapping`` at ``target``; :func:`umount` ends the mount.

    ``ref`` is ``containers-storage:NAME``, ``containerd:[ROOT@NAMESPACE]NAME``, ``docker-storage:NAME`` or
    ``folders:UPPER:...:LOWEST``. See :class:`~layerkit.hosts.mounts.spec.MountOptions` for the options.

    Raises:
        NotFound: no such image, or a layer of it is gone.
        StoreError: a layer's folder changed since it was read.
        UnsupportedHost: this host or user cannot mount it so.
    """
    from layerkit.hosts.adopted import mount as adopt
    from layerkit.hosts.adopted.sources import find_unpacked
    from layerkit.hosts.mounts.spec import MountOptions

    options = MountOptions(rendering, own_meta=own_meta, upper=upper, work=work, stacking=stacking, reread=reread)
    settings = Settings(store)
    with settings.open_store() as held:
        return adopt.mount_unpacked(find_unpacked(ref), Path(target), mapping, held, options, progress=progress)


def umount(target: str | Path, *, store: Path | None = None) -> None:
    """Unmount what layerkit mounted at ``target`` over ``store``.

    Raises:
        NotFound: layerkit mounted nothing there.
    """
    from layerkit.hosts.mounts import mount as mounter

    mounter.umount(Path(target), run=mounter.default_run(store or default_store()))


def collect_garbage(store: Path | None = None, *, dry_run: bool = False) -> dict[str, object]:
    """Free what no image, mount or bundle uses in ``store`` (None: the default); return what was freed."""
    from layerkit.usecases import collect_garbage as use_case

    with open_store(store) as held:
        report = use_case.collect_garbage(held, dry_run=dry_run)
    return {"removed": list(report.removed), "freed_bytes": report.freed_bytes}


def mounts(*, store: Path | None = None) -> list[dict[str, str]]:
    """Return the mounts made from ``store``: target, image, manifest digest, map, and lost layers.

    ``lost`` names the layer folders of another runtime that it removed under the mount, one in a line: files of
    theirs that nobody has open cannot be opened any more. ``server`` is ``killed`` where metadata is served
    (rendering ``fuse``) and nobody does any more.
    """
    from layerkit.hosts.mounts import mount as mounter

    run = mounter.default_run(store or default_store())
    unserved = mounter.unserved(run)
    return [
        {
            "target": record.target,
            **{k: record.label.get(k, "") for k in ("image", "manifest", "map")},
            "lost": "\n".join(folder for folder in record.folders if not os.path.isdir(folder)),
            "server": "killed" if record in unserved else "",
        }
        for record in mounter.active(run)
    ]


__all__ = [
    "Mounted", "OpenImage", "Settings", "collect_garbage", "default_store", "mapping", "mount_unpacked", "mounts",
    "open_image", "open_store", "umount",
]  # fmt: skip
