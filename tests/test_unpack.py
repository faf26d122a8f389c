"""The pipeline from a blob to its index: verification, ends, errors from each side, threads and memory."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from in_memory import Blob, described
from programs import wait_for
from tar_blocks import END, folder, header, member, packed, pax

from layerkit import unpack
from layerkit.formats.tar.reader import read_tar
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import Cancelled, DigestMismatch, InvalidImage, LimitExceeded, UnsafeEntry
from layerkit.model.limits import Limits
from layerkit.unpack import SLOT_BYTES, SLOTS, LayerReading, index_layer

pytestmark = pytest.mark.usefixtures("no_thread_is_left")

FORMS = ["none", "gzip", "zstd"]


@pytest.fixture(scope="module")
def tar() -> bytes:
    """Return a layer larger than the ring, with files across, at and beyond the ends of chunks."""
    rng = os.urandom(1 << 16)
    parts = [folder(b"d")]
    sizes = [0, 1, 511, 512, 513, SLOT_BYTES - 512, SLOT_BYTES, SLOT_BYTES + 1, 3 * SLOT_BYTES - 512, 5 << 20, 7]
    for i, size in enumerate(sizes):
        parts.append(pax((b"mtime", b"%d.5" % i)) + member(b"d/%02d" % i, (rng * (size // len(rng) + 1))[:size]))
    return b"".join(parts) + END


class Sink:
    def __init__(self, most: int = 1 << 30, fail_after: int = 1 << 60) -> None:
        self.data, self.most, self.fail_after = bytearray(), most, fail_after

    def write(self, chunk: memoryview, /) -> int:
        if len(self.data) > self.fail_after:
            raise OSError(28, "No space left on device")
        part = chunk[: self.most]
        self.data += part
        return len(part)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("step", [1 << 20, 5000])
def test_index_data_and_digests(tar: bytes, form: str, step: int) -> None:
    blob = packed(tar, form)
    sink, seen = Sink(most=300_000), []
    reading = LayerReading(Blob(blob, step), described(blob), Digest.of(tar), data=sink)
    index = reading.finish(lambda *step: seen.append(step))
    assert list(index.entries()) == list(read_tar(tar).entries())
    assert (index.diff_id, index.tar_size) == (Digest.of(tar), len(tar))
    assert sink.data == tar
    assert {(what, total) for what, _, total in seen} == {(f"layer {described(blob).digest}", len(blob))}
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


@pytest.mark.parametrize("form", FORMS)
def test_without_a_diff_id_it_is_computed(tar: bytes, form: str) -> None:
    blob = packed(tar, form)
    assert index_layer(Blob(blob), described(blob), None).diff_id == Digest.of(tar)


@pytest.mark.parametrize("form", FORMS)
def test_sha512(tar: bytes, form: str) -> None:
    blob = packed(tar, form)
    diff_id = Digest("sha512", hashlib.sha512(tar).hexdigest())
    descriptor = Descriptor("", Digest("sha512", hashlib.sha512(blob).hexdigest()), len(blob))
    assert index_layer(Blob(blob), descriptor, diff_id).diff_id == diff_id
    assert index_layer(Blob(blob), described(blob), diff_id).diff_id == diff_id
    assert index_layer(Blob(blob), descriptor, None).diff_id == Digest.of(tar)


@pytest.mark.parametrize("form", FORMS)
def test_wrong_diff_id(tar: bytes, form: str) -> None:
    blob = packed(tar, form)
    with pytest.raises(DigestMismatch, match="diff_id"):
        index_layer(Blob(blob), described(blob), Digest.of(b"other"))


@pytest.mark.parametrize("form", FORMS)
def test_wrong_blob_digest_and_size(tar: bytes, form: str) -> None:
    blob = packed(tar, form)
    right = described(blob)
    with pytest.raises(DigestMismatch, match="got sha256"):
        index_layer(Blob(blob), Descriptor("", Digest.of(b""), len(blob)), None)
    for size in (len(blob) - 1, len(blob) + 1, 0):
        with pytest.raises(DigestMismatch, match="bytes"):
            index_layer(Blob(blob), Descriptor("", right.digest, size), None)


@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_blob_is_called_that_and_not_a_bad_tar(tar: bytes, form: str) -> None:
    blob = packed(tar, form)
    for at in (3, 600, len(blob) // 2, len(blob) - 3):
        damaged = bytearray(blob)
        damaged[at] ^= 0x55
        with pytest.raises(DigestMismatch):
            index_layer(Blob(bytes(damaged)), described(blob), None)
    with pytest.raises(DigestMismatch):
        index_layer(Blob(blob[:-700]), described(blob), None)


def test_bytes_after_the_marker_count_for_the_digest_only(tar: bytes) -> None:
    longer = tar + os.urandom(3 * SLOT_BYTES + 100)
    blob = packed(longer, "gzip")
    sink = Sink()
    index = LayerReading(Blob(blob), described(blob), Digest.of(longer), data=sink).finish()
    assert index.tar_size == len(longer)
    assert sink.data == longer


class Failing(Blob):
    """A reader that fails once it gave out ``after`` bytes."""

    def __init__(self, data: bytes, after: int, error: BaseException) -> None:
        super().__init__(data, 1 << 16)
        self._left, self._error = after, error

    def readinto(self, buffer: memoryview, /) -> int:
        if self._left <= 0:
            raise self._error
        n = super().readinto(buffer)
        self._left -= n
        return n


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("after", [0, 100_000])
def test_the_readers_error_comes_out_once(tar: bytes, form: str, after: int) -> None:
    blob = packed(tar, form)
    error = OSError("connection reset")
    with pytest.raises(OSError, match="reset") as e:
        index_layer(Failing(blob, after, error), described(blob), None)
    assert e.value is error


@pytest.mark.parametrize("form", FORMS)
def test_the_sinks_error_comes_out_once(tar: bytes, form: str) -> None:
    blob = packed(tar, form)
    for after in (0, 2 << 20):
        with pytest.raises(OSError, match="No space"):
            LayerReading(Blob(blob), described(blob), None, data=Sink(fail_after=after - 1)).finish()


def test_a_sink_that_takes_nothing_is_an_error(tar: bytes) -> None:
    with pytest.raises(OSError, match="no more bytes"):
        LayerReading(Blob(tar), described(tar), None, data=Sink(most=0)).finish()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("at", [0, 1, 5])
def test_progress_may_cancel(tar: bytes, form: str, at: int) -> None:
    blob, calls = packed(tar, form), []

    def progress(*_step: object) -> None:
        calls.append(1)
        if len(calls) > at:
            raise Cancelled("stop")

    with pytest.raises(Cancelled, match="stop"):
        index_layer(Blob(blob), described(blob), None, progress=progress)
    assert len(calls) == at + 1


@pytest.mark.parametrize("form", FORMS)
def test_an_unsafe_entry_ends_the_work_at_once(form: str) -> None:
    tar = member(b"../x") + b"".join(member(b"f%d" % i, os.urandom(1 << 20)) for i in range(40)) + END
    blob = packed(tar, form)
    reader = Blob(blob)
    with pytest.raises(UnsafeEntry, match="climbs"):
        index_layer(reader, described(blob), Digest.of(tar))
    # Names are decoded in batches, so at the end at the latest; but the error is the entry's.


def test_an_unknown_type_does_not_wait_for_the_rest() -> None:
    tar = header(b"s", b"s") + b"".join(member(b"f%d" % i, bytes(1 << 20)) for i in range(40)) + END
    reader = Blob(tar)
    with pytest.raises(UnsafeEntry, match="type"):
        index_layer(reader, described(tar), None)
    assert reader.given <= (SLOTS + 2) * SLOT_BYTES


def test_a_blob_above_the_limit_is_not_even_read(tar: bytes) -> None:
    reader = Blob(tar)
    with pytest.raises(LimitExceeded):
        index_layer(reader, described(tar), None, limits=Limits(layer_blob_bytes=100))
    assert reader.given == 0


def test_a_slow_side_stops_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring is full at some time: nobody runs ahead without bound."""
    monkeypatch.setattr(unpack, "SLOT_BYTES", 4096)
    tar = b"".join(member(b"%d" % i, bytes(9000)) for i in range(60)) + END
    reader, ahead = Blob(tar), []

    class Slow(Sink):
        def write(self, chunk: memoryview, /) -> int:
            time.sleep(0.002)
            ahead.append(reader.given - len(self.data))
            return super().write(chunk)

    sink = Slow()
    index = LayerReading(reader, described(tar), Digest.of(tar), data=sink).finish()
    assert sink.data == tar and len(index) == 60
    assert max(ahead) <= (SLOTS + 2) * 4096


def test_threads_that_wait_for_room_are_woken_to_end(tar: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring is full when the caller gives up, so the reader waits for a slot that nobody will free."""
    monkeypatch.setattr(unpack, "SLOT_BYTES", 4096)
    reader = Blob(tar)

    def progress(*_step: object) -> None:
        wait_for(lambda: reader.given >= SLOTS * 4096, "the ring gets full")
        assert reader.given < len(tar)
        raise Cancelled("stop")

    with pytest.raises(Cancelled):
        index_layer(reader, described(tar), None, progress=progress)


@pytest.mark.parametrize("size", [0, 1, 10_000])
def test_a_blob_that_does_not_end_is_left_at_its_promised_size(size: int) -> None:
    class Endless:
        given = 0

        def readinto(self, buffer: memoryview, /) -> int:
            self.given += len(buffer)
            return len(buffer)

        def close(self) -> None: ...

    reader = Endless()
    with pytest.raises(DigestMismatch, match="at least"):
        index_layer(reader, Descriptor("", Digest.of(b""), size), None)
    assert reader.given <= size + SLOT_BYTES


def test_an_empty_blob() -> None:
    index = index_layer(Blob(b""), described(b""), Digest.of(b""))
    assert len(index) == 0 and index.tar_size == 0


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """A child reads 512 MiB of file data within 80 MiB above what it needs for 16 MiB."""
    code = """
import sys, resource, hashlib, io
sys.path[:0] = sys.argv[2:]
from tar_blocks import header
from layerkit.unpack import index_layer
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
mib = int(sys.argv[1])
class Reader:
    def __init__(self):
        self.at, self.head, self.size = 0, header(b"f", size=mib << 20), 512 + (mib << 20) + 1024
        self.zeros = bytes(1 << 20)
    def readinto(self, buffer):
        part = self.head[self.at :] or self.zeros
        n = min(len(buffer), self.size - self.at, len(part))
        buffer[:n] = part[:n]
        self.at += n
        return n
h, r, b = hashlib.sha256(), Reader(), memoryview(bytearray(1 << 20))
while n := r.readinto(b):
    h.update(b[:n])
index = index_layer(Reader(), Descriptor("", Digest("sha256", h.hexdigest()), r.size), None)
assert index.size[0] == mib << 20
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = [
        int(subprocess.run(
            [sys.executable, "-c", code, str(mib), *sys.path], check=True, stdout=subprocess.PIPE, text=True
        ).stdout)
        for mib in (16, 512)
    ]  # fmt: skip
    assert peaks[1] - peaks[0] < 20 << 10, peaks


def test_damage_in_the_tar_under_right_digests_is_said_as_such() -> None:
    tar = bytearray(member(b"a", b"x") + member(b"b", b"y") + END)
    tar[1024 + 124 : 1024 + 135] = b"77777777777"  # a size that sends the walk astray
    with pytest.raises(InvalidImage, match="checksum"):
        index_layer(Blob(bytes(tar)), described(bytes(tar)), None)
