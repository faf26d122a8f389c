"""A layer written from an index is read back as that index, by us, GNU tar and the standard library."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from in_memory import MemorySink
from needs import need_tool

from layerkit.formats.compression.decompress import Compression
from layerkit.formats.tar.reader import TarReader
from layerkit.formats.tar.writer import layer_tar
from layerkit.model.descriptor import Descriptor, Platform
from layerkit.model.digest import Digest
from layerkit.model.entry import Entry, Extent, Kind
from layerkit.model.errors import InvalidImage, LossyResult
from layerkit.model.image import Image, Layer
from layerkit.model.index import Index
from layerkit.pack import NewLayer, Packing, Writing, rewrite_image, write_layer

CAP = b"\1\0\0\2\0\4\0\0" + bytes(12)
ACL = b"\2\0\0\0" + b"".join(
    bytes((tag, 0, perm, 0)) + i.to_bytes(4, "little")
    for tag, perm, i in ((1, 7, 2**32 - 1), (2, 5, 1000), (4, 5, 2**32 - 1), (16, 7, 2**32 - 1), (32, 0, 2**32 - 1))
)


def whole(runs: tuple[Extent, ...], stored: bytes, size: int) -> bytes:
    out, at = bytearray(size), 0
    for offset, length in runs:
        out[offset : offset + length] = stored[at : at + length]
        at += length
    return bytes(out)


def regular(
    path: bytes, stored: bytes, sparse: tuple[Extent, ...] | None = None, size: int = 0, **more: object
) -> Entry:
    data = stored if sparse is None else whole(sparse, stored, size)
    return Entry(path, Kind.REG, size=len(data), sha256=hashlib.sha256(data).digest(), sparse=sparse, **more)  # type: ignore[arg-type]


ENTRIES = [
    (Entry(b"", Kind.DIR, 0o755, mtime=5), b""),
    (Entry(b"a", Kind.HARDLINK, link=b"z/file"), b""),  # before its target, in the order of names
    (Entry(b"b", Kind.HARDLINK, link=b"a"), b""),
    (Entry(b"gone", Kind.WHITEOUT, 0), b""),
    (Entry(b"again", Kind.WHITEOUT, 0), b""),
    (regular(b"again", b"new", mtime=-2, mtime_ns=500_000_000), b"new"),
    (Entry(b"dir", Kind.DIR, 0o1777, 70000, 3_000_000_000, mtime=1, mtime_ns=1), b""),
    (Entry(b"dir", Kind.OPAQUE, 0), b""),
    (regular(b"dir/\xff\xfe", b"x" * 513, perm=0o4755, xattrs=((b"security.capability", CAP),)), b"x" * 513),
    (regular(b"dir/" + b"n" * 200 + "ü".encode(), b"", xattrs=((b"system.posix_acl_access", ACL),)), b""),
    (Entry(b"l", Kind.SYMLINK, 0o777, link=b"/" + b"t" * 150), b""),
    (Entry(b"null", Kind.CHAR, 0o666, major=1, minor=3), b""),
    (Entry(b"sda", Kind.BLOCK, 0o660, major=8, minor=1_000_000), b""),
    (Entry(b"pipe", Kind.FIFO, 0o600), b""),
    (regular(b"sparse", b"ab" * 512, ((4096, 512), (65536, 512)), 1 << 20), b"ab" * 512),
    (regular(b"hole", b"", (), 1 << 16), b""),
    (regular(b"tail", b"q" * 10, ((90, 10),), 100), b"q" * 10),
    (Entry(b"z", Kind.DIR, 0o700), b""),
    (regular(b"z/file", bytes(range(256)) * 9000, uid=2**32 - 2), bytes(range(256)) * 9000),
]  # fmt: skip


def index_of(entries: list[tuple[Entry, bytes]]) -> tuple[Index, dict[bytes, bytes]]:
    return Index.of([e for e, _ in entries], Digest.of(b"")), {
        e.path: data for e, data in entries if e.kind is Kind.REG
    }


def tar_of(index: Index, data: dict[bytes, bytes]) -> bytes:
    def content(row: int) -> Iterator[memoryview]:
        view = memoryview(data[index.path[row]])
        for at in range(0, len(view), 100_000):
            yield view[at : at + 100_000]

    return b"".join(bytes(piece) for piece in layer_tar(index, content))


def read(tar: bytes) -> Index:
    reader = TarReader("test")
    padded = [(tar[at : at + (1 << 20)], len(tar[at : at + (1 << 20)])) for at in range(0, len(tar), 1 << 20)]
    reader.read(padded)
    return reader.index(Digest.of(tar))


def plain(index: Index) -> list[Entry]:
    return [e._replace(offset=-1) for e in index.entries()]


def test_what_is_written_is_read_back() -> None:
    index, data = index_of(ENTRIES)
    tar = tar_of(index, data)
    again = read(tar)
    assert plain(again) == plain(index)
    for entry in again.entries():
        if entry.kind is Kind.REG and entry.offset >= 0:
            assert tar[entry.offset : entry.offset + len(data[entry.path])] == data[entry.path]
    assert tar == tar_of(index, data)
    assert tar_of(again, data) == tar


def test_the_standard_library_reads_it() -> None:
    index, data = index_of(ENTRIES)
    with tarfile.open(
        fileobj=io.BytesIO(tar_of(index, data)), encoding="utf-8", errors="surrogateescape"
    ) as archive:
        members = archive.getmembers()
        names = [os.fsencode(m.name) for m in members]
        assert names.index(b"z/file") < names.index(b"a") < names.index(b"b")
        assert names.index(b"dir") < names.index(b"dir/.wh..wh..opq")
        assert names.index(b".wh.again") < names.index(b"again")
        for member in members:
            if member.isreg() and os.fsencode(member.name) in data:
                file = archive.extractfile(member)
                assert file is not None
                want = next(e for e, _ in ENTRIES if e.path == os.fsencode(member.name) and e.kind is Kind.REG)
                assert hashlib.sha256(file.read()).digest() == want.sha256


def test_gnu_tar_extracts_it(tmp_path: Path) -> None:
    need_tool("tar")
    index, data = index_of([(e, d) for e, d in ENTRIES if e.kind not in (Kind.CHAR, Kind.BLOCK)])
    (tmp_path / "l.tar").write_bytes(tar_of(index, data))
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(["tar", "-C", out, "--no-same-owner", "-xf", tmp_path / "l.tar"], check=True)
    assert (out / "sparse").read_bytes() == whole(((4096, 512), (65536, 512)), b"ab" * 512, 1 << 20)
    assert (out / "hole").read_bytes() == bytes(1 << 16)
    assert (out / "tail").read_bytes() == bytes(90) + b"q" * 10
    assert (out / "a").stat().st_ino == (out / "z/file").stat().st_ino == (out / "b").stat().st_ino
    assert os.stat(os.fsencode(out) + b"/dir/\xff\xfe").st_size == 513
    assert (out / "again").stat().st_mtime_ns == -1_500_000_000


@pytest.mark.parametrize("compression", list(Compression))
def test_the_blob_is_put_and_read_back(compression: Compression) -> None:
    index, data = index_of(ENTRIES)
    sink, seen = MemorySink(), list[Index]()

    def content(row: int) -> list[memoryview]:
        return [memoryview(data[index.path[row]])]

    descriptor, diff_id = write_layer(index, content, sink, Writing(Packing(compression)), seen.append)
    assert plain(seen[0]) == plain(index)
    assert seen[0].diff_id == diff_id == Digest.of(tar_of(index, data))
    assert Digest.of(sink.blobs[descriptor.digest]) == descriptor.digest
    assert (descriptor.digest == diff_id) == (compression is Compression.NONE)
    assert write_layer(index, content, MemorySink(), Writing(Packing(compression))) == (descriptor, diff_id)


@pytest.mark.parametrize("wrong", [b"", b"shor", b"too long"])
def test_content_of_another_length_is_refused(wrong: bytes) -> None:
    index, _ = index_of([(regular(b"f", b"short"), b"short")])
    sink = MemorySink()
    with pytest.raises(InvalidImage, match="want 5"):
        write_layer(index, lambda row: [memoryview(wrong)], sink)
    assert not sink.blobs


def test_what_a_tar_cannot_hold_is_refused() -> None:
    index, _ = index_of([(Entry(b"n" * 252, Kind.WHITEOUT), b"")])
    with pytest.raises(LossyResult, match="too long"):
        tar_of(index, {})
    index, _ = index_of(
        [(Entry(b"a", Kind.HARDLINK, link=b"b"), b""), (Entry(b"b", Kind.HARDLINK, link=b"a"), b"")]
    )
    with pytest.raises(InvalidImage, match="hard links"):
        tar_of(index, {})


name = st.binary(min_size=1, max_size=8).filter(
    lambda b: not set(b) & {0, 47} and b not in (b".", b"..") and b[:4] != b".wh."
)


@settings(max_examples=40 * int(os.environ.get("LAYERKIT_TEST_FUZZ", "1")), deadline=None)
@given(st.data())
def test_any_index_comes_back(draw: st.DataObject) -> None:
    entries: dict[bytes, tuple[Entry, bytes]] = {}
    for part in draw.draw(st.lists(name, max_size=12)):
        common: dict[str, Any] = {
            "perm": draw.draw(st.integers(0, 0o7777)), "uid": draw.draw(st.integers(0, 2**32 - 2)),
            "gid": draw.draw(st.integers(0, 2**32 - 2)), "mtime": draw.draw(st.integers(-(2**40), 2**40)),
            "mtime_ns": draw.draw(st.integers(0, 999_999_999)),
            "xattrs": draw.draw(st.sampled_from([(), ((b"user.x", b"\0\n=v"),), ((b"trusted.t", b""),)])),
        }  # fmt: skip
        kind = draw.draw(st.sampled_from(["reg", "dir", "link", "sym", "gone"]))
        if kind == "reg":
            stored = draw.draw(st.binary(max_size=1500))
            entries[part] = (regular(part, stored, **common), stored)
        elif kind == "dir":
            entries[part] = (Entry(part, Kind.DIR, **common), b"")
        elif kind == "gone":
            entries[part] = (Entry(part, Kind.WHITEOUT, 0), b"")
        elif kind == "sym":
            entries[part] = (Entry(part, Kind.SYMLINK, link=draw.draw(name), **common), b"")
        else:
            files = [p for p, (e, _) in entries.items() if e.kind is Kind.REG and p != part]
            if files and part not in entries:
                entries[part] = (Entry(part, Kind.HARDLINK, link=draw.draw(st.sampled_from(files)), **common), b"")
    targets = {e.link for e, _ in entries.values() if e.kind is Kind.HARDLINK}
    if any(entries[t][0].kind is not Kind.REG for t in targets if t in entries):
        return
    index, data = index_of(list(entries.values()))
    assert plain(read(tar_of(index, data))) == plain(index)


# --- configs and manifests ---------------------------------------------------------------------------------


def image_of(layers: int, history: list[dict[str, object]] | None, **annotations: str) -> Image:
    blobs = [
        Descriptor("application/vnd.docker.image.rootfs.diff.tar.gzip", Digest.of(b"%d" % i), i)
        for i in range(layers)
    ]
    diff_ids = [Digest.of(b"d%d" % i) for i in range(layers)]
    document: dict[str, object] = {
        "architecture": "amd64", "os": "linux", "created": "2020-01-01T00:00:00Z",
        "config": {"Env": ["A=b"], "Cmd": ["/bin/sh"], "User": "u", "Labels": {"x": "y"}, "Volumes": {"/v": {}}},
        "rootfs": {"type": "layers", "diff_ids": [str(d) for d in diff_ids]}, "unknown": [1, {"a": None}],
    }  # fmt: skip
    if history is not None:
        document["history"] = history
    config = json.dumps(document).encode()
    kind = "application/vnd.docker.container.image.v1+json"
    manifest_kind = "application/vnd.docker.distribution.manifest.v2+json"
    manifest = json.dumps({
        "schemaVersion": 2, "mediaType": manifest_kind,
        "config": {"mediaType": kind, "digest": str(Digest.of(config)), "size": len(config)},
        "layers": [{"mediaType": b.media_type, "digest": str(b.digest), "size": b.size} for b in blobs],
        "annotations": {k.replace("_", "."): v for k, v in annotations.items()},
    }).encode()  # fmt: skip
    return Image(
        "n", manifest, Descriptor(manifest_kind, Digest.of(manifest), len(manifest)),
        config, Descriptor(kind, Digest.of(config), len(config)),
        tuple(Layer(b, d) for b, d in zip(blobs, diff_ids, strict=True)), Platform("linux", "amd64"),
    )  # fmt: skip


HISTORY: list[dict[str, object]] = [
    {"created_by": "ADD base"}, {"created_by": "ENV A", "empty_layer": True}, {"created_by": "RUN 1"},
    {"created_by": "RUN 2"}, {"created_by": "CMD", "empty_layer": True},
]  # fmt: skip


def steps(image: Image) -> list[tuple[str, bool]]:
    return [(s["created_by"], s.get("empty_layer", False)) for s in json.loads(image.config)["history"]]


def test_a_merged_layer_in_config_and_history() -> None:
    image = image_of(3, HISTORY, org_opencontainers_image_base_name="b", org_opencontainers_image_title="t")
    new = NewLayer(
        Descriptor("application/vnd.oci.image.layer.v1.tar", Digest.of(b"n"), 1), Digest.of(b"nd"), "merged", (1, 2)
    )
    out = rewrite_image(image, [image.layers[0], new])
    assert steps(out) == [
        ("ADD base", False),
        ("ENV A", True),
        ("RUN 1", True),
        ("RUN 2", True),
        ("merged", False),
        ("CMD", True),
    ]
    before, after = json.loads(image.config), json.loads(out.config)
    assert {k: v for k, v in after.items() if k not in ("history", "rootfs")} == {
        k: v for k, v in before.items() if k not in ("history", "rootfs")
    }
    assert after["rootfs"]["diff_ids"] == [str(image.layers[0].diff_id), str(new.diff_id)]
    manifest = json.loads(out.manifest)
    assert manifest["annotations"] == {
        "org.opencontainers.image.base.name": "b",
        "org.opencontainers.image.title": "t",
    }
    assert [layer["mediaType"] for layer in manifest["layers"]] == [
        "application/vnd.oci.image.layer.v1.tar+gzip", "application/vnd.oci.image.layer.v1.tar",
    ]  # fmt: skip
    assert out.descriptor.digest == Digest.of(out.manifest)
    assert Digest.of(out.config) == out.config_descriptor.digest
    everything = NewLayer(new.descriptor, new.diff_id, "merged", (0, 1, 2))
    whole_image = rewrite_image(image, [everything], created="2021-01-01T00:00:00Z")
    assert json.loads(whole_image.manifest)["annotations"] == {"org.opencontainers.image.title": "t"}
    assert json.loads(whole_image.config)["created"] == "2021-01-01T00:00:00Z"


def test_a_rewritten_layer_keeps_its_step_and_one_that_goes_makes_none() -> None:
    image = image_of(3, HISTORY)
    new = NewLayer(
        Descriptor("application/vnd.oci.image.layer.v1.tar", Digest.of(b"n"), 1), Digest.of(b"nd"), "", (1,)
    )
    out = rewrite_image(image, [image.layers[0], new])
    assert steps(out) == [("ADD base", False), ("ENV A", True), ("RUN 1", False), ("RUN 2", True), ("CMD", True)]
    added = NewLayer(new.descriptor, new.diff_id, "more")
    assert steps(rewrite_image(image, [*image.layers, added])) == [
        ("ADD base", False), ("ENV A", True), ("RUN 1", False), ("RUN 2", False), ("more", False), ("CMD", True),
    ]  # fmt: skip


def test_a_history_that_does_not_fit_is_left_out() -> None:
    out = rewrite_image(image_of(3, HISTORY[:2]), image_of(3, None).layers)
    assert "history" not in json.loads(out.config)
