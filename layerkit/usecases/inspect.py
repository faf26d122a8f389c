"""Use case: look at what an image holds, and what a map would do to it."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from layerkit import idmap
from layerkit.idmap import Mapping
from layerkit.model.entry import Kind
from layerkit.model.errors import LayerkitError, show_path
from layerkit.model.image import Image
from layerkit.model.index import Index
from layerkit.model.reports import IdRow, InspectReport, LayerRow
from layerkit.model.tree import Tree
from layerkit.model.trees.merge import merge
from layerkit.model.work import Work
from layerkit.unpack import Found

_KIND_NAMES = {
    Kind.REG: "files", Kind.DIR: "directories", Kind.SYMLINK: "symlinks", Kind.FIFO: "fifos",
    Kind.CHAR: "character devices", Kind.BLOCK: "block devices",
}  # fmt: skip


def inspect(work: Work, found: Found, mapping: Mapping | None) -> InspectReport:
    """Return what the image with the indexes ``found`` holds, and what ``mapping`` would do to it."""
    image, indexes = work.image, found.indexes
    tree = merge(indexes, limits=work.limits)
    kinds = np.bincount(tree.kind, minlength=16)
    problems: list[str] = []
    if mapping is not None:
        try:
            idmap.apply(tree, mapping)
        except LayerkitError as error:
            problems.append(str(error))
    return InspectReport(
        name=work.name,
        manifest=str(image.descriptor.digest),
        platform=str(image.platform),
        entries=len(tree),
        inodes=tree.inodes,
        data_bytes=tree.data_bytes,
        tree_digest=str(tree.digest()),
        layers=tuple(_layer_row(image, place, index) for place, index in enumerate(indexes)),
        kinds={text: int(kinds[kind]) for kind, text in _KIND_NAMES.items() if kinds[kind]},
        uids=_id_rows(tree.uid, mapping.uid if mapping else None, mapping),
        gids=_id_rows(tree.gid, mapping.gid if mapping else None, mapping),
        xattrs=_xattr_counts(tree),
        map_text=mapping.canonical() if mapping else "",
        problems=tuple(problems),
        warnings=found.warnings(tree.warnings),
    )


def _layer_row(image: Image, place: int, index: Index) -> LayerRow:
    descriptor = image.layers[place].descriptor
    return LayerRow(
        number=place + 1,
        digest=str(descriptor.digest),
        diff_id=str(index.diff_id),
        media_type=descriptor.media_type,
        blob_bytes=descriptor.size,
        tar_bytes=index.tar_size,
        entries=len(index),
        whiteouts=int((index.kind >= Kind.WHITEOUT).sum()),
    )


def _id_rows(ids: NDArray[np.uint32], id_map: idmap.IdMap | None, mapping: Mapping | None) -> tuple[IdRow, ...]:
    values, counts = np.unique(ids, return_counts=True)
    becomes = [""] * len(values)
    if id_map is not None and mapping is not None:
        mapped, inside = id_map.lookup(values)
        other = "unmapped" if mapping.overflow is None else f"{mapping.overflow} (overflow)"
        becomes = [str(m) if ok else other for m, ok in zip(mapped.tolist(), inside.tolist(), strict=True)]
    return tuple(IdRow(*row) for row in zip(values.tolist(), counts.tolist(), becomes, strict=True))


def _xattr_counts(tree: Tree) -> dict[str, int]:
    uses = np.bincount(tree.xattr, minlength=len(tree.xattr_sets))
    counts: Counter[str] = Counter()
    for pairs, use in zip(tree.xattr_sets, uses.tolist(), strict=True):
        for xattr, _ in pairs:
            counts[show_path(xattr)] += use
    return dict(sorted(counts.items()))
