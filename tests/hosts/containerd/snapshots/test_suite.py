"""What containerd asks of every snapshotter, over the socket and with real mounts.

The behaviours are those of containerd's own suite (core/snapshots/testsuite); each test is named after its
original (``checkSnapshotterBasic`` is ``test_basic``). ``CloseTwice`` is of a process here, not of an object.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import short_folder
from needs import need_root, need_tool
from snapshot_client import ACTIVE, COMMITTED, ROOT_LABEL, VIEW, Client, Process, mounted, refused, snapshotter

Applier = Callable[[Path], None]
_ROUNDS = int(os.environ.get("LAYERKIT_TEST_SNAPSHOT_ROUNDS", "2"))
_numbers = itertools.count()


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    need_root()
    need_tool("setpriv")
    before = os.umask(0)
    try:
        with short_folder() as folder, snapshotter(folder) as process:
            yield process
    finally:
        os.umask(before)


@pytest.fixture
def client(process: Process) -> Iterator[Client]:
    """Give a snapshotter without snapshots, and see that it can be emptied again."""
    yield process.client
    for info in reversed(process.client.walk()):
        process.client.remove(info.name)
    process.client.cleanup()
    assert os.listdir(process.root / "snapshots") == []
    assert os.listdir(process.run / "l") == os.listdir(process.run / "m") == []


# What appliers do to a tree


def write(name: str, text: str, mode: int) -> Applier:
    def apply(root: Path) -> None:
        (root / name).write_text(text)
        (root / name).chmod(mode)

    return apply


def folder(name: str, mode: int) -> Applier:
    def apply(root: Path) -> None:
        (root / name).mkdir(exist_ok=True)
        (root / name).chmod(mode)

    return apply


def remove(name: str) -> Applier:
    def apply(root: Path) -> None:
        shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()

    return apply


def rename(old: str, new: str) -> Applier:
    return lambda root: os.rename(root / old, root / new)


def link(old: str, new: str) -> Applier:
    return lambda root: os.link(root / old, root / new)


def own(name: str, uid: int, gid: int) -> Applier:
    return lambda root: os.lchown(root / name, uid, gid)


def steps(*appliers: Applier) -> Applier:
    def apply(root: Path) -> None:
        for each in appliers:
            each(root)

    return apply


def content(root: Path) -> dict[str, tuple[Any, ...]]:
    """Return what can be seen below ``root``: kinds, modes, owners, bytes."""
    seen = {}
    for top, folders, files in os.walk(root):
        for name in folders + files:
            path = Path(top) / name
            facts = path.lstat()
            data = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(facts.st_mode) else ""
            seen[str(path.relative_to(root))] = (facts.st_mode, facts.st_uid, facts.st_gid, data)
    return seen


def layers(client: Client, work: Path, *appliers: Applier) -> str:
    """Commit a layer for each applier; each must show what a plain folder shows. Return the top one's name."""
    flat = work / f"flat{next(_numbers)}"
    flat.mkdir()
    parent = ""
    for apply in appliers:
        name = f"layer-{next(_numbers)}"
        with mounted(client.prepare(f"{name}-prepare", parent), work / "prepare") as place:
            apply(place)
        client.commit(name, f"{name}-prepare")
        apply(flat)
        with mounted(client.view(f"{name}-view", name), work / "check") as place:
            assert content(place) == content(flat)
        client.remove(f"{name}-view")
        parent = name
    return parent


# The suite


def test_basic(client: Client, tmp_path: Path) -> None:
    initial = steps(write("foo", "foo\n", 0o777), folder("a", 0o755), folder("a/b", 0o755), folder("a/b/c", 0o755))
    diff = steps(write("bar", "bar\n", 0o777), write("foo", "bar\n", 0o777), remove("a/b"))
    flat = tmp_path / "flat"
    flat.mkdir()
    preparing, committed = str(tmp_path / "preparing"), str(tmp_path / "committed")
    found = client.prepare(preparing)
    assert found
    with mounted(found, tmp_path / "m") as place:
        initial(place)
    client.commit(committed, preparing)
    initial(flat)
    first = client.stat(committed)
    assert (first.parent, first.kind) == ("", COMMITTED)
    with refused("NOT_FOUND"):
        client.stat(preparing)
    with mounted(client.prepare("next", committed), tmp_path / "m") as place:
        assert content(place) == content(flat)
        diff(place)
    diff(flat)
    info = client.stat("next")
    assert (info.parent, info.kind) == (committed, ACTIVE)
    client.commit("committed-next", "next")
    second = client.stat("committed-next")
    assert (second.parent, second.kind) == (committed, COMMITTED)
    with refused("NOT_FOUND"):
        client.stat("next")
    walked = {info.name: info for info in client.walk()}
    assert walked == {committed: first, "committed-next": second}
    with mounted(client.view("nextnext", "committed-next"), tmp_path / "m") as place:
        assert content(place) == content(flat)
    client.remove("nextnext")
    with refused("FAILED_PRECONDITION") as text:
        client.remove(committed)
    assert "remove" in text[0]
    client.remove("committed-next")
    client.remove(committed)


def test_stat_active(client: Client, tmp_path: Path) -> None:
    with mounted(client.prepare("preparing"), tmp_path / "m"):
        pass
    info = client.stat("preparing")
    assert (info.name, info.kind, info.parent) == ("preparing", ACTIVE, "")
    assert dict(info.labels) == ROOT_LABEL


def test_stat_committed(client: Client, tmp_path: Path) -> None:
    with mounted(client.prepare("preparing"), tmp_path / "m") as place:
        (place / "foo").write_text("foo\n")
    client.commit("committed", "preparing")
    info = client.stat("committed")
    assert (info.name, info.kind, info.parent) == ("committed", COMMITTED, "")


def test_transitivity(client: Client, tmp_path: Path) -> None:
    with mounted(client.prepare("preparing"), tmp_path / "m") as place:
        (place / "foo").write_text("foo\n")
    client.commit("snapA", "preparing")
    with mounted(client.prepare("next", "snapA"), tmp_path / "m") as place:
        (place / "foo").write_text("foo bar\n")
    client.commit("snapB", "next")
    above = client.stat("snapB")
    assert (client.stat("snapA").parent, above.parent, client.stat(above.parent).parent) == ("", "snapA", "")


def test_prepare_view_failing(client: Client) -> None:
    client.prepare("preparing")
    client.commit("snapA", "preparing")
    for first, second in (("prepare", "view"), ("prepare", "prepare"), ("view", "view"), ("view", "prepare")):
        key = f"{first}-{second}"
        getattr(client, first)(key, "snapA")
        with refused("ALREADY_EXISTS"):
            getattr(client, second)(key, "snapA")
    with refused("ALREADY_EXISTS"):
        client.prepare("snapA")
    with refused("NOT_FOUND"):
        client.prepare("orphan", "nobody")
    with refused("INVALID_ARGUMENT"):
        client.prepare("on-active", "prepare-view")
    with refused("INVALID_ARGUMENT"):
        client.prepare("")


def test_deleted_files_in_child_snapshot(client: Client, tmp_path: Path) -> None:
    layers(
        client, tmp_path, steps(write("foo", "foo\n", 0o777), write("foobar", "foobar\n", 0o777)),
        remove("foobar"), steps(),
    )  # fmt: skip


def test_remove_intermediate_snapshot(client: Client, tmp_path: Path) -> None:
    with mounted(client.prepare("base"), tmp_path / "m"):
        pass
    client.commit("committed-base", "base")
    client.prepare("intermediate", "committed-base")
    client.commit("committed-inter", "intermediate")
    client.prepare("toplayer", "committed-inter")
    with refused("FAILED_PRECONDITION"):
        client.remove("committed-inter")
    for name in ("toplayer", "committed-inter", "committed-base"):
        client.remove(name)
    with refused("NOT_FOUND"):
        client.remove("toplayer")


def _base_snapshots(client: Client) -> dict[str, tuple[int, str]]:
    client.prepare("c1-a")
    client.commit("c1", "c1-a")
    client.prepare("c2-a", "c1")
    client.commit("c2", "c2-a")
    client.prepare("a1", "c2")
    client.prepare("a2")
    client.view("v1", "c2")
    client.view("v2")
    return {
        "c1": (COMMITTED, ""), "c2": (COMMITTED, "c1"), "a1": (ACTIVE, "c2"), "a2": (ACTIVE, ""),
        "v1": (VIEW, "c2"), "v2": (VIEW, ""),
    }  # fmt: skip


def test_update(client: Client) -> None:
    def now() -> int:
        return time.time_ns()

    before = now()
    expected = _base_snapshots(client)
    after = now()
    root = {"containerd.io/gc.root": "now"}
    for name, (kind, parent) in expected.items():
        info = client.stat(name)
        created = info.created_at.ToNanoseconds()
        assert before <= created <= after and info.updated_at == info.created_at
        assert (info.name, info.kind, info.parent) == (name, kind, parent)

        def set_labels(info: Any, labels: dict[str, str], *paths: str) -> Any:
            info.labels.clear()
            info.labels.update(labels)
            return client.update(info, *paths)

        info.parent = "doesnotexist"
        start = now()
        info = set_labels(info, {"l1": "v1", "l2": "v2", "l3": "v3", **root})
        assert start <= info.updated_at.ToNanoseconds() <= now() and info.created_at.ToNanoseconds() == created
        assert (info.name, info.kind, info.parent) == (name, kind, parent)
        assert dict(info.labels) == {"l1": "v1", "l2": "v2", "l3": "v3", **root}
        info = set_labels(info, {"l1": "updated", "l4": "v4"}, "labels.l1", "labels.l2")
        assert dict(info.labels) == {"l1": "updated", "l3": "v3", **root}
        info = set_labels(info, {"l4": "v4", **root}, "labels")
        assert dict(info.labels) == {"l4": "v4", **root} == dict(client.stat(name).labels)
        for path in ("parent", "name", "kind", "created_at", "nonsense"):
            with refused("INVALID_ARGUMENT"):
                client.update(info, path)
        with refused("INVALID_ARGUMENT"):
            set_labels(info, {"long": "x" * 4093})
    info.name = "nobody"
    with refused("NOT_FOUND"):
        client.update(info)


def test_remove(client: Client) -> None:
    client.prepare("committed-a")
    client.commit("committed-1", "committed-a")
    client.prepare("reuse-1", "committed-1")
    client.remove("reuse-1")
    client.view("reuse-1", "committed-1")
    client.remove("reuse-1")
    client.prepare("reuse-1")
    client.remove("committed-1")
    client.commit("committed-1", "reuse-1")


def test_commit_refusals(client: Client) -> None:
    """Not in the original: what its storage package refuses."""
    _base_snapshots(client)
    for code, name, key in (
        ("ALREADY_EXISTS", "c1", "a1"), ("NOT_FOUND", "new", "nobody"), ("FAILED_PRECONDITION", "new", "v1"),
        ("FAILED_PRECONDITION", "new", "c2"), ("INVALID_ARGUMENT", "", "a1"),
    ):  # fmt: skip
        with refused(code):
            client.commit(name, key)
    with refused("FAILED_PRECONDITION"):
        client.mounts("c1")
    with refused("NOT_FOUND"):
        client.mounts("nobody")
    with refused("FAILED_PRECONDITION"):
        client.commit("new", "a2", parent="c1")
    client.commit("new", "a1", parent="c2")


def test_walk(client: Client) -> None:
    label = {"containerd.io/gc.root": "check-walk"}
    client.prepare("a-np", labels=label)
    client.prepare("p-tmp", labels=label)
    client.commit("p", "p-tmp", label)
    client.prepare("a", "p", label)
    client.view("v", "p", label)
    client.prepare("p-wl-tmp", labels=label)
    client.commit("p-wl", "p-wl-tmp", {"l": "1", **label})
    client.prepare("a-wl", "p-wl", {"l": "2", **label})
    client.view("v-wl", "p-wl", {"l": "3", **label})
    client.prepare("a-np-wl", labels={"l": "2", **label})
    root = 'labels."containerd.io/gc.root"==check-walk'
    for matches, filters in (
        ("a-np p a v p-wl a-wl v-wl a-np-wl", [root]),
        ("a-np a a-wl a-np-wl", [f"kind==active,{root}"]),
        ("v v-wl", [f"kind==view,{root}"]),
        ("p p-wl", [f"kind==committed,{root}"]),
        ("p a-np-wl", ["name==p", "name==a-np-wl"]),
        ("a-wl", ["name==a-wl,labels.l"]),
        ("a v", ["parent==p"]),
        ("a v a-wl v-wl", [f'parent!="",{root}']),
        ("p-wl a-wl v-wl a-np-wl", ["labels.l"]),
        ("a-wl a-np-wl", ["labels.l==2"]),
        # Not in the original:
        ("p p-wl", ["name~=/^p/"]),
        ("a-np p a v p-wl a-wl v-wl a-np-wl", []),
        ("", ["labels.l==9"]),
        ("a-np p a v", ['labels.l!="1",labels.l!="2",labels.l!="3"']),
    ):
        found = [info.name for info in client.walk(*filters)]
        assert sorted(found) == sorted(matches.split()), filters
    for broken in ("name=p", "name==", "==p", 'name=="p', "name==p,", "name==p q==r", "labels."):
        with refused("INVALID_ARGUMENT"):
            client.walk(broken)


def test_view_readonly(client: Client, tmp_path: Path) -> None:
    client.prepare("preparing")
    client.commit("committed", "preparing")
    with mounted(client.view("view", "committed"), tmp_path / "m") as place:
        with pytest.raises(OSError, match="Read-only"):
            (place / "testfile").write_text("testcontent")


def test_file_from_lower_layer(client: Client, tmp_path: Path) -> None:
    layers(
        client, tmp_path,
        steps(folder("dir1", 0o700), write("dir1/f1", "Hello", 0o644), folder("dir2", 0o700),
              write("dir2/f2", "...", 0o644)),
        steps(folder("dir3", 0o700), write("dir3/f1", "Hello", 0o644), remove("dir1"), link("dir2/f2", "dir3/f2"),
              remove("dir2/f2")),
    )  # fmt: skip


def test_close_twice(process: Process) -> None:
    process.client.prepare("closing")
    process.client.commit("closed", "closing")
    process.client.remove("closed")
    assert process.stop() == 0
    assert not process.socket.exists()
    process.start()
    assert process.stop() == 0
    process.start()
    assert process.client.walk() == []


def test_root_permission(client: Client, tmp_path: Path) -> None:
    with mounted(client.prepare("preparing"), tmp_path / "m") as place:
        assert stat.S_IMODE(place.stat().st_mode) == 0o755
        place.chmod(0o750)
        os.chown(place, 3, 4)
    client.commit("committed", "preparing")
    with mounted(client.prepare("next", "committed"), tmp_path / "m") as place:
        # Not in the original, whose overlay snapshotter keeps the owner and loses the mode.
        facts = place.stat()
        assert (stat.S_IMODE(facts.st_mode), facts.st_uid, facts.st_gid) == (0o750, 3, 4)


def test_128_layers_mount(client: Client, tmp_path: Path) -> None:
    def layer(i: int) -> Applier:
        return steps(
            write("overwriteme", f"{i} WAS HERE!\n", 0o777), write(f"addhere/file-{i}", "same\n", 0o755),
            remove("onlyme"), folder("onlyme", 0o755), write(f"onlyme/file-{i}", "only me!\n", 0o777),
        )  # fmt: skip

    lowest = steps(
        write("bottom", "way at the bottom\n", 0o777), write("overwriteme", "FIRST!\n", 0o777),
        folder("addhere", 0o755), folder("onlyme", 0o755), write("onlyme/bottom", "bye!\n", 0o777),
    )  # fmt: skip
    flat = tmp_path / "flat"
    flat.mkdir()
    parent = ""
    for i, apply in enumerate([lowest, *map(layer, range(1, 128))]):
        with mounted(client.prepare(f"prepare-{i}", parent), tmp_path / "m") as place:
            if i % 16 == 0:
                assert content(place) == content(flat)
            apply(place)
        apply(flat)
        parent = f"committed-{i}"
        client.commit(parent, f"prepare-{i}")
    with mounted(client.view("fullview", parent), tmp_path / "m") as place:
        assert content(place) == content(flat)
    # Not in the original: the same stack with mapped owners.
    labels = {f"containerd.io/snapshot/{side}mapping": "0:100000:65536" for side in ("uid", "gid")}
    with mounted(client.prepare("mapped", parent, labels), tmp_path / "m") as place:
        shifted = {
            name: (mode, uid + 100_000, gid + 100_000, data)
            for name, (mode, uid, gid, data) in content(flat).items()
        }
        assert content(place) == shifted


def test_layer_file_update(client: Client, tmp_path: Path) -> None:
    for _ in range(_ROUNDS):
        layers(
            client, tmp_path,
            steps(folder("etc", 0o700), write("etc/hosts", "mydomain 10.0.0.1", 0o644),
                  write("etc/profile", "PATH=/usr/bin", 0o644)),
            steps(write("etc/hosts", "mydomain 10.0.0.2", 0o644), write("etc/profile", "PATH=/usr/bin", 0o666),
                  folder("root", 0o700), write("root/.bashrc", "PATH=/usr/sbin:/usr/bin", 0o644)),
        )  # fmt: skip


def test_remove_directory_in_lower_layer(client: Client, tmp_path: Path) -> None:
    layers(
        client, tmp_path, steps(folder("lib", 0o700), write("lib/hidden", "", 0o644)),
        steps(remove("lib"), folder("lib", 0o700), write("lib/not-hidden", "", 0o644)),
        write("lib/newfile", "", 0o644),
    )  # fmt: skip


def test_chown(client: Client, tmp_path: Path) -> None:
    layers(
        client, tmp_path,
        steps(folder("opt", 0o700), folder("opt/a", 0o700), folder("opt/a/b", 0o700),
              write("opt/a/b/file.txt", "hello", 0o644)),
        steps(own("opt", 1, 1), own("opt/a", 1, 1), own("opt/a/b", 1, 1), own("opt/a/b/file.txt", 1, 1)),
    )  # fmt: skip


def test_rename(client: Client, tmp_path: Path) -> None:
    # Folders of a lower layer cannot be renamed on overlayfs without redirect_dir, as the original says.
    layers(
        client, tmp_path,
        steps(folder("dir1", 0o700), folder("somefiles", 0o700), write("somefiles/f1", "was here first!", 0o644),
              write("somefiles/f2", "nothing interesting", 0o644)),
        steps(write("somefiles/f1-overwrite", "new content 1", 0o644),
              rename("somefiles/f1-overwrite", "somefiles/f1"), rename("somefiles/f2", "somefiles/f3")),
    )  # fmt: skip


def test_directory_permission_on_commit(client: Client, tmp_path: Path) -> None:
    first = [folder(f"dir{i}", 0o700) for i in range(1, 6)]
    layers(
        client, tmp_path,
        steps(*first, write("dir4/f1", "...", 0o644), write("dir5/f1", "...", 0o644),
              *(own(name, 1, 1) for name in ("dir1", "dir2", "dir3", "dir5", "dir5/f1"))),
        steps(own("dir2", 0, 0), remove("dir3"), own("dir4", 1, 1), own("dir4/f1", 1, 1)),
        steps(folder("dir3", 0o700), own("dir3", 1, 1), remove("dir5"), folder("dir5", 0o700), own("dir5", 1, 1)),
    )  # fmt: skip


def test_stat_in_walk(client: Client) -> None:
    _base_snapshots(client)
    for number in range(120):  # more than one message of the stream holds
        client.prepare(f"many-{number}")
    for info in client.walk():
        assert client.stat(info.name) == info


def test_usage(client: Client, tmp_path: Path) -> None:
    """Not in this suite of the original, which tests it for each snapshotter by itself."""
    empty = client.prepare("empty")
    assert empty and client.usage("empty").inodes == 1
    with mounted(client.prepare("preparing"), tmp_path / "m") as place:
        (place / "a").write_bytes(bytes(range(256)) * 4096)
        os.link(place / "a", place / "b")
        (place / "d").mkdir()
    for name in ("preparing", "committed"):
        if name == "committed":
            client.commit("committed", "preparing")
        usage = client.usage(name)
        assert usage.inodes == 3 and 1 << 20 <= usage.size < (1 << 20) + 65536
    client.prepare("above", "committed")
    assert client.usage("above").inodes == 1
    with refused("NOT_FOUND"):
        client.usage("nobody")
