"""What a runtime unpacked, under another map: the runtime's own mount, idmapped by the kernel, is the judge."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from judge import Shown, differences, snapshot
from needs import need_root, need_tool
from programs import answer, run, run_layerkit, wait_for

import layerkit
import layerkit.api.open
from layerkit.hosts.adopted import mount as adopt
from layerkit.hosts.adopted.mount import FolderChanged
from layerkit.hosts.adopted.sources import Unpacked, find_unpacked
from layerkit.hosts.mounts import mount as mounter
from layerkit.hosts.mounts.spec import MountOptions
from layerkit.linux import mounts
from layerkit.linux.folders.reader import LayerFolder, Marks
from layerkit.linux.syscalls import closing
from layerkit.model.errors import InvalidImage, NotFound, UnsupportedHost, UsageError
from layerkit.store.local import LocalStore

MAP = ["0:100000:65536"]
EXTENTS = ((0, 100000, 65536),)
WAYS = [
    pytest.param("data-only", "erofs", False, id="data-only-idmapped"),
    pytest.param("data-only", "erofs", True, id="data-only-own"),
    pytest.param("data-only", "directory", True, id="data-only-folder"),
    pytest.param("classic", "erofs", False, id="classic-idmapped"),
    pytest.param("classic", "erofs", True, id="classic-own"),
    pytest.param("classic", "directory", True, id="classic-folder"),
]


@contextmanager
def judged(folders: tuple[LayerFolder, ...], work: Path) -> Iterator[Path]:
    """Give the layers as the runtime itself mounts them (overlay, bottom first in ``folders``), idmapped."""
    work.mkdir(exist_ok=True)
    shown = work / "shown"
    shown.mkdir(exist_ok=True)
    lower = [mounts.open_folder(layer.path) for layer in reversed(folders)]
    empty = work / "empty"
    empty.mkdir(exist_ok=True)
    with ExitStack() as stack:
        for fd in lower:
            stack.callback(os.close, fd)
        mapped = [mounts.idmapped_clone(fd, EXTENTS, EXTENTS) for fd in lower]
        for fd in mapped:
            stack.callback(os.close, fd)
        # An overlay wants two layers; the empty one lies at the bottom, where it adds nothing.
        last = stack.enter_context(closing(mounts.open_folder(empty)))
        overlay = stack.enter_context(closing(mounts.overlay(mounts.Layers([*mapped, last]))))
        mounts.attach(overlay, shown)
    try:
        yield shown
    finally:
        mounts.detach(shown, lazy=True)


@contextmanager
def adopted(
    unpacked: Unpacked,
    store: Path,
    target: Path,
    stacking: str = "auto",
    rendering: str = "auto",
    own: bool = False,
    **more: Any,
) -> Iterator[adopt.AdoptReport]:
    target.mkdir(exist_ok=True)
    with LocalStore.open(store) as held:
        report = adopt.mount_unpacked(
            unpacked,
            target,
            layerkit.mapping(MAP),
            held,
            MountOptions(stacking=stacking, rendering=rendering, own_meta=own, **more),
        )
    try:
        yield report
    finally:
        mounter.umount(target, run=mounter.default_run(store), lazy=True)


def state_of(folders: tuple[LayerFolder, ...]) -> str:
    """Return all that a change to the folders would change: the runtime's layers are never written to."""
    find = ["find", *(str(layer.path) for layer in folders), "-printf", "%p %i %m %U %G %s %T@ %C@ %n\\n"]
    return "\n".join(sorted(run(*find).stdout.splitlines()))


@pytest.fixture(scope="module")
def podman_store(
    tiny_image: Path, app_image: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Path]]:
    """Return a root of containers-storage that holds the images ``tiny`` and ``app``, and a folder for runs."""
    need_root()
    need_tool("skopeo", "podman")
    root = tmp_path_factory.mktemp("containers")
    runroot = Path(tempfile.mkdtemp(prefix="lk-adopt-"))
    for name, source in (("tiny", f"oci:{tiny_image}:latest"), ("app", f"oci-archive:{app_image}")):
        store = f"containers-storage:[overlay@{root}+{runroot}]localhost/{name}:latest"
        run("skopeo", "--insecure-policy", "copy", "--quiet", source, store)
    yield root, runroot
    for place in (root / "overlay", runroot / "overlay"):
        subprocess.run(["umount", "--lazy", place], capture_output=True)
    shutil.rmtree(runroot, ignore_errors=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adopt") / "store"


@pytest.fixture(scope="module")
def judged_app(podman_store: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[bytes, Shown]:
    unpacked = find_unpacked(f"containers-storage:[overlay@{podman_store[0]}]app")
    with judged(unpacked.folders, tmp_path_factory.mktemp("judge")) as shown:
        return snapshot(shown)


@pytest.mark.parametrize(("stacking", "rendering", "own"), WAYS)
def test_podmans_layers_of_the_real_image(
    podman_store: tuple[Path, Path],
    judged_app: dict[bytes, Shown],
    store: Path,
    tmp_path: Path,
    stacking: str,
    rendering: str,
    own: bool,
) -> None:
    unpacked = find_unpacked(f"containers-storage:[overlay@{podman_store[0]}]app")
    assert len(unpacked.folders) == 8
    before = state_of(unpacked.folders)
    with adopted(unpacked, store, tmp_path / "m", stacking, rendering, own) as report:
        assert differences(snapshot(tmp_path / "m"), judged_app) == []
        assert report.stacking == stacking
    assert state_of(unpacked.folders) == before


@pytest.mark.parametrize(("stacking", "rendering", "own"), WAYS)
def test_podmans_layers_of_the_odd_image(
    podman_store: tuple[Path, Path], store: Path, tmp_path: Path, stacking: str, rendering: str, own: bool
) -> None:
    """The tiny image has every kind of entry, deletions, opaque folders, ACLs, capabilities, hard links, holes."""
    unpacked = find_unpacked(f"containers-storage:[overlay@{podman_store[0]}]tiny")
    with judged(unpacked.folders, tmp_path / "judge") as shown:
        want = snapshot(shown)
    with adopted(unpacked, store, tmp_path / "m", stacking, rendering, own):
        assert differences(snapshot(tmp_path / "m"), want) == []


def _odd(root: Path) -> tuple[LayerFolder, ...]:
    """Return layers with all that can go between them, written as the kernel would."""
    bottom, middle, top = (root / name for name in ("bottom", "middle", "top"))
    for folder in (bottom, middle, top):
        folder.mkdir(parents=True)
    for name in ("gone", "was-file", "kept", "opaque/below", "deep/a/b/c", "linked", "replaced/by/file", "again"):
        (bottom / name).parent.mkdir(parents=True, exist_ok=True)
        (bottom / name).write_text(f"bottom {name}")
    (bottom / "was-folder").mkdir()
    (bottom / "was-folder/x").write_text("x")
    os.link(bottom / "linked", bottom / "deep/link")
    (bottom / "half").write_text("half")
    os.link(bottom / "half", bottom / "other-half")
    os.link(bottom / "half", bottom / "third")
    os.symlink("kept", bottom / "way")
    (bottom / "behind").mkdir()
    (bottom / "behind/f").write_text("behind")
    os.mknod(middle / "gone", stat.S_IFCHR, 0)
    os.mknod(middle / "again", stat.S_IFCHR, 0)
    os.mknod(middle / "half", stat.S_IFCHR, 0)
    (middle / "was-file").mkdir()
    (middle / "was-file/inside").write_text("inside")
    (middle / "was-folder").write_text("a file now")
    (middle / "opaque").mkdir()
    os.setxattr(middle / "opaque", "trusted.overlay.opaque", b"y")
    (middle / "opaque/new").write_text("new")
    (middle / "replaced").write_text("file")
    # A symlink where a lower layer has a folder: a redirect through it must not be followed.
    os.symlink("deep", middle / "behind")
    (middle / "xw").mkdir()
    (bottom / "xw").mkdir()
    (bottom / "xw/f").write_text("hidden by an empty file")
    os.setxattr(middle / "xw", "trusted.overlay.opaque", b"x")
    (middle / "xw/f").touch()
    os.setxattr(middle / "xw/f", "trusted.overlay.whiteout", b"y")
    (top / "again").write_text("top again")
    (top / "replaced").mkdir()
    (top / "replaced/by").mkdir()
    os.setxattr(top / "replaced", "trusted.overlay.opaque", b"y")
    (top / "replaced/by/file").write_text("top file")
    (top / "deep").mkdir(mode=0o2750)
    os.chown(top / "deep", 7, 8)
    os.setxattr(top / "deep", "trusted.overlay.overlay.opaque", b"escaped")
    os.setxattr(top / "deep", "trusted.overlay.impure", b"y")
    os.setxattr(top / "deep", "user.note", b"kept")
    os.setxattr(top / "again", "trusted.overlay.origin", b"\0\xfb\x1d\0")
    return tuple(LayerFolder(folder, name=folder.name) for folder in (bottom, middle, top))


@pytest.mark.parametrize(("stacking", "rendering", "own"), WAYS)
def test_what_layers_can_do_to_each_other(tmp_path: Path, stacking: str, rendering: str, own: bool) -> None:
    need_root()
    folders = _odd(tmp_path / "layers")
    with judged(folders, tmp_path / "judge") as shown:
        want = snapshot(shown)
    assert (b"./gone" in want, b"./opaque/below" in want, b"./xw/f" in want) == (False, False, False)
    assert want[b"./deep"].xattrs == ((b"trusted.overlay.opaque", b"escaped"), (b"user.note", b"kept"))
    with adopted(Unpacked("odd", "folders", folders), tmp_path / "store", tmp_path / "m", stacking, rendering, own):
        got = snapshot(tmp_path / "m")
    # The kernel counts names that a layer removed (nlink); which of them share an inode must be the same.
    assert differences(got, want) == []
    # Its stubs are told from those over data by content, which name it in another way.
    with LocalStore.open(tmp_path / "store") as held:
        assert held.verify(deep=True) == []
        if rendering == "directory":
            stub = next((tmp_path / "store/meta").glob("*/root/again"))
            os.setxattr(stub, "trusted.overlay.redirect", b"/kept")
            assert "again: a stub that leads nowhere (/kept)" in held.verify(deep=True)[0].problem


def test_wh_files_are_deletions_where_a_mount_program_unpacked(tmp_path: Path) -> None:
    need_root()
    bottom, top = tmp_path / "a/bottom", tmp_path / "a/top"
    for name in ("gone", "opaque/below", "kept", "d/x"):
        (bottom / name).parent.mkdir(parents=True, exist_ok=True)
        (bottom / name).write_text(name)
    for name in (".wh.gone", "opaque/.wh..wh..opq", "opaque/new", "d/.wh.x", "z.wh.z"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(name)
    for marks, want in (
        (Marks.AUFS, ["d", "kept", "opaque", "opaque/new", "z.wh.z"]),
        (Marks.OVERLAY, [".wh.gone", "d", "d/.wh.x", "d/x", "gone", "kept", "opaque", "opaque/.wh..wh..opq",
                         "opaque/below", "opaque/new", "z.wh.z"]),
    ):  # fmt: skip
        folders = tuple(LayerFolder(path, marks) for path in (bottom, top))
        with adopted(Unpacked("wh", "folders", folders), tmp_path / "store", tmp_path / "m"):
            assert sorted(os.fsdecode(p)[2:] for p in snapshot(tmp_path / "m") if p != b".") == want


def test_a_changed_folder_is_refused_and_a_new_one_at_its_place_is_not(tmp_path: Path) -> None:
    need_root()
    folders = _odd(tmp_path / "layers")
    unpacked = Unpacked("odd", "folders", folders)
    target, store = tmp_path / "m", tmp_path / "store"
    with adopted(unpacked, store, target) as report:
        assert report.read_folders == 3
    with adopted(unpacked, store, target) as report:
        assert (report.read_folders, report.meta_bytes) == (0, 0)
    (folders[1].path / "was-file/planted").touch()
    with pytest.raises(FolderChanged, match=r"middle: changed since layerkit read it .* --reread"):
        with adopted(unpacked, store, target):
            pass
    assert not os.path.ismount(target)
    with adopted(unpacked, store, target, reread=True) as report:
        assert report.read_folders == 1
        assert (target / "was-file/planted").exists()
    shutil.rmtree(folders[0].path)
    with pytest.raises(NotFound, match="bottom: the layer bottom is not there"):
        with adopted(unpacked, store, target):
            pass
    folders[0].path.mkdir()
    (folders[0].path / "pulled").write_text("anew")
    with adopted(unpacked, store, target) as report:
        assert report.read_folders == 1
        assert (target / "pulled").read_text() == "anew"


def test_gc_takes_what_removed_layers_left(tmp_path: Path) -> None:
    need_root()
    folders = _odd(tmp_path / "layers")
    store = tmp_path / "store"
    with adopted(Unpacked("odd", "folders", folders), store, tmp_path / "m"):
        layerkit.collect_garbage(store)
        with LocalStore.open(store) as held:
            assert len(held.metas()) == 1
        assert (tmp_path / "m/kept").read_text() == "bottom kept"
    layerkit.collect_garbage(store)
    with LocalStore.open(store) as held:
        assert held.metas() == []
    assert list((store / "index").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("trusted.overlay.redirect", b"/elsewhere", "overlayfs moved this folder"),
        ("user.overlay.redirect", b"/elsewhere", "overlayfs moved this folder"),
        ("user.containers.override_stat", b"0:0:0755", "force_mask"),
    ],
)
def test_folders_that_only_the_runtime_can_read_are_refused(
    tmp_path: Path, name: str, value: bytes, what: str
) -> None:
    need_root()
    (tmp_path / "layer/d").mkdir(parents=True)
    os.setxattr(tmp_path / "layer/d", name, value)
    with pytest.raises(InvalidImage, match=what):
        with adopted(find_unpacked(f"folders:{tmp_path / 'layer'}"), tmp_path / "store", tmp_path / "m"):
            pass


def test_the_runtimes_own_metadata_copies_are_refused(tmp_path: Path) -> None:
    """Their stubs would be taken for data, and read as zeros."""
    need_root()
    (tmp_path / "layer").mkdir()
    (tmp_path / "layer/stub").touch()
    os.truncate(tmp_path / "layer/stub", 100)
    os.setxattr(tmp_path / "layer/stub", "trusted.overlay.metacopy", b"")
    with pytest.raises(InvalidImage, match=r"stub is metadata that the runtime copied"):
        with adopted(find_unpacked(f"folders:{tmp_path / 'layer'}"), tmp_path / "store", tmp_path / "m"):
            pass


@pytest.mark.parametrize("stacking", ["data-only", "classic"])
def test_writing_goes_to_the_upper_alone(tmp_path: Path, stacking: str) -> None:
    need_root()
    folders = _odd(tmp_path / "layers")
    before = state_of(folders)
    unpacked = Unpacked("odd", "folders", folders)
    with adopted(unpacked, tmp_path / "store", tmp_path / "m", stacking, upper=tmp_path / "up"):
        at = tmp_path / "m"
        os.chown(at / "kept", 5, 5)
        (at / "deep/link").write_text("changed")
        (at / "opaque/new").unlink()
        assert ((at / "kept").read_text(), (at / "deep/link").read_text()) == ("bottom kept", "changed")
        assert os.getxattr(tmp_path / "up/kept", "trusted.overlay.metacopy") is not None
        assert not (at / "opaque/new").exists()
    assert state_of(folders) == before
    # Mounted again, cold: the upper's stub finds its data through META.
    with adopted(unpacked, tmp_path / "store", tmp_path / "m", stacking, upper=tmp_path / "up"):
        assert (tmp_path / "m/kept").read_text() == "bottom kept"
        assert (tmp_path / "m/kept").stat().st_uid == 5


def test_classic_metadata_holds_only_what_differs(tmp_path: Path) -> None:
    need_root()
    layer = tmp_path / "layer"
    for name in ("a/x", "a/y", "b/z"):
        (layer / name).parent.mkdir(parents=True, exist_ok=True)
        (layer / name).write_text(name)
    os.chown(layer / "a/x", 7, 7)
    mapping = layerkit.mapping(["0:0:7", "7:70000:1", "8:8:1000"])
    unpacked = find_unpacked(f"folders:{layer}")
    assert mapping is not None
    with LocalStore.open(tmp_path / "store") as held:
        report = adopt.write_upper(unpacked, tmp_path / "out", mapping, held, MountOptions(stacking="classic"))
    upper = tmp_path / "out/upper"
    assert sorted(str(p.relative_to(upper)) for p in upper.rglob("*")) == ["a", "a/x"]
    assert os.listxattr(upper / "a/x") == ["trusted.overlay.metacopy"]
    assert report.data_folders == (str(layer),)


@pytest.mark.parametrize("stacking", ["data-only", "classic"])
def test_a_ready_upper_is_mounted_with_the_printed_line(
    podman_store: tuple[Path, Path], judged_app: dict[bytes, Shown], store: Path, tmp_path: Path, stacking: str
) -> None:
    unpacked = find_unpacked(f"containers-storage:[overlay@{podman_store[0]}]app")
    mapping = layerkit.mapping(MAP)
    assert mapping is not None
    with LocalStore.open(store) as held:
        report = adopt.write_upper(unpacked, tmp_path / "out", mapping, held, MountOptions(stacking=stacking))
    (tmp_path / "m").mkdir()
    run("sh", "-c", report.mount_line.replace("TARGET", str(tmp_path / "m")))
    try:
        assert differences(snapshot(tmp_path / "m"), judged_app) == []
    finally:
        run("umount", tmp_path / "m")


@pytest.mark.usefixtures("caches_stay")
def test_the_page_cache_is_the_runtimes_own(podman_store: tuple[Path, Path], store: Path, tmp_path: Path) -> None:
    from page_cache import drop, resident_bytes

    unpacked = find_unpacked(f"containers-storage:[overlay@{podman_store[0]}]app")
    with adopted(unpacked, store, tmp_path / "m"):
        shown = next(p for p in (tmp_path / "m/usr/bin").iterdir() if p.is_file() and p.stat().st_size > 1 << 20)
        path = shown.relative_to(tmp_path / "m")
        below = next(f.path / path for f in reversed(unpacked.folders) if (f.path / path).is_file())
        drop(below)
        assert resident_bytes(shown)[0] < shown.stat().st_size
        below.read_bytes()
        assert resident_bytes(shown) == (shown.stat().st_size,) * 2


def test_more_layers_than_an_overlay_takes(tmp_path: Path) -> None:
    need_root()
    for i in range(500):
        (tmp_path / f"l{i}").mkdir()
        (tmp_path / f"l{i}/f{i}").write_text("x")
    folders = tuple(LayerFolder(tmp_path / f"l{i}") for i in range(500))
    with pytest.raises(UsageError, match="an overlay takes 500"):
        with adopted(Unpacked("many", "folders", folders), tmp_path / "store", tmp_path / "m"):
            pass
    with adopted(Unpacked("many", "folders", folders[:499]), tmp_path / "store", tmp_path / "m"):
        assert [(tmp_path / f"m/f{i}").read_text() for i in (0, 250, 498)] == ["x", "x", "x"]


# --- finding what runtimes have


def test_names_of_podmans_images(podman_store: tuple[Path, Path], tmp_path: Path) -> None:
    root = podman_store[0]
    images = json.loads((root / "overlay-images/images.json").read_text())
    image = next(i for i in images if i["names"] == ["localhost/app:latest"])
    for name in ("app", "localhost/app", "localhost/app:latest", image["id"], image["id"][:12]):
        found = find_unpacked(f"containers-storage:[overlay@{root}]{name}")
        assert (found.name, found.digest, len(found.diff_ids)) == ("localhost/app:latest", image["digest"], 8)
    with pytest.raises(NotFound, match="no such image"):
        find_unpacked(f"containers-storage:[overlay@{root}]absent")
    with pytest.raises(NotFound, match=r"layers\.json: not there"):
        find_unpacked(f"containers-storage:[overlay@{tmp_path}]app")
    with pytest.raises(UsageError, match="storage driver vfs"):
        find_unpacked(f"containers-storage:[vfs@{root}]app")


@pytest.fixture(scope="module")
def containerd_root(app_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Start a containerd of our own with the image ``app`` in it; return its root and socket."""
    need_root()
    need_tool("containerd", "ctr")
    root = tmp_path_factory.mktemp("containerd")
    state = Path(tempfile.mkdtemp(prefix="lk-adopt-"))
    config = state / "config.toml"
    config.write_text('version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n')
    socket = state / "sock"
    with (state / "log").open("wb") as log:
        daemon = subprocess.Popen(
            ["containerd", "--config", config, "--root", root, "--state", state / "state", "--address", socket],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:

        def serves() -> bool:
            assert daemon.poll() is None, (state / "log").read_text()
            return run("ctr", "-a", socket, "version", code=None).returncode == 0

        wait_for(serves)
        run(
            "ctr",
            "-a",
            socket,
            "-n",
            "lk",
            "images",
            "import",
            "--index-name",
            "docker.io/library/app:latest",
            app_image,
        )
        yield root, socket
    finally:
        daemon.terminate()
        daemon.wait(30)
        shutil.rmtree(state, ignore_errors=True)


@pytest.mark.parametrize("stacking", ["data-only", "classic"])
def test_containerds_snapshots(
    containerd_root: tuple[Path, Path],
    judged_app: dict[bytes, Shown],
    store: Path,
    tmp_path: Path,
    stacking: str,
) -> None:
    root, _ = containerd_root
    unpacked = find_unpacked(f"containerd:[{root}@lk]app")
    assert (unpacked.name, len(unpacked.folders), len(unpacked.blobs)) == ("docker.io/library/app:latest", 8, 8)
    with judged(unpacked.folders, tmp_path / "judge") as shown:
        want = snapshot(shown)
    with adopted(unpacked, store, tmp_path / "m", stacking, own=True):
        got = snapshot(tmp_path / "m")
    assert differences(got, want) == []
    # Both runtimes unpacked one image; podman sets the root folder's time, containerd the time of unpacking.
    assert len(got) == len(judged_app)
    with pytest.raises(NotFound, match="no such image in containerd's namespace default"):
        find_unpacked(f"containerd:[{root}@]app")
    with pytest.raises(NotFound, match=r"meta\.db: not there"):
        find_unpacked(f"containerd:[{tmp_path}@lk]app")


def test_dockers_overlay2(tmp_path: Path, store: Path) -> None:
    """Files in the places where dockerd has them; the daemon itself is not needed to read them."""
    need_root()
    import hashlib

    folders = _odd(tmp_path / "layers")
    diff_ids = ["sha256:" + hashlib.sha256(f.name.encode()).hexdigest() for f in folders]
    base, chain = tmp_path / "docker/image/overlay2", ""
    for folder, diff_id in zip(folders, diff_ids, strict=True):
        chain = hashlib.sha256(f"{chain} {diff_id}".encode()).hexdigest() if chain else diff_id[7:]
        chain = chain if chain.startswith("sha256:") else "sha256:" + chain
        record = base / "layerdb/sha256" / chain[7:]
        record.mkdir(parents=True)
        (record / "cache-id").write_text(f"{folder.name}-id")
        (tmp_path / "docker/overlay2" / f"{folder.name}-id").mkdir(parents=True)
        folder.path.rename(tmp_path / "docker/overlay2" / f"{folder.name}-id/diff")
    config = json.dumps({"rootfs": {"type": "layers", "diff_ids": diff_ids}})
    image = hashlib.sha256(config.encode()).hexdigest()
    (base / "imagedb/content/sha256").mkdir(parents=True)
    (base / "imagedb/content/sha256" / image).write_text(config)
    (base / "repositories.json").write_text(
        json.dumps({"Repositories": {"app": {"app:latest": f"sha256:{image}"}}})
    )
    found = find_unpacked(f"docker-storage:[{tmp_path / 'docker'}]app")
    assert [f.name for f in found.folders] == ["bottom-id", "middle-id", "top-id"]
    with adopted(found, store, tmp_path / "m"):
        assert (tmp_path / "m/replaced/by/file").read_text() == "top file"
    assert find_unpacked(f"docker-storage:[{tmp_path / 'docker'}]{image[:12]}").folders == found.folders


def _no_new_mount_api(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the process see a kernel of before 5.2: what it has is called for real, what it lacks is ENOSYS."""
    import errno

    from layerkit.linux import syscalls

    def absent(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    for name in ("fsopen", "open_tree", "move_mount", "mount_setattr"):
        monkeypatch.setattr(syscalls, name, absent)


def test_a_kernel_without_the_new_mount_api_gets_the_classic_stacking(
    podman_store: tuple[Path, Path],
    judged_app: dict[bytes, Shown],
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unpacked = find_unpacked(f"containers-storage:[overlay@{podman_store[0]}]app")
    with monkeypatch.context() as old:
        _no_new_mount_api(old)
        with adopted(unpacked, store, tmp_path / "m", upper=tmp_path / "up") as report:
            assert report.stacking == "classic"
            assert report.how.startswith("a META of its own, directory")
            assert differences(snapshot(tmp_path / "m"), judged_app) == []
            (tmp_path / "m/new").touch()
        assert (tmp_path / "up/new").exists()
        assert mounter.active(mounter.default_run(store)) == []
        with pytest.raises(UnsupportedHost, match="the stacking data-only"):
            with adopted(unpacked, store, tmp_path / "m", "data-only"):
                pass


def test_layers_beyond_a_page_of_paths_are_mounted_by_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_root()
    long = tmp_path / ("x" * 200)
    folders = []
    for i in range(60):
        folder = long / f"l{i}"
        folder.mkdir(parents=True)
        (folder / f"f{i}").write_text(str(i))
        folders.append(LayerFolder(folder))
    with monkeypatch.context() as old:
        _no_new_mount_api(old)
        with adopted(Unpacked("many", "folders", tuple(folders)), tmp_path / "store", tmp_path / "m"):
            assert [(tmp_path / f"m/f{i}").read_text() for i in range(60)] == [str(i) for i in range(60)]


def test_layers_removed_under_a_mount_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need_root()
    from layerkit.cli import main as cli

    folders = _odd(tmp_path / "layers")
    store = tmp_path / "store"
    with adopted(Unpacked("odd", "folders", folders), store, tmp_path / "m"):
        assert [row["lost"] for row in layerkit.api.open.mounts(store=store)] == [""]
        shutil.rmtree(folders[0].path)
        assert [row["lost"] for row in layerkit.api.open.mounts(store=store)] == [str(folders[0].path)]
        cli.app()(["mounts", "--store", str(store)], standalone_mode=False)
        assert "removed layers that it uses" in capsys.readouterr().err
        # An error, never zeros.
        with pytest.raises(FileNotFoundError):
            (tmp_path / "m/kept").read_bytes()
        assert (tmp_path / "m/opaque/new").read_text() == "new"


def test_the_commands(tmp_path: Path) -> None:
    need_root()
    folders = _odd(tmp_path / "layers")
    ref = "folders:" + ":".join(str(folder.path) for folder in reversed(folders))
    store, target = ("--store", tmp_path / "store"), tmp_path / "m"
    target.mkdir()
    try:
        mounted = answer("mount", ref, target, "--uid-map", MAP[0], *store)
        assert (mounted["schema"], mounted["read_folders"]) == ("layerkit.mount.v1", 3)
        assert (target / "again").stat().st_uid == 100000
    finally:
        run_layerkit("umount", target, *store)
    text = run_layerkit("mount", ref, target, "--uid-map", "0:200000:65536", "--stacking", "classic", *store).stdout
    run_layerkit("umount", target, *store)
    assert "3 folders, none read again (classic)" in text
    out = run_layerkit("adopt", ref, tmp_path / "out", "--uid-map", MAP[0], "--stacking", "classic", *store).stdout
    assert sorted(os.listdir(tmp_path / "out")) == ["upper", "work"]
    assert "mount -t overlay" in out
    again = run_layerkit("adopt", ref, tmp_path / "out", "--uid-map", MAP[0], *store, code=2).stderr
    assert "the folder is not empty" in again
    assert "adopt needs a map" in run_layerkit("adopt", ref, tmp_path / "new", *store, code=2).stderr
    assert not (tmp_path / "new").exists()
    bad = run_layerkit("mount", ref, target, "--stacking", "sideways", *store, code=2).stderr
    assert "want auto, data-only or classic" in bad
    assert "--platform" in run_layerkit("mount", ref, target, "--platform", "linux/arm64", *store, code=2).stderr
    assert "unpacked" in run_layerkit("mount", "oci:x", target, "--reread", *store, code=2).stderr
    gone = run_layerkit("mount", f"folders:{tmp_path / 'gone'}", target, *store, code=1).stderr
    assert "is not there (any more)" in gone
    assert "outside the map" in run_layerkit("mount", ref, target, "--uid-map", "0:5:1", *store, code=3).stderr


def test_a_layer_that_is_being_unpacked_is_refused(tmp_path: Path) -> None:
    for name, value in (
        ("overlay-layers/layers.json", [{"id": "one", "flags": {"incomplete": True}}]),
        ("overlay-images/images.json", [{"id": "a" * 64, "layer": "one", "names": ["localhost/app:latest"]}]),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(value))
    with pytest.raises(NotFound, match="is being unpacked"):
        find_unpacked(f"containers-storage:[overlay@{tmp_path}]app")


def test_a_store_with_a_mount_program_shows_what_one_without_shows(
    podman_store: tuple[Path, Path], tiny_image: Path, store: Path, tmp_path: Path
) -> None:
    """containers/storage itself writes .wh. files there, and says so in .has-mount-program."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    root, runroot = tmp_path / "root", Path(tempfile.mkdtemp(prefix="lk-adopt-"))
    place = f"[overlay@{root}+{runroot}:overlay.mount_program={program}]"
    try:
        run(
            "skopeo",
            "--insecure-policy",
            "copy",
            "--quiet",
            f"oci:{tiny_image}:latest",
            f"containers-storage:{place}tiny",
        )
        unpacked = find_unpacked(f"containers-storage:[overlay@{root}]tiny")
        assert [folder.marks for folder in unpacked.folders] == [Marks.AUFS] * len(unpacked.folders)
        assert any(
            name.startswith(".wh.") for f in unpacked.folders for _, _, names in os.walk(f.path) for name in names
        )
        native = find_unpacked(f"containers-storage:[overlay@{podman_store[0]}]tiny")
        with judged(native.folders, tmp_path / "judge") as shown:
            want = snapshot(shown)
        with adopted(unpacked, store, tmp_path / "m"):
            left = differences(snapshot(tmp_path / "m"), want)
        # Folders that no layer sets a time for have that of the unpacking.
        assert [line for line in left if " mtime_ns: " not in line] == []
        folders = {path for path, one in want.items() if stat.S_ISDIR(one.mode)}
        assert {line.partition(" mtime_ns")[0] for line in left} <= {repr(path) for path in folders}
    finally:
        subprocess.run(["umount", "--lazy", root / "overlay"], capture_output=True)
        shutil.rmtree(runroot, ignore_errors=True)
