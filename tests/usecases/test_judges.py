"""Every output of every command that makes images, into every transport, before judges that nobody here wrote.

Each output must be taken by skopeo, podman, docker, containerd and umoci as far as they know the transport; a
container of each engine must see what the root filesystem holds, and the tree that umoci unpacks must equal that of
the input in all attributes. What is written is held against image-spec's JSON schemas too.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import judge
import oci_schemas
import optimizing
import pytest
import runc
import runnable
from engines import Engine, podman_run
from judge import Shown, differences, snapshot, umoci
from needs import need_root, need_tool
from programs import run, skopeo

import layerkit
from layerkit.api import rewrite as rewrites

SHIFT = 100000
COMMANDS = ("copy", "optimize", "flatten", "flatten above a base", "portable", "pack")


@dataclass(frozen=True)
class Want:
    """What an output must hold: its tree, and what a program that runs in it sees."""

    tree: dict[bytes, Shown]
    report: list[str]
    shift: int = 0


@dataclass(frozen=True)
class Lab:
    """The input, what its outputs must hold, and a folder that was changed since it was unpacked."""

    image: str
    changed: Path
    wants: dict[str, Want]


def _report(tree: Path, shift: int = 0) -> list[str]:
    return runnable.seen(run("chroot", tree, "/bin/report").stdout, shift)


def _lab(tiny: ModuleType, work: Path, *, sparse: bool) -> Lab:
    image = f"oci:{runnable.build(tiny, work / 'image', sparse=sparse)}:{runnable.NAME}"
    bundle = work / "umoci"
    umoci(image[4:], bundle)
    plain = Want(snapshot(bundle / "rootfs"), _report(bundle / "rootfs"))
    (work / "mapped").mkdir()
    with judge.unpacked(image[4:], work / "mapped", ((0, SHIFT, 65536),)) as mapped:
        shifted = Want(snapshot(mapped), plain.report, SHIFT)
    changed = work / "changed"
    settings = layerkit.Settings(store=work / "store")
    with layerkit.open_image(image, settings=settings) as opened:
        opened.unpack(changed)
    (changed / "opt/app/new").write_bytes(b"new\n")
    (changed / "usr/bin/hello").chmod(0o4711)
    (changed / "opt/app/run").unlink()
    os.chown(changed / "home/user", 7, 8)
    os.setxattr(changed / "etc/passwd", "user.seen", b"yes")
    run("rm", "-r", changed / "usr/lib")
    packed = Want(snapshot(changed), _report(changed))
    wants = dict.fromkeys(COMMANDS, plain) | {"portable": shifted, "pack": packed}
    return Lab(image, changed, wants)


@pytest.fixture(scope="module")
def lab(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    need_root()
    need_tool("skopeo", "umoci", "chroot")
    return _lab(tiny, tmp_path_factory.mktemp("lab"), sparse=True)


@pytest.fixture(scope="module")
def dense(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """An image that docker can save again: see :func:`runnable.build`."""
    need_root()
    need_tool("skopeo", "umoci", "chroot")
    return _lab(tiny, tmp_path_factory.mktemp("dense"), sparse=False)


def make(command: str, lab: Lab, dst: str, store: Path) -> None:
    """Run ``command`` on the lab's image."""
    settings = layerkit.Settings(store=store)
    if command == "copy":
        rewrites.copy(lab.image, dst, settings=settings)
    elif command == "optimize":
        report = optimizing.optimize_to(lab.image, dst, settings=settings)
        assert report.bytes_after is not None
        assert report.bytes_after < report.bytes_before
    elif command == "flatten":
        rewrites.flatten(lab.image, dst, settings=settings)
    elif command == "flatten above a base":
        rewrites.flatten(lab.image, dst, keep_base="2", settings=settings)
    elif command == "portable":
        mapping = layerkit.mapping([f"0:{SHIFT}:65536"])
        assert mapping is not None
        rewrites.remap(lab.image, dst, mapping, settings=settings)
    else:
        with layerkit.open_image(lab.image, settings=settings) as opened:
            opened.pack(lab.changed, dst)


def same_tree(layout: str, want: Want, work: Path) -> None:
    umoci(layout, work / "bundle")
    # umoci gives the root the time of its unpacking where no layer lists it.
    assert differences(snapshot(work / "bundle/rootfs"), want.tree, skip=frozenset({b"."})) == []


def runs(engine: Engine, words: tuple[object, ...], want: Want) -> None:
    assert runnable.seen(engine(*words), want.shift) == want.report


def in_podman(engine: Engine, name: str, want: Want) -> None:
    runs(engine, podman_run(name), want)
    engine("rmi", "--all", "--force")


def in_docker(engine: Engine, name: str, want: Want) -> None:
    runs(engine, ("run", "--rm", "--network", "none", name), want)
    engine("rmi", "--force", name)


def in_containerd(engine: Engine, archive: Path, name: str, want: Want) -> None:
    engine("image", "import", archive)
    assert engine("image", "ls", "-q").split() == [name]
    runs(engine, ("run", "--rm", name, runc.name()), want)
    engine("image", "rm", "--sync", name)


@pytest.mark.parametrize("command", COMMANDS)
def test_layout(command: str, lab: Lab, podman_engine: Engine, tmp_path: Path) -> None:
    dst, name = f"oci:{tmp_path}/out:v1", "v1"
    make(command, lab, dst, tmp_path / "store")
    oci_schemas.check(tmp_path / "out")
    seen = json.loads(skopeo("inspect", dst).stdout)
    assert seen["Labels"] == {"made-by": "a test"}
    skopeo("copy", dst, f"oci:{tmp_path}/again:{name}")
    same_tree(f"{tmp_path}/again:{name}", lab.wants[command], tmp_path)
    in_podman(podman_engine, podman_engine("pull", "-q", dst).strip(), lab.wants[command])


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_archive(
    kind: str, command: str, lab: Lab, podman_engine: Engine, docker_engine: Engine, containerd_engine: Engine,
    tmp_path: Path,
) -> None:  # fmt: skip
    archive, name, want = tmp_path / "out.tar", "judge.example/out:v1", lab.wants[command]
    make(command, lab, f"{kind}:{archive}:{name}", tmp_path / "store")
    oci_schemas.check(archive)
    assert json.loads(skopeo("inspect", f"{kind}:{archive}:{name}").stdout)["Architecture"] == "amd64"
    skopeo("copy", f"{kind}:{archive}:{name}", f"oci:{tmp_path}/again:v1")
    same_tree(f"{tmp_path}/again:v1", want, tmp_path)
    assert name in podman_engine("load", "-q", "-i", archive)
    in_podman(podman_engine, name, want)
    if kind == "docker-archive":
        assert name in docker_engine("load", "-i", archive)
        in_docker(docker_engine, name, want)
    in_containerd(containerd_engine, archive, name, want)


@pytest.mark.parametrize("command", COMMANDS)
def test_docker_daemon(
    command: str, dense: Lab, docker_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, want = "judge.example/out:v1", dense.wants[command]
    monkeypatch.setenv("DOCKER_HOST", docker_engine.address)
    make(command, dense, f"docker-daemon:{name}", tmp_path / "store")
    daemon = ("--src-daemon-host", docker_engine.address)
    skopeo("copy", *daemon, f"docker-daemon:{name}", f"oci:{tmp_path}/again:v1")
    same_tree(f"{tmp_path}/again:v1", want, tmp_path)
    skopeo("inspect", "--daemon-host", docker_engine.address, f"docker-daemon:{name}")
    in_docker(docker_engine, name, want)
