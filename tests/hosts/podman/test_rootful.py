"""Rootful podman over our mount program: where it idmaps the layers itself, a map is applied once and not twice."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import Engine, podman
from page_cache import drop, resident_bytes
from programs import wait_for
from rootless_podman import load_box, need_podman, write_program

MAP = ("--uidmap", "0:100000:65536")
RUN = ("run", "--rm", "--network", "none", "--cgroups", "no-conmon")
NAME = "changed"
"""No name of hexadecimal digits alone: to ``podman diff`` it would be the beginning of an image's id, too."""
CREATE = ("create", "--network", "none", "--cgroups", "no-conmon")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    need_podman()
    from engines import short_folder

    with short_folder() as folder:
        program = write_program(folder, f"export LAYERKIT_STORE={folder}/layerkit")
        with podman(folder, storage=f'[storage.options.overlay]\nmount_program = "{program}"') as engine:
            (folder / "home").mkdir()
            load_box(engine)
            yield engine


def _wait_until_ready(engine: Engine, name: str) -> None:
    wait_for(lambda: engine.run("exec", name, "stat", "/ready").returncode == 0)


def _remove(engine: Engine, *names: str) -> None:
    """Remove containers. podman races with its own clean-up for their /dev/shm: "device or resource busy"."""

    def gone(name: str) -> bool:
        engine.run("rm", "--force", "--time", "0", name)
        return engine.run("container", "exists", name).returncode == 1

    for name in names:
        wait_for(functools.partial(gone, name), f"{name} stays")


def test_owners_with_lowers_that_podman_has_idmapped(engine: Engine) -> None:
    paths = "/data/other /data/owned /bin/busybox-suid /"
    script = f"stat -c '%a %u:%g' {paths}; echo x > /data/x; chown 5:7 /data/x /data/two"
    shown = engine(*RUN, *MAP, "--user", "0", "box", "sh", "-c", script).splitlines()
    assert shown == ["600 5:7", "640 1000:1000", "4755 0:0", "555 0:0"]
    call = (engine.folder / "calls").read_text().splitlines()[-1]
    assert "/mapped/" in call and "uidmapping=" in call, "podman did not do what this is about"
    assert engine(*RUN, *MAP, "--user", "1000", "box", "/bin/busybox-capable", "cat", "/root/secret") == "secret\n"


def test_owners_on_the_host_and_in_a_commit(engine: Engine) -> None:
    engine(*CREATE, *MAP, "--name", NAME, "--user", "0", "box", "sh", "-c",
           "touch /data/made; chown 5:7 /data/made /data/owned; rm /gone/new; touch /ready; sleep 600")  # fmt: skip
    engine("start", NAME)
    _wait_until_ready(engine, NAME)
    upper = Path(engine("inspect", "--format", "{{.GraphDriver.Data.UpperDir}}", NAME).strip())
    assert (upper / "data/made").stat().st_uid == 100005
    assert set(engine("diff", NAME).splitlines()) >= {"A /data/made", "C /data/owned", "D /gone/new"}
    engine("commit", "--quiet", "--pause=false", NAME, "made")
    _remove(engine, NAME)
    script = "stat -c '%u:%g' /data/made /data/owned /data/other; ls /gone"
    shown = engine(*RUN, "--user", "0", "made", "sh", "-c", script)
    assert shown.split() == ["5:7", "5:7", "5:7"]
    shown = engine(*RUN, *MAP, "--user", "0", "made", "stat", "-c", "%u:%g", "/data/made")
    assert shown == "5:7\n"


@pytest.mark.usefixtures("caches_stay")
def test_two_maps_share_data_and_page_cache(engine: Engine) -> None:
    # Without what only shows the same layers again.
    words = ["du", "-s", "--block-size=1", "--exclude=mapped", "--exclude=merged"]
    words += [str(engine.folder / name) for name in ("root", "layerkit")]

    def disk() -> int:
        lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
        return sum(int(line.split()[0]) for line in lines)

    engine(*RUN, *MAP, "box", "true")
    used = disk()
    for name, first in (("one", 200_000), ("two", 300_000)):
        script = "chown 5:7 /data/other; echo x > /data/made; chmod 4755 /data/made; touch /ready; sleep 600"
        options = ("--uidmap", f"0:{first}:65536", "--name", name, "--user", "0")
        engine(*CREATE, *options, "box", "sh", "-c", script)
        engine("start", name)
    try:
        for name, first in (("one", 200_000), ("two", 300_000)):
            _wait_until_ready(engine, name)
            upper = Path(engine("inspect", "--format", "{{.GraphDriver.Data.UpperDir}}", name).strip())
            assert [(upper / path).stat().st_uid for path in ("data/other", "data/made")] == [first + 5, first]
            paths = ("/data/other", "/data/made", "/bin/busybox-suid")
            shown = engine("exec", name, "stat", "-c", "%a %u:%g", *paths)
            assert shown.splitlines() == ["600 5:7", "4755 0:0", "4755 0:0"]
        assert disk() - used < 400_000
        (data,) = (
            path
            for path in (engine.folder / "root/overlay").glob("*/diff/data/big")
            if path.stat().st_size == 1 << 22
        )
        pages = data.stat().st_size // os.sysconf("SC_PAGE_SIZE")
        for name in ("one", "two"):
            drop(data)
            engine("exec", name, "md5sum", "/data/big")
            assert resident_bytes(data)[0] == pages * os.sysconf("SC_PAGE_SIZE")
    finally:
        _remove(engine, "one", "two")


def test_a_user_store_is_not_touched(engine: Engine) -> None:
    assert (engine.folder / "layerkit/meta").is_dir()
    assert not os.environ.get("LAYERKIT_STORE")
    assert sys.executable in (engine.folder / "program").read_text()
