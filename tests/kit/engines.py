"""Container engines of a test's own: podman, containerd and dockerd with their own root, state and socket.

Each is a context manager that removes what it made; the fixtures below keep one for a whole test file. The
folders are short (``/var/tmp/lk-…``): podman refuses a run folder of more than 50 characters, and the path of a
socket ends at 108. Nothing here touches the engines that the host itself may run.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from kernel_mounts import mounts_below
from needs import need_root, need_tool
from programs import wait_for

_START_SECONDS = 60
_CONTAINERD_BIN = os.environ.get("LAYERKIT_TEST_CONTAINERD_BIN", "")
"""A folder with another containerd, its ctr and its shim, to use in place of the system's."""
_STOP_SECONDS = 20

_CONTAINERD_CONF = """
version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
  address = "{folder}/c.sock"
[ttrpc]
  address = "{folder}/c.sock.ttrpc"
{extra}
"""


def containers_conf(runtime: str) -> str:
    """Return a containers.conf for podman in a bare virtual machine too."""
    return f"""
[containers]
# Without CAP_SYS_RESOURCE the limits cannot be raised, and podman's own default would.
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
runtime = "{runtime}"
"""


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """Make a folder with a short path; what is mounted below is unmounted at the end, and all of it removed."""
    folder = Path(tempfile.mkdtemp(prefix="lk-", dir="/var/tmp"))
    try:
        yield folder
    finally:
        for target in reversed(mounts_below(folder)):
            subprocess.run(["umount", "--lazy", target], check=False)
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Engine:
    """A command line that talks to one engine.

    Attributes:
        folder: everything of the engine lies below it.
        command: the client with its options; :meth:`__call__` appends to it.
        env: added to the environment of the client.
        address: of the socket, "" where there is no daemon.
        log: of the daemon.
    """

    folder: Path
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    address: str = ""
    log: Path | None = None

    def __call__(self, *words: object, code: int = 0, stdin: bytes | None = None) -> str:
        """Run the client and return its standard output; another exit code than ``code`` fails the test."""
        done = self.run(*words, stdin=stdin)
        said = done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")
        assert done.returncode == code, f"{' '.join(map(str, words))}: exit {done.returncode}\n{said}{self.tail()}"
        return done.stdout.decode(errors="surrogateescape")

    def run(self, *words: object, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        """Run the client and return what it did, whatever that was."""
        return subprocess.run(
            [*self.command, *map(str, words)], env={**os.environ, **self.env}, input=stdin or b"",
            capture_output=True, check=False, timeout=300,
        )  # fmt: skip

    def tail(self) -> str:
        """Return the end of the daemon's log."""
        return "\n" + self.log.read_text(errors="replace")[-2000:] if self.log and self.log.exists() else ""


class Ctr(Engine):
    """The client of a containerd, whose containers say what they say into a file."""

    def run(self, *words: object, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        """Run ``ctr``; where it runs a container in the foreground, return what the container said.

        That does not come through ctr itself: before 1.6.22 and 1.7.2 it closes its end of the pipes as soon as it
        hears that the container has ended, and drops what is still in them (containerd's pull request 8643). The
        shim writes both streams to the file, and has them whole before ctr ends.
        """
        if "run" not in words or "--detach" in words:
            return super().run(*words, stdin=stdin)
        at = words.index("run") + 1
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix="said-") as said:
            done = super().run(*words[:at], "--log-uri", f"file://{said.name}", *words[at:], stdin=stdin)
            done.stdout += said.read()
            return done


@contextlib.contextmanager
def podman(folder: Path | None = None, *, storage: str = "", driver: str = "overlay") -> Iterator[Engine]:
    """Give a podman with stores of its own below ``folder``; its containers use runc and no network.

    Args:
        folder: short; None makes one that goes at the end.
        storage: more of storage.conf, such as ``[storage.options.overlay]`` with a mount program.
        driver: of the storage.
    """
    with contextlib.ExitStack() as stack:
        folder = folder or stack.enter_context(short_folder())
        root, runroot = folder / "root", folder / "run"
        (folder / "containers.conf").write_text(containers_conf("runc"))
        (folder / "storage.conf").write_text(
            f'[storage]\ndriver = "{driver}"\ngraphroot = "{root}"\nrunroot = "{runroot}"\n{storage}\n'
        )
        env = {
            "CONTAINERS_CONF": f"{folder}/containers.conf",
            "CONTAINERS_STORAGE_CONF": f"{folder}/storage.conf",
            "TMPDIR": str(folder),
        }
        engine = Engine(folder, ("podman", "--tmpdir", f"{folder}/tmp"), env)
        try:
            yield engine
        finally:
            engine.run("rm", "--all", "--force", "--time", "0")
            engine.run("rmi", "--all", "--force")


def podman_run(*words: object) -> tuple[object, ...]:
    """Return the words of a ``podman run`` that works in a bare virtual machine too."""
    return ("run", "--rm", "--network", "none", "--cgroups", "no-conmon", *words)


@contextlib.contextmanager
def _daemon(
    command: list[str], log: Path, ready: Callable[[], bool], env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a daemon until the end of the block; it also goes when this process is killed."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *command], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            env={**os.environ, **(env or {})},
        )  # fmt: skip
    try:
        try:
            wait_for(lambda: process.poll() is not None or ready())
        finally:
            said = log.read_text(errors="replace")[-3000:]
        assert process.poll() is None, f"{command[0]} did not start:\n{said}"
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _containerd_program(name: str) -> str:
    return str(Path(_CONTAINERD_BIN, name)) if _CONTAINERD_BIN else name


def containerd_version() -> tuple[int, ...]:
    """Return the version of the containerd that :func:`containerd` runs, such as (1, 6)."""
    said = subprocess.run(
        [_containerd_program("containerd"), "--version"], capture_output=True, text=True, check=True
    )
    found = re.search(r"\bv?(\d+)\.(\d+)\.", said.stdout)
    assert found, said.stdout
    return tuple(map(int, found.groups()))


@contextlib.contextmanager
def containerd(folder: Path | None = None, *, config: str = "") -> Iterator[Engine]:
    """Run a containerd of its own; the engine is ``ctr``.

    Args:
        folder: short; None makes one that goes at the end.
        config: more of config.toml, such as ``[proxy_plugins.NAME]``.
    """
    with contextlib.ExitStack() as stack:
        folder = folder or stack.enter_context(short_folder())
        address, file, log = f"{folder}/c.sock", folder / "config.toml", folder / "containerd.log"
        file.write_text(_CONTAINERD_CONF.format(folder=folder, extra=config))
        engine = Ctr(folder, (_containerd_program("ctr"), "--address", address), address=address, log=log)
        stack.callback(_end_shims, address)
        # It takes its shim from the PATH.
        env = {"PATH": f"{_CONTAINERD_BIN}:{os.environ['PATH']}"} if _CONTAINERD_BIN else {}
        command = [_containerd_program("containerd"), "--config", str(file)]
        stack.enter_context(_daemon(command, log, lambda: engine.run("version").returncode == 0, env))
        yield engine


@contextlib.contextmanager
def dockerd(folder: Path | None = None, *, flags: tuple[str, ...] = (), config: str = "") -> Iterator[Engine]:
    """Run a dockerd of its own over a containerd of its own; the engine is ``docker``.

    Args:
        folder: short; None makes one that goes at the end.
        flags: more of them for dockerd, such as ``--userns-remap``.
        config: more of containerd's config.toml.
    """
    with contextlib.ExitStack() as stack:
        folder = folder or stack.enter_context(short_folder())
        (folder / "ctd").mkdir()
        below = stack.enter_context(containerd(folder / "ctd", config=config))
        address, log = f"unix://{folder}/d.sock", folder / "dockerd.log"
        env = {"DOCKER_HOST": address, "DOCKER_CONFIG": f"{folder}/client", "DOCKER_TLS_VERIFY": ""}
        engine = Engine(folder, ("docker", "--host", address), env, address, log)
        (folder / "daemon.json").write_text("{}")  # not the host's own
        command = [
            "dockerd", "--config-file", f"{folder}/daemon.json", "--data-root", f"{folder}/data",
            "--exec-root", f"{folder}/exec", "--host", address, "--pidfile", f"{folder}/d.pid",
            "--containerd", below.address, "--iptables=false", "--ip6tables=false", "--bridge=none",
            "--exec-opt", "native.cgroupdriver=cgroupfs", *flags,
        ]  # fmt: skip
        stack.enter_context(
            _daemon(command, log, lambda: engine.run("version").returncode == 0, {"TMPDIR": str(folder)})
        )
        try:
            yield engine
        finally:
            for container in engine.run("ps", "-aq").stdout.decode().split():
                engine.run("rm", "--force", container)


def _end_shims(address: str) -> None:
    """Kill what a containerd left running: its shims outlive it."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if b"shim" in words[0] and os.fsencode(address) in words:
                    os.kill(int(entry.name), signal.SIGKILL)


@pytest.fixture(scope="module")
def podman_engine() -> Iterator[Engine]:
    """Return a podman with an empty store."""
    need_root()
    need_tool("podman", "runc")
    with podman() as engine:
        yield engine


@pytest.fixture(scope="module")
def containerd_engine() -> Iterator[Engine]:
    """Return ``ctr`` for a running, empty containerd."""
    need_root()
    need_tool("containerd", "ctr", "runc", "setpriv")
    with containerd() as engine:
        yield engine


@pytest.fixture(scope="module")
def docker_engine() -> Iterator[Engine]:
    """Return ``docker`` for a running, empty dockerd; ``engine.address`` is its DOCKER_HOST."""
    need_root()
    need_tool("dockerd", "docker", "containerd", "runc", "setpriv")
    with dockerd() as engine:
        yield engine
