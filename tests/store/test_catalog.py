from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_layers import make_image, random_layer

from layerkit.model.digest import Digest
from layerkit.model.errors import StoreError
from layerkit.store.catalog import Catalog, LayerRow, ObjectRow
from layerkit.store.layout import DataBackend, Layout


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    layout = Layout(tmp_path)
    layout.create_folders()
    opened = Catalog(layout)
    yield opened
    opened.close()


def objects(count: int, salt: int = 0) -> list[ObjectRow]:
    import hashlib

    found = (hashlib.sha256(b"%d %d" % (salt, i)).digest() for i in range(count))
    return [ObjectRow(d[:15] + bytes([d[15] & 0xFC]), d, i) for i, d in enumerate(found)]


def test_a_transaction_is_all_or_nothing_and_undoes_before_others_can_begin(catalog: Catalog) -> None:
    row = LayerRow(Digest.of(b"x"), 10, 2, True, False)
    order: list[str] = []

    def other() -> None:
        with catalog.write():
            order.append("other")

    thread = threading.Thread(target=other)

    def undo() -> None:
        thread.start()
        thread.join(0.1)
        order.append("undo")

    with pytest.raises(RuntimeError), catalog.write(undo) as db:
        catalog.put_layer(db, row)
        raise RuntimeError
    thread.join()
    assert order == ["undo", "other"]
    assert catalog.layers() == []
    with catalog.write() as db:
        catalog.put_layer(db, row)
    assert catalog.layer(row.diff_id) == row


def test_backends_add_up_and_are_taken_away_one_by_one(catalog: Catalog) -> None:
    row = LayerRow(Digest.of(b"x"), 10, 2, True, False)
    with catalog.write() as db:
        catalog.put_layer(db, row)
        catalog.put_layer(db, row._replace(tar=False, objects=True))
    assert catalog.layer(row.diff_id) == row._replace(objects=True)
    with catalog.write() as db:
        catalog.drop_backend(db, row.diff_id, DataBackend.TAR)
    assert catalog.layer(row.diff_id) == row._replace(tar=False, objects=True)


def test_objects_are_known_by_their_whole_digest(catalog: Catalog) -> None:
    rows = objects(100)
    with catalog.write() as db:
        catalog.put_objects(db, rows[:60])
    assert catalog.known_objects(rows) == {row.short for row in rows[:60]}
    assert catalog.objects() == sorted(rows[:60])
    assert catalog.has_object(rows[0].sha256)
    other = bytes([*rows[0].sha256[:31], rows[0].sha256[31] ^ 1])
    assert not catalog.has_object(other)
    with pytest.raises(StoreError, match="share one short name"):
        catalog.known_objects([rows[0]._replace(sha256=other)])
    with pytest.raises(StoreError, match="share one short name"):
        catalog.known_objects([rows[99], rows[99]._replace(sha256=other)])
    with pytest.raises(StoreError, match="bytes in the catalog"):
        catalog.known_objects([rows[0]._replace(size=1234)])
    with catalog.write() as db:
        catalog.drop(db, "objects", [row.short for row in rows[:59]])
    assert catalog.objects() == [rows[59]]


def test_a_meta_written_again_keeps_its_relations(catalog: Catalog) -> None:
    image = make_image(random_layer(1))
    digest = str(image.descriptor.digest)
    catalog.put_image(image, ["a"])
    with catalog.write() as db:
        catalog.put_meta(db, "k", "{}")
        catalog.link_meta(db, digest, "k")
        catalog.link_meta(db, digest, "none")
        catalog.link_meta(db, "none", "k")
        catalog.put_meta(db, "k", '{"a": 1}')
    assert catalog.image_metas() == [(digest, "k")]
    assert catalog.meta("k") == '{"a": 1}'
    with catalog.write() as db:
        catalog.drop(db, "images", [digest])
    assert (catalog.image_metas(), catalog.image_layers(), catalog.names()) == ([], [], [])
    assert [key for key, _ in catalog.metas()] == ["k"]


def test_a_damaged_image_row_says_so(catalog: Catalog) -> None:
    catalog.put_image(make_image(random_layer(1)), ["a"])
    with catalog.write() as db:
        db.execute("UPDATE images SET facts = '{}'")
    with pytest.raises(StoreError, match=r"row of image sha256:\w+ is damaged"):
        catalog.images()


def test_problems_tells_of_dangling_rows(catalog: Catalog, tmp_path: Path) -> None:
    assert catalog.problems(deep=True) == []
    with sqlite3.connect(tmp_path / "catalog.db") as db:
        db.execute("INSERT INTO names VALUES ('a', 'sha256:none', 0)")
    assert catalog.problems(deep=True) == ["a row of names points at a row of images that is not there"]


def test_each_thread_has_its_connection(catalog: Catalog) -> None:
    rows = objects(400)

    def work(part: list[ObjectRow]) -> None:
        for row in part:
            with catalog.write() as db:
                catalog.put_objects(db, [row])
            assert catalog.has_object(row.sha256)

    threads = [threading.Thread(target=work, args=(rows[i::8],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(catalog.objects()) == 400
