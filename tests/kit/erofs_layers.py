"""Layers for the tests of DATA images: a tar beside its index, made without the tar reader."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

from layerkit.model.digest import Digest
from layerkit.model.entry import Entry, Extent, Kind
from layerkit.model.index import Index


def make_layer(
    folder: Path,
    files: dict[bytes, bytes],
    sparse: dict[bytes, tuple[Sequence[Extent], bytes]] | None = None,
    name: str = "layer.tar",
) -> tuple[Index, Path]:
    """Write a tar of ``files`` and return its index and path.

    Args:
        folder: where the tar goes.
        files: content by path.
        sparse: by path (runs of data, content with its holes): only the runs are stored, as a sparse
            entry's are; the tar's own headers do not matter to what is tested.
        name: of the tar.
    """
    sparse = sparse or {}
    raw = io.BytesIO()
    entries: list[Entry] = []
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path, content in {**files, **{p: c for p, (_, c) in sparse.items()}}.items():
            runs = tuple(sparse[path][0]) if path in sparse else None
            stored = content if runs is None else b"".join(content[a : a + n] for a, n in runs)
            info = tarfile.TarInfo(f"f{len(entries)}")
            info.size = len(stored)
            tar.addfile(info, io.BytesIO(stored))
            at = tar.offset - -(-len(stored) // 512) * 512 if stored else -1
            entries.append(
                Entry(
                    path,
                    Kind.REG,
                    size=len(content),
                    offset=at,
                    sha256=hashlib.sha256(content).digest(),
                    sparse=runs,
                )
            )
    data = raw.getvalue()
    for entry in entries:
        if entry.sparse is None and entry.size:
            assert data[entry.offset : entry.offset + entry.size] == files[entry.path]
    out = folder / name
    out.write_bytes(data)
    return Index.of(entries, Digest.of(data), len(data)), out
