"""What changed in a folder since an image, as one more layer of that image."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from layerkit.idmap import Mapping
from layerkit.idmap import apply as apply_map
from layerkit.linux.folders.tree import as_on_disk, read_folder, read_runs
from layerkit.linux.folders.writer import FOLDER
from layerkit.model.entry import Kind
from layerkit.model.errors import InvalidImage, NotFound, UsageError, show_path
from layerkit.model.image import Image
from layerkit.model.index import Index
from layerkit.model.limits import Limits
from layerkit.model.ports import ImageSink, ImageSource, Progress
from layerkit.model.reports import Report
from layerkit.model.trees.diff import diff, diff_and_carried
from layerkit.model.trees.merge import merge
from layerkit.pack import NewLayer, Packing, put_image, rewrite_image, write_layer
from layerkit.usecases.copy import left_behind


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
        map_text: the id map in canonical form, "" for none.
        entries: names in the folder.
        added: new names in the layer.
        changed: names in it that the base has as well.
        removed: whiteouts in it.
        hashed_bytes: how much of the folder was read to see what changed.
        seconds: wall time.
        warnings: what was left out, or odd but harmless.
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


def pack(
    folder: Path,
    source: ImageSource,
    image: Image,
    indexes: Sequence[Index],
    sink: ImageSink,
    *,
    name: str,
    dst_name: str,
    mapping: Mapping | None = None,
    packing: Packing,
    created: str | None = None,
    message: str = "",
    checksum: bool = False,
    limits: Limits,
    progress: Progress | None = None,
) -> PackReport:
    """Put ``image`` with the changes in ``folder`` as one more layer into ``sink``, which is committed.

    The blob is read back before anything is visible: the base with it on top is the folder, or it is an error.

    Args:
        folder: a root filesystem, as ``unpack`` writes it.
        source: where ``image`` was read from.
        image: what the folder was made from.
        indexes: of the layers of ``image``.
        sink: where the result goes.
        name: what the source calls ``image``.
        dst_name: name of the result in the sink.
        mapping: the id map that the folder was unpacked with; owners are mapped back.
        packing: compression of the layer.
        created: RFC 3339 time of the result; None keeps that of the base.
        message: for the history; "" names the command.
        checksum: read every file, also those whose size and time are those of the base.
        limits: bounds on input.
        progress: told of entries and bytes.

    Raises:
        UnmappedId: an owner in the folder that is outside the map.
        LossyResult: something that a layer cannot hold.
        InvalidImage: the folder changed meanwhile.
        UsageError: ``folder`` is no folder, or ``mapping`` has no inverse.
        NotFound: there is no ``folder``.
    """
    start = time.monotonic()
    try:
        old = as_on_disk(merge(indexes, limits=limits), mapping)
        root = _open(folder)
        try:
            read = read_folder(root, old, checksum=checksum, limits=limits, progress=progress)
            new = read.tree
            if mapping is not None:
                new = apply_map(new, mapping.inverse())
            change, carried = diff_and_carried(old, new, root=any(map(_lists_root, indexes)))

            def content(row: int) -> Iterator[memoryview]:
                return read_runs(root, change.entry(row))

            def check(written: Index) -> None:
                left = diff(as_on_disk(merge([*indexes, written], limits=limits), None), new)
                if len(left):
                    raise InvalidImage(
                        f"{show_path(left.path[0]) or '/'}: the layer that was written does not show it as the "
                        "folder has it; nothing was kept"
                    )

            descriptor, diff_id = write_layer(
                change, content, sink, packing=packing, check=check,
                limits=limits, progress=progress,
            )  # fmt: skip
        finally:
            os.close(root)
        layer = NewLayer(descriptor, diff_id, message or "layerkit pack")
        result = rewrite_image(image, [*image.layers, layer], created=created, limits=limits)
        put_image(source, sink, result, dst_name, progress=progress)
        sink.commit()
    except BaseException:
        sink.abort()
        raise
    there = set(old.paths())
    shown = [path in there for path in change.path.tolist()]
    removed = int(np.count_nonzero(change.kind == Kind.WHITEOUT))
    return PackReport(
        name=name,
        base=str(image.descriptor.digest),
        manifest=str(result.descriptor.digest),
        layer=str(descriptor.digest),
        diff_id=str(diff_id),
        layer_bytes=descriptor.size,
        map_text=mapping.canonical() if mapping else "",
        entries=len(new),
        added=shown.count(False),
        changed=shown.count(True) - removed - carried,
        removed=removed,
        hashed_bytes=read.hashed_bytes,
        seconds=time.monotonic() - start,
        warnings=(*read.warnings, *left_behind(source, image, limits)),
    )


def _lists_root(index: Index) -> bool:
    # Only its own markers come before the root's entry.
    return any(not index.path[row] and index.kind[row] == Kind.DIR for row in range(min(3, len(index))))


def _open(folder: Path) -> int:
    try:
        return os.open(folder, FOLDER & ~os.O_NOFOLLOW)
    except FileNotFoundError:
        raise NotFound(f"{folder}: no such folder") from None
    except NotADirectoryError:
        raise UsageError(
            f"{folder}: not a folder; DIR is a root filesystem, as `layerkit unpack` writes it"
        ) from None
