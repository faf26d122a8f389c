"""TODO."""

from __future__ import annotations

import mmap
from pathlib import Path

from layerkit.formats.index import file as index_file
from layerkit.model.digest import Digest
from layerkit.model.errors import LayerkitError, StoreError
from layerkit.model.index import Index
from layerkit.store.layout import Layout


def decode_index(buffer: bytes | mmap.mmap, path: Path) -> Index:
    """Return the index in ``buffer``; ``path`` is where it came from.

    Raises:
        StoreError: it is damaged.
    """
    try:
        return index_file.decode(buffer, str(path))
    except LayerkitError as error:
        raise StoreError(f"{error}; run `layerkit store verify --repair`") from error


def read_index(layout: Layout, diff_id: Digest) -> Index:
    """Return the index of a layer that the catalog has.

    Raises:
        StoreError: it is missing or damaged.
    """
    path = layout.index(diff_id)
    try:
        buffer = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}; run `layerkit store verify --repair`") from error
    index = decode_index(buffer, path)
    if index.diff_id != diff_id:
        raise StoreError(f"{path}: holds the index of {index.diff_id}; run `layerkit store verify --repair`")
    return index
