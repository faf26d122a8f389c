"""What ``layerkit doctor`` says of each runtime, on hosts that can and cannot."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from needs import need_root, need_tool
from programs import command, run

from layerkit.hosts.diagnosis.runtimes import probe_place, storage_root, version_of

NAMES = ["podman, rootful", "podman, rootless", "containerd", "docker", "runc, bundles", "crun, bundles"]


def asked(store: Path, *before: object, **environment: object) -> dict[str, dict[str, Any]]:
    env = {key: str(value) for key, value in environment.items()}
    done = run(*before, *command("doctor", "--store", store, "--json"), env=env)
    runtimes = json.loads(done.stdout)["runtimes"]
    assert [runtime["name"] for runtime in runtimes] == NAMES
    for runtime in runtimes:
        assert runtime["answer"] in ("idmapped mounts", "layerkit", "neither", "not known")
        assert runtime["why"]
        assert runtime["how"]
    return {runtime["name"]: runtime for runtime in runtimes}


def podman_in(folder: Path, tmp_path: Path) -> dict[str, Path]:
    conf = tmp_path / "storage.conf"
    conf.write_text(f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/graph"\n')
    return {"CONTAINERS_STORAGE_CONF": conf}


@contextmanager
def overlay(tmp_path: Path) -> Iterator[Path]:
    """Mount an overlay: the kernel has no idmapped mounts of it."""
    for name in ("lower", "up", "work", "fs"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/up,workdir={tmp_path}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, tmp_path / "fs"], check=True)
    try:
        yield tmp_path / "fs"
    finally:
        subprocess.run(["umount", tmp_path / "fs"], check=True)


def test_a_disk_filesystem_can_be_idmapped_and_podman_does_it(tmp_path: Path) -> None:
    need_root()
    need_tool("podman", "containerd")
    found = asked(tmp_path / "store", **podman_in(tmp_path, tmp_path))
    podman = found["podman, rootful"]
    assert (podman["answer"], podman["layers"]) == ("idmapped mounts", f"{tmp_path}/graph/overlay")
    assert "podman run --uidmap" in podman["how"]
    assert podman["clone"] in (True, False)
    assert found["docker"]["answer"] == "layerkit"
    if found["containerd"]["version"].startswith("1."):
        assert found["containerd"]["answer"] == "layerkit"
        assert "setup containerd" in found["containerd"]["how"]


def test_a_store_on_an_overlay_cannot_and_layerkit_does_it(tmp_path: Path) -> None:
    need_root()
    with overlay(tmp_path) as fs:
        found = asked(tmp_path / "store", **podman_in(fs, tmp_path))["podman, rootful"]
        assert (found["filesystem"], found["answer"]) == ("overlay", "layerkit")
        assert "overlay cannot be mounted idmapped" in found["why"]
        assert "setup podman" in found["how"]
        assert os.listdir(fs) == []


def test_user_namespaces_that_may_not_mount_get_neither(tmp_path: Path) -> None:
    """The feature is switched off for real: no further user namespaces, and no right to mount in this one."""
    need_root()
    need_tool("unshare", "setpriv")
    off = (
        "echo 0 > /proc/sys/user/max_user_namespaces; exec setpriv --inh-caps=-sys_admin --bounding-set=-sys_admin"
    )
    shell = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f'{off} "$@"', "sh"]
    found = asked(tmp_path / "store", *shell, **podman_in(tmp_path, tmp_path))
    rootless = found["podman, rootless"]
    assert rootless["answer"] == "neither"
    assert "was refused when it was tried" in rootless["why"]
    assert "--form portable" in rootless["how"]
    assert found["podman, rootful"]["answer"] == "not known"
    assert "as root" in found["podman, rootful"]["how"]
    assert found["runc, bundles"]["answer"] == "neither"


def test_a_user_namespace_that_may_mount_gets_layerkit(tmp_path: Path) -> None:
    need_root()
    need_tool("unshare")
    found = asked(
        tmp_path / "store", "unshare", "--user", "--map-root-user", "--mount", **podman_in(tmp_path, tmp_path)
    )
    assert found["podman, rootless"]["answer"] == "layerkit"
    assert "--rootless" in found["runc, bundles"]["how"]


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_copy_up_is_a_clone_where_files_share_blocks(tmp_path: Path, kind: str) -> None:
    need_root()
    need_tool(f"mkfs.{kind}")
    image, fs = tmp_path / "disk", tmp_path / "fs"
    with image.open("wb") as file:
        file.truncate(400 << 20)
    subprocess.run([f"mkfs.{kind}", "-q", image], check=True, capture_output=True)
    fs.mkdir()
    subprocess.run(["mount", "-o", "loop", image, fs], check=True)
    try:
        podman = asked(tmp_path / "store", **podman_in(fs, tmp_path))["podman, rootful"]
        assert (podman["filesystem"], podman["clone"]) == (kind, True)
        assert "copies nothing" in podman["clone_why"]
        assert set(os.listdir(fs)) <= {"lost+found"}
    finally:
        subprocess.run(["umount", fs], check=True)


def test_nothing_is_probed_among_a_runtimes_own_files(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    place = probe_place(tmp_path / "a/b/not/yet")
    assert place.stat().st_dev == tmp_path.stat().st_dev
    assert len(place.parts) <= len(tmp_path.parts)


def test_where_podman_keeps_its_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONTAINERS_STORAGE_CONF", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "config/containers").mkdir(parents=True)
    conf = tmp_path / "config/containers/storage.conf"
    conf.write_text('[storage]\ngraphroot = "/srv/own"\n')
    assert storage_root(rootful=False) == Path("/srv/own")
    conf.write_text('[storage]\ngraphroot = "$HOME/x"\n')
    assert storage_root(rootful=False) == tmp_path / "data/containers/storage"
    conf.write_text("not [ toml")
    assert storage_root(rootful=False) == tmp_path / "data/containers/storage"
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(tmp_path / "absent"))
    assert storage_root(rootful=True) == Path("/var/lib/containers/storage")


def test_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "tool"
    program.write_text("#!/bin/sh\necho tool github.com/x 1.6.20~ds1 1.6.20~ds1-1+deb12u3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert version_of("tool") == "1.6.20"
    assert version_of("no-such-tool") == ""
    program.write_text("#!/bin/sh\nexit 1\n")
    assert version_of("tool") == ""
