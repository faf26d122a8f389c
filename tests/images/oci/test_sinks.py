"""Layouts and archives as they are written: whole or not at all, and the same bytes each time."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from made_images import MANIFEST, Layout, below, simple, tar
from needs import need_root

from layerkit.formats.oci import documents as oci
from layerkit.images import transfer
from layerkit.images.oci.archive_sink import ArchiveSink
from layerkit.images.oci.layout_sink import LayoutSink
from layerkit.images.open import open_sink, open_source
from layerkit.model.descriptor import Descriptor, Platform
from layerkit.model.digest import Digest
from layerkit.model.errors import Cancelled, DigestMismatch, InvalidImage, NotFound, UsageError
from layerkit.model.ports import ImageSink

FUZZ = int(os.environ.get("LAYERKIT_TEST_FUZZ", "1"))
FORMS = ["oci", "oci-archive", "docker-archive"]


def _put(source: Path | str, sink: ImageSink, name: str = "one", chosen: str = "") -> None:
    opened = open_source(f"{source}{chosen}")
    try:
        transfer.copy_image(opened, sink, opened.image(), name)
    finally:
        opened.close()


def _copy(source: Path | str, target: str, name: str = "one") -> None:
    sink = open_sink(target)
    try:
        _put(source, sink, name)
        sink.commit()
    finally:
        sink.abort()


def _digest(text: str) -> str:
    source = open_source(text)
    try:
        image = source.image()
        for layer in image.layers:
            data = b"".join(map(bytes, transfer.blob_chunks(source, layer.descriptor)))
            assert Digest.of(data) == layer.descriptor.digest
        return str(image.descriptor.digest)
    finally:
        source.close()


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    return simple("one").folder(tmp_path / "source")


def test_a_layout_holds_nothing_but_the_layout(layout: Path, tmp_path: Path) -> None:
    _copy(layout, f"oci:{tmp_path}/copy")
    blobs = {name for name in below(layout) if name.startswith("blobs")}
    assert set(below(tmp_path / "copy")) == blobs | {"index.json", "oci-layout"}
    umask = os.umask(0)
    os.umask(umask)
    for name in below(tmp_path / "copy"):
        path = tmp_path / "copy" / name
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask


def test_archive_members(layout: Path, tmp_path: Path) -> None:
    _copy(layout, f"oci-archive:{tmp_path}/copy.tar")
    with tarfile.open(tmp_path / "copy.tar") as archive:
        members = archive.getmembers()
    assert members[0].name == "oci-layout"
    assert members[-1].name == "index.json"
    assert {(m.uid, m.gid, m.mtime, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
    assert {m.mode for m in members} == {0o644, 0o755}
    assert (tmp_path / "copy.tar").stat().st_size % 10240 == 0
    subprocess.run(["tar", "-tf", tmp_path / "copy.tar"], check=True, capture_output=True)


@pytest.mark.parametrize("form", ["oci-archive", "docker-archive"])
def test_archives_are_the_same_bytes_each_time(form: str, layout: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        _copy(layout, f"{form}:{tmp_path}/{name}")
        time.sleep(0.01)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    out = io.BytesIO()
    out.isatty = lambda: False  # type: ignore[method-assign]
    sink = open_sink(f"{form}:-", stdout=out)
    _put(layout, sink)
    assert out.getvalue() == b""
    sink.commit()
    assert out.getvalue() == (tmp_path / "a").read_bytes()


def test_archive_through_a_link_and_into_a_pipe(layout: Path, tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    _copy(layout, f"oci-archive:{tmp_path}/link")
    assert (tmp_path / "link").is_symlink()
    want = (tmp_path / "real").read_bytes()
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
        _copy(layout, f"oci-archive:{tmp_path}/pipe")
        assert reader.stdout is not None
        assert reader.stdout.read() == want


# -- a layout that is there already ------------------------------------------------------------------------


def test_adding_keeps_what_is_there(tmp_path: Path) -> None:
    old = simple("one", "two")
    old.index |= {"x-unknown": {"kept": [1]}, "annotations": {"k": "v"}}
    old.index["manifests"][0] |= {
        "x-entry": True,
        "platform": {"os": "linux", "architecture": "x", "os.version": "1"},
    }
    old.index["manifests"].append(
        {"mediaType": "application/x.unknown", "digest": "sha256:" + "00" * 32, "size": 5}
    )
    target = old.folder(tmp_path / "target")
    before = json.loads((target / "index.json").read_bytes())
    new = Layout()
    new.list(new.image(tar(("new", b"new"))), "three")
    _copy(new.folder(tmp_path / "new"), f"oci:{target}", "three")
    after = json.loads((target / "index.json").read_bytes())
    assert after["manifests"][:-1] == before["manifests"]
    assert {k: v for k, v in after.items() if k != "manifests"} == {
        k: v for k, v in before.items() if k != "manifests"
    }
    assert (target / "oci-layout").read_bytes() == old.layout_bytes
    for name in ("two", "three"):
        _digest(f"oci:{target}:{name}")


def test_a_name_moves_to_the_new_image(tmp_path: Path) -> None:
    target = simple("one").folder(tmp_path / "target")
    old = _digest(f"{target}:one")
    new = Layout()
    new.list(new.image(tar(("new", b"new"))), "x")
    _copy(new.folder(tmp_path / "new"), f"oci:{target}", "one")
    assert _digest(f"{target}:one") != old
    assert _digest(f"oci:{target}@{old}") == old
    _copy(new.folder(tmp_path / "new"), f"oci:{target}", "one")
    assert len(json.loads((target / "index.json").read_bytes())["manifests"]) == 2


def test_two_names_are_two_images_also_with_platforms(layout: Path, tmp_path: Path) -> None:
    new = Layout()
    new.list(new.image(tar(("new", b"new")), arch="arm64"), "x")
    target = tmp_path / "target"
    _copy(layout, f"oci:{target}", "one")
    _copy(new.folder(tmp_path / "new"), f"oci:{target}", "two")
    assert all("platform" in e for e in json.loads((target / "index.json").read_bytes())["manifests"])
    with pytest.raises(NotFound, match=r"2 images.*one \(linux/amd64\), two \(linux/arm64\)"):
        open_source(f"oci:{target}").image()


def test_one_name_for_several_platforms_is_like_an_index(tmp_path: Path) -> None:
    layout = Layout()
    for arch in ("s390x", "arm64"):
        entry = layout.image(tar((arch, b"")), arch=arch)
        layout.list(entry | {"platform": {"os": "linux", "architecture": arch}}, "multi")
    source = open_source(str(layout.folder(tmp_path / "lay")))
    assert source.image(Platform("linux", "arm64")).platform.architecture == "arm64"
    assert source.image(Platform("linux", "s390x")).platform.architecture == "s390x"
    source.close()
    layout.list(entry | {"platform": None, "digest": "sha256:" + "00" * 32}, "multi")
    with pytest.raises(NotFound, match="3 are named 'multi', so one must be chosen"):
        open_source(f"oci:{layout.folder(tmp_path / 'lay')}:multi").image()


# -- nothing half-made -------------------------------------------------------------------------------------


def _state(path: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}


@pytest.mark.parametrize("form", ["oci-archive", "docker-archive"])
def test_a_blob_that_failed_leaves_no_bytes_in_the_archive(form: str, layout: Path, tmp_path: Path) -> None:
    sink = open_sink(f"{form}:{tmp_path}/failed")
    with pytest.raises(DigestMismatch):
        sink.put_blob(Descriptor("x", Digest.of(b""), 5 << 20), [b"x" * (1 << 20)] * 5)
    _put(layout, sink)
    sink.commit()
    _copy(layout, f"{form}:{tmp_path}/clean")
    assert (tmp_path / "failed").read_bytes() == (tmp_path / "clean").read_bytes()


@pytest.mark.parametrize("victim", ["blobs", "blobs/sha256"])
def test_a_commit_does_not_write_through_links(victim: str, layout: Path, tmp_path: Path) -> None:
    target = simple("two").folder(tmp_path / "target")
    sink = LayoutSink(str(target))
    sink.put_blob(Descriptor("x", Digest.of(b"xyz"), 3), [b"xyz"])
    (target / victim).rename(tmp_path / "victim")
    (target / victim).symlink_to(tmp_path / "victim")
    with pytest.raises(InvalidImage, match="is a link or a file, not a folder"):
        sink.commit()
    assert not list((tmp_path / "victim").rglob(Digest.of(b"xyz").hex))
    assert sorted(p.name for p in target.iterdir()) == ["blobs", "index.json", "oci-layout"]


@pytest.mark.parametrize("form", FORMS)
def test_disk_full_at_every_point(form: str, layout: Path, tmp_path: Path) -> None:
    """A filesystem of 80 KiB, filled up to a point that moves page by page: each write fails once."""
    need_root()
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80k,nr_inodes=40", "tmpfs", disk], check=True)
    try:
        outcomes = set()
        for pages in range(21):
            (disk / "filler").write_bytes(bytes(4096 * pages))
            try:
                _copy(layout, f"{form}:{disk}/target")
                outcomes.add("done")
                assert _digest(f"{disk}/target:one")
                subprocess.run(["rm", "-rf", disk / "target"], check=True)
            except OSError as error:
                outcomes.add("full")
                assert error.errno == errno.ENOSPC
                assert error.filename is not None
                assert str(error.filename).startswith(str(disk))
            assert below(disk) == ["filler"]
        assert outcomes == {"done", "full"}
    finally:
        subprocess.run(["umount", disk], check=True)


def test_disk_full_while_adding_changes_nothing(layout: Path, tmp_path: Path) -> None:
    need_root()
    disk = tmp_path / "disk"
    disk.mkdir()
    new = Layout()
    new.list(new.image(tar(("new", os.urandom(9000)))), "two")
    new.folder(tmp_path / "new")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", disk], check=True)
    try:
        _copy(layout, f"oci:{disk}/target")
        before, full = _state(disk / "target"), 0
        for pages in range(30):
            with contextlib.suppress(OSError):
                (disk / "filler").write_bytes(bytes(4096 * pages))
            try:
                _copy(tmp_path / "new", f"oci:{disk}/target", "two")
                subprocess.run(["rm", "-rf", disk / "target"], check=True)
                (disk / "filler").unlink()
                _copy(layout, f"oci:{disk}/target")
            except OSError:
                full += 1
                assert _state(disk / "target") == before
        assert full > 3
    finally:
        subprocess.run(["umount", disk], check=True)


def test_filesystem_without_nameless_files(layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    sink = ArchiveSink(str(tmp_path / "x.tar"))
    (aside,) = {p.name for p in tmp_path.iterdir()} - {"source"}
    assert (tmp_path / aside).stat().st_mode & 0o777 == 0o700
    assert len(below(tmp_path / aside)) == 2, "a folder with the file"
    sink.abort()
    assert below(tmp_path) == ["source", *(f"source/{name}" for name in below(layout))]
    _copy(layout, f"oci-archive:{tmp_path}/x.tar")
    assert _digest(f"{tmp_path}/x.tar") == _digest(str(layout))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "x.tar"]


# -- several writers, killed writers -----------------------------------------------------------------------


def _write_one(source: str, target: str, name: str) -> None:
    _copy(f"{source}/{name}", target, name)


def _sources(path: Path, count: int) -> list[str]:
    names = [f"n{i}" for i in range(count)]
    for name in names:
        image = Layout()
        image.list(image.image(tar(("same", b"same")), tar((name, name.encode() * 1000))), name)
        image.folder(path / name)
    return names


def test_many_processes_into_one_new_layout(tmp_path: Path) -> None:
    names = _sources(tmp_path / "sources", 6)
    context = multiprocessing.get_context("fork")
    for round_ in range(2 * FUZZ):
        target = f"oci:{tmp_path}/target{round_}"
        workers = [context.Process(target=_write_one, args=(str(tmp_path / "sources"), target, n)) for n in names]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
            assert worker.exitcode == 0
        for name in names:
            _digest(f"{target}:{name}")
        assert sorted(p.name for p in Path(target[4:]).iterdir()) == ["blobs", "index.json", "oci-layout"]


def test_threads_put_blobs_into_one_sink(tmp_path: Path) -> None:
    blobs = [os.urandom(50_000 + i) for i in range(8)]
    for sink in (LayoutSink(str(tmp_path / "lay")), ArchiveSink(str(tmp_path / "a.tar"))):
        entries = [Descriptor(oci.LAYER_TAR, Digest.of(blob), len(blob)) for blob in blobs]
        threads = [
            threading.Thread(
                target=sink.put_blob, args=(entry, [blob[i : i + 7000] for i in range(0, len(blob), 7000)])
            )
            for entry, blob in zip(entries, blobs, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        data = oci.manifest_json(oci.EMPTY_DESCRIPTOR, entries)
        sink.put_blob(oci.EMPTY_DESCRIPTOR, [b"{}"])
        sink.put_manifest(Descriptor(MANIFEST, Digest.of(data), len(data)), data, "x")
        sink.commit()
    for place in ("lay", "a.tar"):
        source = open_source(str(tmp_path / place))
        for entry, blob in zip(entries, blobs, strict=True):
            assert b"".join(map(bytes, transfer.blob_chunks(source, entry))) == blob
        source.close()


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """After SIGKILL what is listed is whole, and the next writer finds no rubbish it cannot clear."""
    names = _sources(tmp_path / "sources", 4)
    rng = random.Random(4)
    seen: set[int] = set()
    target = tmp_path / "target"

    def begin() -> int:
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                for name in names:
                    _write_one(str(tmp_path / "sources"), f"oci:{target}", name)
                    _write_one(str(tmp_path / "sources"), f"oci-archive:{tmp_path}/x.tar", name)
            os._exit(0)
        return pid

    # How long it takes when it is left alone, on this machine at this moment.
    start = time.monotonic()
    os.waitpid(begin(), 0)
    whole = time.monotonic() - start
    subprocess.run(["rm", "-rf", target], check=True)
    for number in range(60 * FUZZ):
        if number >= 15 * FUZZ and len(seen) > 1:
            break
        pid = begin()
        time.sleep(rng.random() * whole)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        there = sorted(p.name for p in tmp_path.iterdir())
        assert set(there) <= {"sources", "target", "x.tar"} or sum(".layerkit-" in name for name in there) <= 1
        if (tmp_path / "x.tar").exists():
            _digest(f"oci-archive:{tmp_path}/x.tar")
        listed = []
        if (target / "index.json").exists():
            listed = [
                e["annotations"][oci.REF_NAME]
                for e in json.loads((target / "index.json").read_bytes())["manifests"]
            ]
        for name in listed:
            _digest(f"oci:{target}:{name}")
        seen.add(len(listed))
        # The machine may be busier by now, or less so.
        whole *= 1.2 if not listed else 0.9 if len(listed) == len(names) else 1
        if len(listed) == len(names):
            subprocess.run(["rm", "-rf", target], check=True)
    _copy(tmp_path / "sources/n0", f"oci:{target}")
    assert sorted(p.name for p in target.iterdir()) == ["blobs", "index.json", "oci-layout"]
    assert len(seen) > 1


def test_a_reader_during_writes_sees_whole_images(tmp_path: Path) -> None:
    names = _sources(tmp_path / "sources", 12)
    target = tmp_path / "target"
    _copy(tmp_path / "sources/n0", f"oci:{target}", "n0")

    def write_all() -> None:
        for name in names:
            _write_one(str(tmp_path / "sources"), f"oci:{target}", name)

    writer = threading.Thread(target=write_all)
    writer.start()
    reads = 0
    while writer.is_alive() or reads == 0:
        for entry in json.loads((target / "index.json").read_bytes())["manifests"]:
            _digest(f"oci:{target}@{entry['digest']}")
            reads += 1
    writer.join()
    assert len(json.loads((target / "index.json").read_bytes())["manifests"]) == len(names)


# -- what docker reads -------------------------------------------------------------------------------------


def test_docker_archive_lists_images_only(layout: Path, tmp_path: Path) -> None:
    sink = open_sink(f"docker-archive:{tmp_path}/x.tar")
    _put(layout, sink, "app")
    _put(layout, sink, "h:5000/app:v2")
    sink.commit()
    with tarfile.open(tmp_path / "x.tar") as archive:
        (entry,) = json.load(archive.extractfile("manifest.json"))  # type: ignore[arg-type]
    assert entry["RepoTags"] == ["app:latest", "h:5000/app:v2"]
    assert entry["Layers"][0].startswith("blobs/sha256/")
    index = Descriptor(oci.INDEX, Digest.of(oci.index_json([])), len(oci.index_json([])))
    sink = open_sink(f"docker-archive:{tmp_path}/y.tar")
    sink.put_manifest(index, oci.index_json([]), "multi")
    with pytest.raises(UsageError, match="--platform"):
        sink.commit()
    assert not (tmp_path / "y.tar").exists()


def test_start_is_light(layout: Path) -> None:
    """Numpy alone takes as long to load as Python itself; an image is opened without it."""

    def loaded(step: str) -> set[str]:
        code = f"import sys; from layerkit.images import open as r; {step}; print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return {name.partition(".")[0] for name in done.stdout.split()}

    heavy = {"numpy", "docker", "zstandard", "isal", "tarsafe"}
    assert not loaded("r.parse('oci:x')") & (heavy | {"msgspec"})
    assert not loaded(f"r.open_source('oci:{layout}').image()") & heavy


@pytest.mark.parametrize("there", [False, True])
def test_an_interrupt_at_any_line_while_it_begins_leaves_nothing(there: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
    for wanted in range(1, 200):
        lines = 0

        def trace(frame: FrameType, event: str, arg: object, wanted: int = wanted) -> Any:
            nonlocal lines
            if not frame.f_code.co_filename.endswith(("oci/layout_sink.py", "durable.py")):
                return None
            lines += event == "line"
            if lines == wanted:
                sys.settrace(None)
                raise Cancelled("now")
            return trace

        came = True
        sys.settrace(trace)
        with contextlib.suppress(Cancelled):
            sink = LayoutSink(str(out))
            sys.settrace(None)
            sink.abort()
            came = False
        sys.settrace(None)
        assert below(tmp_path) == (["out"] if there else []), f"after {wanted} lines"
        if not came:
            assert wanted > 40
            return
    pytest.fail("it never came to an end")
