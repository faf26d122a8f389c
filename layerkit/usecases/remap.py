"""Use case: an image with mapped owners as another image: in the headers of its layers, or as one more layer.

The *portable* form is plain OCI: every layer is written anew, with the ids in its tar headers, ACLs and
capabilities mapped, and its data streamed through. The form *layer* appends stubs: files of zeros with the
xattr ``trusted.overlay.metacopy``, and no redirect, so that overlayfs takes the data from the same path in the
layers below (Documentation/filesystems/overlayfs.rst, "Metadata only copy up").
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from layerkit.formats.oci import remap_artifact as artifact
from layerkit.formats.tar.writer import Content, stored_bytes
from layerkit.idmap import Mapping
from layerkit.idmap import apply as apply_map
from layerkit.images.transfer import copy_image
from layerkit.metaonly import Namespace, metadata_layer
from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import LossyResult, UsageError
from layerkit.model.image import Layer
from layerkit.model.index import Index
from layerkit.model.limits import Limits
from layerkit.model.ports import ImageSink
from layerkit.model.reports import RemapReport
from layerkit.model.tree import Tree
from layerkit.model.trees.diff import layer_of
from layerkit.model.trees.merge import merge
from layerkit.model.work import Destination, Work
from layerkit.pack import NewLayer, Writing, check_tree, rewrite_image, write_layer
from layerkit.unpack import Contents
from layerkit.usecases.copy import left_behind
from layerkit.usecases.settings import RewriteOptions
from layerkit.usecases.stub_layers import STOCK_WARNINGS, VENDOR_WARNINGS, as_stubs, refuse_overlay


def map_index(index: Index, mapping: Mapping) -> Index:
    """Return ``index`` with every owner mapped: in headers, ACLs and file capabilities. Markers have none.

    Raises:
        UnmappedId: an id outside the map and no overflow id.
        UnsafeEntry: a malformed ACL or capability.
    """
    marks = index.kind >= Kind.WHITEOUT
    # An owner that the map has lets the markers pass.
    some = [id_map.extents[0][0] if id_map.extents else 0 for id_map in (mapping.uid, mapping.gid)]
    mapped = apply_map(
        replace(index, uid=np.where(marks, some[0], index.uid).astype(np.uint32),
                gid=np.where(marks, some[1], index.gid).astype(np.uint32)),
        mapping,
    )  # fmt: skip
    uid, gid = np.where(marks, index.uid, mapped.uid), np.where(marks, index.gid, mapped.gid)
    return replace(mapped, uid=uid, gid=gid)


def map_layers(indexes: Sequence[Index], mapping: Mapping, *, limits: Limits) -> tuple[list[Index], Tree]:
    """Return the indexes with mapped owners, and the root filesystem that they make: the mapped one.

    Folders that no layer has an entry of, which a runtime makes as 0:0, get entries: in a mapped image they
    belong to what 0 is mapped to.

    Raises:
        UnmappedId: an id outside the map and no overflow id.
        LossyResult: such a folder that cannot have an entry, or an image without layers.
    """
    if not indexes:
        raise LossyResult(b"", "the image has no layers, so there is nothing that could hold a mapped owner")
    want = apply_map(merge(indexes, limits=limits), mapping)
    mapped = [map_index(index, mapping) for index in indexes]
    have = merge(mapped, limits=limits)
    wrong = (have.uid != want.uid) | (have.gid != want.gid)
    more: dict[int, list[Entry]] = {}
    for inode in np.flatnonzero(wrong).tolist():
        path = want.inode_path(inode)
        entry = Entry(
            path, Kind.DIR, int(want.mode[inode]) & 0o7777, int(want.uid[inode]), int(want.gid[inode]),
            int(want.mtime[inode]), int(want.mtime_ns[inode]),
        )  # fmt: skip
        more.setdefault(_where_made(mapped, path), []).append(entry)
    for place, entries in more.items():
        index = mapped[place]
        mapped[place] = replace(
            Index.of([*index.entries(), *entries], index.diff_id, index.tar_size), warnings=index.warnings
        )
    return mapped, want


def _where_made(indexes: Sequence[Index], path: bytes) -> int:
    """Return the place of a layer that can hold an entry of the folder ``path``, which a runtime would make.

    That is the topmost one with something in the folder, or the next one where hard links of that layer mean
    a file of a lower layer by the same path; without a next one it is an error.
    """
    if not path:
        return 0  # nothing takes the root away again
    prefix = path + b"/"
    lowest = max(
        place
        for place, index in enumerate(indexes)
        if any(
            kind < Kind.WHITEOUT and p.startswith(prefix) for p, kind in zip(index.path, index.kind, strict=True)
        )
    )
    for place in range(lowest, len(indexes)):
        index = indexes[place]
        links = np.unique(index.link[index.kind == Kind.HARDLINK]).tolist()
        if path not in (index.links[row] for row in links):
            return place
    raise LossyResult(
        path, "is a folder that no layer has an entry of, where a lower layer has a file with hard links"
    )


@dataclass(frozen=True, slots=True)
class RemapOptions:
    """What an image that holds mapped owners is to look like.

    Attributes:
        mapping: the id map.
        rewrite: how the result is written.
        form: ``portable`` (every layer written anew) or ``layer`` (META as one more layer).
        stock_media_type: for the form ``layer``: its standard media type; see :data:`.stub_layers.STOCK_WARNINGS`.
    """

    mapping: Mapping
    rewrite: RewriteOptions
    form: str = "portable"
    stock_media_type: bool = False

    def __post_init__(self) -> None:
        """Refuse a form that there is not, and a media type for a layer that is not made."""
        if self.form not in ("portable", "layer"):
            raise UsageError(f"--form {self.form!r}: want artifact, layer or portable")
        if self.stock_media_type and self.form != "layer":
            raise UsageError("--stock-media-type needs --form layer")


def remap(work: Work, dst: Destination, options: RemapOptions) -> RemapReport:
    """Write the image with mapped owners to ``dst``, in a form that needs no layerkit to run.

    In the portable form layer by layer: one in which the map changes nothing keeps its blob, the written ones are
    read back, and the root filesystem they make must be the mapped one before anything becomes visible.

    Raises:
        UnsafeEntry: ``work.strict``, and the image brings overlay xattrs of its own.
        UnmappedId: an id outside the map and no overflow id.
        LossyResult: form ``layer``: something that overlayfs cannot show through a stub.
        InvalidImage: a damaged image, or a result that is not right; nothing is written then.
    """
    start, image, mapping = time.monotonic(), work.image, options.mapping
    with dst.sink() as sink, Contents(work, need=()) as contents:
        made = (_portable if options.form == "portable" else _with_meta)(work, sink, contents, options)
        result = rewrite_image(image, made.layers, created=options.rewrite.created, limits=work.limits)
        copy_image(work.source, sink, result, dst.name or image.name, progress=work.progress)
    return RemapReport(
        name=dst.name or image.name,
        manifest=str(result.descriptor.digest),
        map_text=mapping.canonical(),
        map_flags=mapping.flags(),
        next_ref=dst.name or image.name,
        entries=len(made.tree),
        layers=len(result.layers),
        layers_read=contents.read,
        data_bytes=made.tree.data_bytes,
        data_backend="",
        rendering="tar",
        how=made.how,
        meta_bytes=made.meta_bytes,
        shared_meta_bytes=0,
        seconds=time.monotonic() - start,
        warnings=(*made.warnings, *made.tree.warnings, *left_behind(work.source, image, work.limits)),
    )


class _Made(NamedTuple):
    """The layers of a result, its tree, and what the report says of it."""

    layers: Sequence[Layer | NewLayer]
    tree: Tree
    how: str
    meta_bytes: int = 0
    warnings: tuple[str, ...] = ()


def _portable(work: Work, sink: ImageSink, contents: Contents, options: RemapOptions) -> _Made:
    indexes, limits = contents.indexes, work.limits
    for index in indexes if work.strict else ():
        refuse_overlay(index, list(Namespace), "refused under --strict")
    mapped, want = map_layers(indexes, options.mapping, limits=limits)
    layers: list[Layer | NewLayer] = []
    got: list[Index] = []
    for place, (layer, old, new) in enumerate(zip(work.image.layers, indexes, mapped, strict=True)):
        if _same_owners(old, new):
            layers.append(layer)
            got.append(old)
            continue
        # One layer at a time, so that no more than one lies uncompressed in a temporary file.
        with contents.more([place]) as one:
            descriptor, diff_id = write_layer(
                new, _content(one, place, new), sink,
                Writing(options.rewrite.packing, "", limits, work.progress, f"writing {place + 1}/{len(indexes)}"),
                got.append,
            )  # fmt: skip
        layers.append(NewLayer(descriptor, diff_id, replaces=(place,)))
    check_tree(want.digest(), merge(got, limits=limits))
    rewritten = sum(isinstance(layer, NewLayer) for layer in layers)
    return _Made(layers, want, f"portable: {rewritten} layers written anew")


def _same_owners(old: Index, new: Index) -> bool:
    return (
        len(old) == len(new)
        and bool((old.uid == new.uid).all())
        and bool((old.gid == new.gid).all())
        and old.xattr_sets == new.xattr_sets
    )


def _content(contents: Contents, place: int, index: Index) -> Content:
    # A row's place can differ from that in the layer's own index, where folders were added.
    return lambda row: contents.stored(place, int(index.offset[row]), stored_bytes(index, row))


def stub_layer(tree: Tree, *, strict: bool = False) -> Index:
    """Return a layer that holds all of ``tree``, every file that is not empty as a stub over its own path.

    Raises:
        UnsafeEntry: ``strict``, and the image brings overlay xattrs of its own.
        LossyResult: something that overlayfs cannot show through a stub.
    """
    index = layer_of(metadata_layer(tree, Namespace.TRUSTED, strict=strict).tree).index
    stubs = np.flatnonzero((index.kind == Kind.REG) & (index.size > 0)).tolist()
    return replace(as_stubs(index, dict.fromkeys(stubs, b"")), offset=np.full(len(index), -1, np.int64))


def _with_meta(work: Work, sink: ImageSink, contents: Contents, options: RemapOptions) -> _Made:
    tree, packing = apply_map(merge(contents.indexes, limits=work.limits), options.mapping), options.rewrite.packing
    descriptor, diff_id = write_layer(
        stub_layer(tree, strict=work.strict), _no_content, sink,
        Writing(packing, "" if options.stock_media_type else artifact.META_TAR + packing.suffix,
                work.limits, work.progress),
    )  # fmt: skip
    text = f"layerkit remap --form layer: {options.mapping.canonical()}"
    return _Made(
        [*work.image.layers, NewLayer(descriptor, diff_id, text)], tree,
        f"META as a layer of type {descriptor.media_type}", descriptor.size,
        STOCK_WARNINGS if options.stock_media_type else VENDOR_WARNINGS,
    )  # fmt: skip


def _no_content(row: int) -> Iterator[memoryview]:
    raise AssertionError(f"a stub has no content (row {row})")
