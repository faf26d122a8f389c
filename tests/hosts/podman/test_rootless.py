"""Rootless podman over our mount program: every way of mapping ids, and what podman does with a container."""

from __future__ import annotations

import concurrent.futures
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import Engine
from ordinary_users import SUBIDS
from programs import wait_for
from rootless_podman import CREATE, RUN, UID, as_user, load_box, need_podman, rootless_podman, servers

MAPS = {
    "none": (),
    "uidmap": ("--uidmap", "0:1000:2000"),
    "keep-id": ("--userns=keep-id",),
    "auto": ("--userns=auto",),
    "nomap": ("--userns=nomap",),
}
NAME = "changed"
"""No name of hexadecimal digits alone: to ``podman diff`` it would be the beginning of an image's id, too."""
OWNERS = {
    "/data/owned": "640 1000:1000 2", "/data/other": "600 5:7 1", "/data/two": "4711 5:7 1",
    "/gone/new": "644 0:0 1", "/bin/busybox-suid": "4755 0:0 1", "/root/secret": "600 0:0 1",
    "/etc": "755 0:0", "/tmp": "1777 0:0",
}  # fmt: skip
CHANGE = (
    "echo more >> /data/two; touch /data/made; chown 5:7 /data/made; chown 20:30 /data/other; "
    "chmod 4750 /data/owned; rm /gone/new; rm -r /etc/group; mkdir /data/dir; "
    "echo x > /data/dir/x; chown 1000:1000 /data/dir"
)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    need_podman()
    with rootless_podman() as engine:
        load_box(engine)
        yield engine
        engine.run("rm", "--all", "--force", "--time", "0")
        wait_for(lambda: not servers(), "servers live on without their mounts")


@pytest.fixture(autouse=True)
def no_containers(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        request.getfixturevalue("engine").run("rm", "--all", "--force", "--time", "0")


def folders(engine: Engine) -> set[str]:
    return set(os.listdir(engine.folder / "home/s/overlay")) - {"l"}


def disk(engine: Engine) -> int:
    words = ["du", "-s", "--block-size=1", str(engine.folder / "home")]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[0])


def start(engine: Engine, name: str, *options: str, script: str = "true") -> None:
    engine(
        *CREATE, "--name", name, "--user", "0", *options, "box", "sh", "-c", f"{script}; touch /ready; sleep 600"
    )
    engine("start", name)
    wait_for(lambda: engine.run("exec", name, "stat", "/ready").returncode == 0)


def last_call(engine: Engine) -> str:
    """Return the words of the mount program for the last container under the map of ``uidmap``."""
    calls = (engine.folder / "calls").read_text().splitlines()
    return [line for line in calls if "uidmapping=:0:1000:2000" in line][-1]


def upper(engine: Engine, name: str) -> Path:
    return Path(engine("inspect", "--format", "{{.GraphDriver.Data.UpperDir}}", name).strip())


@pytest.mark.parametrize("kind", MAPS)
def test_owners_modes_capabilities_and_writes(engine: Engine, kind: str) -> None:
    before, used = folders(engine), disk(engine)
    script = f"stat -c '%n %a %u:%g %h' {' '.join(OWNERS)}; cat /data/big | md5sum"
    shown = engine(*RUN, *MAPS[kind], "--user", "0", "box", "sh", "-c", script).splitlines()
    for line, (path, want) in zip(shown, OWNERS.items(), strict=False):
        assert line.startswith(f"{path} {want}"), line
    assert shown[-1].startswith("b5cfa9d6c8febd618f91ac2843d50a1c")
    # A file capability works for a user without any: it is the map's root that may have it.
    run = engine(*RUN, *MAPS[kind], "--user", "1000", "box", "/bin/busybox-capable", "cat", "/root/secret")
    assert run == "secret\n"
    changed = engine(
        *RUN, *MAPS[kind], "--user", "0", "box", "sh", "-c",
        f"{CHANGE}; cat /data/two; stat -c '%n %a %u:%g' /data/*; ls /gone /etc; cat /data/owned",
    ).splitlines()  # fmt: skip
    assert "two" in changed and "more" in changed
    assert {"/data/made 644 5:7", "/data/other 600 20:30", "/data/owned 4750 1000:1000"} <= set(changed)
    assert "new" not in changed and "group" not in changed and changed[-1] == "owned"
    # Nothing was copied for the map: no layer, and no more disk than a folder or two.
    assert folders(engine) == before
    assert disk(engine) - used < 300_000


@pytest.mark.usefixtures("caches_stay")
def test_two_maps_share_data_and_page_cache(engine: Engine, tmp_path: Path) -> None:
    start(engine, "one", "--uidmap", "0:1000:2000", script="echo 1 > /data/made; chown 5:7 /data/made")
    start(engine, "two", "--userns=keep-id", script="echo 2 > /data/made; chown 5:7 /data/made")
    assert len(servers()) >= 2
    # Seen from the host: the subordinate ids of each map.
    for name, shift in (("one", 1000), ("two", 1)):
        seen = (upper(engine, name) / "data/made").stat()
        assert (seen.st_uid, seen.st_gid) == (SUBIDS + shift + 5 - 1, SUBIDS + shift + 7 - 1)
        assert engine("exec", name, "stat", "-c", "%u:%g", "/data/made", "/data/other").split() == ["5:7", "5:7"]
    data = [
        path
        for path in (engine.folder / "home/s/overlay").glob("*/diff/data/big")
        if path.stat().st_size == 1 << 22
    ]
    assert len(data) == 1, "the layer's file is there once"
    from layerkit.linux.syscalls import cached_pages

    fd = os.open(data[0], os.O_RDONLY)
    try:
        pages = data[0].stat().st_size // os.sysconf("SC_PAGE_SIZE")
        for name in ("one", "two"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            engine("exec", name, "md5sum", "/data/big")
            # What either container reads fills the cache of the one file that both have.
            assert cached_pages(fd) == pages
    finally:
        os.close(fd)


def layer_of(engine: Engine, image: str, tmp_path: Path) -> dict[str, tarfile.TarInfo]:
    """Return the members of the top layer of ``image`` by name."""
    out = engine.folder / "home" / f"saved-{time.monotonic_ns()}"
    engine("save", "--quiet", "--format", "oci-dir", "-o", out, image)
    blobs = out / "blobs/sha256"
    index = json.loads((out / "index.json").read_bytes())
    manifest = json.loads((blobs / index["manifests"][0]["digest"].partition(":")[2]).read_bytes())
    with tarfile.open(blobs / manifest["layers"][-1]["digest"].partition(":")[2]) as archive:
        return {member.name.rstrip("/"): member for member in archive}


@pytest.mark.parametrize(("kind", "running"), [("none", True), ("keep-id", True), ("auto", False)])
def test_commit_diff_and_export_show_the_images_owners(
    engine: Engine, kind: str, running: bool, tmp_path: Path
) -> None:
    start(engine, NAME, *MAPS[kind], script=CHANGE + "; cp /bin/busybox-suid /data/suid; chmod 4755 /data/suid")
    if not running:
        engine("stop", "--time", "0", NAME)
    changes = set(engine("diff", NAME).splitlines())
    assert {
        "C /data/two",
        "A /data/made",
        "D /gone/new",
        "D /etc/group",
        "A /data/dir/x",
        "C /data/other",
    } <= changes
    assert not {path for path in changes if path.startswith("A") and "/bin" in path}
    engine("commit", "--quiet", "--pause=false", NAME, "made")
    layer = layer_of(engine, "made", tmp_path)
    owners = {name: (m.uid, m.gid) for name, m in layer.items()}
    assert owners["data/made"] == (5, 7)
    assert owners["data/other"] == (20, 30)
    assert owners["data/dir"] == (1000, 1000)
    assert owners["data/two"] == (5, 7)
    assert layer["data/owned"].mode & 0o7777 == 0o4750
    assert layer["data/suid"].mode & 0o7777 == 0o4755
    assert {"gone/.wh.new", "etc/.wh.group"} <= set(layer)
    assert not [name for name, m in layer.items() if m.ischr() or m.uid > 1000 or m.gid > 1000]
    # The image that came of it runs, under another map.
    shown = engine(
        *RUN,
        "--uidmap",
        "0:3000:2000",
        "--user",
        "0",
        "made",
        "sh",
        "-c",
        "stat -c %u:%g /data/made; cat /data/dir/x",
    )
    assert shown.split() == ["5:7", "x"]
    # An export has the owners of podman's namespace, as that of podman alone has.
    shift = {"none": 0, "keep-id": 1, "auto": 1}[kind]
    out = engine.folder / "home/export.tar"
    out.unlink(missing_ok=True)
    engine("export", "-o", out, NAME)
    with tarfile.open(out) as archive:
        found = {member.name: (member.uid, member.gid) for member in archive}
    assert (found["data/made"], found["data/two"]) == ((5 + shift, 7 + shift),) * 2
    assert "gone/new" not in found
    if running:
        assert engine("exec", NAME, "cat", "/data/dir/x") == "x\n"
    engine("rmi", "--force", "made")


def test_a_build_has_the_images_owners_too(engine: Engine, tmp_path: Path) -> None:
    """``load_box`` has built ``box`` through the mount program."""
    layer = layer_of(engine, "box", tmp_path)
    assert all(member.uid == 0 for member in layer.values())
    # What changed in its last step, and not all that the map of a build would change.
    assert set(layer) == {"data", "data/big"}
    assert layer["data/big"].size == 4 << 20


def test_read_only_volumes_and_pods(engine: Engine) -> None:
    mapped = MAPS["uidmap"]
    shown = engine(
        *RUN, *mapped, "--read-only", "--user", "0", "box", "sh", "-c", "cat /data/two; touch /data/no || echo ro"
    )
    assert shown.split() == ["two", "ro"]
    engine(*RUN, *mapped, "-v", "vol:/data", "--user", "0", "box", "sh", "-c", "touch /data/v; chown 5:7 /data/v")
    # A new volume is filled from the image, with its owners.
    listed = engine(
        *RUN, *mapped, "-v", "vol:/data", "box", "stat", "-c", "%u:%g", "/data/v", "/data/other"
    ).split()
    assert listed == ["5:7", "5:7"]
    engine("pod", "create", "--infra=false", "--name", "p")
    shown = engine(*RUN, "--pod", "p", "--user", "0", "box", "stat", "-c", "%u:%g", "/data/other")
    assert shown == "5:7\n"
    engine("pod", "rm", "--force", "p")
    engine("volume", "rm", "vol")


def test_twenty_containers_at_once_started_and_killed(engine: Engine) -> None:
    """Each under a map of its own; what is left of them is nothing."""
    before, used = folders(engine), disk(engine)
    names = [f"many{number}" for number in range(20)]
    script = "touch /mine; chown 5:7 /mine; md5sum < /data/big > /sum; sleep 600"

    def begin(number: int) -> None:
        words = ("--uidmap", f"0:{1000 + 2000 * number}:2000", "--user", "0", "box", "sh", "-c", script)
        engine(*CREATE, "--name", names[number], *words)
        engine("start", names[number])

    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(begin, range(len(names))))
    uppers = [upper(engine, name) for name in names]
    wait_for(lambda: all((place / "sum").exists() and (place / "sum").stat().st_size for place in uppers))
    assert {(place / "sum").read_text().split()[0] for place in uppers} == {"b5cfa9d6c8febd618f91ac2843d50a1c"}
    # 0 of podman's namespace is the user, and what comes after are the subordinate ids.
    owners = [(place / "mine").stat().st_uid for place in uppers]
    assert owners == [SUBIDS + 1000 + 2000 * number + 5 - 1 for number in range(len(names))]
    # A folder for each, and no layer; of the four megabytes that each has read, nothing.
    assert len(folders(engine) - before) == len(names)
    assert disk(engine) - used < 100_000 * len(names)
    engine("kill", "--signal", "KILL", *names)
    engine("rm", "--force", "--time", "0", *names)
    assert folders(engine) == before
    wait_for(lambda: not servers(), "servers live on without their mounts")
    assert engine(*RUN, "--uidmap", "0:1000:2000", "box", "cat", "/data/two") == "two\n"


def test_a_container_restarts_with_what_it_wrote(engine: Engine) -> None:
    start(engine, "again", "--userns=keep-id", script="echo kept >> /data/kept; chown 5:7 /data/kept")
    engine("stop", "--time", "0", "again")
    engine("start", "again")
    wait_for(lambda: engine("exec", "again", "cat", "/data/kept") == "kept\nkept\n")
    assert engine("exec", "again", "stat", "-c", "%u:%g", "/data/kept") == "5:7\n"


def test_killed_servers(engine: Engine) -> None:
    """A worker is replaced; a keeper is not needed; without all of them there are errors, and a restart helps."""
    start(engine, "c", "--uidmap", "0:1000:2000")
    keeper, *workers = servers()
    for pid in workers:
        os.kill(pid, 9)
    assert engine("exec", "c", "stat", "-c", "%u:%g", "/data/other") == "5:7\n"
    assert engine("exec", "c", "cat", "/data/two") == "two\n"
    assert keeper in servers() and len(servers()) == 1 + len(workers)
    os.kill(keeper, 9)
    assert engine("exec", "c", "ls", "/gone") == "new\n"
    for pid in servers():
        os.kill(pid, 9)
    wait_for(lambda: not servers())
    done = engine.run("exec", "c", "stat", "/root/secret")
    assert done.returncode != 0
    said = (done.stdout + done.stderr).decode().lower()
    assert "not connected" in said or "abort" in said, said
    engine("stop", "--time", "0", "c")
    engine("start", "c")
    assert engine("exec", "c", "cat", "/root/secret") == "secret\n"


def test_images_that_go_leave_no_metadata(engine: Engine) -> None:
    # Where podman is root, as its folders belong to subordinate ids.
    layerkit = ("podman", "unshare", sys.executable, "-m", "layerkit.cli.main")
    as_user(engine, *layerkit, "store", "gc")
    start(engine, "c", "--uidmap", "0:1000:2000", script="echo x > /data/x")
    engine("commit", "--quiet", "--pause=false", "c", "short")
    engine(*RUN, "--uidmap", "0:1:2000", "short", "true")
    metas = engine.folder / "home/layerkit/meta"
    before = set(os.listdir(metas))
    as_user(engine, *layerkit, "store", "gc")
    assert set(os.listdir(metas)) == before, "all images are there"
    engine("rm", "--all", "--force", "--time", "0")
    engine("rmi", "--force", "short")
    said = as_user(engine, *layerkit, "store", "gc")
    assert "metadata layer" in said
    assert 0 < len(set(os.listdir(metas))) < len(before)
    assert engine(*RUN, "--uidmap", "0:1:2000", "box", "cat", "/data/two") == "two\n"
    as_user(engine, *layerkit, "store", "verify")


def test_another_map_on_a_written_container_is_refused(engine: Engine, tmp_path: Path) -> None:
    start(engine, "c", "--uidmap", "0:1000:2000", script="echo x > /data/x")
    call = last_call(engine)
    words = call.replace(":0:1000:2000", ":0:2000:2000").split()
    done = engine.run("unshare", engine.folder / "program", *words)
    assert done.returncode == 2
    assert b"written under the map uid=0:1000:2000;gid=0:1000:2000, and now wanted under" in done.stderr
    assert b"commit the container" in done.stderr


@pytest.mark.parametrize("rendering", ["fuse", "directory"])
def test_renderings_show_the_same(engine: Engine, rendering: str, tmp_path: Path) -> None:
    start(engine, "c", "--uidmap", "0:1000:2000")
    call = last_call(engine)
    lower = call.partition("lowerdir=")[2].partition(",")[0]
    script = (
        f"mkdir -p m; {engine.folder}/program -o lowerdir={lower},uidmapping=0:1000:2000,gidmapping=0:1000:2000,"
        f"rendering={rendering} m && cd m && find . -exec stat -c '%n %a %u:%g %s %h %Y' {{}} + | sort && "
        "cat data/two data/owned bin/busybox | md5sum; cd ..; umount m"
    )
    shown = engine("unshare", "sh", "-c", script)
    kept = engine.folder / "shown"
    if kept.exists():
        assert [x for x in shown.splitlines() if " 755 " not in x or "bin" in x] == json.loads(kept.read_text())
    else:
        kept.write_text(json.dumps([x for x in shown.splitlines() if " 755 " not in x or "bin" in x]))
    assert "./data/other 600 1005:1007 6 1" in shown


def test_without_the_device_metadata_is_written_and_it_is_said(engine: Engine) -> None:
    call = next(line for line in (engine.folder / "calls").read_text().splitlines() if "uidmapping" not in line)
    lower = call.partition("lowerdir=")[2].partition(",")[0]
    script = (
        "mkdir -p m dev; touch dev/null; mount --bind /dev/null dev/null; mount --rbind dev /dev; "
        f"{engine.folder}/program -o lowerdir={lower},uidmapping=0:1:99,gidmapping=0:1:99,overflow_id=65534 m && "
        "stat -c %u:%g m/bin; umount m"
    )
    done = engine.run("unshare", "unshare", "-m", "sh", "-c", script)
    assert done.stdout == b"1:1\n", done.stderr
    assert b"metadata is written as files instead" in done.stderr


def test_owners_outside_the_map_are_an_error(engine: Engine) -> None:
    done = engine.run(*RUN, "--uidmap", "0:1:500", "--gidmap", "0:1:2000", "box", "true")
    assert done.returncode != 0
    assert b"data/link: uid 1000 is outside the map (0:1:500)" in done.stderr
    assert UID == 4242
