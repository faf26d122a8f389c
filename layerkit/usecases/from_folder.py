"""What changed in a folder since an image, as one more layer of that image."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from layerkit.idmap import Mapping
from layerkit.idmap import apply as apply_map
from layerkit.images.transfer import copy_image
from layerkit.linux.folders.reader import as_on_disk, read_rootfs, read_runs
from layerkit.linux.syscalls import FOLDER
from layerkit.model.entry import Kind
from layerkit.model.errors import InvalidImage, UsageError, show_path
from layerkit.model.index import Index
from layerkit.model.reports import Report
from layerkit.model.trees.diff import diff
from layerkit.model.trees.merge import merge
from layerkit.model.work import Destination, Work
from layerkit.pack import NewLayer, Writing, rewrite_image, write_layer
from layerkit.unpack import find_indexes
from layerkit.usecases.copy import left_behind
from layerkit.usecases.flatten import has_root
from layerkit.usecases.settings import RewriteOptions


@dataclass(frozen=True, slots=True)
class PackReport(Report):
    """What a packing made.

    Attributes:
        name: what the source calls the base image.
        base: digest of its manifest.
        manifest: digest of the new image's manifest.
        layer: digest of the new layer's blob.
        diff_id: of the new layer.
        layer_bytes: size of the blob.
        entries: names in the folder.
        added: new names in the layer.
        changed: names in it that the base has as well.
        removed: whiteouts in it.
        hashed_bytes: how much of the folder was read to see what changed.
    """

    name: str
    base: str
    manifest: str
    layer: str
    diff_id: str
    layer_bytes: int
    map_text: str
    entries: int
    added: int
    changed: int
    removed: int
    hashed_bytes: int
    seconds: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PackOptions:
    """What the new layer is to be like.

    Attributes:
        rewrite: how it is written.
        mapping: the id map that the folder was unpacked with; owners are mapped back.
        message: for the history; "" names the command.
        checksum: read every file, also those whose size and time are those of the base.
    """

    rewrite: RewriteOptions
    mapping: Mapping | None = None
    message: str = ""
    checksum: bool = False


def pack(folder: Path, work: Work, dst: Destination, options: PackOptions) -> PackReport:
    """Put the image with the changes in ``folder`` as one more layer to ``dst``.

    ``folder`` is a root filesystem, as ``unpack`` writes it. The blob is read back before anything is visible: the
    base with it on top is the folder, or it is an error.

    Raises:
        UnmappedId: an owner in the folder that is outside the map.
        LossyResult: something that a layer cannot hold.
        InvalidImage: the folder changed meanwhile.
        UsageError: there is no such folder, or ``mapping`` has no inverse.
    """
    start, image, limits, mapping = time.monotonic(), work.image, work.limits, options.mapping
    with contextlib.ExitStack() as stack:
        root = _open(folder)
        stack.callback(os.close, root)
        indexes = find_indexes(work).indexes
        sink = stack.enter_context(dst.sink())
        old = as_on_disk(merge(indexes, limits=limits), mapping)
        read = read_rootfs(root, old, checksum=options.checksum, limits=limits, progress=work.progress)
        new = read.tree
        if mapping is not None:
            new = apply_map(new, mapping.inverse())
        made = diff(old, new, root=any(map(has_root, indexes)))
        change = made.index

        def content(row: int) -> Iterator[memoryview]:
            return read_runs(root, change.entry(row))

        def check(written: Index) -> None:
            left = diff(as_on_disk(merge([*indexes, written], limits=limits), None), new).index
            if len(left):
                raise InvalidImage(
                    f"{show_path(left.path[0]) or '/'}: the layer that was written does not show it as the "
                    "folder has it; nothing was kept"
                )

        descriptor, diff_id = write_layer(
            change, content, sink,
            Writing(options.rewrite.packing, limits=limits, progress=work.progress), check,
        )  # fmt: skip
        layer = NewLayer(descriptor, diff_id, options.message or "layerkit pack")
        result = rewrite_image(image, [*image.layers, layer], created=options.rewrite.created, limits=limits)
        copy_image(work.source, sink, result, dst.name or image.name, progress=work.progress)
    there = set(old.paths())
    shown = [path in there for path in change.path.tolist()]
    removed = int(np.count_nonzero(change.kind == Kind.WHITEOUT))
    return PackReport(
        name=work.name,
        base=str(image.descriptor.digest),
        manifest=str(result.descriptor.digest),
        layer=str(descriptor.digest),
        diff_id=str(diff_id),
        layer_bytes=descriptor.size,
        map_text=mapping.canonical() if mapping else "",
        entries=len(new),
        added=shown.count(False),
        changed=shown.count(True) - removed - made.carried,
        removed=removed,
        hashed_bytes=read.hashed_bytes,
        seconds=time.monotonic() - start,
        warnings=(*read.warnings, *left_behind(work.source, image, limits)),
    )


def _open(folder: Path) -> int:
    try:
        return os.open(folder, FOLDER & ~os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{folder}: no such folder; DIR is a root filesystem, as `layerkit unpack` writes it"
        ) from None
