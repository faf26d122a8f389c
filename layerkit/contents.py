"""Use case: the layers of an image as indexes together with the raw tars that their content is read from."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from types import TracebackType
from typing import BinaryIO

from layerkit.errors import InvalidImage
from layerkit.formats.layer_writer import Content, stored_bytes
from layerkit.indexes import labelled
from layerkit.limits import Limits
from layerkit.model.digest import Digest
from layerkit.model.image import Image
from layerkit.model.index import Index
from layerkit.ports import ImageSource, Progress
from layerkit.unpack import index_layer

_CHUNK_BYTES = 1 << 20

LoadIndex = Callable[[Digest], Index | None]
"""Gives the kept index of a layer, or None."""

OpenTar = Callable[[Digest], BinaryIO | None]
"""Opens the kept raw tar of a layer, or gives None."""


class Contents:
    """Indexes and content of an image's layers; close it, or use it in ``with``.

    Where a layer's raw tar is not kept, it is written to a nameless temporary file while the blob is read, so
    each blob is read once and nothing is left behind, not even by a kill.

    Attributes:
        indexes: of all layers, bottom first.
        read: how many blobs were read.
    """

    def __init__(
        self,
        source: ImageSource,
        image: Image,
        *,
        limits: Limits,
        load: LoadIndex = lambda _: None,
        open_tar: OpenTar = lambda _: None,
        need: Collection[int] | None = None,
        tmp: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Read the layers of ``image``.

        Args:
            source: where the blobs are.
            image: whose layers are meant.
            limits: bounds on input.
            load: gives kept indexes.
            open_tar: gives kept tars.
            need: places of the layers whose content will be asked for; None is all.
            tmp: folder of temporary files, default the system's.
            progress: told of the bytes of each blob.

        Raises:
            InvalidImage: a layer is malformed, unsafe, or not what its digests promise.
        """
        limits.check("layers_per_image", len(image.layers), image.name or "image")
        self.indexes: list[Index] = []
        self.read = 0
        self._tars: dict[Digest, BinaryIO] = {}
        wanted = {image.layers[at].diff_id for at in (range(len(image.layers)) if need is None else need)}
        known: dict[Digest, Index] = {}
        with contextlib.ExitStack() as stack:
            for place, layer in enumerate(image.layers):
                diff_id = layer.diff_id
                if diff_id in known:
                    self.indexes.append(known[diff_id])
                    continue
                index = load(diff_id)
                tar = open_tar(diff_id) if index is not None and diff_id in wanted else None
                if tar is not None:
                    stack.callback(tar.close)
                if index is None or (tar is None and diff_id in wanted):
                    if diff_id in wanted:
                        tar = stack.enter_context(tempfile.TemporaryFile(dir=tmp, prefix="layerkit-", buffering=0))
                    reader = source.open_blob(layer.descriptor)
                    try:
                        index = index_layer(
                            reader, layer.descriptor, diff_id, limits=limits, data=_Sink(tar) if tar else None,
                            progress=labelled(progress, place, len(image.layers)),
                        )  # fmt: skip
                    finally:
                        reader.close()
                    self.read += 1
                if tar is not None:
                    self._tars[diff_id] = tar
                known[diff_id] = index
                self.indexes.append(index)
            self._stack = stack.pop_all()

    def stored(self, layer: int, offset: int, size: int) -> Iterator[memoryview]:
        """Yield ``size`` bytes at ``offset`` of a layer's tar; a piece is good until the next is asked for."""
        index = self.indexes[layer]
        fd = self._tars[index.diff_id].fileno()
        buffer = memoryview(bytearray(min(size, _CHUNK_BYTES)))
        while size:
            got = os.preadv(fd, [buffer[:size]], offset)
            if not got:
                raise InvalidImage(f"layer {index.diff_id}: its tar ends at byte {offset}; read the image again")
            yield buffer[:got]
            offset += got
            size -= got

    def of_layer(self, layer: int) -> Content:
        """Return what gives the stored bytes of the rows of layer ``layer``'s index."""
        index = self.indexes[layer]
        return lambda row: self.stored(layer, int(index.offset[row]), stored_bytes(index, row))

    def close(self) -> None:
        """Release the tars."""
        self._stack.close()

    def __enter__(self) -> Contents:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Sink:
    """A file as a :class:`~layerkit.ports.DataSink`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, chunk: memoryview, /) -> int:
        return self._file.write(chunk)


__all__ = ["Contents", "LoadIndex", "OpenTar"]
