"""EROFS renderings: the metadata layer as an image of stubs, and the data of a layer as a map of its tar."""

from __future__ import annotations

import os
from typing import BinaryIO

import numpy as np

from layerkit.errors import InvalidImage
from layerkit.formats.erofs import data, writer
from layerkit.formats.erofs.patch import Fixups, Patch
from layerkit.metaonly import METACOPY_VALUE, MetadataLayer, redirects
from layerkit.model.index import Index
from layerkit.model.tree import Tree

__all__ = ["Fixups", "build_data", "build_meta", "patch_meta"]

_WINDOW_BYTES = 1 << 20


def build_meta(meta: MetadataLayer, file: BinaryIO) -> Fixups:
    """Write ``meta`` as an EROFS image to ``file``, in one pass without seeking.

    The same metadata layer gives the same bytes. Inode numbers depend on the tree, never on owners.

    Returns:
        What :func:`patch_meta` needs to make the image of another id map from this one.

    Raises:
        LossyResult: an entry that EROFS cannot express.
    """
    prefix = meta.namespace.prefix
    form = writer.StubForm(
        (prefix + b"metacopy", METACOPY_VALUE), prefix + b"redirect", meta.redirect_bytes, meta.redirects_of
    )
    return writer.write(meta.tree, meta.is_stub, form, file)


def patch_meta(source: int, target: int, fixups: Fixups, tree: Tree) -> None:
    """Write the image at ``source`` to ``target`` with the owners of ``tree`` in place of its own.

    The result is byte for byte what :func:`build_meta` makes of the mapped tree.

    Args:
        source: descriptor of an image that :func:`build_meta` wrote for any map of the same tree.
        target: descriptor of an empty file, open for writing.
        fixups: returned when ``source`` (or the image it was patched from) was built.
        tree: the tree with other owners, capabilities in their v3 form: ``MetadataLayer.tree``.

    Raises:
        UsageError: ``tree`` is not a map of the image's tree.
        InvalidImage: ``source`` is not the image that ``fixups`` belongs to.
    """
    patch = Patch(fixups, tree)
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
    for offset, value in patch.values:
        os.pwrite(target, value, offset)


def build_data(index: Index, tar: BinaryIO | int, file: BinaryIO) -> None:
    """Write to ``file`` the EROFS image that maps the contents of a layer, by short name, onto its tar.

    Mount it with the uncompressed tar as its one extra device (``device=LAYER.tar``).

    Args:
        index: of the layer.
        tar: the uncompressed tar, or its descriptor; read only for sparse files that blocks cannot map.
        file: takes some 100 bytes per file.

    Raises:
        InvalidImage: two contents with one short name, or a tar that is shorter than the index says.
        LossyResult: a layer too large for block addresses.
    """
    data.write_data(index, tar, file, names=redirects)
