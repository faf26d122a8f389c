"""Use case: a layer blob, read once, to its index; and, if asked, its raw tar to a sink.

One pass does it all, spread over three threads so that two processors are busy: a reader (fetch and
decompress), a hasher (the digests of blob and tar, and the copy of the tar), and the caller's own thread
(headers, and the sha256 of each file). They share a ring of buffers; memory does not depend on the layer's
size. To decompress takes the longest, so the reader does nothing else, and may begin with the next layer
while the others are still at the end of this one (:class:`LayerReading`).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, BinaryIO

from layerkit.formats.compression.decompress import Compression, Decompressor
from layerkit.formats.index.check import UNPROVEN, is_unproven
from layerkit.formats.tar.reader import Chunk, TarReader
from layerkit.formats.tar.writer import Content, stored_bytes
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import DigestMismatch, InvalidImage, LimitExceeded, NotFound, UnsafeEntry
from layerkit.model.image import Layer
from layerkit.model.index import Index
from layerkit.model.limits import DEFAULT, Limits
from layerkit.model.ports import BlobReader, DataSink, Progress
from layerkit.model.work import NOBODY, Kept, Others, Work

if TYPE_CHECKING:
    from hashlib import _Hash

SLOTS, SLOTS_WITH_DATA = 6, 4
"""Of a ring: fewer where data is kept, as the next layer's ring is then filled while this one's is still in use."""
SLOT_BYTES = 1 << 21
PIECES = 2
"""Of the blob, at most 2 MiB each, that may wait to be hashed."""

_STOP = -1
_CHUNK_BYTES = 1 << 20
_SHA256_OF_NOTHING = Digest.of(b"")


def index_layer(
    reader: BlobReader,
    descriptor: Descriptor,
    diff_id: Digest | None,
    *,
    limits: Limits = DEFAULT,
    progress: Progress | None = None,
) -> Index:
    """Read a layer blob to its end and return its index; blob digest, size and ``diff_id`` are verified.

    Args:
        reader: the blob's bytes. It is read in another thread, and not closed.
        descriptor: the digest and size that the blob must have.
        diff_id: the digest that the uncompressed tar must have; None computes its sha256.
        limits: bounds on everything in the layer.
        progress: called in this thread with the compressed bytes read; what it raises ends the work.

    Raises:
        DigestMismatch: the blob's digest or size, or the tar's digest, is another one.
        InvalidImage: malformed, unsafe (:class:`UnsafeEntry`) or beyond ``limits`` (:class:`LimitExceeded`).
        LossyResult: an ACL that cannot be expressed.
    """
    return LayerReading(reader, descriptor, diff_id, limits=limits).finish(progress)


class VerifiedBlob:
    """A blob's reader that hashes what passes, and ends at what the descriptor promises."""

    def __init__(self, reader: BlobReader, descriptor: Descriptor, limits: Limits) -> None:
        self._reader, self._descriptor = reader, descriptor
        self._hash: _Hash = descriptor.digest.hasher()
        self._hand_over: Callable[[bytes], None] | None = None
        self.count = 0
        limits.check("layer_blob_bytes", descriptor.size, f"layer {descriptor.digest}: bytes of the blob")

    def readinto(self, buffer: memoryview, /) -> int:
        """Read on, hash, and refuse what goes beyond the promised size."""
        n = self._reader.readinto(buffer)
        self.count += n
        if self.count > self._descriptor.size:
            raise self._wrong_size(f"at least {self.count}")
        if self._hand_over is None:
            self._hash.update(buffer[:n])
        elif n:
            self._hand_over(bytes(buffer[:n]))
        return n

    def hash_elsewhere(self, hand_over: Callable[[bytes], None] | None) -> None:
        """Give copies of what is read to ``hand_over`` from now on, for :meth:`hash`; None: hash here again."""
        self._hand_over = hand_over

    def hash(self, piece: bytes) -> None:
        """Hash the next piece that was handed over, in any one thread."""
        self._hash.update(piece)

    def read_rest(self) -> None:
        """Read what is left and verify the size."""
        rest = memoryview(bytearray(1 << 16))
        while self.readinto(rest):
            pass
        if self.count != self._descriptor.size:
            raise self._wrong_size(str(self.count))

    def finish(self) -> None:
        """Read what is left and verify size and digest."""
        self.read_rest()
        want = self._descriptor.digest
        if self._hash.hexdigest() != want.hex:
            raise DigestMismatch(f"layer {want}", f"{want.algorithm}:{self._hash.hexdigest()}", str(want))

    def _wrong_size(self, got: str) -> DigestMismatch:
        return DigestMismatch(f"layer {self._descriptor.digest}", f"{got} bytes", f"{self._descriptor.size} bytes")


class LayerReading:
    """One layer being read. A slot goes reader -> (hasher and caller) -> reader; tokens in queues say whose it is.

    Attributes:
        read: set when the blob was read and decompressed to its end, or never will be. The reader's thread has
            nothing to do from then on, and another reading may well start.
    """

    def __init__(
        self,
        reader: BlobReader,
        descriptor: Descriptor,
        diff_id: Digest | None,
        *,
        limits: Limits = DEFAULT,
        data: DataSink | None = None,
    ) -> None:
        """Prepare; for the other arguments see :func:`index_layer`.

        ``data`` takes the uncompressed tar, from another thread; what it got is good if :meth:`finish` returns.
        """
        self._descriptor, self._diff_id, self._limits = descriptor, diff_id, limits
        self._data = data
        self._label = f"layer {descriptor.digest}"
        self._blob = VerifiedBlob(reader, descriptor, limits)
        self._tar_hash = (diff_id or _SHA256_OF_NOTHING).hasher()
        self._same_bytes = False  # blob and tar are the same bytes: one hash is enough
        self._slots = SLOTS if data is None else SLOTS_WITH_DATA
        self._ring: list[mmap.mmap] = []  # whole pages, as direct writes want them
        self._stopped = threading.Event()
        self._started: list[threading.Thread] = []
        self.read = threading.Event()
        self._read_error: BaseException | None = None
        self._hash_error: BaseException | None = None
        # Lengths of filled slots, in ring order, and tokens for slots that each consumer is done with; for the
        # hasher also pieces of the blob, of which it takes every one, whatever happens.
        self._pieces = threading.Semaphore(PIECES)
        self._to_hash: SimpleQueue[int | bytes] = SimpleQueue()
        self._to_walk: SimpleQueue[int] = SimpleQueue()
        self._hashed: SimpleQueue[int] = SimpleQueue()
        self._walked: SimpleQueue[int] = SimpleQueue()

    def start(self) -> None:
        """Begin to read, in two threads, until the ring is full. End it with :meth:`finish` or :meth:`abort`."""
        for name, target in (("read", self._read), ("hash", self._hash)):
            thread = threading.Thread(target=target, name=f"layerkit-{name}", daemon=True)
            thread.start()
            self._started.append(thread)

    def abort(self) -> None:
        """Make both threads end soon, and wait for them; harmless at any time."""
        self._stopped.set()
        self._walked.put(_STOP)  # a token each, in case they wait for one
        self._hashed.put(_STOP)
        self._join()

    def _join(self) -> None:
        for thread in self._started:
            thread.join()
        self.read.set()
        self._ring.clear()

    def finish(self, progress: Progress | None = None) -> Index:
        """Walk over the tar, in this thread, while the others read; return the index, all digests verified."""
        tar = TarReader(str(self._descriptor.digest), self._limits)
        error: BaseException | None = None
        try:
            if not self._started:
                self.start()
            tar.read(self._chunks(progress))
            self._join()
        except BaseException as e:
            error = e
            self.abort()
        # What is read from here on comes after all that was handed over.
        self._blob.hash_elsewhere(None)
        self._raise_first(error)
        self._blob.finish()
        return tar.index(self._verified_diff_id())

    def _raise_first(self, error: BaseException | None) -> None:
        """Raise the one error that explains the others, if there is any."""
        first = self._hash_error or (error if error is not None and not isinstance(error, _Interrupted) else None)
        first = first or self._read_error
        if first is None:
            return
        # A damaged blob shows up as bad gzip or bad tar; that the bytes are not the promised ones says more.
        # What a sound but hostile layer holds is no such case, and is not downloaded to its end.
        if isinstance(first, InvalidImage) and not isinstance(first, (UnsafeEntry, LimitExceeded, DigestMismatch)):
            try:
                self._blob.finish()
            except DigestMismatch as e:
                raise e from first
        raise first

    def _verified_diff_id(self) -> Digest:
        want = self._diff_id
        algorithm = (want or _SHA256_OF_NOTHING).algorithm
        got = self._descriptor.digest if self._same_bytes else Digest(algorithm, self._tar_hash.hexdigest())
        if want is not None and got != want:
            raise DigestMismatch(f"uncompressed {self._label} (diff_id)", str(got), str(want))
        return got

    # --- the reader's thread -----------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            source = Decompressor(self._blob, limits=self._limits, where=self._label)
            if source.compression is Compression.GZIP:  # zstd has time to hash, and its pieces are large
                self._blob.hash_elsewhere(self._hand_over)
            elif source.compression is Compression.NONE:
                self._same_bytes = self._tar_hash.name == self._descriptor.digest.algorithm
            slot = 0
            while not self._stopped.is_set():
                if slot < self._slots:
                    self._ring.append(_slot())
                else:
                    self._hashed.get()
                    self._walked.get()
                if self._stopped.is_set():
                    break
                n = source.readinto(memoryview(self._ring[slot % self._slots]))
                if not n:
                    self._blob.read_rest()
                    break
                self._to_hash.put(n)
                self._to_walk.put(n)
                slot += 1
        except BaseException as e:
            self._read_error = e
        finally:
            self._to_hash.put(_STOP)
            self._to_walk.put(_STOP)
            self.read.set()

    def _hand_over(self, piece: bytes) -> None:
        self._pieces.acquire()
        self._to_hash.put(piece)

    # --- the hasher's thread -----------------------------------------------------------------------------

    def _hash(self) -> None:
        slot = 0
        while (item := self._to_hash.get()) != _STOP:
            if isinstance(item, bytes):
                self._blob.hash(item)
                self._pieces.release()
                continue
            if self._hash_error is None and not self._stopped.is_set():
                try:
                    view = memoryview(self._ring[slot % self._slots])[:item]
                    if not self._same_bytes:
                        self._tar_hash.update(view)
                    if self._data is not None:
                        _write_all(self._data, view)
                except BaseException as e:
                    self._hash_error = e
            slot += 1
            self._hashed.put(item)

    # --- the caller's thread -----------------------------------------------------------------------------

    def _chunks(self, progress: Progress | None) -> Iterator[Chunk]:
        slot = 0
        while (n := self._to_walk.get()) != _STOP:
            if self._hash_error is not None:
                raise _Interrupted
            if progress is not None:
                progress(self._label, self._blob.count, self._descriptor.size)
            yield self._ring[slot % self._slots], n
            slot += 1
            self._walked.put(n)
        if self._read_error is not None or self._hash_error is not None:
            raise _Interrupted


def _slot() -> mmap.mmap:
    """Return memory of a slot: in one large page where it can be had, which is cheaper to get and to write from."""
    slot = mmap.mmap(-1, SLOT_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        slot.madvise(mmap.MADV_HUGEPAGE)
    return slot


class _Interrupted(Exception):
    """Another thread failed; its error is the one to raise."""


def _write_all(sink: DataSink, view: memoryview) -> None:
    while view:
        n = sink.write(view)
        if n <= 0:
            raise OSError("the sink of the layer's data takes no more bytes")
        view = view[n:]


@dataclass(frozen=True, slots=True)
class Found:
    """The indexes of an image and where they came from.

    Attributes:
        indexes: bottom first; those that nothing has proven carry a warning that says so.
        origins: for each, ``store``, ``layer`` (it was read), or what others say: ``cache``, ``artifact``, ``toc``,
            ``shared``.
        notes: why a better way was not gone, as text.
    """

    indexes: tuple[Index, ...]
    origins: tuple[str, ...]
    notes: tuple[str, ...]

    def warnings(self, others: Sequence[str]) -> tuple[str, ...]:
        """Return the warnings for a report: ``others`` with one in place of many about unproven layers."""
        doubtful = sum(is_unproven(index) for index in self.indexes)
        kept = tuple(text for text in others if not text.startswith(UNPROVEN))
        if not doubtful:
            return kept
        said = (
            f"{UNPROVEN}{doubtful} of {len(self.indexes)} layers are known only from what is "
            "published of them; `layerkit verify` reads the layers and proves it"
        )
        return (said, *self.notes, *kept)

    @property
    def layers_read(self) -> int:
        """Return how many layer blobs were read whole."""
        return _count_read(self.indexes, self.origins)


def _count_read(indexes: Sequence[Index], origins: Sequence[str]) -> int:
    return len({index.diff_id for index, origin in zip(indexes, origins, strict=True) if origin == "layer"})


def find_indexes(work: Work, others: Others = NOBODY, *, layers: bool = True) -> Found:
    """Return the index of every layer of the image with as few bytes read as can be.

    Args:
        work: the image, and what is kept of it.
        others: asked for what is not kept; only layers that they have not either are read.
        layers: read layers where there is nothing else; if not, that is an error.

    Raises:
        NotFound: not ``layers``, and a layer that nothing is published of.
        InvalidImage: a layer is malformed, unsafe, or not what its digests promise.
    """

    def find(layer: Layer, known: Mapping[Digest, Index], step: Progress | None) -> tuple[Index, str]:
        if (kept := work.kept.load_index(layer.diff_id)) is not None:
            return kept, "store"
        if (got := others.index(layer, known)) is not None:
            return got
        if not layers:
            raise NotFound(f"{work.image.name}: there is no published index of layer {layer.descriptor.digest}")
        return read_in_turn(layer, work.source.open_blob, others, work.limits, step)

    indexes, origins = _each_layer(work, find)
    return Found(indexes, origins, tuple(others.notes))


def _each_layer(
    work: Work, find: Callable[[Layer, Mapping[Digest, Index], Progress | None], tuple[Index, str]]
) -> tuple[tuple[Index, ...], tuple[str, ...]]:
    """Return index and origin of each layer, bottom first, as ``find`` gives them; it is told of those below."""
    image, indexes, origins = work.image, dict[Digest, Index](), dict[Digest, str]()
    work.limits.check("layers_per_image", len(image.layers), image.name or "image")
    for place, layer in enumerate(image.layers):
        if layer.diff_id not in indexes:
            step = labelled(work.progress, place, len(image.layers))
            indexes[layer.diff_id], origins[layer.diff_id] = find(layer, indexes, step)
    return tuple(indexes[d] for d in image.diff_ids), tuple(origins[d] for d in image.diff_ids)


def read_in_turn(
    layer: Layer,
    open_blob: Callable[[Descriptor], BlobReader],
    others: Others,
    limits: Limits,
    progress: Progress | None = None,
) -> tuple[Index, str]:
    """Return the index of a layer and where it came from: the layer is read, unless others do so just now.

    Args:
        layer: which.
        open_blob: opens its blob.
        others: whose turn is waited for, and who get the index.
        limits: bounds on the layer.
        progress: told of the bytes read.

    Raises:
        InvalidImage: the layer is malformed, unsafe, or not what its digests promise.
    """
    with others.turn(layer) as got:
        if got is not None:
            return got
        with contextlib.closing(open_blob(layer.descriptor)) as reader:
            index = index_layer(reader, layer.descriptor, layer.diff_id, limits=limits, progress=progress)
        others.take(index)
        return index, "layer"


def labelled(progress: Progress | None, place: int, count: int) -> Progress | None:
    """Return ``progress`` with each step called ``layer PLACE/COUNT``."""
    if progress is None:
        return None
    return lambda _what, done, total: progress(f"layer {place + 1}/{count}", done, total)


class Contents:
    """Indexes and content of an image's layers; close it, or use it in ``with``.

    Where a layer's raw tar is not kept, it is written to a nameless temporary file while the blob is read, so
    each blob is read once and nothing is left behind, not even by a kill.

    Attributes:
        indexes: of all layers, bottom first.
        read: how many blobs were read.
    """

    def __init__(self, work: Work, need: Collection[int] | None = None) -> None:
        """Read the layers of the image.

        Args:
            work: the image, and what is kept of it.
            need: places of the layers whose content will be asked for; None is all.

        Raises:
            InvalidImage: a layer is malformed, unsafe, or not what its digests promise.
        """
        self._work, self._tars = work, dict[Digest, BinaryIO]()
        wanted = {layer.diff_id for at, layer in enumerate(work.image.layers) if need is None or at in need}
        with contextlib.ExitStack() as stack:

            def find(layer: Layer, _: object, step: Progress | None) -> tuple[Index, str]:
                diff_id, tar, read = layer.diff_id, None, "store"
                index = work.kept.load_index(diff_id)
                if index is not None and diff_id in wanted and (tar := work.kept.open_tar(diff_id)) is not None:
                    stack.callback(tar.close)
                if index is None or (tar is None and diff_id in wanted):
                    if diff_id in wanted:
                        tar = stack.enter_context(tempfile.TemporaryFile(prefix="layerkit-", buffering=0))
                    with contextlib.closing(work.source.open_blob(layer.descriptor)) as reader:
                        reading = LayerReading(reader, layer.descriptor, diff_id, limits=work.limits, data=tar)
                        index, read = reading.finish(step), "layer"
                if tar is not None:
                    self._tars[diff_id] = tar
                return index, read

            self.indexes, origins = _each_layer(work, find)
            self._stack = stack.pop_all()
        self.read = _count_read(self.indexes, origins)

    def more(self, need: Collection[int]) -> Contents:
        """Return the content of the layers at ``need``, each read again where it is not kept; to be closed too."""
        return Contents(replace(self._work, kept=Indexed(self.indexes, self._work.kept)), need)

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

    def __exit__(self, *_: object) -> None:
        self.close()


class Indexed(Kept):
    """What is kept, and indexes that were read just now."""

    def __init__(self, indexes: Collection[Index], kept: Kept) -> None:
        self._indexes = {index.diff_id: index for index in indexes}
        self._kept = kept

    def load_index(self, diff_id: Digest) -> Index | None:
        """See the port."""
        return self._indexes.get(diff_id)

    def open_tar(self, diff_id: Digest) -> BinaryIO | None:
        """See the port."""
        return self._kept.open_tar(diff_id)
