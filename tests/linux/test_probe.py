"""The probes tell the truth about real filesystems and leave nothing behind."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import disk
from needs import need_root, need_tool

from layerkit.linux import mounts, probe
from layerkit.linux.probe import Features
from layerkit.model.errors import UsageError


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path: Path) -> Iterator[None]:
    descriptors = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert list(tmp_path.rglob(".layerkit-probe*")) == []
    assert [m for m in mounts.mount_table() if "layerkit-probe" in m.point] == []


def test_the_host_of_the_tests_can_do_everything_but_what_its_disk_cannot(tmp_path: Path) -> None:
    need_root()
    features = Features(tmp_path)
    answers = {row.feature: row.present for row in features.explain()}
    absent = [name for name, present in answers.items() if not present and "reflink" not in name]
    assert absent == [], "a machine for these tests needs Linux 6.16 and a disk filesystem"
    assert features.max_layers == 500
    assert features.filesystem == mounts.mount_of(tmp_path).fstype  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_reflinks_are_found_where_they_are(tmp_path: Path, kind: str) -> None:
    with disk(tmp_path, kind, size=400 << 20) as folder:
        features = Features(folder / "not" / "yet")
        assert features.filesystem == kind
        assert features.reflink
        assert features.erofs_device
        assert features.erofs_directio
        assert features.store_idmap


def test_what_tmpfs_cannot_do(tmp_path: Path) -> None:
    need_root()
    (tmp_path / "fs").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path / "fs"], check=True)
    try:
        features = Features(tmp_path / "fs")
        assert not features.erofs_file
        assert not features.erofs_directio
        assert not features.reflink
        # Loop devices serve in place of files.
        assert features.erofs
        assert features.erofs_device
        assert features.erofs_idmap
        assert features.overlay_trusted
    finally:
        subprocess.run(["umount", tmp_path / "fs"], check=True)


def test_answers_are_kept_and_the_value_cannot_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features(tmp_path)
    first = features.reflink
    monkeypatch.setattr("layerkit.linux.probe._scratch", None)
    assert features.reflink == first
    with pytest.raises(dataclasses.FrozenInstanceError):
        features.store = tmp_path  # type: ignore[misc]


def test_an_ordinary_user_gets_noes_and_no_errors(tmp_path: Path) -> None:
    need_root()
    place = tmp_path / "theirs"
    place.mkdir()
    os.chown(place, 65534, 65534)
    for parent in (tmp_path, *tmp_path.parents[:-2]):
        parent.chmod(0o755)
    code = (
        f"import sys, os, json; sys.path[:0] = {[p for p in sys.path if p]!r}\n"
        "from layerkit.linux.probe import Features\nfrom pathlib import Path\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        f"f = Features(Path({str(place)!r}))\n"
        "print(json.dumps([f.privileged, f.can_mount, f.erofs, f.erofs_device, f.erofs_idmap, f.store_idmap,"
        " f.overlay_trusted, f.overlay_userxattr, f.layers_by_fd, f.max_layers]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not any(json.loads(done.stdout))
    assert list(place.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name another store"):
        _ = Features(Path("/proc/sys/store")).reflink


def test_the_tiny_images_are_sound(tmp_path: Path) -> None:
    need_tool("fsck.erofs")
    (tmp_path / "plain").write_bytes(probe.tiny_erofs())
    subprocess.run(["fsck.erofs", tmp_path / "plain"], check=True, stdout=subprocess.DEVNULL)
    assert len(probe.tiny_erofs_over_device()[0]) == 4096


def test_a_broken_image_makes_the_probe_say_no(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_root()
    image, device = probe.tiny_erofs_over_device()
    monkeypatch.setattr(probe, "tiny_erofs_over_device", lambda: (image, device.replace(b"probe", b"other")))
    assert not Features(tmp_path).erofs_device
    monkeypatch.setattr(probe, "tiny_erofs", lambda: bytes(4096))
    assert not Features(tmp_path).erofs
    assert not Features(tmp_path).erofs_idmap


def test_doctor_draws_the_conclusions(tmp_path: Path) -> None:
    need_root()
    from layerkit.hosts.diagnosis.doctor import examine

    report = examine(tmp_path / "store")
    assert report.rendering == "erofs"
    assert report.data_backend == "tar"
    assert report.namespace == "trusted"
    assert report.idmapped
    assert not report.copy_up_clone
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["present"] is True
    assert {name for name, _ in report.conclusions()} >= {"rendering", "data", "copy-up is a clone"}
    assert not (tmp_path / "store").exists()
