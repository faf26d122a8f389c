"""The command as people use it: in a process of its own, judged by its output, exit code and what it leaves."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from needs import need_root, need_tool
from programs import Cli
from programs import command as command_line

MAP = "0:100000:65536"
ALL_COMMANDS = (
    "remap", "unpack", "pack", "inspect", "analyze", "optimize", "flatten", "copy", "verify",
    "mount", "umount", "mounts", "doctor", "store", "adopt", "which", "copyups", "cache",
)  # fmt: skip


def test_every_command_has_help_with_an_example(cli: Cli) -> None:
    top = cli("--help").stdout
    for command in ALL_COMMANDS:
        assert command in top
        text = cli(command, "--help").stdout
        if command != "store":
            assert "Example" in text
    for command in ("df", "ls", "rm", "verify", "gc"):
        assert "Example" in cli("store", command, "--help").stdout


def test_remap_mount_umount(cli: Cli, tiny_image: Path, tmp_path: Path) -> None:
    need_root()
    target = tmp_path / "m"
    target.mkdir()
    first = cli.json("remap", tiny_image, "--uid-map", MAP)
    assert first["schema"] == "layerkit.remap.v1"
    assert first["layers_read"] == first["layers"] > 3
    second = cli("remap", tiny_image, "--uid-map", "0:200000:65536")
    assert "0 layers read" in second.stdout
    assert f"layerkit mount {first['next_ref']} TARGET --uid-map 0:200000:65536" in second.stderr
    cli("mount", first["next_ref"], target, "--uid-map", MAP)
    try:
        assert target.lstat().st_uid == 100000
        rows = cli.json("mounts")["mounts"]
        assert [row["target"] for row in rows] == [str(target)]
        with pytest.raises(OSError, match="Read-only"):
            (target / "new").touch()
        removed = cli.json("store", "gc")["removed"]
        assert removed == []
    finally:
        ended = cli.json("umount", target)
    assert ended == {"schema": "layerkit.umount.v1", "target": str(target)}
    assert cli.json("mounts")["mounts"] == []


def test_a_writable_mount_keeps_changes_in_its_upper(cli: Cli, tiny_image: Path, tmp_path: Path) -> None:
    need_root()
    target, upper = tmp_path / "m", tmp_path / "upper"
    target.mkdir()
    cli("mount", tiny_image, target, "--uid-map", MAP, "--upper", upper)
    try:
        name = next(p for p in sorted(target.rglob("*")) if p.is_file() and not p.is_symlink() and p.stat().st_size)
        before = name.read_bytes()
        os.chown(name, 100007, 100007)
        stub = upper / name.relative_to(target)
        assert "trusted.overlay.metacopy" in os.listxattr(stub)
        assert stub.read_bytes() == bytes(len(before))
        with name.open("ab") as f:
            f.write(b"more")
        assert name.read_bytes() == before + b"more"
        assert name.stat().st_uid == 100007
    finally:
        cli("umount", target)


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_every_kind_of_archive_is_read(
    cli: Cli, tiny_archive: Callable[..., Path], kind: str, compression: str
) -> None:
    if kind == "docker-archive" and compression == "zstd":
        compression = "gzip"
    path = tiny_archive(kind, compression)
    seen = cli.json("inspect", path)
    with path.open("rb") as f:
        piped = json.loads(cli("inspect", "-", "--json", stdin=f).stdout)
    assert seen["tree_digest"] == piped["tree_digest"]
    assert seen["entries"] > 20


def test_the_name_in_the_store_is_that_of_the_file_whatever_the_reference(
    cli: Cli, tiny_archive: Callable[..., Path], tmp_path: Path
) -> None:
    plain = tiny_archive("oci-archive", "gzip").read_bytes()
    for name, data in (("i.tar", plain), ("i.tar.gz", gzip.compress(plain)), ("i.tgz", gzip.compress(plain)),
                       ("i.tar.zst", zstandard.compress(plain))):  # fmt: skip
        path = tmp_path / name
        path.write_bytes(data)
        for text in (f"{path}", f"{path}:latest", f"oci-archive:{path}:latest"):
            assert cli.json("inspect", text)["name"] == "i:latest", text


def test_inspect_says_what_a_map_would_do(cli: Cli, tiny_image: Path) -> None:
    report = cli.json("inspect", tiny_image, "--uid-map", "0:100000:1000")
    becomes = {row["id"]: row["becomes"] for row in report["uids"]}
    assert becomes[0] == "100000"
    assert becomes[1000] == "unmapped"
    assert "outside the map" in report["problems"][0]
    assert "users" in cli("inspect", tiny_image).stdout


def test_an_artifact_is_attached_and_the_image_untouched(cli: Cli, tiny_image: Path, tmp_path: Path) -> None:
    need_tool("skopeo", "umoci")
    layout = tmp_path / "out"
    report = cli.json("remap", tiny_image, f"oci:{layout}:tiny", "--uid-map", MAP)
    other = cli.json("remap", tiny_image, f"oci:{tmp_path / 'twice'}:tiny", "--uid-map", MAP)
    assert report["artifact"] == other["artifact"]
    index = json.loads((layout / "index.json").read_text())
    assert [m["digest"] for m in index["manifests"]] == [report["manifest"], report["artifact"]]
    manifest = json.loads((layout / "blobs/sha256" / report["artifact"].partition(":")[2]).read_text())
    assert manifest["subject"]["digest"] == report["manifest"]
    assert manifest["artifactType"] == "application/vnd.layerkit.remap.v1"
    assert report["artifact"] in cli("verify", f"oci:{layout}:tiny").stdout
    # The image in it is still one that others take.
    subprocess.run(["skopeo", "copy", "--quiet", f"oci:{layout}:tiny", f"dir:{tmp_path / 'd'}"], check=True)
    subprocess.run(["umoci", "stat", "--image", f"{layout}:tiny"], check=True, capture_output=True)


@pytest.mark.parametrize("rendering", ["erofs", "tar"])
@pytest.mark.parametrize("namespace", ["trusted", "user"])
def test_verify_notices_a_false_artifact(
    cli: Cli, tiny_image: Path, tmp_path: Path, rendering: str, namespace: str
) -> None:
    layout = tmp_path / "out"
    words = ("--rendering", rendering, "--namespace", namespace)
    report = cli.json("remap", tiny_image, f"oci:{layout}:t", "--uid-map", MAP, *words)
    cli("verify", f"oci:{layout}:t")
    # The same artifact, but it claims another map.
    blobs = layout / "blobs/sha256"
    old = blobs / report["artifact"].partition(":")[2]
    forged = old.read_bytes().replace(b"100000", b"300000")
    assert forged != old.read_bytes()
    import hashlib

    digest = hashlib.sha256(forged).hexdigest()
    (blobs / digest).write_bytes(forged)
    index = (layout / "index.json").read_text().replace(old.name, digest)
    (layout / "index.json").write_text(index)
    assert "metadata for the map" in cli("verify", f"oci:{layout}:t", code=3).stderr


def test_errors_say_what_to_do_and_have_their_exit_code(
    cli: Cli, tiny_image: Path, tmp_path: Path, store_dir: Path
) -> None:
    need_root()
    unmapped = cli("remap", tiny_image, "--uid-map", "0:100000:1000", code=3).stderr
    assert "outside the map" in unmapped
    assert "--overflow-id" in unmapped
    cli("remap", tiny_image, "--uid-map", "0:100000:1000", "--overflow-id", "65534")
    cli("remap", tiny_image, "--uid-map", "nonsense", code=2)
    cli("remap", tiny_image, "--uid-map", "0:100000:10,5:200000:10", code=2)
    cli("remap", tiny_image, code=0)
    cli("remap", tmp_path / "absent.tar", "--uid-map", MAP, code=1)
    cli("mount", tiny_image, tmp_path / "absent", code=2)
    cli("umount", tmp_path, code=1)
    cli("nonsense", code=2)
    garbage = tmp_path / "garbage.tar"
    garbage.write_bytes(os.urandom(10000))
    cli("remap", garbage, "--uid-map", MAP, code=3)
    assert [p.name for p in (store_dir / "tmp").iterdir()] == []


def test_a_damaged_layer_leaves_nothing_behind(
    cli: Cli, tiny_archive: Callable[..., Path], tmp_path: Path, store_dir: Path
) -> None:
    data = bytearray(tiny_archive("oci-archive", "none").read_bytes())
    place = data.index(b"#!/bin/sh")
    data[place] ^= 1
    (tmp_path / "bad.tar").write_bytes(data)
    assert "sha256" in cli("remap", tmp_path / "bad.tar", "--uid-map", MAP, code=3).stderr
    assert list((store_dir / "tmp").iterdir()) == []
    cli("store", "verify")


def test_store_commands(cli: Cli, tiny_image: Path, store_dir: Path) -> None:
    need_root()
    report = cli.json("remap", tiny_image, "--uid-map", MAP, "--own-meta")
    df = cli.json("store", "df")
    assert df["schema"] == "layerkit.store-df.v1"
    assert "metadata layers" in cli("store", "df").stdout
    assert report["manifest"] in cli("store", "ls").stdout
    assert "whole" in cli("store", "verify").stdout
    name = report["next_ref"].partition(":")[2]
    cli("store", "rm", name)
    cli("store", "gc")
    left = [p for folder in ("tar", "data", "index", "meta") for p in (store_dir / folder).iterdir()]
    assert left == []


def test_kill_at_any_moment_leaves_a_whole_store(cli: Cli, app_image: Path, store_dir: Path) -> None:
    need_root()
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    for _ in range(4 * int(os.environ.get("LAYERKIT_TEST_FUZZ", "1"))):
        process = subprocess.Popen(
            command_line("remap", str(app_image), "--uid-map", MAP, "--own-meta"),
            env={**os.environ, "LAYERKIT_STORE": str(store_dir)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(chance.uniform(0.2, 2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (store_dir / "version.json").exists():
            cli("store", "verify")
    cli("remap", app_image, "--uid-map", MAP)
    cli("store", "gc")
    assert list((store_dir / "tmp").iterdir()) == []
    cli("store", "verify")


HELD = """
import time
from layerkit.cli.main import run
from layerkit.store.import_layers import _Importer

finish, begun = _Importer._finish, []

def held(*arguments):
    begun.append(arguments)
    if len(begun) > 1:
        print("in the middle", flush=True)
        time.sleep(600)
    finish(*arguments)

_Importer._finish = held
run()
"""
"""``layerkit`` that stops, and says so, when its store has one layer and is about to get the second."""


def test_an_interrupt_ends_with_130_and_leaves_nothing(app_image: Path, store_dir: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HELD, "remap", str(app_image), "--uid-map", MAP],
        env={**os.environ, "LAYERKIT_STORE": str(store_dir)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "in the middle\n"
    assert any((store_dir / "tmp").iterdir())
    # People press it more than once.
    for _ in range(5):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert list((store_dir / "tmp").iterdir()) == []
