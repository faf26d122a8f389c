"""The EROFS image of an id map, made from the one with container ids: neither a tree nor a layout is needed."""

from __future__ import annotations

import os

import numpy as np

from layerkit.formats.erofs.patch import Fixups, Patch
from layerkit.idmap import Mapping
from layerkit.model.errors import InvalidImage

_WINDOW_BYTES = 1 << 20


def patch_meta(source: int, target: int, fixups: Fixups, mapping: Mapping) -> None:
    """Write the image at ``source`` to ``target`` with every owner mapped: of inodes, in ACLs and capabilities.

    The result is byte for byte what :func:`~layerkit.formats.meta.erofs.build_meta` makes of the mapped tree.

    Args:
        source: descriptor of an image that ``build_meta`` wrote of a tree with container ids.
        target: descriptor of an empty file, open for reading and writing.
        fixups: returned when ``source`` was built.
        mapping: covers every owner of the tree; the caller has checked that.

    Raises:
        InvalidImage: ``source`` is not the image that ``fixups`` belongs to, or has an owner without a host id.
    """
    patch = Patch(fixups, mapping.lookup)
    found = os.fstat(source).st_size
    if found != fixups.image_bytes:
        raise InvalidImage(
            f"metadata image of {found} bytes, its fixups are for {fixups.image_bytes}; build it again"
        )
    # One pass through a small window beats copying the file (or cloning it) and writing through a map of it:
    # nearly every block holds an inode, so nearly every block is written anyway.
    window = np.empty(_WINDOW_BYTES // 8, "<u8")
    raw = window.view(np.uint8).data
    at = 0
    while at < found:
        got = os.preadv(source, [raw[: min(_WINDOW_BYTES, found - at)]], at)
        if got <= 0 or got % 8:
            raise InvalidImage(f"metadata image: read of {got} bytes at {at} of {found}; build it again")
        patch.apply(window[: got // 8], at // 8)
        done = 0
        while done < got:
            done += os.pwrite(target, raw[done:got], at + done)
        at += got
    for fix in fixups.xattrs:
        os.pwrite(target, patch.value(fix, os.pread(source, fix.length, fix.offset)), fix.offset)
