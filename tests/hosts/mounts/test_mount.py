"""The mounter against the real kernel: what a mount shows, what is shared, and what a kill leaves."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from needs import need_root, need_tool

from layerkit.hosts.mounts import mount as mounter
from layerkit.hosts.mounts.records import RunFolder
from layerkit.hosts.mounts.spec import MountLayer, MountSpec
from layerkit.linux import mounts
from layerkit.linux import syscalls as sc
from layerkit.linux.syscalls import closing
from layerkit.metaonly import Namespace, data_path
from layerkit.model.errors import LayerkitError, NotFound, StoreError, UnsupportedHost, UsageError

CONTENT = {b"bin/tool": b"#!/bin/sh\necho ran $0 as $(id -u)\n", b"etc/conf": b"key=value\n" * 300}
MAP = (((0, 100_000, 65_536),), ((0, 200_000, 65_536),))


@dataclass
class Lab:
    root: Path
    spec: MountSpec
    run: Path

    def target(self, name: str = "mnt") -> Path:
        path = self.root / name
        path.mkdir(exist_ok=True)
        return path

    def erofs_mounts(self) -> list[mounts.Mount]:
        return [m for m in mounts.mount_table() if m.point.startswith(str(self.run)) and m.fstype == "erofs"]

    def ours(self) -> list[mounts.Mount]:
        return [m for m in mounts.mount_table() if m.point.startswith(str(self.root))]


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def write_meta(folder: Path, prefix: str) -> None:
    """A META by hand: stubs of CONTENT, a link, a setuid mode, owners, an ACL."""
    for path, data in CONTENT.items():
        place = folder / os.fsdecode(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
        os.truncate(place, len(data))
        os.setxattr(place, f"{prefix}.overlay.metacopy", b"\0\4\0\0")
        os.setxattr(place, f"{prefix}.overlay.redirect", b"/" + data_path(sha(data)))
    os.chown(folder / "etc/conf", 1000, 1001)
    (folder / "bin/tool").chmod(0o4755)
    (folder / "etc/link").symlink_to("conf")
    folder.chmod(0o751)
    os.chown(folder, 7, 8)


def write_data(folder: Path) -> None:
    for data in CONTENT.values():
        place = folder / os.fsdecode(data_path(sha(data)))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    need_root()
    need_tool("mkfs.erofs")
    meta, data = tmp_path / "meta", tmp_path / "data"
    meta.mkdir()
    data.mkdir()
    write_meta(meta, "trusted")
    write_data(data)
    blob = f"--blobdev={tmp_path}/data.blob"
    for words in (["meta.erofs", "meta"], ["--chunksize=4096", blob, "data.erofs", "data"]):
        subprocess.run(["mkfs.erofs", "-T0", *words], check=True, cwd=tmp_path, capture_output=True)
    (tmp_path / "mnt").mkdir()
    spec = MountSpec(
        meta=MountLayer(tmp_path / "meta.erofs", "sha256:meta"),
        data=(MountLayer(tmp_path / "data.erofs", "sha256:data", tmp_path / "data.blob"),),
        namespace=Namespace.TRUSTED,
        target=tmp_path / "mnt",
        label={"image": "tiny"},
    )
    try:
        yield Lab(tmp_path, spec, tmp_path / "run")
    finally:
        for entry in reversed(mounts.mount_table()):
            if entry.point.startswith(str(tmp_path)):
                mounts.detach(entry.point, lazy=True)


def folders(lab: Lab) -> MountSpec:
    return replace(lab.spec, meta=MountLayer(lab.root / "meta"), data=(MountLayer(lab.root / "data"),))


def check_shown(target: Path, uid_shift: int = 0, gid_shift: int = 0) -> None:
    for path, data in CONTENT.items():
        assert (target / os.fsdecode(path)).read_bytes() == data
    shown = (target / "etc/conf").stat()
    assert (shown.st_uid, shown.st_gid) == (1000 + uid_shift, 1001 + gid_shift)
    assert stat.S_IMODE((target / "bin/tool").stat().st_mode) == 0o4755
    assert (target / "etc/link").readlink() == Path("conf")
    assert sorted(p.name for p in target.iterdir()) == ["bin", "etc"]
    ran = subprocess.run([target / "bin/tool"], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("ran ")
    # As a program's loader maps it; the shared layers below are noexec, and that must not show.
    with (target / "bin/tool").open("rb") as f, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_EXEC) as m:
        assert m[:2] == b"#!"


@pytest.mark.parametrize("kind", ["erofs", "folder", "mixed"])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_mount_shows_the_data_under_metas_owners(lab: Lab, kind: str, mapped: bool) -> None:
    spec = {
        "erofs": lab.spec,
        "folder": folders(lab),
        "mixed": replace(lab.spec, data=(MountLayer(lab.root / "data"),)),
    }[kind]
    record = mounter.mount(replace(spec, idmap=MAP if mapped else None), run=lab.run)
    check_shown(lab.target(), *((100_000, 200_000) if mapped else (0, 0)))
    assert mounter.active(lab.run) == [record]
    assert record.label == {"image": "tiny"}
    with pytest.raises(OSError, match="Read-only"):
        (lab.target() / "new").touch()
    mounter.umount(lab.target(), run=lab.run)
    assert lab.ours() == []
    assert mounter.active(lab.run) == []


def test_images_are_mounted_once_and_released_with_the_last(lab: Lab) -> None:
    mounter.mount(lab.spec, run=lab.run)
    once = lab.erofs_mounts()
    assert len(once) == 2
    mounter.mount(replace(lab.spec, target=lab.target("second"), idmap=MAP), run=lab.run)
    assert lab.erofs_mounts() == once
    mounter.umount(lab.target(), run=lab.run)
    assert lab.erofs_mounts() == once
    check_shown(lab.target("second"), 100_000, 200_000)
    mounter.umount(lab.target("second"), run=lab.run)
    assert lab.erofs_mounts() == []
    assert list(RunFolder(lab.run).layers.iterdir()) == []


def test_data_is_read_with_direct_io_and_shared_layers_are_locked_down(lab: Lab) -> None:
    mounter.mount(lab.spec, run=lab.run)
    shared = {Path(m.point).name: m for m in lab.erofs_mounts()}
    assert "directio" in shared["data-sha256:data"].super_options
    for entry in shared.values():
        assert {"ro", "nosuid", "nodev", "noexec"} <= set(entry.options.split(","))
    (top,) = [m for m in mounts.mount_table() if m.point == str(lab.target())]
    assert "nodev" in top.options
    assert "nosuid" not in top.options
    assert stat.S_IMODE(lab.run.stat().st_mode) == 0o700


def test_many_mounts_at_once_from_threads_and_processes(lab: Lab) -> None:
    def one(number: int) -> None:
        target = lab.target(f"at-once-{number}")
        idmap = (((0, 100_000 * (number + 1), 65_536),), ((0, 100_000 * (number + 1), 65_536),))
        mounter.mount(replace(lab.spec, target=target, idmap=idmap), run=lab.run)
        assert (target / "etc/conf").stat().st_uid == 1000 + 100_000 * (number + 1)

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(one, range(20)))
    assert len(lab.erofs_mounts()) == 2
    assert len(mounter.active(lab.run)) == 20
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda n: mounter.umount(lab.target(f"at-once-{n}"), run=lab.run), range(20)))
    assert lab.ours() == []


def test_processes_that_come_and_go_at_once(lab: Lab) -> None:
    children = [
        run_child(
            lab,
            f"""
from dataclasses import replace
for round in range(8):
    target = root / "p{number}"
    target.mkdir(exist_ok=True)
    mounter.mount(replace(spec, target=target), run=root / "run")
    assert (target / "etc/conf").read_bytes().startswith(b"key=value")
    assert (target / "etc/conf").stat().st_uid == 101000
    mounter.umount(target, run=root / "run")
""",
        )
        for number in range(4)
    ]
    for child in children:
        child.communicate(timeout=300)
    assert [child.returncode for child in children] == [0] * 4
    assert lab.ours() == []


def test_a_run_folder_of_another_user_is_refused(lab: Lab) -> None:
    lab.run.mkdir()
    os.chown(lab.run, 12_345, 12_345)
    with pytest.raises(StoreError, match="belongs to uid 12345"):
        mounter.mount(lab.spec, run=lab.run)


CHILD = """
import sys, os, threading, time, signal
from pathlib import Path
sys.path[:0] = {path!r}
from layerkit.hosts.mounts import mount as mounter
from layerkit.hosts.mounts.spec import *
from layerkit.metaonly import Namespace
root = Path({root!r})
spec = MountSpec(MountLayer(root / "meta.erofs", "sha256:meta"),
    (MountLayer(root / "data.erofs", "sha256:data", root / "data.blob"),), Namespace.TRUSTED, root / "mnt",
    idmap=(((0, 100000, 65536),), ((0, 100000, 65536),)))
"""


def run_child(lab: Lab, body: str) -> subprocess.Popen[bytes]:
    text = CHILD.format(path=[p for p in sys.path if p], root=str(lab.root)) + body
    return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE)


@pytest.mark.parametrize("step", range(12))
def test_a_kill_in_mid_mount_leaves_what_clear_stale_and_umount_clear(lab: Lab, step: int) -> None:
    # The child kills itself just before its n-th mount call, which is where the state changes.
    child = run_child(
        lab,
        f"""
from layerkit.linux import mounts, syscalls
from layerkit.linux.syscalls import closing
from layerkit.linux import syscalls as sc
left = {step}
def dying(name, real):
    def call(*a, **k):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return real(*a, **k)
    return call
for module, name in ((mounts, "attach"), (mounts, "detach"), (mounts, "overlay"), (mounts, "erofs"),
        (mounter.RunFolder, "write"), (mounter.RunFolder, "release_unused")):
    setattr(module, name, dying(name, getattr(module, name)))
for _ in range(4):
    mounter.mount(spec, run=root / "run")
    mounter.umount(root / "mnt", run=root / "run")
""",
    )
    assert child.wait(60) == -signal.SIGKILL
    if step % 2:
        with_mount = bool(mounter.active(lab.run))
        mounter.clear_stale(lab.run)
        # A finished mount is nobody's rubbish: clearing leaves it.
        assert bool(mounter.active(lab.run)) == with_mount
        if not with_mount:
            assert lab.ours() == []
    # Whatever was left, the same mount can be made and unmade now.
    if mounter.active(lab.run):
        mounter.umount(lab.target(), run=lab.run)
    mounter.mount(lab.spec, run=lab.run)
    check_shown(lab.target())
    mounter.umount(lab.target(), run=lab.run)
    assert lab.ours() == []
    assert list(RunFolder(lab.run).records.iterdir()) == []


def test_a_kill_at_any_time(lab: Lab) -> None:
    rounds = 3 * int(os.environ.get("LAYERKIT_TEST_FUZZ", "1"))
    for number in range(rounds):
        child = run_child(
            lab,
            'print("go", flush=True)\nwhile True:\n    mounter.mount(spec, run=root / "run")\n'
            '    mounter.umount(root / "mnt", run=root / "run")\n',
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.013 + 0.0037 * number)
        child.kill()
        child.wait()
        child.stdout.close()
        mounter.clear_stale(lab.run)
        for record in mounter.active(lab.run):
            mounter.umount(Path(record.target), run=lab.run)
        assert lab.ours() == []
        # The kill may have come before there was a folder for records.
        assert list(RunFolder(lab.run).records.glob("*")) == []


def test_umount_clears_a_mount_cut_short(lab: Lab) -> None:
    mounter.mount(lab.spec, run=lab.run)
    mounts.detach(lab.target())
    assert len(lab.erofs_mounts()) == 2
    mounter.umount(lab.target(), run=lab.run)
    assert lab.ours() == []
    with pytest.raises(NotFound, match="nothing is mounted"):
        mounter.umount(lab.target(), run=lab.run)


def test_umount_under_another_store_releases_the_layers_of_its_own(lab: Lab) -> None:
    """Whoever forgets the store's name when unmounting must not leave its data mounted for ever."""
    mounter.mount(lab.spec, run=lab.run)
    mounter.umount(lab.spec.target, run=lab.root / "runs-of-another-store")
    assert lab.ours() == []
    assert mounter.active(lab.run) == []


def test_clear_stale_leaves_living_mounts_and_forgets_dead_namespaces(lab: Lab) -> None:
    mounter.mount(lab.spec, run=lab.run)
    dead = lab.run / "mnt-1"
    (dead / "records").mkdir(parents=True)
    (dead / "lock").touch()
    assert mounter.clear_stale(lab.run) == ["folder mnt-1"]
    check_shown(lab.target())


def test_a_folder_of_a_living_namespace_is_left_alone(lab: Lab) -> None:
    need_tool("unshare")
    mounter.mount(lab.spec, run=lab.run)
    with subprocess.Popen(["unshare", "-m", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin and other.stdout
        other.stdin.write(b"x\n")
        other.stdin.flush()
        other.stdout.readline()
        name = f"mnt-{Path(f'/proc/{other.pid}/ns/mnt').stat().st_ino}"
        (lab.run / name).mkdir()
        (lab.run / name / "lock").touch()
        assert mounter.clear_stale(lab.run) == []
    assert mounter.clear_stale(lab.run) == [f"folder {name}"]


def test_a_mount_in_use_is_not_unmounted_and_says_by_whom(lab: Lab) -> None:
    mounter.mount(lab.spec, run=lab.run)
    with (lab.target() / "etc/conf").open("rb"):
        with pytest.raises(LayerkitError, match=rf"in use by {os.getpid()}"):
            mounter.umount(lab.target(), run=lab.run)
        assert len(mounter.active(lab.run)) == 1
        mounter.umount(lab.target(), run=lab.run, lazy=True)
    assert lab.ours() == []


def test_mounts_of_others_are_not_unmounted(lab: Lab) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "none", lab.target()], check=True)
    with pytest.raises(NotFound, match="tmpfs that layerkit did not make"):
        mounter.umount(lab.target(), run=lab.run)
    assert len(lab.ours()) == 1


def test_names_with_spaces_commas_colons_and_newlines(lab: Lab) -> None:
    for name in ("a b", "a,b:c", "a\\134b\nc", "ü", "\udcff", "x" * 250):
        target = lab.target(name)
        mounter.mount(replace(lab.spec, target=target, upper=lab.root / f"up-{name[:40]}"), run=lab.run)
        with pytest.raises(UsageError, match="already"):
            mounter.mount(replace(lab.spec, target=target), run=lab.run)
        mounter.umount(target, run=lab.run)
        assert lab.ours() == []


def test_paths_may_be_symbolic_links(lab: Lab) -> None:
    link = lab.root / "link"
    link.symlink_to(lab.root, target_is_directory=True)
    spec = replace(lab.spec, target=link / "mnt", meta=MountLayer(link / "meta.erofs", "m"))
    record = mounter.mount(spec, run=link / "run")
    assert record.target == str(lab.root / "mnt")
    mounter.umount(link / "mnt", run=lab.run)
    assert lab.ours() == []


class TestUpper:
    def test_metadata_changes_copy_no_data_and_the_root_looks_like_metas(self, lab: Lab) -> None:
        os.setxattr(lab.root / "meta", "user.note", b"kept")
        spec = replace(folders(lab), idmap=MAP, upper=lab.root / "upper")
        record = mounter.mount(spec, run=lab.run)
        target = lab.target()
        assert record.work == str(lab.root / "upper.work")
        root = target.stat()
        assert (stat.S_IMODE(root.st_mode), root.st_uid, root.st_gid) == (0o751, 100_007, 200_008)
        assert os.getxattr(target, "user.note") == b"kept"
        (target / "etc/conf").chmod(0o600)
        assert (lab.root / "upper/etc/conf").stat().st_blocks <= 8
        assert "trusted.overlay.metacopy" in os.listxattr(lab.root / "upper/etc/conf")
        assert (target / "etc/conf").read_bytes() == CONTENT[b"etc/conf"]
        (target / "new").write_bytes(b"new")
        mounter.umount(target, run=lab.run)
        mounter.mount(spec, run=lab.run)
        assert (target / "new").read_bytes() == b"new"
        assert stat.S_IMODE((target / "etc/conf").stat().st_mode) == 0o600
        mounter.umount(target, run=lab.run)

    def test_one_upper_serves_one_mount(self, lab: Lab) -> None:
        spec = replace(lab.spec, upper=lab.root / "upper")
        mounter.mount(spec, run=lab.run)
        with pytest.raises(UsageError, match="its own"):
            mounter.mount(replace(spec, target=lab.target("second"), work=lab.root / "w2"), run=lab.run)
        with pytest.raises(UsageError, match="its own"):
            # Another store's run folder does not know the record; the mount table does.
            mounter.mount(replace(spec, target=lab.target("second"), work=lab.root / "w2"), run=lab.root / "run2")

    def test_what_a_failed_mount_made_is_removed(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> int:
            assert (lab.root / "upper").exists() and (lab.root / "upper.work").exists()
            raise OSError(errno.EINVAL, "overlay: no_such_option")

        monkeypatch.setattr("layerkit.linux.mounts.overlay", refuse)
        with pytest.raises(OSError, match="no_such_option"):
            mounter.mount(replace(lab.spec, upper=lab.root / "upper"), run=lab.run)
        assert not (lab.root / "upper").exists()
        assert not (lab.root / "upper.work").exists()
        assert lab.ours() == []
        assert list(RunFolder(lab.run).records.iterdir()) == []

    def test_refusals(self, lab: Lab) -> None:
        spec = replace(lab.spec, upper=lab.root / "upper")
        (lab.root / "full").mkdir()
        (lab.root / "full/precious").touch()

        def refused(match: str, **changes: object) -> None:
            with pytest.raises(UsageError, match=match):
                mounter.mount(replace(spec, **changes), run=lab.run)  # type: ignore[arg-type]

        refused("not empty", work=lab.root / "full")
        refused("beside the upper", work=lab.root / "upper/work")
        refused("overlaps the target", upper=lab.target() / "up")
        refused("overlaps the layer", meta=MountLayer(lab.root / "meta"), upper=lab.root / "meta/up")
        refused("different mounts", work=Path("/dev/shm/layerkit-test-work"))
        refused("needs --upper", upper=None, work=lab.root / "w")
        mounter.mount(lab.spec, run=lab.run)
        subprocess.run(["mount", "-t", "overlay", "x", "-o", f"lowerdir={lab.root}/meta:{lab.root}/full",
                        lab.target("over")], check=True)  # fmt: skip
        refused("lies on an overlay", upper=lab.target("over") / "etc/up", target=lab.target("third"))
        assert (lab.root / "full/precious").exists()


class TestRefusals:
    def test_targets(self, lab: Lab) -> None:
        (lab.root / "file").touch()
        for target, match in ((lab.root / "none", "make it first"), (lab.root / "file", "not a folder")):
            with pytest.raises(UsageError, match=match):
                mounter.mount(replace(lab.spec, target=target), run=lab.run)
        mounter.mount(lab.spec, run=lab.run)
        with pytest.raises(UsageError, match="already"):
            mounter.mount(lab.spec, run=lab.run)
        assert len(mounter.active(lab.run)) == 1

    def test_the_wrong_namespace_would_read_zeros(self, lab: Lab) -> None:
        with pytest.raises(UsageError, match="would read as zeros"):
            mounter.mount(replace(lab.spec, namespace=Namespace.USER), run=lab.run)
        with pytest.raises(UsageError, match="not a META"):
            mounter.mount(replace(lab.spec, meta=MountLayer(lab.root / "data"), data=()), run=lab.run)
        assert lab.ours() == []

    def test_a_user_namespace_meta_mounts_with_userxattr(self, lab: Lab) -> None:
        meta = lab.root / "meta-user"
        meta.mkdir()
        write_meta(meta, "user")
        spec = replace(folders(lab), meta=MountLayer(meta), namespace=Namespace.USER)
        mounter.mount(spec, run=lab.run)
        check_shown(lab.target())

    def test_options_that_break_stubs(self, lab: Lab) -> None:
        mounter.mount(lab.spec, run=lab.run)
        (top,) = [m for m in mounts.mount_table() if m.point == str(lab.target())]
        assert "nfs_export=on" not in top.super_options and "metacopy=on" not in top.super_options

    def test_layers(self, lab: Lab) -> None:
        data = MountLayer(lab.root / "data.erofs", "k", lab.root / "data.blob")
        for layers, match in (
            ((data,) * 500, "501 layers"),
            ((data, replace(data, path=lab.root / "meta.erofs")), "two images"),
            ((replace(data, key="../up"),), "layer key"),
            ((MountLayer(lab.root / "data"),) * 2, "given twice"),
            ((replace(data, tar=lab.root / "gone"),), "store verify"),
        ):
            with pytest.raises(UsageError, match=match):
                mounter.mount(replace(lab.spec, data=layers), run=lab.run)
        assert lab.ours() == []

    def test_500_layers_are_taken(self, lab: Lab) -> None:
        extra = []
        for number in range(498):
            (lab.root / f"d{number}").mkdir()
            extra.append(MountLayer(lab.root / f"d{number}"))
        mounter.mount(replace(folders(lab), data=(*extra, MountLayer(lab.root / "data"))), run=lab.run)
        check_shown(lab.target())

    def test_an_overlay_on_an_overlay_on_an_overlay_is_explained(self, lab: Lab) -> None:
        below = folders(lab).meta
        for number in range(2):
            subprocess.run(
                ["mount", "-t", "overlay", "x", "-o", f"metacopy=on,lowerdir={below.path}:{lab.root}/data",
                 lab.target(f"o{number}")], check=True,
            )  # fmt: skip
            below = MountLayer(lab.target(f"o{number}"))
        with pytest.raises((OSError, UsageError), match=r"stacks two|not a META"):
            mounter.mount(replace(lab.spec, meta=below, data=(MountLayer(below.path / "etc"),)), run=lab.run)

    def test_an_ordinary_user_is_told_what_to_do(self, lab: Lab) -> None:
        code = (
            f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}\n"
            "import os\nfrom layerkit.hosts.mounts.spec import *\nfrom layerkit.hosts.mounts.mount import mount\n"
            "from layerkit.metaonly import Namespace\n"
            "from layerkit.linux import userns\nfrom layerkit.model.errors import UnsupportedHost\n"
            "from pathlib import Path\n"
            "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
            "print(userns.can_mount(), userns.is_privileged())\n"
            "spec = MountSpec(MountLayer(Path('/usr')), (), Namespace.USER, Path('/tmp'))\n"
            "try: mount(spec, run=Path('/tmp/x'))\n"
            "except UnsupportedHost as e: print(e)"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert out.startswith("False False\nthis host does not offer mounting for this user; run as root")

    def test_a_broken_image_is_refused_and_nothing_stays(self, lab: Lab) -> None:
        (lab.root / "meta.erofs").write_bytes(bytes(8192))
        with pytest.raises(OSError):
            mounter.mount(lab.spec, run=lab.run)
        assert lab.ours() == []


class TestBelow:
    """The pieces under the mounter."""

    def test_a_loop_device_serves_where_the_file_cannot_be_mounted(self, lab: Lab) -> None:
        folder = Path(f"/dev/shm/layerkit-test-{os.getpid()}")
        folder.mkdir()
        try:
            image = folder / "meta.erofs"
            image.write_bytes((lab.root / "meta.erofs").read_bytes())
            with closing(mounts.erofs(image, directio=True)) as fd:
                assert Path(f"/proc/self/fd/{fd}/etc/link").readlink() == Path("conf")
        finally:
            (folder / "meta.erofs").unlink(missing_ok=True)
            folder.rmdir()

    def test_data_through_loop_devices(self, lab: Lab) -> None:
        spec = lab.spec.data[0]
        with closing(mounts.erofs(spec.path, spec.tar, directio=True, loop_only=True)) as fd:
            for data in CONTENT.values():
                assert Path(f"/proc/self/fd/{fd}", os.fsdecode(data_path(sha(data)))).read_bytes() == data

    def test_layers_by_name_where_descriptors_are_not_taken(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Linux 6.5 to 6.12 cannot be run here: their refusal of descriptors is played by an unknown command.
        monkeypatch.setattr("layerkit.linux.syscalls.FSCONFIG_SET_FD", 99)
        mounter.mount(replace(lab.spec, upper=lab.root / "upper"), run=lab.run)
        check_shown(lab.target())

    def test_an_idmapped_clone_is_attached_for_a_moment_where_it_must_be(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, calls = mounts.overlay, []

        def refuse_first(*args: object, **kwargs: object) -> int:
            calls.append(1)
            if len(calls) == 1:
                raise OSError(22, "as a kernel before 6.15 says to a detached layer")
            return real(*args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(mounts, "overlay", refuse_first)
        mounter.mount(replace(lab.spec, idmap=MAP), run=lab.run)
        check_shown(lab.target(), 100_000, 200_000)
        assert len(lab.ours()) == 3

    def test_a_filesystem_that_cannot_be_idmapped_is_named(self, lab: Lab) -> None:
        with closing(sc.open_tree("/proc")) as fd, pytest.raises(UnsupportedHost, match="idmapped"):
            from layerkit.linux import userns

            with closing(userns.userns_fd(*MAP)) as namespace:
                mounts.idmap(fd, namespace)

    def test_descriptors_do_not_leak(self, lab: Lab) -> None:
        before = len(os.listdir("/proc/self/fd"))
        for number in range(3):
            spec = replace(lab.spec, idmap=MAP, upper=lab.root / f"u{number}")
            mounter.mount(spec, run=lab.run)
            with pytest.raises(UsageError):
                mounter.mount(spec, run=lab.run)
            mounter.umount(lab.target(), run=lab.run)
        assert len(os.listdir("/proc/self/fd")) == before
        assert threading.active_count() < 50
