"""Use case: images into sinks: copied as they are, or with layers and a config that are made here."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from layerkit.formats.compression.compress import ZSTD_LEVEL, all_cores, compress, compressor
from layerkit.formats.compression.decompress import Compression
from layerkit.formats.compression.zstd_chunked import CHUNK_BYTES, ZstdChunked
from layerkit.formats.oci import documents as oci
from layerkit.formats.oci.rewrite import NewLayer, rewrite
from layerkit.formats.tar.layer_writer import Content, Part, layer_parts, layer_tar
from layerkit.images.transfer import Chunks, blob_chunks, copy_image, put_blobs
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import InvalidImage, UsageError
from layerkit.model.image import Image, Layer
from layerkit.model.index import Index
from layerkit.model.limits import DEFAULT, Limits
from layerkit.model.ports import ImageSink, ImageSource, Progress
from layerkit.model.tree import Tree
from layerkit.unpack import index_layer

if TYPE_CHECKING:
    from layerkit.model.digest import Digest
    from layerkit.model.image import Image
    from layerkit.model.index import Index
    from layerkit.model.ports import ImageSink, ImageSource, Progress

COMPRESSOR_KEY = "io.layerkit.compressor"
"""Annotation of a layer that was made here: what packed it. With the same one the same tar gives the same blob."""

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Packing:
    """How the layers that are made here are compressed.

    Attributes:
        compression: of the blobs.
        level: as :func:`~layerkit.formats.compression.compress.compress` takes it; None is its default.
        jobs: threads that compress; None is one for each core. The bytes do not depend on it.
        chunked: with zstd: a frame for each file and a table of contents, see ``zstd_chunked``.
    """

    compression: Compression = Compression.GZIP
    level: int | None = None
    jobs: int | None = None
    chunked: bool = False

    @property
    def media_type(self) -> str:
        """Return the OCI media type of such a layer."""
        return oci.LAYER_TAR + self.suffix

    @property
    def suffix(self) -> str:
        """Return what the media type of anything that is packed so ends with."""
        return f"+{self.compression.value}" if self.compression.value else ""

    @property
    def compressor(self) -> str:
        """Return the name, version and settings of the compressor, "" for none."""
        if self.chunked:
            return f"{compressor(self.compression, self.level)} chunked {CHUNK_BYTES}"
        return compressor(self.compression, self.level)


def write_layer(
    index: Index,
    content: Content,
    sink: ImageSink,
    *,
    packing: Packing | None = None,
    media_type: str = "",
    check: Callable[[Index], None] | None = None,
    limits: Limits = DEFAULT,
    progress: Progress | None = None,
    label: str = "writing a layer",
    tmp: str | os.PathLike[str] | None = None,
) -> tuple[Descriptor, Digest]:
    """Write the layer that has the rows of ``index`` and put its blob into ``sink``; return it and its diff_id.

    Everything streams: the compressed blob goes through a temporary file, because its digest has to be known
    before it is put. The same arguments give the same bytes.

    Args:
        index: rows in canonical order; whiteouts and opaque markers are written as such.
        content: gives the stored bytes of a regular file's row (the runs of a sparse file one after the other).
        sink: where the blob goes; a blob that it has already is not put again.
        packing: compression of the blob; None is the default one.
        media_type: of the descriptor; "" is the OCI one that goes with the compression.
        check: called with the index that the finished blob, read back, has, before it is put.
        limits: bounds for the reading back.
        progress: told of the bytes of tar written; may raise ``Cancelled``.
        label: what ``progress`` is told.
        tmp: folder of the temporary file, default the system's.

    Raises:
        LossyResult: something that a tar cannot hold.
        InvalidImage: content that is not as long as the index says, or what is read back is not right.
    """
    packing = packing or Packing()
    tar_hash, blob_hash = hashlib.sha256(), hashlib.sha256()
    size = done = 0

    def hashed() -> Iterator[bytes | bytearray | memoryview]:
        nonlocal done
        for piece in layer_tar(index, content):
            tar_hash.update(piece)
            done += len(piece)
            if progress is not None:
                progress(label, done, 0)
            yield piece

    annotations = {COMPRESSOR_KEY: packing.compressor} if packing.compressor else {}

    def packed() -> Iterator[bytes]:
        if not packing.chunked:
            yield from compress(hashed(), packing.compression, packing.level, jobs=packing.jobs)
            return
        writer = ZstdChunked(index, packing.level or ZSTD_LEVEL, jobs=packing.jobs or all_cores())
        yield from writer.blob(seen(layer_parts(index, content)))
        annotations.update(writer.annotations)

    def seen(parts: Iterator[Part]) -> Iterator[Part]:
        nonlocal done
        for part in parts:
            tar_hash.update(part.data)
            done += len(part.data)
            if progress is not None and part.is_content:
                progress(label, done, 0)
            yield part

    with tempfile.TemporaryFile(dir=tmp, prefix="layerkit-") as spool:
        for out in packed():
            blob_hash.update(out)
            size += spool.write(out)
        spool.flush()
        descriptor = Descriptor(
            media_type or packing.media_type,
            Digest("sha256", blob_hash.hexdigest()),
            size,
            annotations=annotations,
        )
        diff_id = Digest("sha256", tar_hash.hexdigest())
        if check is not None:
            check(index_layer(_FileReader(spool), descriptor, diff_id, limits=limits))
        if not sink.has_blob(descriptor.digest):
            sink.put_blob(descriptor, Chunks(lambda: _file_chunks(spool)))
    return descriptor, diff_id


class _FileReader:
    """The blob in the temporary file, from its start."""

    def __init__(self, file: BinaryIO) -> None:
        self._fd, self._at = file.fileno(), 0

    def readinto(self, buffer: memoryview, /) -> int:
        got = os.preadv(self._fd, [buffer], self._at)
        self._at += got
        return got

    def close(self) -> None:
        """Do nothing: the file belongs to the caller."""


def _file_chunks(file: BinaryIO) -> Iterator[memoryview]:
    reader, buffer = _FileReader(file), memoryview(bytearray(_CHUNK_BYTES))
    while got := reader.readinto(buffer):
        yield buffer[:got]


def rewrite_image(
    image: Image,
    layers: Sequence[Layer | NewLayer],
    *,
    created: str | None = None,
    drop_history: bool = False,
    limits: Limits = DEFAULT,
) -> Image:
    """Return ``image`` with other layers: a new config and manifest, everything else in them untouched.

    Args:
        image: where config, annotations and history come from.
        layers: of the result, bottom first: layers of ``image`` that stay, in their order, and new ones.
        created: RFC 3339 time of the result; None keeps that of ``image``, so nothing depends on the clock.
        drop_history: leave out the history of layers that are gone, instead of keeping it as steps that
            made no layer.
        limits: bounds.
    """
    return rewrite(image, layers, created=created, drop_history=drop_history, limits=limits)


def put_image(
    source: ImageSource, sink: ImageSink, image: Image, name: str = "", *, progress: Progress | None = None
) -> None:
    """Put a rewritten ``image``; blobs of its new layers are in ``sink`` already, kept ones are copied.

    See :func:`copy_image` for the arguments.
    """
    copy_image(source, sink, image, name, progress=progress)


__all__ = [
    "COMPRESSOR_KEY", "Chunks", "NewLayer", "Packing", "blob_chunks", "copy_image", "put_blobs",
    "put_image", "rewrite_image", "write_layer",
]  # fmt: skip


def check_tree(want: Digest, got: Tree) -> None:
    """Raise unless ``got`` is the root filesystem whose digest is ``want``.

    Raises:
        InvalidImage: it is another one.
    """
    found = got.digest()
    if found != want:
        raise InvalidImage(
            f"the root filesystem of the result is {found} and that of the source {want}, so nothing was written; "
            "please report this with the image"
        )


def creation_time(text: str | None, epoch: str | None) -> str | None:
    """Return the RFC 3339 time for ``--created``, else that of ``SOURCE_DATE_EPOCH``, else None.

    Raises:
        UsageError: neither seconds since 1970 nor an RFC 3339 time.
    """
    import datetime

    source = "--created" if text is not None else "SOURCE_DATE_EPOCH"
    value = text if text is not None else epoch
    if not value:
        return None
    try:
        if value.isascii() and value.isdigit():
            moment = datetime.datetime.fromtimestamp(int(value), datetime.UTC)
        else:
            moment = datetime.datetime.fromisoformat(value)
            if moment.tzinfo is None:
                raise ValueError("no time zone")
    except (ValueError, OverflowError, OSError) as error:
        raise UsageError(
            f"{source} {json.dumps(value)}: want seconds since 1970 or a time like 2026-01-31T12:00:00Z ({error})"
        ) from None
    return moment.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def packing(compression: str = "gzip", level: int | None = None, jobs: int | None = None) -> Packing:
    """Return how new layers are compressed.

    Args:
        compression: ``gzip``, ``zstd``, ``zstd:chunked`` or ``none``.
        level: gzip 1 to 9, zstd 1 to 22; None is the default.
        jobs: threads that compress; None is one for each core.

    Raises:
        UsageError: another compression, or a level that it does not have.
    """
    from layerkit.formats.compression.compress import LEVELS
    from layerkit.formats.compression.decompress import Compression
    from layerkit.pack import Packing

    kinds = {
        "gzip": Compression.GZIP, "zstd": Compression.ZSTD, "zstd:chunked": Compression.ZSTD,
        "none": Compression.NONE,
    }  # fmt: skip
    if compression not in kinds:
        raise UsageError(f"--compression {compression!r}: want gzip, zstd, zstd:chunked or none")
    allowed = LEVELS[kinds[compression]]
    if level is not None and level not in allowed:
        want = f"want {allowed[0]} to {allowed[-1]}" if allowed else "it has no levels"
        raise UsageError(f"--compression-level {level} for {compression}: {want}")
    return Packing(kinds[compression], level, jobs, chunked=compression == "zstd:chunked")
