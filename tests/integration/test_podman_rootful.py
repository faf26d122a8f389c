"""Rootful podman over our mount program: where it idmaps the layers itself, a map is applied once and not twice."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import Engine, podman
from podman_engine import load_box, need_podman, write_program

MAP = ("--uidmap", "0:100000:65536")
RUN = ("run", "--rm", "--network", "none", "--cgroups", "no-conmon")
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


def test_owners_with_lowers_that_podman_has_idmapped(engine: Engine) -> None:
    paths = "/data/other /data/owned /bin/busybox-suid /"
    script = f"stat -c '%a %u:%g' {paths}; echo x > /data/x; chown 5:7 /data/x /data/two"
    shown = engine(*RUN, *MAP, "--user", "0", "box", "sh", "-c", script).splitlines()
    assert shown == ["600 5:7", "640 1000:1000", "4755 0:0", "555 0:0"]
    call = (engine.folder / "calls").read_text().splitlines()[-1]
    assert "/mapped/" in call and "uidmapping=" in call, "podman did not do what this is about"
    assert engine(*RUN, *MAP, "--user", "1000", "box", "/bin/busybox-capable", "cat", "/root/secret") == "secret\n"


def test_owners_on_the_host_and_in_a_commit(engine: Engine) -> None:
    engine(*CREATE, *MAP, "--name", "c", "--user", "0", "box", "sh", "-c",
           "touch /data/made; chown 5:7 /data/made /data/owned; rm /gone/new; touch /ready; sleep 600")  # fmt: skip
    engine("start", "c")
    for _ in range(100):
        if engine.run("exec", "c", "stat", "/ready").returncode == 0:
            break
        time.sleep(0.05)
    upper = Path(engine("inspect", "--format", "{{.GraphDriver.Data.UpperDir}}", "c").strip())
    assert (upper / "data/made").stat().st_uid == 100005
    assert set(engine("diff", "c").splitlines()) >= {"A /data/made", "C /data/owned", "D /gone/new"}
    engine("commit", "--quiet", "--pause=false", "c", "made")
    engine("rm", "--force", "--time", "0", "c")
    script = "stat -c '%u:%g' /data/made /data/owned /data/other; ls /gone"
    shown = engine(*RUN, "--user", "0", "made", "sh", "-c", script)
    assert shown.split() == ["5:7", "5:7", "5:7"]
    shown = engine(*RUN, *MAP, "--user", "0", "made", "stat", "-c", "%u:%g", "/data/made")
    assert shown == "5:7\n"


def test_a_user_store_is_not_touched(engine: Engine) -> None:
    assert (engine.folder / "layerkit/meta").is_dir()
    assert not os.environ.get("LAYERKIT_STORE")
    assert sys.executable in (engine.folder / "program").read_text()
