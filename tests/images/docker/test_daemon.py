"""``docker-daemon:`` against a real dockerd: what goes in runs and comes out the same, an error leaves nothing."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import runnable
from engines import Engine
from made_images import Layout, attach, dump, tar
from programs import run_layerkit, wait_for

from layerkit.images.open import open_source

RUN = ("run", "--rm", "--network", "none")


@pytest.fixture(scope="module")
def image(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runnable.build(tiny, tmp_path_factory.mktemp("run") / "image", sparse=False)


@pytest.fixture
def cli(docker_engine: Engine, tmp_path: Path) -> Callable[..., Any]:
    """Return a runner of ``layerkit`` over the test's dockerd that gives parsed JSON, or what a failure says."""
    (tmp_path / "tmp").mkdir()

    def run(*words: object, code: int = 0, host: str = docker_engine.address) -> Any:
        env = {"DOCKER_HOST": host, "LAYERKIT_STORE": str(tmp_path / "store"), "TMPDIR": str(tmp_path / "tmp")}
        done = run_layerkit(*words, "--json", code=code, env=env)
        assert os.listdir(tmp_path / "tmp") == []
        return json.loads(done.stdout) if code == 0 else done.stderr

    return run


def images(engine: Engine) -> list[str]:
    return sorted(engine("images", "--all", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}").splitlines())


def test_there_and_back(cli: Callable[..., Any], docker_engine: Engine, image: Path, tmp_path: Path) -> None:
    report = cli("copy", image, "docker-daemon:there:1")
    assert report["name"] == "there:1"
    told = docker_engine("inspect", "there:1", "--format", "{{.Id}} {{json .RootFS.Layers}} {{.Config.Labels}}")
    with_us = open_source(str(image)).image()
    assert told.split()[0] == str(with_us.config_descriptor.digest)
    assert json.loads(told.split()[1]) == [str(d) for d in with_us.diff_ids]
    cli("copy", "docker-daemon:there:1", f"oci:{tmp_path}/back:x")
    back = open_source(f"oci:{tmp_path}/back:x").image()
    assert (back.config, back.diff_ids) == (with_us.config, with_us.diff_ids)
    assert runnable.seen(docker_engine(*RUN, "there:1"))
    # By id, by a name without a tag, by another of its names: one image each time.
    docker_engine("tag", "there:1", "elsewhere.example/there:2")
    docker_engine("tag", "there:1", "there:latest")
    short = told.split(":")[1][:12]
    for name in ("there", "docker.io/library/there:1", "elsewhere.example/there:2", short, told.split()[0]):
        assert cli("inspect", f"docker-daemon:{name}")["layers"]


def test_every_command_reads_and_writes_it(cli: Callable[..., Any], docker_engine: Engine, image: Path) -> None:
    cli("copy", image, "docker-daemon:in:1")
    want = runnable.seen(docker_engine(*RUN, "in:1"))
    assert any("/bin/busybox" in line or "bin/busybox" in line for line in want)
    cli("optimize", "docker-daemon:in:1", "docker-daemon:opt")
    cli("flatten", "docker-daemon:in:1", "docker-daemon:flat", "--compression", "none")
    cli("remap", "docker-daemon:in:1", "docker-daemon:maps", "--form", "portable", "--uid-map", "0:100000:65536")
    assert runnable.seen(docker_engine(*RUN, "opt:latest")) == want
    assert runnable.seen(docker_engine(*RUN, "flat:latest")) == want
    assert runnable.seen(docker_engine(*RUN, "maps:latest"), 100000) == want
    assert cli("verify", "docker-daemon:flat")
    assert cli("analyze", "docker-daemon:in:1")


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_compressed_layers_load(
    cli: Callable[..., Any], docker_engine: Engine, tmp_path: Path, compression: str
) -> None:
    """Debian's docker 20.10 reads no zstd: such layers are inflated for it."""
    layout = Layout()
    # A layer that the daemon has already is not read again: each compression gets one of its own.
    text = (compression * 100_000).encode()
    layout.list(layout.image(tar(("a", text)), tar(("b", b"b"))), "it:1")
    layout.folder(tmp_path / "in")
    cli("flatten", tmp_path / "in", f"oci:{tmp_path}/flat:it", "--compression", compression)
    cli("copy", f"oci:{tmp_path}/flat:it", f"docker-daemon:flat:{compression}")
    container = docker_engine("create", f"flat:{compression}", "/none").strip()
    assert text in docker_engine.run("cp", f"{container}:/a", "-").stdout
    docker_engine("rm", container)


def test_no_daemon_and_no_such_image(cli: Callable[..., Any], image: Path, tmp_path: Path) -> None:
    for words in (("inspect", "docker-daemon:x:1"), ("copy", image, "docker-daemon:x:1")):
        said = cli(*words, host=f"unix://{tmp_path}/none.sock", code=1)
        assert "no docker daemon answers" in said and "DOCKER_HOST" in said and "docker load" in said
        assert len(said.splitlines()) <= 3
        assert "no docker daemon" in cli(*words, host="tcp://127.0.0.1:1", code=1)
    assert "docker images" in cli("inspect", "docker-daemon:nobody/has:this", code=1)
    for name in ("UPPER/case:1", "x:1:2", "x@sha256:" + "0" * 64, "-x"):
        assert "docker-daemon" in cli("copy", image, f"docker-daemon:{name}", code=2)


def test_damage_or_a_stop_loads_nothing(
    cli: Callable[..., Any], docker_engine: Engine, image: Path, tmp_path: Path
) -> None:
    before = images(docker_engine)
    bad = Layout()
    bad.list(bad.image(tar(("a", b"x" * 100_000)), tar(("b", b"y"))), "bad:1")
    blob = max(bad.blobs, key=lambda d: len(bad.blobs[d]))
    bad.blobs[blob] = bad.blobs[blob][:-1] + b"z"
    bad.folder(tmp_path / "bad")
    cli("copy", tmp_path / "bad", "docker-daemon:bad:1", code=3)
    # A layer that is a tar to nobody: the daemon itself refuses it, and its reason is told.
    odd = Layout()
    odd.list(odd.image(b"no tar at all" * 100), "odd:1")
    odd.folder(tmp_path / "odd")
    assert "refused the image" in cli("copy", tmp_path / "odd", "docker-daemon:odd:1", code=1)
    assert images(docker_engine) == before


HELD = """
import sys, time
from layerkit.cli.main import run
from layerkit.images.docker.daemon import DaemonSink

give, given = DaemonSink._give, []

def held(self, piece):
    given.append(piece)
    while len(given) > 20:
        time.sleep(0.01)
    give(self, piece)

DaemonSink._give = held
run()
"""
"""``layerkit`` whose upload to a daemon stops in the middle and waits to be killed."""


def test_a_killed_upload_loads_nothing(docker_engine: Engine, tmp_path: Path) -> None:
    """kill -9 and Ctrl-C while the layers are on their way."""
    before = images(docker_engine)
    big = Layout()
    big.list(big.image(*(tar((f"f{i}", os.urandom(8 << 20))) for i in range(4))), "big:1")
    big.folder(tmp_path / "big")
    spool = docker_engine.folder / "data/tmp"
    for number, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        process = subprocess.Popen(
            [sys.executable, "-c", HELD, "copy", tmp_path / "big", "docker-daemon:big:1"],
            env={**os.environ, "DOCKER_HOST": docker_engine.address}, stderr=subprocess.PIPE,
        )  # fmt: skip
        while not any(spool.rglob("*")) and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(number)
        assert process.wait(60) == code, process.stderr.read() if process.stderr else ""
        if process.stderr:
            process.stderr.close()
        assert images(docker_engine) == before
        wait_for(lambda: not any(spool.rglob("*")))  # the daemon clears away what it got


def test_what_a_daemon_has_no_place_for(cli: Callable[..., Any], docker_engine: Engine, tmp_path: Path) -> None:
    """Attached artifacts stay behind and are named; an index and an artifact of its own are refused."""
    layout = Layout()
    one = layout.image(tar(("a", b"1")))
    two = layout.image(tar(("a", b"2")), arch="arm64")
    entries = [one | {"platform": {"os": "linux", "architecture": "amd64"}},
               two | {"platform": {"os": "linux", "architecture": "arm64"}}]  # fmt: skip
    index = layout.put(dump({"schemaVersion": 2, "manifests": entries}), "application/vnd.oci.image.index.v1+json")
    layout.list(index, "multi")
    signature = attach(layout, one, b"signature")
    layout.folder(tmp_path / "in")
    report = cli("copy", f"oci:{tmp_path}/in:multi", "docker-daemon:multi:1", "--platform", "linux/amd64")
    assert report["attached"] == []
    assert report["left"] == [signature["digest"]]
    before = images(docker_engine)
    said = cli("copy", f"oci:{tmp_path}/in:multi", "docker-daemon:multi:2", "--all-platforms", code=2)
    assert "--platform" in said
    cli("remap", f"oci:{tmp_path}/in:multi", "docker-daemon:multi:3", "--uid-map", "0:1000:10", code=2)
    assert images(docker_engine) == before


class _Failing(http.server.BaseHTTPRequestHandler):
    """A daemon with the faults that a real one cannot be made to have: it denies, breaks off, fails inside."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("/images/")[2] or self.path
        if path.endswith("/version"):
            self._say({"ApiVersion": "1.41", "MinAPIVersion": "1.24"})
        elif path.startswith("denied"):
            self._say({"message": "authorization denied by plugin"}, 403)
        elif path.startswith("broken") and path.endswith("/json"):
            self._say({"Id": "sha256:" + "0" * 64, "RepoTags": ["broken:1"]})
        elif path.startswith("broken"):
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(bytes(5000))
            self.close_connection = True
        else:
            self._say({"message": "no space for a lock file"}, 500)

    def do_POST(self) -> None:
        self.rfile.read(3000)  # of much more
        self._say({"message": "disk on fire"}, 500)
        self.close_connection = True

    def _say(self, document: object, status: int = 200) -> None:
        body = dump(document)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "a unix socket"

    def log_message(self, *words: object) -> None:
        pass


def test_a_daemon_that_denies_breaks_off_or_fails(cli: Callable[..., Any], image: Path, tmp_path: Path) -> None:
    with socketserver.ThreadingUnixStreamServer(f"{tmp_path}/d.sock", _Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"unix://{tmp_path}/d.sock"
        assert "denied by plugin" in cli("inspect", "docker-daemon:denied:1", host=host, code=4)
        assert "broke" in cli("copy", "docker-daemon:broken:1", tmp_path / "out.tar", host=host, code=1)
        assert "no space for a lock" in cli("inspect", "docker-daemon:failing:1", host=host, code=1)
        said = cli("copy", image, "docker-daemon:any:1", host=host, code=1)
        assert "docker-daemon:any:1" in said and len(said.splitlines()) == 1
        assert not (tmp_path / "out.tar").exists()
        server.shutdown()
