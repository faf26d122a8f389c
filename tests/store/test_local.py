from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_layers import (
    MadeLayer,
    make_image,
    make_layer,
    meta_info,
    overwrite,
    put,
    put_meta,
    random_layer,
    state,
)

from layerkit import metaonly
from layerkit.model.descriptor import Descriptor, Platform
from layerkit.model.digest import Digest
from layerkit.model.errors import DigestMismatch, NotFound, StoreError, UsageError
from layerkit.store import spool
from layerkit.store.fsck import Severity
from layerkit.store.local import LocalStore
from layerkit.store.metas import MetaEntry, chain_key, meta_key
from layerkit.store.source import StoreSource

KEY = "ab" * 32


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path / "store") as opened:
        yield opened


def damage(store: LocalStore, *, repair: bool = False, deep: bool = True) -> list[str]:
    return [f"{f.where}: {f.problem}" for f in store.verify(repair=repair, deep=deep) if f.is_damage]


def kept_meta(store: LocalStore) -> MetaEntry:
    found = store.meta(KEY)
    assert found is not None
    return found


# Opening


def test_open_makes_a_store_that_only_its_owner_enters(tmp_path: Path) -> None:
    root = tmp_path / "a" / "b"
    with LocalStore.open(root) as store:
        assert stat.S_IMODE(root.stat().st_mode) == 0o700
        assert stat.S_IMODE(store.objects_root.stat().st_mode) == 0o755
        identity = store.identity
    with LocalStore.open(root) as again:
        assert again.identity == identity
        assert again.verify() == []


def test_open_refuses_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no layerkit store"):
        LocalStore.open(tmp_path / "none", create=False)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match=r"it holds 'thesis.tex'"):
        LocalStore.open(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"layout": 99, "id": "x"}', "layout 99, and this layerkit knows up to 1"),
        ('{"layout": true, "id": "x"}', "is unknown; is this"),
        ('{"lay', "damaged"),
        ("[]", "damaged"),
    ],
)
def test_open_refuses_versions_it_does_not_know(store: LocalStore, content: str, said: str) -> None:
    (store.root / "version.json").write_text(content)
    with pytest.raises(StoreError, match=said):
        LocalStore.open(store.root)


def test_open_refuses_a_newer_catalog_and_a_damaged_one(store: LocalStore) -> None:
    store._catalog._db.execute("PRAGMA user_version = 7")
    with pytest.raises(StoreError, match="catalog of version 7"):
        LocalStore.open(store.root)
    store.close()
    (store.root / "catalog.db").write_bytes(b"garbage" * 1000)
    with pytest.raises(StoreError, match=r"catalog.db: damaged"):
        LocalStore.open(store.root)


def test_open_refuses_a_root_that_others_write_to_and_narrows_one_they_read(store: LocalStore) -> None:
    store.root.chmod(0o755)
    LocalStore.open(store.root).close()
    assert stat.S_IMODE(store.root.stat().st_mode) == 0o700
    store.root.chmod(0o770)
    with pytest.raises(StoreError, match="others may write"):
        LocalStore.open(store.root)


def test_an_interrupted_start_is_completed(tmp_path: Path) -> None:
    root = tmp_path / "store"
    (root / "locks").mkdir(parents=True)
    (root / "version.json.new").write_text("{")
    with LocalStore.open(root) as store:
        assert store.verify() == []


# Layers


def test_tar_backend_keeps_tar_data_and_index(store: LocalStore) -> None:
    layer = random_layer(1)
    assert store.load_index(layer.diff_id) is None
    put(store, layer, "tar", step=700)
    assert store.tar_path(layer.diff_id).read_bytes() == layer.tar
    assert stat.S_IMODE(store.tar_path(layer.diff_id).stat().st_mode) == 0o444
    assert store.data_image(layer.diff_id).stat().st_size > 0
    index = store.load_index(layer.diff_id)
    assert index is not None
    assert list(index.entries()) == list(layer.index.entries())
    assert store.has_layer(layer.diff_id, "tar")
    assert not store.has_layer(layer.diff_id, "objects")
    assert store.verify() == []


def test_objects_backend_writes_each_content_once(store: LocalStore) -> None:
    layer = make_layer({b"a": b"one", b"b": b"two" * 100_000, b"c/d": b"one", b"empty": b""})
    before = os.umask(0o077)
    try:
        put(store, layer, "objects")
    finally:
        os.umask(before)
    names = {path for path in store.objects_root.rglob("*") if path.is_file()}
    assert len(names) == 2
    for entry in layer.index.entries():
        if entry.size:
            path = store.objects_root / os.fsdecode(metaonly.data_path(entry.sha256))
            assert path in names
            assert path == store.object_file(entry.sha256)
            assert stat.S_IMODE(path.stat().st_mode) == 0o444
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    assert store.object_file(layer.index.entry(1).sha256).read_bytes() == b"two" * 100_000
    assert store.uses(layer.index.entry(0).sha256) == [(layer.diff_id, b"a"), (layer.diff_id, b"c/d")]
    assert not any(store.root.joinpath("tar").iterdir())
    assert not any(store.root.joinpath("tmp").rglob("tar*"))
    assert store.has_layer(layer.diff_id, "objects")
    assert store.verify() == []


def test_layers_share_objects(store: LocalStore) -> None:
    put(store, random_layer(1), "objects")
    first = {p: p.stat().st_ino for p in store.objects_root.rglob("*") if p.is_file()}
    put(store, random_layer(2), "objects")
    after = {p: p.stat().st_ino for p in store.objects_root.rglob("*") if p.is_file()}
    assert first.items() < after.items()
    assert store.verify() == []


def test_sparse_objects_keep_their_runs(store: LocalStore) -> None:
    mib = 1 << 20
    holed = bytearray(8 * mib)
    runs = ((mib, 4096), (5 * mib, 8192))
    for start, length in runs:
        holed[start : start + length] = b"s" * length
    layer = make_layer({}, {b"holes": (runs, bytes(holed)), b"all-hole": ((), bytes(3 * mib))})
    put(store, layer, "objects")
    holes, nothing = (store.object_file(layer.index.entry(row).sha256) for row in (1, 0))
    assert nothing.stat().st_size == 3 * mib
    assert nothing.stat().st_blocks == 0
    assert holes.stat().st_blocks * 512 < 64 << 10
    with holes.open("rb") as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == mib
        assert os.lseek(file.fileno(), mib, os.SEEK_HOLE) == mib + 4096
    assert store.verify() == []


def test_commit_checks_the_size_and_leaves_nothing(store: LocalStore) -> None:
    layer = random_layer(3)
    for backend in ("tar", "objects"):
        with store.begin_layer(backend) as writer:
            writer.write(memoryview(layer.tar)[:-512])
            with pytest.raises(DigestMismatch):
                writer.commit(layer.index)
            with pytest.raises(StoreError, match="before"):
                writer.commit(layer.index)
    assert state(store) == set()
    assert store.verify() == []


def test_abort_and_close_leave_nothing(tmp_path: Path) -> None:
    store = LocalStore.open(tmp_path / "store")
    one, two = store.begin_layer("tar"), store.begin_layer("objects")
    meta = store.begin_meta(KEY)
    for writer in (one, two):
        writer.write(memoryview(b"x" * 5000))
    meta.image_file.write_bytes(b"x")
    one.abort()
    one.abort()
    assert store._locks.holds == 2
    store.close()
    assert store._locks.holds == 0
    assert state(store) == set()


@pytest.mark.parametrize("step", ["open_lock", "try_lock", "mkdir"])
def test_an_interrupt_while_the_temporary_folder_is_made(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes when the step is done and its result not noted yet."""
    owner: object = Path if step == "mkdir" else spool
    real = getattr(owner, step)

    def interrupted(*arguments: object, **more: object) -> None:
        real(*arguments, **more)
        raise KeyboardInterrupt

    store = LocalStore.open(tmp_path / "store")
    monkeypatch.setattr(owner, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.begin_layer("tar")
    monkeypatch.undo()
    assert list((tmp_path / "store/tmp").iterdir()) == []
    with store.begin_layer("tar"):
        pass  # and it can go on
    store.close()
    assert list((tmp_path / "store/tmp").iterdir()) == []


def test_a_layer_comes_twice_and_the_first_stands(store: LocalStore) -> None:
    layer = random_layer(4)
    put(store, layer, "tar")
    inode = store.tar_path(layer.diff_id).stat().st_ino
    put(store, layer, "tar")
    assert store.tar_path(layer.diff_id).stat().st_ino == inode
    assert store.verify() == []


def test_what_is_missing_comes_back_with_the_next_import(store: LocalStore) -> None:
    layer = random_layer(4)
    put(store, layer, "tar")
    put(store, layer, "objects")
    store.data_image(layer.diff_id).unlink()
    store.tar_path(layer.diff_id).unlink()
    victim = next(p for p in store.objects_root.rglob("*") if p.is_file())
    victim.chmod(0o644)
    victim.write_bytes(b"")
    assert not store.has_layer(layer.diff_id, "tar")
    put(store, layer, "tar")
    put(store, layer, "objects")
    assert store.verify() == []


def test_backends_are_added_to_each_other(store: LocalStore) -> None:
    layer, other = random_layer(5), random_layer(6)
    put(store, layer, "tar")
    assert store.convert_layer(layer.diff_id, "objects")
    assert store.has_layer(layer.diff_id, "objects")
    assert store.has_layer(layer.diff_id, "tar")
    put(store, other, "objects")
    assert not store.convert_layer(other.diff_id, "tar")
    put(store, other, "tar")
    assert store.has_layer(other.diff_id, "objects")
    assert not store.convert_layer(Digest.of(b"unknown"), "tar")
    assert store.verify() == []


def test_an_index_can_be_kept_alone(store: LocalStore) -> None:
    layer = random_layer(5)
    store.save_index(layer.index)
    assert store.load_index(layer.diff_id) is not None
    assert not store.has_layer(layer.diff_id, "tar")
    assert store.verify() == []
    put(store, layer, "tar")
    store.save_index(layer.index)
    assert store.has_layer(layer.diff_id, "tar")


def test_two_contents_of_one_short_name_are_refused(store: LocalStore) -> None:
    layer = make_layer({b"a": b"one", b"b": b"two"})
    put(store, layer, "objects")
    files = state(store)
    clash = layer.index.sha256.copy()
    clash[0, 31] ^= 1  # beyond the 126 bits
    with store.begin_layer("objects") as writer:
        writer.write(memoryview(layer.tar))
        with pytest.raises(StoreError, match="share one short name"):
            writer.commit(replace(layer.index, sha256=clash, diff_id=Digest.of(b"other")))
    assert state(store) == files
    both = make_layer({b"a": b"xyz", b"b": b"zyx"})
    clash = both.index.sha256.copy()
    clash[1] = clash[0]
    clash[1, 15] ^= 3
    with store.begin_layer("objects") as writer:
        writer.write(memoryview(both.tar))
        with pytest.raises(StoreError, match="share one short name"):
            writer.commit(replace(both.index, sha256=clash))
    assert state(store) == files
    assert store.verify() == []


def test_a_stray_object_is_not_trusted(store: LocalStore) -> None:
    layer = make_layer({b"a": b"right"})
    path = store.objects_root / os.fsdecode(metaonly.data_path(layer.index.sha256[0].tobytes()))
    path.parent.mkdir()
    path.write_bytes(b"wrong")
    put(store, layer, "objects")
    assert path.read_bytes() == b"right"


# METAs and images


def test_meta_key_depends_on_every_part() -> None:
    digest = Digest.of(b"t")
    keys = {
        meta_key(digest, "u 0 1 2", "erofs", "trusted", 1),
        meta_key(Digest.of(b"u"), "u 0 1 2", "erofs", "trusted", 1),
        meta_key(digest, "other", "erofs", "trusted", 1),
        meta_key(digest, "u 0 1 2", "other", "trusted", 1),
        meta_key(digest, "u 0 1 2", "erofs", "other", 1),
        meta_key(digest, "u 0 1 2", "erofs", "trusted", 2),
    }
    assert len(keys) == 6


def test_meta_round_trip(store: LocalStore) -> None:
    assert store.meta(KEY) is None
    put_meta(store, KEY)
    entry = kept_meta(store)
    assert entry.image_file.read_bytes() == b"meta" * 3000
    assert entry.info["names"] == 10
    assert entry.allocated_bytes >= 12000
    inode = entry.image_file.stat().st_ino
    put_meta(store, KEY, b"another run was later")
    assert entry.image_file.stat().st_ino == inode
    assert [m.key for m in store.metas()] == [KEY]
    with store.begin_meta("cd" * 32) as writer, pytest.raises(StoreError, match="lacks names"):
        writer.commit({"tree": "", "map": "", "rendering": "", "namespace": ""})
    assert store.verify() == []


def test_meta_folder_of_odd_entries(store: LocalStore) -> None:
    with store.begin_meta(KEY) as writer:
        writer.root.mkdir()
        (writer.root / ("n" * 100)).mkdir()
        (writer.root / "closed").mkdir(mode=0)
        (writer.root / "link").symlink_to("nowhere")
        os.mkfifo(writer.root / "fifo")
        (writer.root / "file").write_bytes(b"")
        os.link(writer.root / "file", writer.root / "name")
        fd = os.open(writer.root / ("n" * 100), os.O_RDONLY)
        for _ in range(39):  # the whole path is longer than what a system call takes, this part is not
            os.mkdir("n" * 100, dir_fd=fd)
            below = os.open("n" * 100, os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        os.close(fd)
        writer.commit({**meta_info(), "rendering": "directory"})
    assert store.verify() == []
    root = kept_meta(store).root
    (root / "file").write_bytes(b"data")
    assert damage(store) == [f"meta/{KEY}: root: file: not a stub (No data available)"]
    (root / "file").write_bytes(b"")
    os.utime(root / "link", (1, 1), follow_symlinks=False)
    assert damage(store) == [f"meta/{KEY}: root: an entry is not as it was written"]
    assert damage(store, deep=False) == []
    assert damage(store, repair=True) != []
    assert store.meta(KEY) is None
    assert store.verify() == []


def test_image_round_trip_and_lookup(store: LocalStore) -> None:
    layer = random_layer(7)
    image = make_image(layer)
    store.add_image(image, ["debian:12", "mine"])
    assert store.image("mine") == image
    digest = str(image.descriptor.digest)
    for name in (digest, digest[:16], digest.partition(":")[2][:6]):
        assert store.image(name) == image
    with pytest.raises(NotFound, match=r"did you mean debian:12\?"):
        store.image("debian:13")
    with pytest.raises(NotFound):
        store.image(digest[:10])
    other = make_image(layer, name="other")
    store.add_image(other, ["mine"])
    assert store.image("mine") == other
    assert [(r.names, r.layers, r.platform) for r in store.ls()] == [
        (("debian:12",), 1, "linux/amd64"),
        (("mine",), 1, "linux/amd64"),
    ]
    with pytest.raises(UsageError, match="2 images begin so"):
        store._catalog.digests = lambda: ["sha256:" + "a" * 63 + c for c in "bc"]  # type: ignore[method-assign]
        store.image("sha256:aaaaaaa")


def test_image_without_a_name_goes_by_its_digest(store: LocalStore) -> None:
    image = make_image(random_layer(7))
    store.add_image(image, [""])
    assert store.images()[0].names == (str(image.descriptor.digest),)
    store.remove_image(str(image.descriptor.digest)[:20])
    assert store.images()[0].names == ()
    with pytest.raises(NotFound):
        store.remove_image("nothing")


def test_source_serves_the_image(store: LocalStore) -> None:
    layer = random_layer(8)
    put(store, layer, "tar")
    image = make_image(layer)
    store.add_image(image, ["a"])
    source = StoreSource(store, "a")
    assert source.image() == image
    assert source.image(Platform("linux", "amd64", "v1")) == image
    with pytest.raises(NotFound, match="not for linux/arm64"):
        source.image(Platform("linux", "arm64"))
    buffer = memoryview(bytearray(1 << 20))
    for descriptor, want in (
        (image.layers[0].descriptor, layer.tar), (image.descriptor, image.manifest),
        (image.config_descriptor, image.config),
    ):  # fmt: skip
        reader = source.open_blob(descriptor)
        assert bytes(buffer[: reader.readinto(buffer)]) == want
        reader.close()
    with pytest.raises(NotFound, match="is not kept, only what is in it"):
        source.open_blob(Descriptor("x", Digest.of(b"gone"), 4))


# Upkeep


def test_df_counts(store: LocalStore) -> None:
    layer = random_layer(9)
    put(store, layer, "tar")
    put(store, layer, "objects")
    put_meta(store, KEY, mapping="uid 0 100000 65536")
    image = make_image(layer)
    store.add_image(image, ["a"], metas=[KEY, "unknown"])
    store.put_tree_facts(chain_key(image.diff_ids), {"tree": meta_info()["tree"], "data_bytes": 10_000_000})
    report = store.df()
    rows = {row.what: row for row in report.classes}
    assert rows["layer tars"].apparent_bytes == len(layer.tar)
    distinct = {e.sha256: e.size for e in layer.index.entries() if e.size}
    assert (rows["objects"].count, rows["objects"].apparent_bytes) == (len(distinct), sum(distinct.values()))
    (meta,) = report.metas
    assert meta.images == ("a",)
    assert meta.bytes_per_entry == meta.allocated_bytes / 10
    assert report.saved_bytes == 10_000_000 - meta.allocated_bytes
    assert report.to_dict()["saved_bytes"] == report.saved_bytes
    assert store.ls()[0].maps == ("uid 0 100000 65536",)


def filled(store: LocalStore) -> MadeLayer:
    layer = random_layer(10)
    put(store, layer, "tar")
    put(store, layer, "objects")
    put_meta(store, KEY)
    store.add_image(make_image(layer), ["a"], metas=[KEY])
    assert store.verify() == []
    return layer


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("tar", "its content has the digest"),
        ("data", "not what the index and the tar give"),
        ("index", ""),
        ("objects", "its content has the digest"),
        ("meta", "meta.erofs: its content has the digest"),
    ],
)
def test_verify_names_the_file_with_a_flipped_bit(store: LocalStore, what: str, said: str) -> None:
    layer = filled(store)
    path = {
        "tar": store.tar_path(layer.diff_id),
        "data": store.data_image(layer.diff_id),
        "index": store.root / "index" / f"{layer.diff_id.hex}.idx",
        "objects": sorted(p for p in store.objects_root.rglob("*") if p.is_file())[3],
        "meta": kept_meta(store).image_file,
    }[what]
    overwrite(path, path.stat().st_size // 2)
    found = damage(store)
    where = path.parent if what == "meta" else path
    assert len(found) == 1
    assert found[0].startswith(f"{where.relative_to(store.root)}: {said}")
    if what == "index":
        with pytest.raises(StoreError, match="store verify --repair"):
            store.load_index(layer.diff_id)
    assert len(damage(store, repair=True)) == 1
    assert damage(store) == []
    if what in ("data", "objects", "index"):
        assert store.has_layer(layer.diff_id, "tar") and store.has_layer(layer.diff_id, "objects")
        assert store.verify() == []
    if what == "tar":
        assert not store.has_layer(layer.diff_id, "tar")
        assert store.has_layer(layer.diff_id, "objects")
        put(store, layer, "tar")
        assert store.verify() == []
    if what == "meta":
        assert store.meta(KEY) is None


def test_verify_names_what_is_missing_or_of_the_wrong_mode(store: LocalStore) -> None:
    layer = filled(store)
    store.tar_path(layer.diff_id).chmod(0o644)
    victim = min(p for p in store.objects_root.rglob("*") if p.is_file())
    victim.unlink()
    (kept_meta(store).path / "extra").write_text("")
    found = damage(store)
    assert f"tar/{layer.diff_id.hex}: mode 0644, want 0444" in found
    assert f"{victim.relative_to(store.root)}: missing" in found
    assert f"meta/{KEY}: extra does not belong there" in found
    assert len(found) == 3
    store.verify(repair=True)
    assert store.verify() == []


def test_repair_takes_out_an_object_that_no_tar_has(store: LocalStore) -> None:
    layer = random_layer(11)
    put(store, layer, "objects")
    victim = next(p for p in store.objects_root.rglob("*") if p.is_file())
    victim.unlink()
    assert [f.remedy for f in store.verify(repair=True)] == ["taken out; import the image again"]
    assert not store.has_layer(layer.diff_id, "objects")
    assert damage(store) == []
    put(store, layer, "objects")
    assert store.verify() == []


def test_verify_finds_a_changed_manifest_and_a_dangling_row(store: LocalStore) -> None:
    filled(store)
    with store._catalog.write() as db:
        db.execute("UPDATE images SET manifest = x'00'")
        db.execute("DELETE FROM objects WHERE short = (SELECT min(short) FROM objects)")
    found = damage(store)
    assert any("its manifest has the digest" in line for line in found)
    assert any("not in the catalog, and layer" in line for line in found)
    store.verify(repair=True)
    assert damage(store) == []


def test_leftovers_are_no_damage_and_gc_removes_them(store: LocalStore) -> None:
    filled(store)
    files = state(store)
    (store.root / "tmp" / "123-dead").mkdir()
    (store.root / "tmp" / "123-dead" / "tar-0").write_bytes(b"x" * 5000)
    (store.root / "tmp" / "123-dead.owner").touch()
    (store.root / "tmp" / "file").touch()
    for name in ("tar/" + "0" * 64, "data/x", "index/y", "objects/:a/short", "objects/z", "meta/w"):
        (store.root / name).parent.mkdir(exist_ok=True)
        (store.root / name).write_bytes(b"x")
    found = store.verify()
    assert {f.severity for f in found} == {Severity.LEFTOVER}
    assert len(found) == 9
    would = store.gc(dry_run=True)
    assert len(would.removed) == 9
    assert would.freed_bytes >= 8192
    report = store.gc()
    assert (report.removed, report.freed_bytes) == (would.removed, would.freed_bytes)
    assert store.verify() == []
    assert state(store) == files


def test_gc_keeps_what_images_and_mounts_use(store: LocalStore) -> None:
    one, two, mounted = random_layer(1), random_layer(2), random_layer(3)
    for layer in (one, two, mounted):
        put(store, layer, "tar")
        put(store, layer, "objects")
    keys = ["aa" * 32, "bb" * 32, "cc" * 32]
    for key in keys:
        put_meta(store, key)
    store.add_image(make_image(one), ["one"], metas=[keys[0]])
    store.add_image(make_image(one, two, name="two"), ["two"], metas=[keys[1]])
    store.remove_image("two")
    asked = []

    def in_use() -> tuple[set[str], set[str]]:
        asked.append(store._locks._exclusive_owner)
        return {str(mounted.diff_id)}, {keys[2]}

    report = store.gc(in_use)
    assert asked == [threading.get_ident()]
    assert store.verify() == []
    assert store.has_layer(one.diff_id, "objects") and store.has_layer(mounted.diff_id, "objects")
    assert not store.has_layer(two.diff_id, "tar")
    assert [m.key for m in store.metas()] == [keys[0], keys[2]]
    assert any(line.startswith(f"layer {two.diff_id}") for line in report.removed)
    kept = {e.sha256 for layer in (one, mounted) for e in layer.index.entries() if e.size}
    assert len([p for p in store.objects_root.rglob("*") if p.is_file()]) == len(kept)

    # A mount of an image that was removed: its META is in use, and with it all that belongs to the image.
    store.remove_image("one")
    store.gc(((), {keys[0]}))
    assert store.has_layer(one.diff_id, "tar")
    store.gc()
    assert store.df().classes[0].count == 0
    assert state(store) == set()
    assert store._catalog._one("SELECT count(*) FROM objects") == (0,)


def test_gc_drops_metas_that_can_be_made_again_when_asked(store: LocalStore) -> None:
    layer = filled(store)
    other = "ee" * 32
    put_meta(store, other)
    store.gc(((), {KEY}), drop_metas=True)
    assert [m.key for m in store.metas()] == [KEY]
    store.gc(drop_metas=True)
    assert store.metas() == []
    assert store.has_layer(layer.diff_id, "tar")


def test_gc_keeps_objects_while_an_index_is_damaged(store: LocalStore) -> None:
    layer = filled(store)
    count = len(list(store.objects_root.rglob("*")))
    overwrite(store.root / "index" / f"{layer.diff_id.hex}.idx", 100)
    report = store.gc()
    assert report.removed[0].startswith("no objects, since not all indexes can be read")
    assert len(list(store.objects_root.rglob("*"))) == count


def test_gc_waits_for_a_hold_and_says_so(store: LocalStore) -> None:
    with LocalStore.open(store.root) as other:
        with other.hold(), pytest.raises(StoreError, match="another layerkit process"):
            store.gc(wait_seconds=0.1)
        with store.hold(), pytest.raises(StoreError, match="this process still uses"):
            store.gc(wait_seconds=0.1)
        put(other, random_layer(1), "tar")  # its temporary folder lives on
        store.gc()
        put(other, random_layer(2), "objects")
        assert store.verify() == []


def test_closed_folders_and_deep_ones_are_removed(tmp_path: Path) -> None:
    from layerkit.linux.durable import remove

    top = tmp_path / "top"
    (top / "a" / "b").mkdir(parents=True)
    fd = os.open(top / "a", os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("x" * 10, dir_fd=fd)
        below = os.open("x" * 10, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    (top / "link").symlink_to("/etc")
    (top / "a" / "b").chmod(0)
    remove(top)
    remove(top)
    assert not top.exists()
    assert Path("/etc/passwd").exists()


def test_stores_on_two_disks_hold_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        with LocalStore.open(tmp_path / name) as store:
            put(store, random_layer(12), "tar")
            contents.append({p: (store.root / p).read_bytes() for p in state(store) if not p.startswith("tmp")})
    assert contents[0] == contents[1]
    assert np.all([len(c) == 3 for c in contents])
