"""The engines of ``tests/kit/engines.py`` run a container and leave nothing: no process, no mount, no folder."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
from engines import Engine, containerd, dockerd, podman, podman_run
from kernel_mounts import mounts_below
from needs import need_root, need_tool


def _run(engine: Engine, folder: Path) -> str:
    program = shutil.which("busybox") or ""
    with tarfile.open(folder / "root.tar", "w") as archive:
        archive.add(program, "bin/busybox")
    if "podman" in engine.command[0]:
        engine("import", folder / "root.tar", "box:1")
        return engine(*podman_run("box:1", "/bin/busybox", "id", "-u"))
    if "docker" in engine.command[0]:
        engine("import", folder / "root.tar", "box:1")
        return engine("run", "--rm", "--network", "none", "box:1", "/bin/busybox", "id", "-u")
    (folder / "root").mkdir()
    shutil.copy(program, folder / "root/busybox")
    return engine("run", "--rm", "--rootfs", folder / "root", "one", "/busybox", "id", "-u")


@pytest.mark.parametrize("start", [podman, containerd, dockerd], ids=lambda f: f.__name__)
def test_runs_and_leaves_nothing(start: Callable[..., AbstractContextManager[Engine]], tmp_path: Path) -> None:
    need_root()
    need_tool("podman", "containerd", "ctr", "dockerd", "docker", "runc", "busybox", "setpriv")
    with start() as engine:
        assert _run(engine, tmp_path).strip() == "0"
        folder = engine.folder
    assert not folder.exists()
    assert not mounts_below(folder.parent / folder.name)
    seen = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(folder) not in seen


def test_containerd_loses_nothing_that_a_container_said() -> None:
    """Its client may be as slow as it likes: what fills its own pipe is not what the container's end waits for."""
    need_root()
    need_tool("containerd", "ctr", "runc", "busybox", "setpriv")
    with containerd() as engine:
        (engine.folder / "box").mkdir()
        shutil.copy(shutil.which("busybox") or "", engine.folder / "box/busybox")
        # Nobody reads from ctr until the container has long ended.
        slow = replace(engine, command=("sh", "-c", '"$@" | { sleep 3; cat; }', "sh", *engine.command))
        said = slow("run", "--rm", "--rootfs", engine.folder / "box", "one", "/busybox", "seq", "22000")
        assert said.split() == [str(number) for number in range(1, 22001)]
