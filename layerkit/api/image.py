"""An image that was opened: what can be asked of it, and done with it.

This is where adapters (transports, the store, the kernel) meet the use cases. Everything imported here is
light; numpy and the rest come when a call needs them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from layerkit.model.errors import UsageError
from layerkit.model.limits import Limits
from layerkit.usecases.settings import Settings, default_store, store_at, usable_store

if TYPE_CHECKING:
    from layerkit.idmap import Mapping
    from layerkit.images.reference import Reference
    from layerkit.model.image import Image
    from layerkit.model.index import Index
    from layerkit.model.ports import ImageSink, ImageSource, Progress
    from layerkit.model.reports import InspectReport, RemapReport, VerifyReport
    from layerkit.model.tree import Tree
    from layerkit.pack import Packing
    from layerkit.store.local import LocalStore
    from layerkit.usecases.from_folder import PackReport
    from layerkit.usecases.into_store import Brought
    from layerkit.usecases.published_indexes import Found
    from layerkit.usecases.to_folder import UnpackReport
    from layerkit.usecases.waste.analyze import AnalyzeReport


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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.umount()


class OpenImage:
    """An image that was opened for reading."""

    def __init__(
        self,
        name: str,
        source: ImageSource,
        image: Image,
        settings: Settings,
        limits: Limits,
        resources: contextlib.ExitStack,
    ) -> None:
        """Use :func:`open_image`. ``name`` is the one that the image has, or gets, in the store."""
        self.name, self.source, self.image = name, source, image
        self._settings, self._limits, self._resources = settings, limits, resources

    def __enter__(self) -> OpenImage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    @property
    def settings(self) -> Settings:
        """Return what it was opened with."""
        return self._settings

    @property
    def limits(self) -> Limits:
        """Return the bounds on what is read of it."""
        return self._limits

    @property
    def store_path(self) -> Path:
        """Return the folder of the store that this image is brought into."""
        return self._settings.store_path

    def close(self) -> None:
        """Release files and temporary data."""
        self._resources.close()

    def indexes(self, *, progress: Progress | None = None) -> list[Index]:
        """Return the index of every layer, bottom first: kept ones, and blobs read for the others."""
        from layerkit.unpack import read_indexes

        with self.kept() as store:
            return read_indexes(
                self.source, self.image, store.load_index if store else lambda _: None,
                limits=self._limits, progress=progress,
            )[0]  # fmt: skip

    def tree(self, *, progress: Progress | None = None) -> Tree:
        """Return the merged root filesystem, with container ids. Nothing is stored."""
        from layerkit.model.trees.merge import merge

        return merge(self.indexes(progress=progress), limits=self._limits)

    def inspect(self, mapping: Mapping | None = None, *, progress: Progress | None = None) -> InspectReport:
        """Return what the image holds and what ``mapping`` would do to it.

        Indexes that are published are taken at their word; the report's warnings say so.
        """
        from layerkit.usecases.inspect import inspect

        found = self._find_indexes(progress)
        report = inspect(self.name, self.image, found.indexes, mapping, self._limits)
        return replace(report, warnings=found.warnings(report.warnings))

    def analyze(self, *, progress: Progress | None = None) -> tuple[AnalyzeReport, list[Index]]:
        """Return where the image's bytes go, and the indexes that it was seen from (for ``sharing``)."""
        from layerkit.usecases.waste.analyze import analyze, layer_history

        indexes = self.indexes(progress=progress)
        history = layer_history(self.image.config, len(indexes))
        return analyze(self.name, self.image, indexes, history, limits=self._limits), indexes

    def verify(self, *, progress: Progress | None = None) -> VerifyReport:
        """Read every blob and check it; make every attached remap artifact again and compare.

        Raises:
            InvalidImage: something is not what it promises to be.
        """
        from layerkit.formats.oci.remap_artifact import ARTIFACT_TYPE
        from layerkit.unpack import read_indexes
        from layerkit.usecases.attach import renderer
        from layerkit.usecases.verify import verify

        indexes, _ = read_indexes(self.source, self.image, lambda _: None, limits=self._limits, progress=progress)
        attached = self.source.referrers(self.image.descriptor.digest, ARTIFACT_TYPE)
        return verify(self.name, self.image, indexes, self.source, attached, renderer, self._limits)

    def remap(
        self,
        mapping: Mapping | None,
        *,
        rendering: str = "auto",
        namespace: str = "auto",
        own_meta: bool = False,
        progress: Progress | None = None,
    ) -> RemapReport:
        """Bring the image into the store and make what a mount under ``mapping`` needs.

        Args:
            mapping: the id map; None keeps the owners.
            rendering: ``auto``, ``erofs``, ``directory`` or ``fuse``.
            namespace: ``auto``, ``trusted`` or ``user``.
            own_meta: write META for this map even where an idmapped mount of the shared one would do.
            progress: told about the bytes read.

        Raises:
            UnmappedId: an owner outside the map.
        """
        with store_at(self._settings.store_path, self._limits) as store:
            return self._bring(store, mapping, rendering, namespace, own_meta, progress).report

    def mount(
        self,
        target: str | Path,
        mapping: Mapping | None = None,
        *,
        upper: Path | None = None,
        work: Path | None = None,
        rendering: str = "auto",
        own_meta: bool = False,
        progress: Progress | None = None,
    ) -> Mounted:
        """Mount the image under ``mapping`` at ``target``; read-only unless ``upper`` is given.

        See :meth:`remap` for the other arguments.

        Raises:
            UnsupportedHost: this host or user cannot mount it so; the hint says what can.
        """
        from layerkit.hosts.mounts import mount as mounter
        from layerkit.hosts.mounts.layers import data_layers, meta_layer

        path = Path(target)
        # Held until the mount's record says what it uses: gc must not come in between.
        with store_at(self._settings.store_path, self._limits) as store, store.hold():
            report, ways, facts, entry = self._bring(store, mapping, rendering, "auto", own_meta, progress)
            extents = (mapping.uid.extents, mapping.gid.extents) if mapping else None
            mounter.mount(
                mounter.MountSpec(
                    meta=meta_layer(entry, mapping),
                    data=data_layers(store, ways.backend, facts),
                    namespace=ways.namespace,
                    target=path,
                    idmap=extents if ways.idmap else None,
                    upper=upper,
                    work=work,
                    read_only=upper is None,
                    label={
                        "image": self.name, "manifest": report.manifest, "map": report.map_text, "meta": entry.key,
                        "layers": ",".join(facts.data_layers), "backend": ways.backend.value,
                    },
                ),
                run=mounter.default_run(store.root),
            )  # fmt: skip
        return Mounted(path, report, self._settings.store_path)

    def unpack(
        self,
        target: str | Path,
        mapping: Mapping | None = None,
        *,
        copy: str = "auto",
        progress: Progress | None = None,
    ) -> UnpackReport:
        """Write the root filesystem under ``mapping`` to the new folder ``target``, whole or not at all.

        Args:
            target: does not exist yet, or is an empty folder.
            mapping: the id map; None keeps the owners.
            copy: ``auto`` shares blocks with the store where the filesystem can, ``reflink`` insists on it,
                ``bytes`` shares none.
            progress: told about bytes read and entries written; may raise ``Cancelled``.

        Raises:
            LossyResult: the filesystem, or a process without privileges, cannot hold an entry exactly.
            UnmappedId: an owner outside the map.
        """
        from layerkit.usecases.to_folder import unpack

        with store_at(self._settings.store_path, self._limits) as store:
            return unpack(
                self.source, self.image, self.name, store, Path(target), mapping, copy=copy,
                data=self._settings.data, limits=self._limits, jobs=self._settings.jobs, progress=progress,
            )  # fmt: skip

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

        Args:
            folder: a root filesystem that was unpacked from this image.
            dst: reference of the result.
            mapping: the id map that it was unpacked with.
            packing: compression of the layer; None is gzip.
            created: time of the result, RFC 3339 or seconds since 1970; None takes ``SOURCE_DATE_EPOCH``, and
                without that the time of the image stays.
            message: for the history.
            checksum: read every file, also those whose size and time did not change.
            progress: told of entries and bytes; may raise ``Cancelled``.

        Raises:
            UnmappedId: an owner in the folder that is outside the map.
            LossyResult: something that a layer cannot hold.
        """
        from layerkit.images import reference
        from layerkit.pack import Packing, creation_time
        from layerkit.usecases.from_folder import pack

        how, when = packing or Packing(), creation_time(created, os.environ.get("SOURCE_DATE_EPOCH"))
        if not Path(folder).is_dir():
            raise UsageError(f"{folder}: no such folder; DIR is a root filesystem, as `layerkit unpack` writes it")
        indexes = self.indexes(progress=progress)
        parsed = reference.parse(dst)
        return pack(
            Path(folder), self.source, self.image, indexes, self._sink(parsed),
            name=self.name, dst_name=parsed.name or self.image.name, mapping=mapping, packing=how, created=when,
            message=message, checksum=checksum, limits=self._limits, progress=progress,
        )  # fmt: skip

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

        Args:
            mapping: the id map.
            dst: ``docker://…``, ``oci:DIR[:TAG]`` or ``oci-archive:FILE[:TAG]``, ``-`` for an archive on standard
                output.
            rendering: ``auto`` (erofs), ``erofs`` or ``tar``.
            namespace: ``auto`` (trusted), ``trusted`` or ``user``.
            statement: attach an in-toto statement of what was done to the artifact.
            sign_key: a private key; the statement is then signed, in a sigstore bundle.
            progress: told about the bytes read.

        Indexes that are published are taken at their word; the report's warnings say so.
        """
        if mapping is None:
            raise UsageError("nothing to remap: give a map with --uid-map C:H:N, or --subuid-name NAME")
        from layerkit.images import reference
        from layerkit.metaonly import Namespace
        from layerkit.model.trees.merge import merge
        from layerkit.usecases.attach import attach, attester, renderer

        if rendering not in ("auto", "erofs", "tar"):
            raise UsageError(f"--rendering {rendering!r}: an artifact holds erofs (the default) or tar")
        if namespace not in ("auto", *Namespace):
            raise UsageError(f"--namespace {namespace!r}: want auto, trusted or user")
        form = "erofs" if rendering == "auto" else rendering
        attest = None
        if statement or sign_key is not None:
            attest = attester(self.image, self.source.where, sign_key, self._limits)
        found = self._find_indexes(progress)
        parsed = reference.parse(dst)
        # The image is copied as it is: only META and its manifest are made here.
        report = attach(
            self.image, merge(found.indexes, limits=self._limits), mapping, self.source,
            self._sink(parsed),
            name=self.name, dst_name=parsed.name or self.image.name, render=renderer(form), rendering=form,
            namespace=Namespace.TRUSTED if namespace == "auto" else Namespace(namespace),
            strict=self._settings.strict, layers_read=found.layers_read, limits=self._limits, attest=attest,
            progress=progress,
        )  # fmt: skip
        return replace(report, warnings=found.warnings(report.warnings))

    def _sink(self, dst: Reference) -> ImageSink:
        from layerkit.images import reference

        return reference.open_sink(dst, limits=self._limits, registry=self._settings.registry, near=self.source)

    def _find_indexes(self, progress: Progress | None) -> Found:
        """Return the indexes for something that is looked at or published, and not mounted by it."""
        from layerkit.images.registry.options import flag
        from layerkit.store.unproven import UnprovenIndexes
        from layerkit.usecases.published_indexes import find_indexes

        published = self._settings.published
        if published is None:
            published = flag("LAYERKIT_PUBLISHED") is not False
        with self.kept() as store:
            return find_indexes(
                self.source, self.image, store.load_index if store else lambda _: None, limits=self._limits,
                published=published, load_unproven=UnprovenIndexes(limits=self._limits).load, progress=progress,
            )  # fmt: skip

    @contextlib.contextmanager
    def kept(self) -> Iterator[LocalStore | None]:
        """Give the store if there is one that can be used; looking at an image makes none, and needs none."""
        path = self._settings.store_path
        if not usable_store(path):
            yield None
            return
        with store_at(path, self._limits, create=False) as store:
            yield store

    def _bring(
        self,
        store: LocalStore,
        mapping: Mapping | None,
        rendering: str,
        namespace: str,
        own_meta: bool,
        progress: Progress | None,
    ) -> Brought:
        from layerkit.usecases.into_store import bring

        chosen = self._settings
        return bring(
            store, self.source, self.image, self.name, mapping, rendering=rendering, namespace=namespace,
            own_meta=own_meta, data=chosen.data, jobs=chosen.jobs, strict=chosen.strict, limits=self._limits,
            progress=progress,
        )  # fmt: skip


def umount(target: str | Path, *, store: Path | None = None) -> None:
    """Unmount what layerkit mounted at ``target`` over ``store``.

    Raises:
        NotFound: layerkit mounted nothing there.
    """
    from layerkit.hosts.mounts import mount as mounter

    mounter.umount(Path(target), run=mounter.default_run(store or default_store()))
