"""``bundle``: runc and crun run it; owners, privileges, users, volumes, and what stays when it goes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import made_images
import page_cache
import pytest
import runc
import runnable
from engines import short_folder
from memcg import cache_bytes, memory_group, run_in
from needs import missing, need_tool
from programs import answer, command, run_layerkit

import layerkit
from layerkit.api import bundle as bundling
from layerkit.formats.runtime.config import Wishes
from layerkit.hosts.bundle import container
from layerkit.hosts.bundle import folder as folders
from layerkit.hosts.mounts.mount import default_run
from layerkit.model.errors import InvalidImage, LayerkitError, NotFound, UnmappedId, UsageError
from layerkit.store import pins
from layerkit.usecases.bundle import BundleReport

pytestmark = pytest.mark.usefixtures("as_root")

RUNTIMES = ("runc", "crun")
REF = "store:app:latest"
MAPS = ("0:100000:65536", "0:300000:65536")
# As an ordinary user of the container: owners, a setuid program at work, a program that needs its capability.
LOOK = """
import json, os, subprocess, time
out = {"uid": os.getuid(), "map": open("/proc/self/uid_map").read().split()}
for path in ("/usr/bin/su", "/opt/app", "/opt/tools/setuid", "/opt/tools/setgid", "/srv/drop", "/etc/passwd"):
    st = os.stat(path)
    out[path] = [st.st_uid, st.st_gid, st.st_mode & 0o7777]
su = subprocess.Popen(["su"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
while True:
    status = dict(line.split(":", 1) for line in open(f"/proc/{su.pid}/status") if ":" in line)
    if status["Name"].strip() == "su":
        break
    time.sleep(0.01)
out["su"] = status["Uid"].split()
su.kill()
out["ping"] = subprocess.run(["ping", "-c1", "-W2", "127.0.0.1"], capture_output=True).returncode
out["capability"] = os.getxattr("/opt/tools/capable", "security.capability").hex()
out["note"] = os.getxattr("/opt/tools/plain", "user.origin").decode()
print(json.dumps(out))
"""
WRITE = (
    "set -e; chown 5:6 /etc/passwd; chmod 600 /etc/group; echo line >> /etc/hosts; rm /usr/bin/su; mkdir /new; "
    "chmod 2775 /new; ln -s x /new/link; mv /opt/tools /opt/moved; cat /opt/moved/plain > /dev/null; "
    "stat -c '%u:%g:%a' /etc/passwd /etc/group /new /opt/moved/setuid"
)


@pytest.fixture(scope="module")
def store(app_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store that has the real image."""
    work = tmp_path_factory.mktemp("store")
    path: Path = work / "store"
    app_image = Path(shutil.copy(app_image, work / "app.tar"))
    with layerkit.open_image(str(app_image), settings=layerkit.Settings(store=path)) as image:
        image.remap(layerkit.mapping([MAPS[0]]))
        assert f"store:{image.name}" == REF
    return path


@pytest.fixture
def open_path() -> Iterator[Path]:
    """Return a folder that lets the container's root through; pytest's own are closed again and again."""
    with short_folder() as folder:
        folder.chmod(0o711)
        yield folder


def make(store: Path, ref: Any, folder: Path, uid_map: str | None, *words: str, **wishes: Any) -> BundleReport:
    settings = layerkit.Settings(store=store)
    mapping = layerkit.mapping([uid_map]) if uid_map else None
    with layerkit.open_image(str(ref), settings=settings) as image:
        return bundling.bundle(image, folder, mapping, Wishes(command=words, **wishes))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_two_containers_of_one_image_with_different_maps(store: Path, open_path: Path, runtime: str) -> None:
    need_tool(runtime)
    for number, uid_map in enumerate(MAPS):
        folder, base = open_path / f"b{number}", int(uid_map.split(":")[1])
        report = make(store, REF, folder, uid_map, "python3", "-c", LOOK)
        assert (report.user, report.layers_read, report.meta_bytes, report.warnings) == ("1000:1000", 0, 0, ())
        try:
            seen = json.loads(runc.run(runtime, open_path, folder))
            assert (seen["uid"], seen["map"]) == (1000, uid_map.split(":"))
            assert seen["/usr/bin/su"] == [0, 0, 0o4755]
            assert seen["/opt/app"] == [1000, 1000, 0o750]
            assert seen["/opt/tools/setuid"] == [33, 33, 0o4755]
            assert seen["/opt/tools/setgid"] == [0, 33, 0o2755]
            assert seen["/srv/drop"] == [0, 1000, 0o3777]
            # Real, effective, saved and filesystem uid of a running setuid program; ping needs its capability.
            assert seen["su"] == ["1000", "0", "0", "0"]
            assert seen["ping"] == 0
            assert (seen["capability"][:10], seen["note"]) == ("0100000200", "copied from /usr/bin/true")
            # From outside.
            for path, owner in (("usr/bin/su", (0, 0)), ("opt/app", (1000, 1000)), ("srv/drop", (0, 1000))):
                shown = (folder / "rootfs" / path).stat()
                assert (shown.st_uid, shown.st_gid) == (base + owner[0], base + owner[1])
        finally:
            bundling.remove(folder)
        assert not folder.exists()


CALLS = """
import ctypes, errno, json
libc = ctypes.CDLL(None, use_errno=True)
with open("/proc/self/status") as file:
    mode = next(line.split()[1] for line in file if line.startswith("Seccomp:"))
libc.fanotify_init(0x80000200, 0)
print(json.dumps([mode, errno.errorcode[ctypes.get_errno()]]))
"""


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_system_calls_are_those_that_the_hosts_engines_leave_open(
    store: Path, open_path: Path, tmp_path: Path, runtime: str
) -> None:
    need_tool(runtime)
    if not any(path.is_file() for path in container.SECCOMP_PROFILES):
        missing("needs the seccomp profile of containers-common")
    own = tmp_path / "own.json"
    own.write_text(
        '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["fanotify_init"], "action": "SCMP_ACT_ERRNO",'
        ' "errno": "EXDEV"}]}'
    )
    for number, (wish, caps, want) in enumerate(
        (
            # Let through, the kernel says that it has no such flag. The rule hangs on a capability.
            ("auto", (), ["2", "EPERM"]),
            ("auto", ("SYS_ADMIN",), ["2", "EINVAL"]),
            ("unconfined", (), ["0", "EINVAL"]),
            (str(own), (), ["2", "EXDEV"]),
        )
    ):
        folder = open_path / f"b{number}"
        make(store, REF, folder, MAPS[0], "python3", "-c", CALLS, seccomp=wish, cap_add=caps)
        try:
            assert json.loads(runc.run(runtime, open_path, folder)) == want
        finally:
            bundling.remove(folder)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_writes_go_to_the_upper_and_copy_no_data(store: Path, open_path: Path, runtime: str) -> None:
    need_tool(runtime)
    folder = open_path / "b"
    make(store, REF, folder, MAPS[0], "sh", "-c", WRITE, user="0", workdir="/")
    try:
        out = runc.run(runtime, open_path, folder)
        assert out.split() == ["5:6:644", "0:0:600", "0:0:2775", "33:33:4755"]
        upper = folder / "state/upper"
        owned = {name: (upper / name).lstat() for name in ("etc/passwd", "etc/group", "new", "new/link")}
        assert (owned["etc/passwd"].st_uid, owned["etc/passwd"].st_gid) == (100005, 100006)
        assert {owned[name].st_uid for name in ("etc/group", "new", "new/link")} == {100000}
        # chown and chmod: metadata alone.
        assert owned["etc/passwd"].st_blocks * 512 <= 4096
        assert "trusted.overlay.metacopy" in os.listxattr(upper / "etc/passwd")
        assert stat.S_ISCHR((upper / "usr/bin/su").stat().st_mode)
        assert (folder / "rootfs/opt/moved/plain").read_bytes()[:4] == b"\x7fELF"
    finally:
        bundling.remove(folder)


def test_the_images_own_command(store: Path, open_path: Path) -> None:
    need_tool("runc")
    make(store, REF, open_path / "b", MAPS[0])
    try:
        assert "django" in runc.run("runc", open_path, open_path / "b")
    finally:
        bundling.remove(open_path / "b")


def test_without_a_map_and_read_only(store: Path, open_path: Path) -> None:
    need_tool("runc")
    make(
        store,
        REF,
        open_path / "b",
        None,
        "sh",
        "-c",
        "id -u; touch /x || echo no",
        user="0",
        read_only=True,
    )
    try:
        assert runc.run("runc", open_path, open_path / "b").split() == ["0", "no"]
        assert stat.S_IMODE((open_path / "b").stat().st_mode) == 0o700
    finally:
        bundling.remove(open_path / "b")


@pytest.mark.usefixtures("caches_stay")
def test_the_page_cache_grows_once(store: Path, open_path: Path) -> None:
    need_tool("runc")
    made = []
    with memory_group("bundle") as group:
        if group is None:
            missing("needs a memory cgroup")
        try:
            for number in range(4):
                made.append(open_path / f"b{number}")
                words = ("sh", "-c", "find /usr/lib -xdev -type f -exec cat {} + | wc -c")
                make(store, REF, made[-1], f"0:{number + 1}00000:65536", *words, user="0")
            files = (made[0] / "rootfs/usr/lib").rglob("*")
            page_cache.drop(*(path for path in files if path.is_file() and not path.is_symlink()))
            sizes = []
            for folder in made:
                read = int(runc.run("runc", open_path, folder))
                run_in(group, ["find", f"{folder}/rootfs/usr/lib", "-type", "f", "-exec", "cat", "--", "{}", "+"])
                sizes.append(cache_bytes(group))
        finally:
            for folder in made:
                bundling.remove(folder)
    # What the first container read is in memory for all; the charge of what follows is metadata.
    assert read > 20 << 20
    assert sizes[-1] < read / 10


def test_a_further_map_costs_next_to_nothing(store: Path, open_path: Path) -> None:
    def allocated(*roots: Path) -> int:
        return sum(p.lstat().st_blocks * 512 for root in roots for p in (root, *root.rglob("*")))

    data = allocated(store / "tar")
    before = allocated(store)
    made = []
    try:
        for number in range(5):
            folder = open_path / f"b{number}"
            words = ("bundle", REF, folder, "--uid-map", f"0:{number + 2}00000:65536", "--store", store)
            run_layerkit(*words)
            made.append(folder)
        own = [allocated(f / "state", f / "volumes") + (f / "config.json").stat().st_blocks * 512 for f in made]
        grown = allocated(store) - before
    finally:
        for folder in made:
            bundling.remove(folder)
    assert max(own) + grown / 5 <= data / 100


def test_twenty_at_once_started_and_killed(store: Path, open_path: Path) -> None:
    need_tool("runc")
    made: list[Path] = []
    errors: list[BaseException] = []
    started: dict[str, subprocess.Popen[bytes]] = {}

    def one(number: int) -> None:
        try:
            folder = open_path / f"b{number}"
            uid_map = f"0:{number + 1}00000:65536"
            make(
                store,
                REF,
                folder,
                uid_map,
                "python3",
                "-c",
                "import time; print(1, flush=True); time.sleep(600)",
            )
            made.append(folder)
            name = runc.name()
            started[name] = subprocess.Popen(
                runc.words("runc", open_path, "run", "-b", folder, name),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            out = started[name].stdout
            assert out is not None
            assert out.readline() == b"1\n"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(20)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert len(folders.running(read(made[0]))) >= 1
        with pytest.raises(LayerkitError, match="running container"):
            bundling.remove(made[0])
    finally:
        for name, process in started.items():
            subprocess.run(runc.words("runc", open_path, "kill", name, "KILL"), capture_output=True)
            process.wait(120)
            subprocess.run(runc.words("runc", open_path, "delete", "--force", name), capture_output=True)
        for folder in made:
            bundling.remove(folder)
    assert not [p for p in open_path.iterdir() if p.name.startswith("b")]
    assert pins.live(store) == []
    # The shared layers go with the last one.
    assert not [m for m in Path("/proc/self/mountinfo").read_text().splitlines() if str(default_run(store)) in m]


def read(folder: Path) -> folders.Bundle:
    found = folders.read(folder)
    assert found is not None
    return found


# Images of our own


def entry(name: str, kind: bytes, link: str = "", **more: Any) -> tarfile.TarInfo:
    return made_images.special(name, kind, link, **more)


@pytest.fixture
def kit(tmp_path: Path) -> Callable[..., Path]:
    """Return a maker of images around a static busybox: ``kit(config, *members)``."""
    need_tool("runc")
    return lambda config, *members, layers=1: runnable.busybox_image(
        tmp_path / f"image-{len(list(tmp_path.iterdir()))}", config, *members, layers=layers
    )


def test_user_workdir_and_environment_of_the_image(kit: Callable[..., Path], open_path: Path) -> None:
    image = kit(
        {"User": "app", "WorkingDir": "/srv/made/here", "Env": ["A=b c"], "Entrypoint": ["/bin/sh", "-c"],
         "Cmd": ["id; pwd; stat -c %u:%g:%a .; echo $A $HOME $PATH"]}
    )  # fmt: skip
    report = make(open_path / "store", image, open_path / "b", MAPS[0])
    try:
        assert report.user == "1000:1001"
        ids, cwd, owner, env = runc.run("runc", open_path, open_path / "b").splitlines()
        assert ids == "uid=1000(app) gid=1001 groups=44(video)" or "44" in ids
        assert (cwd, owner) == ("/srv/made/here", "0:0:755")
        assert env.startswith("b c /home/app /usr/local/sbin:")
    finally:
        bundling.remove(open_path / "b")


@pytest.mark.parametrize("kind", ["bind", "tmpfs"])
def test_volumes_keep_data_out_of_the_root(kit: Callable[..., Path], open_path: Path, kind: str) -> None:
    image = kit(
        {"Volumes": {"/data": {}, "/none/there": {}}, "Cmd": ["/bin/sh", "-c",
         "cat /data/sub/seed; stat -c %u:%g:%a /data; ls /none/there; touch /data/new /none/there/new"]},
        entry("data", tarfile.DIRTYPE, mode=0o1770, uid=7, gid=8), entry("data/sub", tarfile.DIRTYPE, mode=0o755),
        ("data/sub/seed", b"seeded\n"),
    )  # fmt: skip
    make(open_path / "store", image, open_path / "b", MAPS[0], image_volumes=kind)
    try:
        out = runc.run("runc", open_path, open_path / "b").split()
        # runc copies into a tmpfs what is in the folder, and not the owner of the folder itself.
        assert out[:2] == ["seeded", "7:8:1770" if kind == "bind" else "0:0:1770"]
        upper = {
            str(p.relative_to(open_path / "b/state/upper")) for p in (open_path / "b/state/upper").rglob("new")
        }
        assert upper == set()
        if kind == "bind":
            place = open_path / "b/volumes/0"
            assert (place.stat().st_uid, place.stat().st_gid) == (100007, 100008)
            assert (place / "new").stat().st_uid == 100000
    finally:
        bundling.remove(open_path / "b")


def test_a_hundred_layers(kit: Callable[..., Path], open_path: Path) -> None:
    image = kit({"Cmd": ["/bin/sh", "-c", "cat /layer/*"]}, layers=100)
    make(open_path / "store", image, open_path / "b", MAPS[0])
    try:
        assert sorted(runc.run("runc", open_path, open_path / "b")) == sorted("".join(str(n) for n in range(99)))
    finally:
        bundling.remove(open_path / "b")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_hosts_network(kit: Callable[..., Path], open_path: Path, runtime: str) -> None:
    need_tool(runtime)
    image = kit({"Cmd": ["/bin/sh", "-c", "ls /sys/class/net; cat /proc/net/dev"]})
    make(open_path / "store", image, open_path / "b", MAPS[0], network="host")
    try:
        names = runc.run(runtime, open_path, open_path / "b").split()
        assert set(os.listdir("/sys/class/net")) <= set(names)
    finally:
        bundling.remove(open_path / "b")


def test_the_hosts_accounts_are_never_read(kit: Callable[..., Path], open_path: Path) -> None:
    """Links that point out of the image are resolved inside it; what is no file is refused."""
    climbing = "/../../../../../../etc/lk-accounts"
    image = kit({"User": "app", "Cmd": ["/bin/id"]}, entry("etc/passwd", tarfile.SYMTYPE, climbing))
    with pytest.raises(InvalidImage, match="no user 'app'"):
        make(open_path / "store", image, open_path / "b", MAPS[0])
    image = kit(
        {"User": "app", "Cmd": ["/bin/id", "-u"]}, entry("etc/passwd", tarfile.SYMTYPE, climbing),
        ("etc/lk-accounts", b"app:x:77:78::/:/x\n"),
    )  # fmt: skip
    assert make(open_path / "store", image, open_path / "b", MAPS[0]).user == "77:78"
    bundling.remove(open_path / "b")
    for kind in (tarfile.FIFOTYPE, tarfile.DIRTYPE):
        image = kit({"User": "app", "Cmd": ["/bin/id"]}, entry("etc/passwd", kind, mode=0o644))
        with pytest.raises(InvalidImage, match="not a regular file"):
            make(open_path / "store", image, open_path / "b", MAPS[0])
    assert not (open_path / "b").exists()
    assert pins.live(open_path / "store") == []


def test_workdir_and_volumes_stay_inside(kit: Callable[..., Path], open_path: Path) -> None:
    outside = open_path / "outside"
    outside.mkdir()
    image = kit(
        {"WorkingDir": "/way/made", "Volumes": {"/vol/inner": {}}, "Cmd": ["/bin/pwd"]},
        entry("way", tarfile.SYMTYPE, f"/../../../../../..{outside}"), entry("vol", tarfile.SYMTYPE, str(outside)),
    )  # fmt: skip
    with pytest.raises(InvalidImage, match="link to nowhere"):
        make(open_path / "store", image, open_path / "b", MAPS[0])
    assert list(outside.iterdir()) == []
    assert not (open_path / "b").exists()
    image = kit({"WorkingDir": "/etc/passwd/x", "Cmd": ["/bin/pwd"]})
    with pytest.raises(InvalidImage, match="not a folder"):
        make(open_path / "store", image, open_path / "b", MAPS[0])


def test_refusals(kit: Callable[..., Path], open_path: Path) -> None:
    image, store = kit({"Cmd": ["/bin/id"]}), open_path / "store"
    full = open_path / "full"
    full.mkdir()
    (full / "mine").touch()
    with pytest.raises(UsageError, match="not empty"):
        make(store, image, full, MAPS[0])
    with pytest.raises(UsageError, match="leaves out 0"):
        make(store, image, open_path / "b", "1:100000:10")
    with pytest.raises(UnmappedId, match="uid 5000"):
        make(store, image, open_path / "b", "0:100000:2000", user="5000")
    with pytest.raises(InvalidImage, match="no user 'mallory'"):
        make(store, image, open_path / "b", MAPS[0], user="mallory")
    with pytest.raises(UsageError, match="names no command"):
        make(store, kit({}), open_path / "b", MAPS[0])
    with pytest.raises(NotFound, match="not a bundle"):
        bundling.remove(full)
    assert sorted(p.name for p in open_path.iterdir() if not p.name.startswith("image")) == ["full", "store"]
    assert run_layerkit("bundle", image, "--store", store, code=2).stderr.startswith(
        "layerkit: DIR is missing, the folder for the bundle"
    )
    said = run_layerkit("bundle", "--rootless", image, open_path / "b", "--store", store, code=2).stderr
    assert "--rootless is for ordinary users" in said


WRONG: dict[str, Any] = {
    "folder": ["--uid-map", MAPS[0]],
    "map": ["--uid-map", "1:100000:10"],
    "words": ["--data", "paper"],
    "volume": ["-v", "here:/there"],
    "capability": ["--cap-add", "all"],
    "profile": ["--seccomp", "/nonexistent"],
    "network": ["--network", "bridge"],
}


@pytest.mark.parametrize("what", WRONG)
def test_arguments_are_checked_before_a_store_is_made(kit: Callable[..., Path], open_path: Path, what: str) -> None:
    folder = open_path / "b"
    if what == "folder":
        folder.mkdir()
        (folder / "mine").touch()
    run_layerkit("bundle", kit({"Cmd": ["/bin/id"]}), folder, "--store", open_path / "new", *WRONG[what], code=2)
    assert not (open_path / "new").exists() and folder.exists() == (what == "folder")


def test_the_folder_of_another_user_is_not_taken(kit: Callable[..., Path], open_path: Path) -> None:
    """An empty one gives way to one of ours; a bundle of theirs is refused, and stays theirs."""
    image, store, folder = kit({"Cmd": ["/bin/id"]}), open_path / "store", open_path / "b"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    folder.chmod(0o777)
    held = os.open(folder, os.O_PATH)
    make(store, image, folder, MAPS[0])
    assert not os.path.samestat(os.fstat(held), folder.stat())
    os.close(held)
    assert (folder.stat().st_uid, stat.S_IMODE(folder.stat().st_mode)) == (0, 0o710)
    folders.unmount(read(folder))
    os.chown(folder, 65534, 65534)
    with pytest.raises(UsageError, match="belongs to uid 65534"):
        make(store, image, folder, MAPS[0])
    assert folder.stat().st_uid == 65534
    bundling.remove(folder)


def test_a_folder_that_keeps_the_container_out_is_told(kit: Callable[..., Path], open_path: Path) -> None:
    shut = open_path / "shut"
    shut.mkdir(mode=0o700)
    report = make(open_path / "store", kit({"Cmd": ["/bin/id"]}), shut / "b", MAPS[0])
    bundling.remove(shut / "b")
    wanted = f"{shut} (mode 0700) keeps the container's root, 100000 on the host, out"
    assert [w for w in report.warnings if wanted in w]


def test_gc_keeps_what_a_bundle_needs(kit: Callable[..., Path], open_path: Path) -> None:
    store, folder = open_path / "store", open_path / "b"
    image = kit({"Cmd": ["/bin/cat", "/etc/group"]})
    make(store, image, folder, MAPS[0])
    # As after a reboot: the mount is gone, the bundle is not; then the image is forgotten.
    folders.unmount(read(folder))
    name = next(iter(layerkit_names(store)))
    run_layerkit("store", "rm", name, "--store", store)
    run_layerkit("store", "gc", "--store", store)
    again = make(store, image, folder, MAPS[0])
    assert (again.reused, again.layers_read) == (True, 0)
    assert "video" in runc.run("runc", open_path, folder)
    with pytest.raises(UsageError, match="ready already"):
        make(store, image, folder, MAPS[0])
    folders.unmount(read(folder))
    with pytest.raises(UsageError, match="under the map"):
        make(store, image, folder, MAPS[1])
    bundling.remove(folder)
    run_layerkit("store", "rm", name, "--store", store)
    assert "freed" in run_layerkit("store", "gc", "--store", store).stdout
    assert not list((store / "tar").iterdir())
    assert run_layerkit("store", "verify", "--store", store).stdout


def layerkit_names(store: Path) -> list[str]:
    rows = answer("store", "ls", "--store", store)
    return [name for row in rows["images"] for name in row["names"]]


def test_changes_stay_when_it_is_mounted_again(kit: Callable[..., Path], open_path: Path) -> None:
    store, folder = open_path / "store", open_path / "b"
    image = kit({"Cmd": ["/bin/sh", "-c", "ls /kept; touch /kept"]})
    make(store, image, folder, MAPS[0])
    runc.run("runc", open_path, folder)
    run_layerkit("umount", folder / "rootfs", "--store", store)
    assert make(store, image, folder, MAPS[0]).reused
    assert runc.run("runc", open_path, folder) == "/kept\n"
    bundling.remove(folder)


def test_killed_while_it_is_made(kit: Callable[..., Path], open_path: Path) -> None:
    """A kill at any moment leaves nothing that runs half, and what is left goes with --remove."""
    store, image = open_path / "store", kit({"Cmd": ["/bin/id", "-u"]})
    make(store, image, open_path / "first", MAPS[0])
    bundling.remove(open_path / "first")
    for delay in [0.02 * n for n in range(2, int(os.environ.get("LAYERKIT_KILLS", "14")))]:
        folder = open_path / "b"
        words = ["bundle", image, folder, "--uid-map", MAPS[0], "--store", store]
        process = subprocess.Popen(command(*words), stdout=subprocess.DEVNULL)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (folder / "config.json").exists():
            assert runc.run("runc", open_path, folder) == "0\n"
        if (folder / "layerkit.json").exists():
            bundling.remove(folder)
        elif folder.exists():
            folder.rmdir()  # killed between the folder and its first file: empty
    make(store, image, open_path / "b", MAPS[0])
    assert runc.run("runc", open_path, open_path / "b") == "0\n"
    bundling.remove(open_path / "b")
    run_layerkit("store", "gc", "--store", store)


def test_the_command_and_its_answer(kit: Callable[..., Path], open_path: Path) -> None:
    store, folder = open_path / "store", open_path / "web.1"
    image = kit({"Entrypoint": ["/bin/cat"], "Cmd": ["/x"], "ExposedPorts": {"80/tcp": {}}, "StopSignal": "SIGINT"})
    out = run_layerkit(
        "bundle", image, folder, "--uid-map", MAPS[0], "--store", store, "--json", "-e", "X=1", "--user", "app",
        "--entrypoint", '["/bin/sh", "-c"]', "--annotation", "a=b", "-v", "/usr:/host:ro", "--", "echo $X; id -u",
    ).stdout  # fmt: skip
    facts = json.loads(out)
    assert facts["schema"] == "layerkit.bundle.v1"
    assert facts["args"] == ["/bin/sh", "-c", "echo $X; id -u"]
    config = json.loads((folder / "config.json").read_text())
    assert config["hostname"] == "web-1"
    assert config["annotations"]["org.opencontainers.image.stopSignal"] == "SIGINT"
    assert config["annotations"]["org.opencontainers.image.exposedPorts"] == "80/tcp"
    assert runc.run("runc", open_path, folder).split() == ["1", "1000"]
    mounted = answer("mounts", "--store", store)["mounts"]
    assert [m["target"] for m in mounted] == [str(folder / "rootfs")]
    run_layerkit("bundle", "--remove", folder)
    assert not folder.exists()
