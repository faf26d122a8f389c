"""Runtimes' own files that are damaged, or made to mislead: one clear error, and nothing is mounted."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from needs import need_root

from layerkit.formats.bolt import Bolt, Bucket, _fnv1a
from layerkit.hosts.adopted.sources import find_unpacked, read_bolt
from layerkit.linux.folders.reader import Marks, index_layer_folder
from layerkit.model.entry import Kind
from layerkit.model.errors import InvalidImage, LayerkitError, LossyResult, NotFound
from layerkit.model.limits import Limits

PAGE = 4096


def page(number: int, flags: int, elements: list[tuple[int, bytes, bytes]]) -> bytes:
    """Return a leaf page (flags 2) of (element flags, key, value), or an inline one if ``number`` is 0."""
    head, body = b"", b""
    offset = 16 * len(elements)
    for i, (kind, key, value) in enumerate(elements):
        head += struct.pack("<IIII", kind, offset - 16 * i + len(body), len(key), len(value))
        body += key + value
    return struct.pack("<QHHI", number, flags, len(elements), 0) + head + body


def meta(number: int, txid: int, root: int) -> bytes:
    body = struct.pack("<IIIIQQQQQ", 0xED0CDAED, 2, PAGE, 0, root, 0, 0, 10, txid)
    return (struct.pack("<QHHI", number, 4, 0, 0) + body + struct.pack("<Q", _fnv1a(body))).ljust(PAGE, b"\0")


def database(root: list[tuple[int, bytes, bytes]], *more: bytes) -> bytes:
    pages = [meta(0, 1, 9), meta(1, 2, 2), page(2, 2, root), *more]
    return b"".join(p.ljust(PAGE, b"\0") for p in pages)


def inline(elements: list[tuple[int, bytes, bytes]]) -> bytes:
    return struct.pack("<QQ", 0, 0) + page(0, 2, elements)


def branch(number: int, children: list[tuple[bytes, int]]) -> bytes:
    head, body = b"", b""
    for i, (key, child) in enumerate(children):
        head += struct.pack("<IIQ", 16 * (len(children) - i) + len(body), len(key), child)
        body += key
    return struct.pack("<QHHI", number, 1, len(children), 0) + head + body


def test_buckets_values_and_branches() -> None:
    data = database(
        [(1, b"inline", inline([(0, b"a", b"1"), (1, b"deep", inline([(0, b"b", b"2")]))])),
         (1, b"tree", struct.pack("<QQ", 3, 0)), (0, b"x", b"value")],
        branch(3, [(b"a", 4), (b"m", 5)]), page(4, 2, [(0, b"a", b"A"), (0, b"c", b"C")]),
        page(5, 2, [(0, b"m", b"M"), (0, b"z", b"Z")]),
    )  # fmt: skip
    root = Bolt(data, "db").root
    assert [key for key, _ in root.items()] == [b"inline", b"tree", b"x"]
    assert root.value(b"inline", b"deep", b"b") == b"2"
    tree = root.bucket(b"tree")
    assert tree is not None
    assert list(tree.items()) == [(b"a", b"A"), (b"c", b"C"), (b"m", b"M"), (b"z", b"Z")]
    assert [tree.get(key) for key in (b"a", b"c", b"m", b"z", b"0", b"d", b"zz")] == [
        b"A", b"C", b"M", b"Z", None, None, None,
    ]  # fmt: skip
    assert (root.get(b"x", b"below"), root.bucket(b"x"), root.value(b"tree")) == (None, None, b"")


def test_the_later_of_two_valid_metas_counts() -> None:
    data = database([(0, b"k", b"new")])
    old = page(9, 2, [(0, b"k", b"old")]).ljust(PAGE, b"\0")
    data += bytes(PAGE * (9 - len(data) // PAGE)) + old
    assert Bolt(data, "db").root.value(b"k") == b"new"
    torn = data[:PAGE] + bytes(PAGE) + data[2 * PAGE :]
    assert Bolt(torn, "db").root.value(b"k") == b"old"
    assert Bolt(bytes(PAGE) + data[PAGE:], "db").root.value(b"k") == b"new"


def everything(bucket: Bucket, depth: int = 0) -> None:
    for count, (_, value) in enumerate(bucket.items()):
        if count > 10_000 or depth > 100:
            return
        if isinstance(value, Bucket):
            everything(value, depth + 1)


def test_damaged_databases_end_in_one_error() -> None:
    good = database([(1, b"a", inline([(0, b"b", b"c")])), (1, b"t", struct.pack("<QQ", 3, 0))],
                    branch(3, [(b"a", 4)]), page(4, 2, [(0, b"a", b"A")]))  # fmt: skip
    rng = random.Random(4)
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(2 * PAGE, len(data))] = rng.randrange(256)
        try:
            everything(Bolt(bytes(data[: rng.randint(PAGE, len(data))]), "db").root)
        except InvalidImage as error:
            assert "not a bolt database, or damaged" in str(error)


def test_circles_end() -> None:
    itself = database([(1, b"t", struct.pack("<QQ", 2, 0))])
    with pytest.raises(InvalidImage, match="nest too deep"):
        bucket: Any = Bolt(itself, "db").root
        while bucket is not None:
            bucket = bucket.get(b"t")
    loop = database([(1, b"t", struct.pack("<QQ", 3, 0))], branch(3, [(b"a", 3)]))
    with pytest.raises(InvalidImage, match="neither branch nor leaf"):
        everything(Bolt(loop, "db").root)
    with pytest.raises(InvalidImage, match="neither branch nor leaf"):
        Bolt(loop, "db").root.get(b"t", b"a")


@pytest.mark.parametrize("data", [b"", b"short", bytes(3 * PAGE), b"SQLite format 3\0".ljust(9000, b"x")])
def test_what_is_no_database(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "db").write_bytes(data)
    with pytest.raises(InvalidImage, match="no valid meta page"):
        read_bolt(tmp_path / "db")


def containers(root: Path, layers: object, images: object) -> str:
    for name, value in (("overlay-layers/layers.json", layers), ("overlay-images/images.json", images)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return f"containers-storage:[overlay@{root}]app"


IMAGE = {"id": "a" * 64, "names": ["localhost/app:latest"], "layer": "one"}


@pytest.mark.parametrize(
    ("layers", "images"),
    [
        ("{", [IMAGE]),
        ([{"id": "one"}], "not json"),
        ([{"id": "one", "parent": "one"}], [IMAGE]),
        ([{"id": "one", "parent": "two"}, {"id": "two", "parent": "one"}], [IMAGE]),
        ([{"id": "one", "parent": "gone"}], [IMAGE]),
        ([{"id": "../../../etc"}], [{**IMAGE, "layer": "../../../etc"}]),
        ({"id": "one"}, [IMAGE]),
        ([7], [IMAGE]),
        ([{"id": "one"}], {"names": "app"}),
        ([{"id": "one"}], [{"names": ["localhost/app:latest"]}]),
        ('[{"id": "one", "id": "two"}]', [IMAGE]),
    ],
)
def test_podmans_files_that_are_not_what_they_should_be(tmp_path: Path, layers: object, images: object) -> None:
    with pytest.raises(LayerkitError) as caught:
        find_unpacked(containers(tmp_path, layers, images))
    assert caught.value.exit_code == 3
    assert str(tmp_path) in str(caught.value)


def test_dockers_files_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    base = tmp_path / "image/overlay2"
    image = "b" * 64
    (base / "imagedb/content/sha256").mkdir(parents=True)

    def asked(config: object, table: object) -> str:
        (base / "imagedb/content/sha256" / image).write_text(json.dumps(config))
        (base / "repositories.json").write_text(json.dumps(table))
        return f"docker-storage:[{tmp_path}]app"

    table = {"Repositories": {"app": {"app:latest": f"sha256:{image}"}}}
    configs: list[object] = [
        {},
        [],
        {"rootfs": 7},
        {"rootfs": {"diff_ids": ["../../x"]}},
        {"rootfs": {"diff_ids": 7}},
    ]
    for config in configs:
        with pytest.raises(InvalidImage):
            find_unpacked(asked(config, table))
    tables: list[object] = [
        {},
        [],
        {"Repositories": 7},
        {"Repositories": {"app": {"app:latest": "sha256:../../x"}}},
    ]
    for odd in tables:
        with pytest.raises(LayerkitError):
            find_unpacked(asked({"rootfs": {"diff_ids": []}}, odd))
    diff_id = "sha256:" + "c" * 64
    ref = asked({"rootfs": {"diff_ids": [diff_id]}}, table)
    with pytest.raises(NotFound, match="the layer is not there"):
        find_unpacked(ref)
    record = base / "layerdb/sha256" / ("c" * 64)
    record.mkdir(parents=True)
    (record / "cache-id").write_text("../../../etc")
    with pytest.raises(InvalidImage, match="no name of a layer's folder"):
        find_unpacked(ref)


def test_a_layer_beyond_the_limits(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"f{i}").touch()
    with pytest.raises(InvalidImage, match="entries_per_layer"):
        index_layer_folder(tmp_path, limits=Limits(entries_per_layer=10))


def test_odd_names_links_and_depth(tmp_path: Path) -> None:
    """A deep tree keeps one descriptor open, and no link leads out of the layer."""
    names = [b"\xff\xfe", b"a\nb", b" ", b"...", b"-rf", "ü".encode()]
    for name in names:
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).touch()
    os.symlink("/etc", tmp_path / "out")
    deep = os.open(tmp_path, os.O_RDONLY)
    for _ in range(300):
        os.mkdir("d", dir_fd=deep)
        below = os.open("d", os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = below
    os.close(deep)
    before = len(os.listdir("/proc/self/fd"))
    layer = index_layer_folder(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
    paths = layer.index.path.tolist()
    assert set(names) <= set(paths)
    assert b"/".join([b"d"] * 300) in paths
    assert not any(path.startswith(b"out/") for path in paths)


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh..."])
def test_deletions_of_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InvalidImage, match="a deletion of nothing"):
        index_layer_folder(tmp_path, marks=Marks.AUFS)


def test_a_name_that_is_deleted_twice_is_deleted_once(tmp_path: Path) -> None:
    need_root()
    os.mknod(tmp_path / "gone", 0o020000, 0)
    (tmp_path / ".wh.gone").touch()
    (tmp_path / ".wh.other").touch()
    entries = list(index_layer_folder(tmp_path, marks=Marks.AUFS).index.entries())
    assert [(e.path, e.kind) for e in entries] == [
        (b"", Kind.DIR), (b"gone", Kind.WHITEOUT), (b"other", Kind.WHITEOUT),
    ]  # fmt: skip


def test_a_filesystem_in_a_layer_is_not_gone_into(tmp_path: Path) -> None:
    need_root()
    (tmp_path / "proc").mkdir()
    subprocess.run(["mount", "-t", "proc", "proc", tmp_path / "proc"], check=True)
    try:
        with pytest.raises(LossyResult, match="proc: another filesystem"):
            index_layer_folder(tmp_path)
    finally:
        subprocess.run(["umount", tmp_path / "proc"], check=True)
