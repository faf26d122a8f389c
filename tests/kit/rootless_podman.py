"""A rootless podman of a test's own, as an ordinary user with subordinate ids, that may use our mount program."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import struct
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engines import Engine, containers_conf, short_folder
from needs import missing, need_root, need_tool
from programs import KIT, ROOT, run

UID = 4242
NAME = "lktest"
RUN = ("run", "--rm", "--network", "none", "--cgroups", "disabled")
CREATE = ("create", "--network", "none", "--cgroups", "disabled")


def need_podman() -> None:
    """Skip unless rootless podman can run here."""
    need_root()
    need_tool("podman", "crun", "newuidmap", "nsenter", "setpriv", "unshare", "busybox")
    if not Path("/dev/fuse").exists():
        missing("needs /dev/fuse (modprobe fuse)")


@contextlib.contextmanager
def rootless_podman(*, mount_program: bool = True, uid: int = UID, home: Path | None = None) -> Iterator[Engine]:
    """Give a rootless podman with a store, a home and a run folder of its own.

    ``engine.folder`` has ``home`` (with ``s``, podman's storage), ``calls`` (a line for each call of the mount
    program) and ``layerkit`` (its store). ``engine.command`` without its last word runs anything as the user.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(short_folder())
        folder.chmod(0o755)
        home, work = home or folder / "home", folder / "x"
        (home / ".config/containers").mkdir(parents=True)
        work.mkdir(mode=0o700)
        (home / ".config/containers/containers.conf").write_text(containers_conf("crun"))
        storage = f'[storage]\ndriver = "overlay"\ngraphroot = "{home}/s"\nrunroot = "{work}/r"\n'
        if mount_program:
            storage += f'[storage.options.overlay]\nmount_program = "{folder}/program"\n'
        (home / ".config/containers/storage.conf").write_text(storage)
        write_program(folder)
        subprocess.run(["chown", "-R", f"{uid}:{uid}", home, work], check=True)
        readable = ":".join(map(str, (sys.base_prefix, sys.prefix, ROOT, folder, home)))
        holder = subprocess.Popen(
            [sys.executable, KIT / "ordinary_users.py", "machine", folder, str(uid), NAME, readable],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert holder.stdin and holder.stdout
        stack.callback(_end, holder, work)
        assert holder.stdout.readline() == "ready\n"
        user = (
            "nsenter", "-t", str(holder.pid), "-m", f"--wdns={home}",
            "setpriv", "--reuid", str(uid), "--regid", str(uid),
            "--clear-groups", "env", "-i", "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", f"HOME={home}",
            f"XDG_RUNTIME_DIR={work}", f"USER={NAME}", f"LAYERKIT_STORE={home}/layerkit", f"TMPDIR={home}",
            "OPENBLAS_NUM_THREADS=1",
        )  # fmt: skip
        engine = Engine(folder, (*user, "podman"))
        try:
            yield engine
        finally:
            engine.run("rm", "--all", "--force", "--time", "0")


def load_box(engine: Engine) -> None:
    """Give ``engine`` the image ``box``: busybox, owners, a capability, and a second layer that removes things."""
    binary = Path("/usr/bin/busybox").read_bytes()
    names = (
        "sh", "ls", "stat", "id", "cat", "touch", "chown", "chmod", "rm", "mkdir", "md5sum", "sleep", "true",
        "echo", "find", "dd", "cp", "mv", "sync",
    )  # fmt: skip
    path = engine.folder / "home/box.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: Any) -> None:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.mode, info.mtime = kind, len(data), 0o755, 1_700_000_000
            for key, value in fields.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))

        for folder in ("bin", "data", "gone", "gone/deep", "etc", "tmp", "proc", "sys", "dev", "run"):
            add(folder, kind=tarfile.DIRTYPE, mode=0o1777 if folder == "tmp" else 0o755)
        add("root", kind=tarfile.DIRTYPE, mode=0o700)
        add("bin/busybox", binary)
        add("bin/busybox-suid", binary, mode=0o4755)
        # VFS_CAP_REVISION_2 with the effective bit; CAP_DAC_OVERRIDE.
        capability = struct.pack("<5I", 0x0200_0001, 1 << 1, 0, 0, 0).decode("utf-8", "surrogateescape")
        add("bin/busybox-capable", binary, pax_headers={"SCHILY.xattr.security.capability": capability})
        for name in names:
            add(f"bin/{name}", kind=tarfile.SYMTYPE, linkname="busybox")
        add("etc/passwd", b"root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n", mode=0o644)
        add("etc/group", b"root:x:0:\nuser:x:1000:\n", mode=0o644)
        add("root/secret", b"secret\n", mode=0o600)
        add("data/owned", b"owned\n", uid=1000, gid=1000, mode=0o640)
        add("data/other", b"other\n", uid=5, gid=7, mode=0o600)
        add("data/big", b"big!" * (2 << 20))
        add("data/link", kind=tarfile.LNKTYPE, linkname="data/owned", uid=1000, gid=1000, mode=0o640)
        add("gone/deep/file", b"gone\n")
        add("data/removed", b"removed\n")
    path.chmod(0o644)
    engine("import", path, "box:1")
    context = engine.folder / "context"
    context.mkdir()
    (context / "Containerfile").write_text(
        "FROM localhost/box:1\n"
        "RUN rm -r /gone /data/removed && echo two > /data/two && chown 5:7 /data/two && chmod 4711 /data/two\n"
        "RUN rm -r /data/big && mkdir /gone && echo new > /gone/new\n"
        "RUN dd if=/dev/zero of=/data/big bs=65536 count=64\n"
    )
    engine("build", "--network", "host", "--isolation", "chroot", "--layers", "-t", "box", context)


def write_program(folder: Path, before: str = "") -> Path:
    """Write the program that storage.conf names: it notes each call, runs ``before`` in a shell, then ours."""
    program, calls = folder / "program", folder / "calls"
    calls.touch()
    calls.chmod(0o666)
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\n{before}\n'
        f'exec {sys.executable} -m layerkit.cli.mount_program_main "$@"\n'
    )
    program.chmod(0o755)
    return program


def as_user(engine: Engine, *words: object, code: int = 0) -> str:
    """Run any program as podman's user and return what it prints."""
    return run(*engine.command[:-1], *words, code=code).stdout


def servers(uid: int = UID) -> list[int]:
    """Return the pids of the living FUSE servers of a user, keepers first."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state = (entry / "stat").read_text()
                ours = "(layerkit-fuse)" in state and state.rpartition(")")[2].split()[0] != "Z"
                if ours and entry.stat().st_uid == uid:
                    found.append(int(entry.name))
    return sorted(found)


def _end(holder: subprocess.Popen[str], run: Path) -> None:
    """End podman's own pause process, which keeps its namespaces, and the holder of ours."""
    with contextlib.suppress(OSError, ValueError):
        os.kill(int((run / "libpod/tmp/pause.pid").read_text()), signal.SIGKILL)
    assert holder.stdin
    holder.stdin.close()
    holder.wait(10)
