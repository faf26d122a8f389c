"""EROFS renderings: the metadata layer as an image of stubs, and the data of a layer as a map of its tar."""

from __future__ import annotations

from typing import BinaryIO

from layerkit.formats.erofs import data, writer
from layerkit.formats.erofs.patch import Fixups
from layerkit.metaonly import METACOPY, METACOPY_VALUE, REDIRECT, MetadataLayer, redirects
from layerkit.model.index import Index

__all__ = ["Fixups", "build_data", "build_meta"]


def build_meta(meta: MetadataLayer, file: BinaryIO) -> Fixups:
    """Write ``meta`` as an EROFS image to ``file``, in one pass without seeking.

    The same metadata layer gives the same bytes. Inode numbers depend on the tree, never on owners.

    Returns:
        What ``patch_meta`` needs to make the image of an id map from this one.

    Raises:
        LossyResult: an entry that EROFS cannot express.
    """
    xattr = meta.namespace.xattr
    form = writer.StubForm(
        (xattr(METACOPY), METACOPY_VALUE), xattr(REDIRECT), meta.redirect_bytes, meta.redirects_of
    )
    return writer.write(meta.tree, meta.is_stub, form, file)


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
