"""Whether an index from a stranger keeps to what one that was read from a layer always does.

The reader of tars (``formats.tar``) refuses what is unsafe while it reads. An index that came from elsewhere has
not gone through it, so the same rules are applied to its columns here. Even then it is a claim: it is marked as
unproven until the layer is read.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from layerkit.formats.tar import names as tar_names
from layerkit.model.entry import WHITEOUT_PREFIX, Kind
from layerkit.model.errors import InvalidImage, UnsafeEntry, show_path
from layerkit.model.index import Index, path_key
from layerkit.model.limits import Limits

UNPROVEN = "unproven: "
"""Begins the warning that an index carries which no ``diff_id`` has proven."""


def mark_unproven(index: Index, origin: str) -> Index:
    """Return ``index`` with the warning that nothing has proven it; ``origin`` says where it came from."""
    text = (
        f"{UNPROVEN}layer {str(index.diff_id)[:19]} is known from {origin} only; reading the layer would prove it"
    )
    return replace(index, warnings=(text, *unmarked(index).warnings))


def unmarked(index: Index) -> Index:
    """Return ``index`` without that warning."""
    return replace(index, warnings=tuple(text for text in index.warnings if not text.startswith(UNPROVEN)))


def is_unproven(index: Index) -> bool:
    """Return whether nothing has proven ``index``."""
    return any(text.startswith(UNPROVEN) for text in index.warnings)


def check_index(index: Index, what: str, limits: Limits) -> None:
    """Raise unless ``index`` could have been read from a layer.

    Raises:
        UnsafeEntry: a name that climbs, is not normal, or is a whiteout's.
        LimitExceeded: beyond a bound.
        InvalidImage: rows out of order, or values that do not fit the kind of their entry.
    """
    rows = len(index)
    limits.check("entries_per_layer", rows, f"{what}: entries")
    names = sum(len(s.blob) for s in (index.path, index.links)) + sum(
        len(n) + len(v) for pairs in index.xattr_sets for n, v in pairs
    )
    limits.check("metadata_bytes_per_layer", names, f"{what}: bytes of names and xattrs")
    _check_paths(index, what, limits)
    _check_links(index, what, limits)
    _check_xattrs(index, what, limits)
    regular = index.kind == Kind.REG
    linked = (index.kind == Kind.SYMLINK) | (index.kind == Kind.HARDLINK)
    device = (index.kind == Kind.CHAR) | (index.kind == Kind.BLOCK)
    bare = ~regular
    for good, text in (
        (not (index.size[bare] != 0).any(), "a size of what is no file"),
        (not index.sha256[bare].any(), "a digest of what is no file"),
        (not (index.offset[bare] != -1).any(), "a place of what is no file"),
        (not (index.sparse[bare] != -1).any(), "holes in what is no file"),
        (not ((index.link >= 0) != linked).any(), "a link's target that is missing, or of what is no link"),
        (not (index.major[~device].any() or index.minor[~device].any()), "a device number of what is no device"),
    ):
        if not good:
            raise InvalidImage(f"{what}: {text}; publish the index again")
    if rows:
        limits.check("file_bytes", int(index.size.max()), f"{what}: bytes of a file")
    _check_places(index, what, limits)


def _check_paths(index: Index, what: str, limits: Limits) -> None:
    paths = index.path.tolist()
    named = [path for path in paths if path]
    if tar_names.normalise_all(named, what, limits) != named:
        bad = next(p for p in named if tar_names.normalise(p, what) != p)
        raise UnsafeEntry(what, bad, "a name that is not in its plain form")
    entry = index.kind < Kind.WHITEOUT
    order = [(path_key(path), not whole and -int(kind)) for path, whole, kind in
             zip(paths, entry.tolist(), index.kind.tolist(), strict=True)]  # fmt: skip
    for place, (before, after) in enumerate(itertools.pairwise(order)):
        if not before < after:
            raise InvalidImage(f"{what}: {show_path(paths[place + 1])}: rows out of order, or twice the same")
    for path, kind in zip(paths, index.kind.tolist(), strict=True):
        if WHITEOUT_PREFIX in path and any(p.startswith(WHITEOUT_PREFIX) for p in path.split(b"/")):
            raise UnsafeEntry(what, path, "a whiteout's name as that of an entry")
        if not path and kind not in (Kind.DIR, Kind.OPAQUE):
            raise UnsafeEntry(what, path, "the root is no folder")


def _check_links(index: Index, what: str, limits: Limits) -> None:
    for row in np.flatnonzero(index.kind == Kind.HARDLINK).tolist():
        path, link = index.path[row], index.links[int(index.link[row])]
        if tar_names.target(link, path, what, limits) != link:
            raise UnsafeEntry(what, path, "a hard link whose target is not in its plain form")
    for row in np.flatnonzero(index.kind == Kind.SYMLINK).tolist():
        path, link = index.path[row], index.links[int(index.link[row])]
        limits.check("link_target_bytes", len(link), f"{what}: bytes of a symlink's target")
        if not link or b"\0" in link:
            raise UnsafeEntry(what, path, "a symlink to nothing, or with a NUL in its target")


def _check_xattrs(index: Index, what: str, limits: Limits) -> None:
    if index.xattr_sets[:1] != ((),):
        raise InvalidImage(f"{what}: the first set of xattrs is not the empty one")
    for pairs in index.xattr_sets:
        limits.check("xattrs_per_entry", len(pairs), f"{what}: xattrs of an entry")
        names = [name for name, _ in pairs]
        if names != sorted(set(names)) or any(not n or b"\0" in n for n in names):
            raise InvalidImage(f"{what}: xattrs out of order, twice, or without a name")
        for name, value in pairs:
            limits.check("xattr_name_bytes", len(name), f"{what}: bytes of an xattr's name")
            limits.check("xattr_value_bytes", len(value), f"{what}: bytes of an xattr's value")


def _check_places(index: Index, what: str, limits: Limits) -> None:
    """See that what a file stores lies inside the tar, and that the runs of sparse files are runs."""
    whole = (index.kind == Kind.REG) & (index.sparse < 0) & (index.offset >= 0)
    if (index.offset[whole] + index.size[whole] > index.tar_size).any():
        raise InvalidImage(f"{what}: a file beyond the end of its layer")
    limits.check("sparse_extents_per_file", int(np.diff(index.sparse_maps.starts).max(initial=0)), what)
    for row in np.flatnonzero(index.sparse >= 0).tolist():
        end, size = 0, int(index.size[row])
        for offset, length in index.sparse_maps.extents(int(index.sparse[row])):
            if offset < end or length <= 0 or offset + length > size:
                raise InvalidImage(f"{what}: {show_path(index.path[row])}: runs of data that overlap or go too far")
            end = offset + length
        stored = index.sparse_maps.stored_bytes(int(index.sparse[row]))
        if index.offset[row] >= 0 and int(index.offset[row]) + stored > index.tar_size:
            raise InvalidImage(f"{what}: {show_path(index.path[row])}: lies beyond the end of its layer")
