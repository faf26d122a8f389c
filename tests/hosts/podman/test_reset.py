"""``podman system reset`` leaves no metadata, and ``layerkit setup podman`` is all that a user does."""

from __future__ import annotations

import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import Engine
from rootless_podman import RUN, as_user, need_podman, rootless_podman

USER = 4243


@pytest.fixture
def engine() -> Iterator[Engine]:
    need_podman()
    with rootless_podman(uid=USER) as engine:
        path = engine.folder / "home/one.tar"
        with tarfile.open(path, "w") as archive:
            archive.add("/usr/bin/busybox", "bin/busybox")
        path.chmod(0o644)
        engine("import", path, "one:1")
        yield engine


def _run(engine: Engine) -> str:
    return engine(*RUN, "--uidmap", "0:1:2000", "one:1", "/bin/busybox", "stat", "-c", "%u:%g", "/bin/busybox")


def test_a_reset_leaves_no_metadata(engine: Engine) -> None:
    assert _run(engine) == "0:0\n"
    metas = engine.folder / "home/layerkit/meta"
    assert os.listdir(metas)
    layerkit = ("podman", "unshare", sys.executable, "-m", "layerkit.cli.main", "store")
    as_user(engine, *layerkit, "gc")
    assert os.listdir(metas), "podman has the image"
    engine("system", "reset", "--force")
    as_user(engine, *layerkit, "gc")
    assert not os.listdir(metas)
    assert not os.listdir(engine.folder / "home/layerkit/index")


def test_setup_podman_is_all_that_a_user_does(engine: Engine, tmp_path: Path) -> None:
    conf = engine.folder / "home/.config/containers/storage.conf"
    text = conf.read_text()
    plain = text.partition("[storage.options.overlay]")[0]
    conf.write_text(plain)
    command = engine.folder / "layerkit-mount-program"
    (engine.folder / "program").rename(command)
    # As an installed layerkit finds it: beside its own command.
    start = engine.folder / "layerkit"
    start.write_text(f"#!{sys.executable}\nfrom layerkit.cli.main import run\nrun()\n")
    start.chmod(0o755)
    as_user(engine, start, "setup", "podman")
    assert f'mount_program = "{command}"' in conf.read_text()
    calls = (engine.folder / "calls").read_text().count("\n")
    assert _run(engine) == "0:0\n"
    assert (engine.folder / "calls").read_text().count("\n") > calls
    as_user(engine, start, "setup", "podman", "--undo")
    assert conf.read_text() == plain
