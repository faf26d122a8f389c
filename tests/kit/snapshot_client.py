"""A snapshotter process of a test's own, a client for its socket, and mount(2) as containerd calls it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.field_mask_pb2 import FieldMask
from kernel_mounts import mounts_below

from layerkit.hosts.containerd import messages_pb2 as pb

SERVICE = "/containerd.services.snapshots.v1.Snapshots/"
ROOT_LABEL = {"containerd.io/gc.root": "2026-01-01T00:00:00Z"}
VIEW, ACTIVE, COMMITTED = 1, 2, 3

_libc = ctypes.CDLL(None, use_errno=True)
_FLAGS = {"ro": 1, "rw": 0, "bind": 4096, "rbind": 4096 | 16384}
_MS_REMOUNT = 32
_MNT_DETACH = 2


class Client:
    """The service as containerd calls it."""

    def __init__(self, socket: Path) -> None:
        self._channel = grpc.insecure_channel(f"unix:{socket}")

    def close(self) -> None:
        self._channel.close()

    def _call(self, method: str, request: Any, reply: Any) -> Any:
        call = self._channel.unary_unary(SERVICE + method, lambda m: m.SerializeToString(), reply.FromString)
        return call(request, timeout=60, wait_for_ready=True)

    def _create(self, method: str, key: str, parent: str, labels: Mapping[str, str] | None) -> list[Any]:
        request = pb.CreateRequest(key=key, parent=parent, labels=dict(ROOT_LABEL if labels is None else labels))
        return list(self._call(method, request, pb.MountsReply).mounts)

    def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> list[Any]:
        return self._create("Prepare", key, parent, labels)

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> list[Any]:
        return self._create("View", key, parent, labels)

    def mounts(self, key: str) -> list[Any]:
        return list(self._call("Mounts", pb.KeyRequest(key=key), pb.MountsReply).mounts)

    def commit(self, name: str, key: str, labels: Mapping[str, str] | None = None, parent: str = "") -> None:
        labels = dict(ROOT_LABEL if labels is None else labels)
        self._call("Commit", pb.CommitRequest(name=name, key=key, labels=labels, parent=parent), pb.MountsReply)

    def remove(self, key: str) -> None:
        self._call("Remove", pb.KeyRequest(key=key), pb.MountsReply)

    def stat(self, key: str) -> Any:
        return self._call("Stat", pb.KeyRequest(key=key), pb.InfoReply).info

    def update(self, info: Any, *paths: str) -> Any:
        mask = FieldMask(paths=list(paths)) if paths else None
        return self._call("Update", pb.UpdateRequest(info=info, update_mask=mask), pb.InfoReply).info

    def walk(self, *filters: str) -> list[Any]:
        call = self._channel.unary_stream(
            SERVICE + "List", lambda m: m.SerializeToString(), pb.ListReply.FromString
        )
        replies = list(call(pb.ListRequest(filters=list(filters)), timeout=60))
        assert all(len(reply.info) <= 100 for reply in replies)
        return [info for reply in replies for info in reply.info]

    def usage(self, key: str) -> Any:
        return self._call("Usage", pb.KeyRequest(key=key), pb.UsageReply)

    def cleanup(self) -> None:
        self._call("Cleanup", pb.KeyRequest(), pb.MountsReply)


@contextlib.contextmanager
def refused(code: str) -> Iterator[list[str]]:
    """Expect a refusal with a gRPC status; its message is put into the list that is given."""
    text: list[str] = []
    try:
        yield text
    except grpc.RpcError as error:
        assert error.code().name == code, f"{error.code()}: {error.details()}"
        text.append(str(error.details()))
    else:
        raise AssertionError(f"was not refused, want {code}")


@dataclass
class Process:
    """A running snapshotter."""

    folder: Path
    run: Path
    store: Path
    process: subprocess.Popen[str] = field(init=False)
    client: Client = field(init=False)

    @property
    def socket(self) -> Path:
        return self.folder / "s.sock"

    @property
    def root(self) -> Path:
        return self.folder / "sroot"

    def start(self, *, inject: str = "") -> None:
        """Start it, and wait until it serves; ``inject`` is Python that runs in it first."""
        words = [
            "snapshotter", "--address", str(self.socket), "--root", str(self.root), "--run", str(self.run),
            "--store", str(self.store), "--json", "--quiet",
        ]  # fmt: skip
        code = f"{inject}\nimport sys\nfrom layerkit.cli.main import run\nsys.argv[1:] = {words!r}\nrun()"
        with (self.folder / "snapshotter.log").open("ab") as log:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=log,
                text=True,
            )  # fmt: skip
        text = ""
        assert self.process.stdout is not None
        while not text.rstrip().endswith("}"):
            line = self.process.stdout.readline()
            assert line, f"the snapshotter ended:\n{self.log()}"
            text += line
        assert json.loads(text)["address"] == str(self.socket)
        self.client = Client(self.socket)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return how it ended."""
        self.client.close()
        self.process.send_signal(number)
        code = self.process.wait(30)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code

    def log(self) -> str:
        return (self.folder / "snapshotter.log").read_text(errors="replace")[-3000:]


@contextlib.contextmanager
def snapshotter(folder: Path, store: Path | None = None) -> Iterator[Process]:
    """Run a snapshotter below ``folder``, which is short; its mounts go at the end."""
    Path("/run/layerkit").mkdir(mode=0o711, exist_ok=True)
    run = Path(tempfile.mkdtemp(prefix="t", dir="/run/layerkit"))
    process = Process(folder, run, store or folder / "store")
    try:
        process.start()
        try:
            yield process
        finally:
            if process.process.poll() is None:
                process.stop(signal.SIGKILL)
    finally:
        for target in reversed(mounts_below(run)):
            subprocess.run(["umount", "--lazy", target], check=False)
        shutil.rmtree(run)


def mount_all(found: Sequence[Any], target: Path) -> None:
    """Make the mounts as containerd does: mount(2) with one page of options."""
    for mount in found:
        flags, words = 0, []
        for option in mount.options:
            if option in _FLAGS:
                flags |= _FLAGS[option]
            else:
                words.append(option)
        data = ",".join(words).encode()
        assert len(data) < os.sysconf("SC_PAGE_SIZE"), f"{len(data)} bytes of mount options"
        _mount(mount.source, target, mount.type, flags, data)
        if flags & 4096 and flags & 1:
            _mount("", target, "", flags | _MS_REMOUNT, b"")


def _mount(source: str, target: Path, kind: str, flags: int, data: bytes) -> None:
    arguments = (os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), data)
    if _libc.mount(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)}: {kind} {flags:#x} {data.decode()}", str(target))


def unmount(target: Path) -> None:
    """Unmount what is on top at ``target``."""
    if _libc.umount2(os.fsencode(target), 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))


@contextlib.contextmanager
def mounted(found: Sequence[Any], target: Path) -> Iterator[Path]:
    """Mount at ``target``, made if it is not there, for the block."""
    target.mkdir(exist_ok=True)
    mount_all(found, target)
    try:
        yield target
    finally:
        unmount(target)
