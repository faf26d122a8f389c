"""zstd:chunked: a plain zstd layer to every reader, whose table of contents leads to each file's bytes."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
import zstandard
from in_memory import MemorySink

from layerkit.formats.compression.decompress import Compression
from layerkit.formats.compression.zstd_chunked import CHECKSUM_KEY, CHUNK_BYTES, POSITION_KEY
from layerkit.formats.index import toc
from layerkit.formats.tar.writer import layer_tar
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import LossyResult
from layerkit.model.index import Index
from layerkit.pack import Packing, Writing, write_layer

BIG = bytes(range(256)) * (CHUNK_BYTES // 128) + b"the end"
RUNS = ((4096, 5), (1 << 20, CHUNK_BYTES + 3), (CHUNK_BYTES * 2, 1))
SPARSE_SIZE = CHUNK_BYTES * 2 + 5000


def sparse_content() -> bytes:
    whole = bytearray(SPARSE_SIZE)
    for offset, length in RUNS:
        whole[offset : offset + length] = (b"run%d " % offset * length)[:length]
    return bytes(whole)


def files() -> dict[bytes, bytes]:
    return {
        b"a": b"small",
        b"d/big": BIG,
        b"d/empty": b"",
        b"s": sparse_content(),
        b"z": b"last",
        b"h": bytes(9999),
    }


def regular(path: bytes, **more: Any) -> Entry:
    content = files()[path]
    digest = hashlib.sha256(content).digest()
    return Entry(path, Kind.REG, 0o644, size=len(content), sha256=digest, offset=512, **more)


def index() -> Index:
    return Index.of(
        [
            Entry(b"", Kind.DIR, 0o755), Entry(b"d", Kind.DIR, 0o750, 7, 8, 1_700_000_000, 250_000_000),
            regular(b"a", xattrs=((b"user.k", b"\xff\0v"),), mtime=-1), regular(b"d/big"), regular(b"d/empty"),
            regular(b"s", sparse=RUNS), regular(b"h", sparse=()), regular(b"z"),
            Entry(b"link", Kind.SYMLINK, 0o777, link=b"d/big"), Entry(b"\xc3\xa9", Kind.HARDLINK, 0o644, link=b"a"),
            Entry(b"null", Kind.CHAR, 0o666, major=1, minor=3), Entry(b"gone", Kind.WHITEOUT, 0),
            Entry(b"d", Kind.OPAQUE, 0),
        ],
        Digest.of(b""),
    )  # fmt: skip


def content(of: Index) -> Any:
    def read(row: int) -> Iterator[memoryview]:
        entry = of.entry(row)
        whole = files()[entry.path]
        for offset, length in entry.sparse if entry.sparse is not None else ((0, len(whole)),):
            for at in range(offset, offset + length, 1_000_000):
                yield memoryview(whole)[at : min(at + 1_000_000, offset + length)]

    return read


def written(of: Index, jobs: int = 2, level: int | None = None) -> tuple[Descriptor, Digest, bytes, list[Index]]:
    sink, seen = MemorySink(), list[Index]()
    packing = Packing(Compression.ZSTD, level, jobs, chunked=True)
    descriptor, diff_id = write_layer(of, content(of), sink, Writing(packing), seen.append)
    return descriptor, diff_id, sink.blobs[descriptor.digest], seen


def unpacked(frames: bytes) -> bytes:
    return zstandard.ZstdDecompressor().stream_reader(frames, read_across_frames=True).read()


def table(descriptor: Descriptor, blob: bytes) -> list[dict[str, Any]]:
    """Return the entries of the table that the annotations lead to; the footer says the same."""
    offset, length, plain_length, kind = map(int, descriptor.annotations[POSITION_KEY].split(":"))
    assert kind == 1
    footer = blob[-64:]
    assert blob[-72:-64] == b"\x50\x2a\x4d\x18" + (64).to_bytes(4, "little")
    assert [int.from_bytes(footer[at : at + 8], "little") for at in range(0, 56, 8)] == [
        offset, length, plain_length, 1, 0, 0, 0,
    ]  # fmt: skip
    assert footer[56:] == b"GNUlInUx"
    packed = blob[offset : offset + length]
    assert blob[offset - 8 : offset] == b"\x50\x2a\x4d\x18" + length.to_bytes(4, "little")
    assert descriptor.annotations[CHECKSUM_KEY] == f"sha256:{hashlib.sha256(packed).hexdigest()}"
    plain = zstandard.ZstdDecompressor().decompress(packed)
    assert len(plain) == plain_length
    document = json.loads(plain)
    assert document.keys() == {"version", "entries"}
    assert document["version"] == 1
    entries: list[dict[str, Any]] = document["entries"]
    return entries


def test_every_file_is_where_the_table_says() -> None:
    descriptor, diff_id, blob, seen = written(index())
    assert descriptor.media_type == "application/vnd.oci.image.layer.v1.tar+zstd"
    assert Digest.of(blob) == descriptor.digest
    tar = b"".join(bytes(piece) for piece in layer_tar(index(), content(index())))
    assert Digest.of(tar) == diff_id
    assert unpacked(blob) == tar
    assert [e.path for e in seen[0].entries()] == [e.path for e in index().entries()]
    entries = table(descriptor, blob)
    shown: dict[str, bytes] = {}
    for number, entry in enumerate(entries):
        if entry["type"] == "chunk" or "digest" not in entry:
            continue
        parts = [entry]
        for more in entries[number + 1 :]:
            if more["type"] != "chunk":
                break
            assert more["name"] == entry["name"]
            parts.append(more)
        whole = b""
        for part in parts:
            assert part.get("chunkOffset", 0) == len(whole)
            if part.get("chunkType") == "zeros":
                assert part.get("offset") == part.get("endOffset")
                whole += bytes(part["chunkSize"])
                continue
            data = unpacked(blob[part["offset"] : part["endOffset"]])
            if len(parts) > 1:
                assert len(data) == part["chunkSize"] <= CHUNK_BYTES
                assert part["chunkDigest"] == f"sha256:{hashlib.sha256(data).hexdigest()}"
            whole += data
        assert entry["digest"] == f"sha256:{hashlib.sha256(whole).hexdigest()}"
        assert entry["size"] == len(whole)
        shown[entry["name"]] = whole
    assert shown == {name.decode(): data for name, data in files().items() if data}


def test_the_table_says_what_the_headers_say() -> None:
    descriptor, _, blob, _ = written(index())
    entries = {e["name"]: e for e in table(descriptor, blob) if e["type"] != "chunk"}
    assert entries["./"]["type"] == "dir"
    assert entries["d/"] == {
        "type": "dir", "name": "d/", "mode": 0o750, "uid": 7, "gid": 8, "modtime": "2023-11-14T22:13:20.25Z",
    }  # fmt: skip
    assert entries["a"]["xattrs"] == {"user.k": base64.b64encode(b"\xff\0v").decode()}
    assert entries["a"]["modtime"] == "1969-12-31T23:59:59Z"
    assert entries["link"]["linkName"] == "d/big"
    assert (entries["é"]["type"], entries["é"]["linkName"]) == ("hardlink", "a")
    assert (entries["null"]["devMajor"], entries["null"]["devMinor"]) == (1, 3)
    assert entries[".wh.gone"]["type"] == entries["d/.wh..wh..opq"]["type"] == "reg"
    assert entries["d/empty"].keys() == {"type", "name", "mode", "modtime"}


def test_our_own_reader_of_tables_takes_it() -> None:
    descriptor, diff_id, blob, _ = written(index())
    place = toc.locate(descriptor)
    assert place is not None
    found = toc.read(lambda start, length: blob[start : start + length], place, descriptor, diff_id)

    def known(entry: Entry) -> Entry:
        """Leave out what a table does not know, and what a link's own entry does not mean."""
        return entry._replace(offset=-1, sparse=None, perm=0 if entry.kind is Kind.HARDLINK else entry.perm)

    assert list(map(known, found.entries())) == list(map(known, index().entries()))


def test_threads_change_nothing() -> None:
    one, two, five = (written(index(), jobs, level=1) for jobs in (1, 2, 5))
    assert one[2] == two[2] == five[2]
    assert one[0] == two[0] == five[0]


@pytest.mark.parametrize(
    "entry",
    [Entry(b"\xff", Kind.DIR), Entry(b"a", Kind.SYMLINK, link=b"\xff"), Entry(b"a", Kind.DIR, mtime=1 << 40)],
)
def test_what_json_cannot_hold_is_an_error(entry: Entry) -> None:
    with pytest.raises(LossyResult, match="use zstd"):
        written(Index.of([entry], Digest.of(b"")))


def test_an_empty_layer() -> None:
    descriptor, _, blob, _ = written(Index.of([], Digest.of(b"")))
    assert table(descriptor, blob) == []
    assert unpacked(blob) == bytes(1024)
