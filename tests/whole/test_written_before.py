"""What version 0.1.0 wrote goes on: its stores, mounts, bundles, snapshots, queues and artifacts are read and used.

The fixtures are what that version left on disk (tests/fixtures/written-before/README.md). They are used through the
command line and the public API alone, so that nothing here depends on where a rule lives in the package. Absolute
paths in them begin with ``/run/written-before``. Each test that needs them has a mount namespace of its own, where
its copy of the fixture lies at that place; ``/run/layerkit`` is its own there as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import page_cache
import pytest
from hook_service import hook_process
from judge import Shown, differences, snapshot
from needs import need_root, need_tool
from programs import wait_for
from registry_server import docker_registry
from snapshot_client import Client

import layerkit

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures/written-before"
PLACE = Path("/run/written-before")
MAP, OWN_MAP, OTHER_MAP = "0:100000:65536", "0:300000:65536", "0:700000:65536"
# What other tests have mounted meanwhile is copied into a new namespace, and would be in use there.
NAMESPACE = """set -e
awk '$2 ~ "^(/tmp|/var/tmp|/run)/" && $3 ~ "^(overlay|erofs)$" {print $2}' /proc/self/mounts |
    while read -r at; do umount -l "$at" || :; done
mount -t tmpfs tmpfs /run
mkdir -p /run/layerkit /run/written-before
mount --bind "$0" /run/written-before
if [ -d "$0/run-layerkit" ]; then mount --bind "$0/run-layerkit" /run/layerkit; fi
echo ready
exec cat
"""
MOUNT = """import ctypes, os, sys
kind, source, target, data, flags = sys.argv[1:]
words = [os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(int(flags)), data.encode()]
if ctypes.CDLL(None, use_errno=True).mount(*words):
    sys.exit(f"{os.strerror(ctypes.get_errno())}: {words}")
"""
READ_ONLY, BIND, REMOUNT = 1, 4096, 32


@pytest.fixture(autouse=True)
def _no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep out what the host itself may have in its cache."""
    monkeypatch.setenv("LAYERKIT_CACHE", str(tmp_path / "cache"))


def extract(kind: str, folder: Path) -> Path:
    """Unpack a fixture with all that it kept of its files."""
    folder.mkdir()
    words = ["--xattrs", "--xattrs-include=*", "--numeric-owner"] if os.geteuid() == 0 else []
    subprocess.run(
        ["tar", "--extract", "--file", FIXTURES / f"{kind}.tar.gz", "--directory", folder, "-p", *words], check=True
    )
    return folder


def run(*words: object, code: int = 0, **env: object) -> str:
    """Run ``layerkit`` and return its standard output; it must end with ``code``, and says why not."""
    return _run([sys.executable, "-m", "layerkit.cli.main", *map(str, words)], code, env)


def _run(words: list[str], code: int, env: dict[str, object]) -> str:
    done = subprocess.run(
        words, capture_output=True, text=True, errors="surrogateescape", timeout=180, check=False,
        env={**os.environ, **{name: str(value) for name, value in env.items()}},
    )  # fmt: skip
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + (done.stderr if code else "")


def tree_of(plain: dict[str, Any]) -> dict[bytes, Shown]:
    """Return a tree as ``make.py`` wrote it: bytes as Latin-1."""

    def raw(value: str) -> bytes:
        return value.encode("latin-1")

    found = {}
    for path, (mode, uid, gid, size, mtime, rdev, target, xattrs, sha256, links) in plain.items():
        pairs = tuple((raw(name), raw(value)) for name, value in xattrs)
        found[raw(path)] = Shown(
            mode, uid, gid, size, mtime, rdev, raw(target), pairs, sha256, tuple(map(raw, links))
        )
    return found


def trees_of(plain: dict[str, Any]) -> dict[str, dict[bytes, Shown]]:
    return {name: tree_of(tree) for name, tree in plain.items()}


class Site:
    """A fixture at its place, in a mount namespace of its own."""

    def __init__(self, folder: Path, holder: int) -> None:
        self.folder, self._holder = folder, holder
        self.seen = Path(f"/proc/{holder}/root{PLACE}")
        """The place as it looks from outside the namespace, mounts included."""

    def run(self, *words: object, code: int = 0, **env: object) -> str:
        return self.inside(sys.executable, "-m", "layerkit.cli.main", *words, code=code, **env)

    def inside(self, *words: object, code: int = 0, **env: object) -> str:
        return _run(["nsenter", f"--mount=/proc/{self._holder}/ns/mnt", *map(str, words)], code, env)

    def json(self, *words: object, **env: Any) -> Any:
        return json.loads(self.run(*words, "--json", **env))

    def mount(self, kind: str, source: object, target: object, options: str, flags: int = 0) -> None:
        """Call mount(2) inside."""
        self.inside(sys.executable, "-c", MOUNT, kind, source, target, options, flags)

    def shows(self, path: str, want: dict[bytes, Shown]) -> None:
        assert differences(snapshot(self.seen / path), want) == []

    def metas(self) -> dict[str, Any]:
        return {meta["key"]: meta for meta in self.json("store", "df", "--store", PLACE / "store")["metas"]}

    @property
    def records(self) -> Path:
        """The folder of this namespace's records: that of the namespace that made them, renamed."""
        number = os.stat(f"/proc/{self._holder}/ns/mnt").st_ino
        return next(self.folder.glob("run-layerkit/*")) / f"mnt-{number}"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[[str], Site]]:
    """Return a maker of sites, one for a test."""
    need_root()
    need_tool("unshare", "nsenter", "tar")
    with contextlib.ExitStack() as stack:

        def make(kind: str) -> Site:
            folder = extract(kind, tmp_path / "site")
            command = ["unshare", "--mount", "sh", "-c", NAMESPACE, str(folder)]
            holder = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            # At the end its input is closed, and with it goes the namespace.
            assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
            return Site(folder, holder.pid)

        yield make


class Host(Site):
    """A machine with a store, its mounts and bundles, and a snapshotter."""

    def __init__(self, made: Site) -> None:
        super().__init__(made.folder, made._holder)
        self.facts = json.loads((self.folder / "host.json").read_bytes())
        self.trees = trees_of(self.facts["trees"])
        # The run folder of a mount namespace goes by its number, and this one is another.
        (before,) = self.folder.glob("run-layerkit/*/mnt-*")
        before.rename(self.records)

    @property
    def ref(self) -> str:
        return f"store:{self.facts['name']}"

    def recorded(self, target: str) -> dict[str, Any]:
        """Return the record of the mount at ``mounts/TARGET``."""
        found = [json.loads(path.read_bytes()) for path in self.records.glob("records/*.json")]
        (record,) = [r for r in found if r["target"] == str(PLACE / "mounts" / target)]
        assert isinstance(record, dict)
        return record


@pytest.fixture
def host(site: Callable[[str], Site]) -> Host:
    return Host(site("host"))


STORE = ("--store", PLACE / "store")


# The store


def test_the_store_is_whole_and_lists_what_it_holds(host: Host) -> None:
    assert host.json("store", "verify", *STORE)["whole"]
    images = host.json("store", "ls", *STORE)["images"]
    assert [[i["names"], i["manifest"], i["maps"]] for i in images] == [
        [i["names"], i["manifest"], i["maps"]] for i in host.facts["images"]
    ]
    forms = {(m["map"], m["rendering"], m["namespace"], m["entries"]) for m in host.metas().values()}
    assert forms == {(m["map"], m["rendering"], m["namespace"], m["entries"]) for m in host.facts["metas"]}
    assert {rendering for _, rendering, *_ in forms} == {"erofs", "directory", "fuse"}
    assert host.json("inspect", host.ref, *STORE)["tree_digest"] == host.facts["tree"]
    # A store is at no fixed place.
    with layerkit.open_image(host.ref, settings=layerkit.Settings(store=host.folder / "store")) as image:
        assert str(image.tree().digest()) == host.facts["tree"]
        assert len(image.tree()) == len(host.trees["plain"])


KEPT = ("tar/*", "data/*.erofs", "index/*.idx", "objects/*/*", "meta/*/meta.erofs", "meta/*/tree.fuse",
        "meta/*/root/usr/link-a")  # fmt: skip


@pytest.mark.parametrize("kept", KEPT)
def test_a_store_that_is_damaged_is_told_from_a_whole_one(host: Host, kept: str) -> None:
    """``verify`` knows of every kind of file what was in it."""
    path = sorted((host.folder / "store").glob(kept))[0]
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    assert "damaged" in host.run("store", "verify", *STORE, code=1)


@pytest.mark.parametrize(
    ("words", "want"),
    [
        pytest.param((), "plain", id="idmapped, no map"),
        pytest.param(("--uid-map", MAP), "map", id="idmapped"),
        pytest.param(("--uid-map", OWN_MAP, "--own-meta"), "own", id="metadata of its own"),
        pytest.param(("--uid-map", MAP, "--rendering", "fuse"), "map", id="served"),
        pytest.param(("--uid-map", MAP, "--rendering", "directory", "--data", "objects"), "map", id="folder"),
    ],
)
def test_an_image_of_the_store_is_mounted_with_what_is_there(host: Host, words: tuple[str, ...], want: str) -> None:
    before = host.metas()
    host.run("mount", host.ref, PLACE / "mounts/own", *words, *STORE)
    host.shows("mounts/own", host.trees[want])
    (row,) = host.json("mounts", *STORE)["mounts"]
    assert (row["target"], row["image"]) == (f"{PLACE}/mounts/own", host.facts["name"])
    assert host.metas() == before, "metadata was made again"
    host.run("umount", PLACE / "mounts/own", *STORE)
    assert host.json("mounts", *STORE)["mounts"] == []


def test_another_map_is_made_of_what_is_there(host: Host) -> None:
    host.run("remap", host.ref, "--uid-map", OTHER_MAP, "--own-meta", *STORE)
    host.run("mount", host.ref, PLACE / "mounts/own", "--uid-map", OTHER_MAP, "--own-meta", *STORE)
    by_600000 = {path: (shown.uid, shown.gid) for path, shown in snapshot(host.seen / "mounts/own").items()}
    assert by_600000 == {p: (s.uid + 600_000, s.gid + 600_000) for p, s in host.trees["map"].items()}
    host.run("umount", PLACE / "mounts/own", *STORE)


def test_gc_frees_what_nobody_uses_and_keeps_what_a_pin_holds(host: Host) -> None:
    gone = next(i for i in host.facts["images"] if not i["names"])["manifest"]
    told = host.json("store", "gc", *STORE)
    assert f"image {gone}" in told["removed"] and told["freed_bytes"] > 0
    kept = {m["key"] for m in host.facts["metas"] if m["images"] and gone not in m["images"]}
    assert set(host.metas()) == kept
    # The folder of one of the two bundles was deleted by hand.
    assert any("bundle2" in line for line in told["removed"])
    (pin,) = (host.folder / "store/pins").iterdir()
    assert json.loads(pin.read_bytes())["owner"] == f"{PLACE}/bundle/layerkit.json"
    assert len(list((host.folder / "store/tar").iterdir())) == 2
    assert host.json("store", "verify", *STORE)["whole"]

    for name in [name for image in host.facts["images"] for name in image["names"]]:
        host.run("store", "rm", name, *STORE)
    host.run("store", "gc", *STORE)
    assert len(list((host.folder / "store/tar").iterdir())) == 2, "what the bundle needs is gone"
    assert set(host.metas()) >= set(json.loads(pin.read_bytes())["metas"])
    host.run("bundle", "--remove", PLACE / "bundle")
    assert not (host.folder / "bundle").exists()
    host.run("store", "gc", *STORE)
    assert host.metas() == {}
    kinds = ("tar", "data", "index", "objects", "meta", "tmp", "pins")
    left = [path for kind in kinds for path in (host.folder / "store" / kind).rglob("*") if path.is_file()]
    assert left == []


def test_what_a_killed_run_left_is_cleared_away(host: Host) -> None:
    store = PLACE / "killed-store"
    here = host.folder / "killed-store"
    assert list((here / "tmp").iterdir()) and len(list((here / "tar").iterdir())) == 2
    host.run("store", "gc", "--store", store)
    assert host.json("store", "verify", "--store", store)["whole"]
    assert list((here / "tmp").iterdir()) == []
    # The layer that was whole belongs to no image yet.
    assert list((here / "tar").iterdir()) == []


def test_indexes_in_the_cache_save_reading_layers(host: Host) -> None:
    image = f"oci:{PLACE}/indexed:app"
    layout = host.folder / "indexed"
    index = json.loads((layout / "index.json").read_bytes())
    index["manifests"] = [entry for entry in index["manifests"] if "artifactType" not in entry]
    (layout / "index.json").write_text(json.dumps(index))
    manifest = json.loads((layout / "blobs" / index["manifests"][0]["digest"].replace(":", "/")).read_bytes())
    for layer in manifest["layers"]:
        (layout / "blobs" / layer["digest"].replace(":", "/")).unlink()
    words = ("inspect", image, "--store", PLACE / "no-store")
    found = host.json(*words, LAYERKIT_CACHE=PLACE / "cache")
    assert found["tree_digest"] == host.facts["tree"]
    said = host.run(*words, code=3)
    assert "is missing" in said


# Mounts


def test_records_whose_mounts_are_gone_are_forgotten(host: Host) -> None:
    records = host.records / "records"
    assert len(list(records.glob("*.json"))) == 6 and len(list(records.glob("*.server"))) == 1
    assert host.json("mounts", *STORE)["mounts"] == []
    assert len(list(records.iterdir())) == 7
    # A mount that was cut short is cleared by its name, and the others with it.
    host.run("umount", PLACE / "mounts/idmapped", *STORE)
    assert list(records.iterdir()) == []
    said = host.run("umount", PLACE / "mounts/idmapped", *STORE, code=1)
    assert "nothing is mounted there" in said


def test_gc_forgets_them_too(host: Host) -> None:
    told = host.json("store", "gc", *STORE)
    assert sum(line.startswith("record ") for line in told["removed"]) == 7
    assert list((host.records / "records").iterdir()) == []


def _mount_again(host: Host, target: str) -> dict[str, Any]:
    """Mount what the record of ``target`` says, as the version did that wrote it; return the record."""
    record = host.recorded(target)
    run_folder = Path("/run/layerkit", *host.records.parts[-2:])
    lower = []
    for name in record["layers"]:
        kind, _, key = name.partition("-")
        place = run_folder / "layers" / name
        if not (host.records / "layers" / name).is_dir():
            (host.records / "layers" / name).mkdir(mode=0o700)
        if kind == "meta":
            host.mount("erofs", PLACE / "store/meta" / key / "meta.erofs", place, "", READ_ONLY)
        else:
            host.mount(
                "erofs", PLACE / f"store/data/{key}.erofs", place, f"device={PLACE}/store/tar/{key}", READ_ONLY
            )
        lower.append(str(place))
    options = f"lowerdir={'::'.join(lower)},upperdir={record['upper']},workdir={record['work']},metacopy=on"
    host.mount("overlay", f"layerkit:{record['id']}", record["target"], options)
    return record


def test_a_mount_that_is_still_there_is_known_and_ended(host: Host) -> None:
    record = _mount_again(host, "own")
    host.shows("mounts/own", host.trees["written"])
    (row,) = host.json("mounts", *STORE)["mounts"]
    assert row == next(m for m in host.facts["mounts"] if m["target"] == record["target"])
    said = host.run("mount", host.ref, PLACE / "mounts/own", *STORE, code=2)
    assert "unmount it first" in said
    said = host.run("mount", host.ref, PLACE / "mounts/idmapped", "--upper", record["upper"], *STORE, code=2)
    assert "give each mount its own" in said

    # What it uses stays, without a name and without a bundle.
    host.run("bundle", "--remove", PLACE / "bundle")
    for name in [name for image in host.facts["images"] for name in image["names"]]:
        host.run("store", "rm", name, *STORE)
    host.run("store", "gc", *STORE)
    assert set(host.metas()) >= {record["label"]["meta"]}
    with contextlib.suppress(OSError):
        page_cache.drop_all(page_cache.ALL)
    host.shows("mounts/own", host.trees["written"])

    found = json.loads(host.run("which", PLACE / "mounts/own/srv/tagged", *STORE, "--json"))
    assert host.facts["name"] in json.dumps(found) or record["label"]["manifest"] in json.dumps(found)
    host.run("umount", PLACE / "mounts/own", *STORE)
    left = host.inside("cat", "/proc/self/mounts")
    assert str(PLACE / "mounts") not in left and f"{host.records.name}/layers/" not in left
    assert list((host.records / "layers").iterdir()) == []
    host.run("store", "gc", *STORE)
    assert host.metas() == {}


def test_a_served_mount_without_its_server_is_told(host: Host) -> None:
    record = host.recorded("served")
    lower = f"lowerdir={PLACE}/bundle:{PLACE}/mounts"
    host.mount("overlay", f"layerkit:{record['id']}", record["target"], lower, READ_ONLY)
    (row,) = host.json("mounts", *STORE)["mounts"]
    assert (row["target"], row["server"]) == (record["target"], "killed")
    host.run("umount", record["target"], *STORE)
    assert list((host.records / "records").iterdir()) == []


# Bundles


def test_a_bundle_is_mounted_again_with_what_was_written_in_it(host: Host) -> None:
    words = ("bundle", host.ref, PLACE / "bundle", "--seccomp", "unconfined", *STORE)
    said = host.run(*words, "--uid-map", OTHER_MAP, code=2)
    assert "is a bundle of" in said
    identity = json.loads((host.folder / "bundle/layerkit.json").read_bytes())["id"]
    host.run(*words, "--uid-map", MAP)
    assert json.loads((host.folder / "bundle/layerkit.json").read_bytes())["id"] == identity
    host.shows("bundle/rootfs", host.trees["bundle"])
    assert (host.seen / "bundle/rootfs/etc/kept").read_text() == "by a container\n"
    assert json.loads((host.folder / "bundle/config.json").read_bytes())["root"]["path"]
    host.run("bundle", "--remove", PLACE / "bundle")
    assert not (host.folder / "bundle").exists()
    assert not (host.folder / f"store/pins/{identity}.json").exists()


# The snapshotter


@contextlib.contextmanager
def _snapshotter(host: Host) -> Iterator[Client]:
    words = ("snapshotter", "--address", PLACE / "s.sock", "--root", PLACE / "sroot", *STORE, "--quiet")
    command = [f"--mount={host.seen.parent.parent.parent}/ns/mnt", sys.executable, "-m", "layerkit.cli.main"]
    process = subprocess.Popen(["nsenter", *command, *map(str, words)])
    try:
        wait_for(lambda: (host.folder / "s.sock").exists() or process.poll() is not None)
        assert process.poll() is None, "the snapshotter ended"
        with contextlib.closing(Client(host.seen / "s.sock")) as client:
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@contextlib.contextmanager
def _shown(host: Host, found: list[Any]) -> Iterator[str]:
    """Mount what the snapshotter answered, as containerd does."""
    (host.folder / "point").mkdir(exist_ok=True)
    for mount in found:
        flags = {"ro": READ_ONLY, "rw": 0, "bind": BIND, "rbind": BIND}
        number = sum(flags[option] for option in mount.options if option in flags)
        words = ",".join(option for option in mount.options if option not in flags)
        host.mount(mount.type, mount.source, PLACE / "point", words, number)
    try:
        yield "point"
    finally:
        host.inside("umount", PLACE / "point")


def test_containers_go_on_over_their_snapshots(host: Host) -> None:
    wanted = host.facts["snapshots"]
    with _snapshotter(host) as client:
        found = [
            {"name": i.name, "parent": i.parent, "kind": i.kind, "labels": dict(i.labels),
             "created": i.created_at.ToNanoseconds()}
            for i in client.walk()
        ]  # fmt: skip
        assert found == wanted["infos"]
        assert [i.name for i in client.walk("labels.note==kept")] == ["mapped"]
        usage = client.usage("unpacked")
        assert [usage.size, usage.inodes] == wanted["usage"]
        for key, tree in (("plain", "plain"), ("mapped", "container"), ("seen", "view")):
            with _shown(host, client.mounts(key)) as point:
                host.shows(point, host.trees[tree])


def test_new_containers_over_layers_that_were_there(host: Host) -> None:
    metas = sorted(path.name for path in (host.folder / "sroot/meta").iterdir())
    with _snapshotter(host) as client:
        labels = {f"containerd.io/snapshot/{kind}mapping": OTHER_MAP for kind in ("uid", "gid")}
        with _shown(host, client.prepare("new", "unpacked", labels)) as point:
            new = {p: (s.uid - 600_000, s.gid - 600_000, s.sha256) for p, s in snapshot(host.seen / point).items()}
        with _shown(host, client.mounts("mapped")) as point:
            old = {p: (s.uid, s.gid, s.sha256) for p, s in snapshot(host.seen / point).items()}
        # But for what the other container wrote.
        assert {p: s for p, s in old.items() if p != b"./etc/mine"} == new
        assert sorted(path.name for path in (host.folder / "sroot/meta").iterdir()) == metas, "was made again"
        client.commit("committed", "mapped")
        with _shown(host, client.prepare("again", "committed", {})) as point:
            assert {p: (s.uid, s.gid, s.sha256) for p, s in snapshot(host.seen / point).items()} == old
        # A pull asks whether the layers are there.
        ref = host.facts["snapshots"]["infos"][1]["name"].rpartition("/")[2]
        with pytest.raises(Exception, match="ALREADY_EXISTS"):
            parent = host.facts["snapshots"]["infos"][0]["name"]
            client.prepare("extract", parent, {"containerd.io/snapshot.ref": ref})


def test_snapshots_can_all_be_removed(host: Host) -> None:
    with _snapshotter(host) as client:
        for info in reversed(client.walk()):
            client.remove(info.name)
        client.cleanup()
        assert client.walk() == []
    for folder in ("snapshots", "meta", "index"):
        assert list((host.folder / "sroot" / folder).iterdir()) == []
    names = [name for image in host.json("store", "ls", *STORE)["images"] for name in image["names"]]
    assert names == [host.facts["name"]], "the snapshotter's own name in the store has to go"


# podman's storage


@pytest.fixture
def storage(site: Callable[[str], Site]) -> Site:
    made = site("storage")
    (made.folder / "merged").mkdir(exist_ok=True)
    return made


def test_containers_of_podman_keep_their_owners(storage: Site) -> None:
    facts = json.loads((storage.folder / "storage.json").read_bytes())
    trees = trees_of(facts["trees"])
    env: dict[str, Any] = {"LAYERKIT_STORE": PLACE / "storage-store"}
    lower = facts["options"].partition(",upperdir=")[0]
    for options, tree in (
        (f"{facts['options']},{facts['map']}", "container"),
        # As for a commit: without the map the owners are those of an image.
        (facts["options"], "commit"),
        (f"{lower},{facts['map']},rendering=directory", "read-only"),
    ):
        storage.run("mount-program", "-o", options, PLACE / "merged", **env)
        storage.shows("merged", trees[tree])
        storage.inside("umount", PLACE / "merged")
    other = f"uidmapping={OTHER_MAP}:,gidmapping={OTHER_MAP}:"
    said = storage.run("mount-program", "-o", f"{facts['options']},{other}", PLACE / "merged", code=2, **env)
    assert "written under the map" in said


def test_metadata_over_folders_goes_with_the_folders(storage: Site) -> None:
    """The copies of the folders are others than those that were read, as after a restore from a backup."""
    words = ("--store", PLACE / "storage-store")
    before = {m["rendering"] for m in storage.json("store", "df", *words)["metas"]}
    assert before == {"fuse", "directory"}
    storage.run("store", "gc", *words)
    assert storage.json("store", "df", *words)["metas"] == []
    assert list((storage.folder / "storage-store/index").iterdir()) == []
    assert storage.json("store", "verify", *words)["whole"]


# finalize


@pytest.fixture
def uppers(site: Callable[[str], Site]) -> tuple[Site, dict[str, dict[bytes, Shown]]]:
    made = site("finalize")
    return made, trees_of(json.loads((made.folder / "finalize.json").read_bytes()))


def _is_as_before(site: Site, name: str, want: dict[bytes, Shown]) -> None:
    """Compare, but for the kernel's habit of making all whiteouts links of one inode."""

    def apart(tree: dict[bytes, Shown]) -> dict[bytes, Shown]:
        return {p: s._replace(links=()) if stat.S_ISCHR(s.mode) else s for p, s in tree.items()}

    assert differences(apart(snapshot(site.seen / f"finalize/{name}/upper")), apart(want)) == []


def test_what_finalize_did_can_be_taken_back(uppers: tuple[Site, dict[str, dict[bytes, Shown]]]) -> None:
    site, trees = uppers
    upper = PLACE / "finalize/whole/upper"
    site.shows("finalize/whole/upper", trees["whole final"])
    assert site.json("finalize", upper, "--lower", PLACE / "finalize/whole/lower", "--check")["final"]
    site.run("finalize", upper, "--undo", f"{upper}.layerkit-undo")
    _is_as_before(site, "whole", trees["whole before"])
    assert not (site.folder / "finalize/whole/upper.layerkit-undo").exists()


@pytest.mark.parametrize("then", ["undo", "go on"])
def test_a_finalize_that_was_killed(uppers: tuple[Site, dict[str, dict[bytes, Shown]]], then: str) -> None:
    site, trees = uppers
    upper, lower = PLACE / "finalize/half/upper", PLACE / "finalize/half/lower"
    if then == "go on":
        assert site.json("finalize", upper, "--lower", lower)["resumed"]
        assert site.json("finalize", upper, "--lower", lower, "--check")["final"]
        paths = {path: (s.mode, s.uid, s.gid, s.size) for path, s in trees["whole final"].items()}
        found = snapshot(site.seen / "finalize/half/upper")
        assert {path: (s.mode, s.uid, s.gid, s.size) for path, s in found.items()} == paths
    site.run("finalize", upper, "--undo", f"{upper}.layerkit-undo")
    _is_as_before(site, "half", trees["half before"])
    assert list((site.folder / "finalize/half").glob("*.layerkit-undo*")) == []


# Artifacts


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    need_tool("tar")
    return extract("artifacts", tmp_path / "site") / "artifacts"


def test_published_remaps_are_verified_and_used(artifacts: Path, tmp_path: Path) -> None:
    """``verify`` makes each of the three again and compares the bytes; ``pull`` asks for the signature, too."""
    ref = f"oci:{artifacts}/published:app"
    assert len(json.loads(run("verify", ref, "--json"))["artifacts"]) == 3
    words = ("pull", ref, "--uid-map", MAP, "--require-published", "--store", tmp_path / "store")
    pulled = json.loads(run(*words, "--key", artifacts / "sign.pub", "--json"))
    assert pulled["published"] and pulled["signed"] and not pulled["refused"]
    run("pull", ref, "--uid-map", OTHER_MAP, *words[4:], code=3)
    with layerkit.open_image(f"oci:{artifacts}/published:app") as image:
        tree = tree_of(json.loads((artifacts / "trees.json").read_bytes())["app"])
        assert set(image.tree().paths()) == {b"" if p == b"." else p[2:] for p in tree}


@pytest.mark.parametrize("part", ["layer", "artifact", "statement"])
def test_a_published_remap_that_is_damaged_is_refused(artifacts: Path, tmp_path: Path, part: str) -> None:
    ref = f"oci:{artifacts}/published:app"
    blobs = artifacts / "published/blobs/sha256"
    words = ("--uid-map", MAP, "--key", artifacts / "sign.pub", "--require-published", "--json")
    published = json.loads(run("pull", ref, *words, "--store", tmp_path / "before"))["published"]
    documents = [json.loads(data) for p in blobs.iterdir() if (data := p.read_bytes()).startswith(b'{"')]
    index = json.loads((artifacts / "published/index.json").read_bytes())
    image = next(m["digest"] for m in index["manifests"] if "artifactType" not in m)
    statement = next(d for d in documents if d.get("subject", {}).get("digest") == published)
    document = {"layer": json.loads((blobs / image[7:]).read_bytes()), "statement": statement}.get(part)
    document = document or json.loads((blobs / published[7:]).read_bytes())
    path = blobs / document["layers"][0]["digest"][7:]
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    run("pull", ref, *words, "--store", tmp_path / "after", code=3)


def test_published_indexes_save_reading_layers(artifacts: Path, tmp_path: Path) -> None:
    made = json.loads(
        run("remap", f"oci:{artifacts}/published:app", f"oci:{tmp_path}/new:app", "--uid-map", OTHER_MAP, "--store",
            tmp_path / "store", "--json", LAYERKIT_CACHE=tmp_path / "cache")
    )  # fmt: skip
    assert made["layers_read"] == 0 and "2 of 2" in made["warnings"][0]
    # What was made without the layers is what they make of the map.
    found = json.loads(run("verify", f"oci:{tmp_path}/new:app", "--json"))
    assert found["artifacts"] == [made["artifact"]]


@pytest.mark.parametrize("want", ["app", "map"])
def test_a_published_image_is_mounted(site: Callable[[str], Site], want: str) -> None:
    made = site("artifacts")
    trees = trees_of(json.loads((made.folder / "artifacts/trees.json").read_bytes()))
    (made.folder / "m").mkdir()
    words = ("--uid-map", MAP) if want == "map" else ()
    made.run("mount", f"oci:{PLACE}/artifacts/published:app", PLACE / "m", *words, *STORE)
    made.shows("m", trees[want])
    made.run("umount", PLACE / "m", *STORE)


@pytest.mark.parametrize("name", ["layered", "stubs"])
def test_images_with_stubs_in_layers_are_read(artifacts: Path, name: str) -> None:
    ref, facts = f"oci:{artifacts}/{name}:app", json.loads((artifacts / "facts.json").read_bytes())[name]
    found = json.loads(run("verify", ref, "--json"))
    assert [found["manifest"], found["tree_digest"]] == [facts["manifest"], facts["tree_digest"]]


# The hook

HOOK = f"""
listen = "127.0.0.1:0"
state = "state"
store = "store"
engine = "threads"
workers = 1
[[registry]]
name = "main"
host = "{{host}}"
tls_verify = false
[[map]]
uid_map = ["{MAP}"]
[retry]
attempts = 2
first_seconds = 0.1
"""


@pytest.fixture
def hook(tmp_path: Path) -> Iterator[Path]:
    """Give the folder of a hook that was killed, beside a registry with the images of its jobs."""
    need_tool("tar", "docker-registry")
    folder = extract("hook", tmp_path / "site") / "hook"
    with docker_registry(tmp_path / "registry") as registry:
        for name in ("done", "dead", "slow", "waiting"):
            target = f"docker://{registry.host}/team/{name}:v1"
            run("copy", f"oci:{folder}/images:{name}", target, "--tls-verify=false")
        (folder / "hook.toml").write_text(HOOK.format(host=registry.host))
        yield folder


def _jobs(folder: Path) -> dict[str, Any]:
    said = run("hook", "jobs", "--config", folder / "hook.toml", "--json")
    return {job["id"]: job for job in json.loads(said)["jobs"]}


def test_jobs_are_listed_as_they_were(hook: Path) -> None:
    facts = json.loads((hook / "hook.json").read_bytes())
    names = ("id", "digest", "map", "state", "attempts", "why", "created", "finished", "targets", "report")
    assert {i: [job[name] for name in names] for i, job in _jobs(hook).items()} == {
        job["id"]: [job[name] for name in names] for job in facts["jobs"]
    }


def test_a_hook_goes_on_with_the_jobs_of_the_one_before(hook: Path) -> None:
    facts = json.loads((hook / "hook.json").read_bytes())
    config, before = hook / "hook.toml", {job["state"]: job["id"] for job in facts["jobs"]}
    token = (hook / "state" / facts["token"]).read_text().strip()
    # One that is done is known, and its artifact is found in the registry.
    (again,) = json.loads(
        run("hook", "run", _ref(config, "done"), "--config", config, "--json")
    )["jobs"]  # fmt: skip
    assert again["id"] == before["done"] and again["report"]["existing"] and again["state"] == "done"

    with hook_process(config, log=hook / "log") as (_, url):
        request = urllib.request.Request(f"{url}/v1/status", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.status == 200
        wait_for(lambda: all(_jobs(hook)[before[s]]["state"] == "done" for s in ("running", "waiting")))
        assert {s: _jobs(hook)[before[s]]["state"] for s in ("dead", "skipped")} == {
            "dead": "dead",
            "skipped": "skipped",
        }
        run("hook", "retry", "--all", "--config", config)
        wait_for(lambda: _jobs(hook)[before["dead"]]["state"] == "done")
    assert set(_jobs(hook)) == set(before.values()), "a job was not known again"
    # Each job left its artifact beside the image, and what one reads of it is right.
    for name in ("slow", "waiting", "dead", "done"):
        found = json.loads(run("verify", _ref(config, name), "--tls-verify=false", "--json"))
        assert len(found["artifacts"]) == 1, name


def _ref(config: Path, name: str) -> str:
    host = next(line for line in config.read_text().splitlines() if line.startswith("host")).split('"')[1]
    return f"docker://{host}/team/{name}:v1"


def test_layers_that_the_hook_knows_are_not_read_again(hook: Path) -> None:
    config = hook / "hook.toml"
    said = run("hook", "run", _ref(config, "done"), "--config", config, "--again", "--json")
    (job,) = json.loads(said)["jobs"]
    assert (job["report"]["layers_read"], job["report"]["layers_kept"]) == (0, 2)


def test_the_fixtures_are_those_that_are_described() -> None:
    """A fixture that is made anew by a later version would show nothing: README.md has the digest of each."""
    readme = (FIXTURES / "README.md").read_text()
    archives = sorted(FIXTURES.glob("*.tar.gz"))
    assert len(archives) == 5
    for path in archives:
        assert hashlib.sha256(path.read_bytes()).hexdigest() in readme, path.name
