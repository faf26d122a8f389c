"""runc and crun for tests: with a state folder of the test's own, also on a host of mixed cgroups."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import image_kit
from support import need_tool

_NUMBER = itertools.count(1)
# crun refuses a host that has cgroups of both versions; it does not need those of version 2.
_ONE_KIND = 'mount --make-rprivate /; umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"'


def name() -> str:
    """Return a container name that nobody else uses."""
    return f"lkt-{os.getpid()}-{next(_NUMBER)}"


def words(runtime: str, state: Path, *arguments: object) -> list[str]:
    """Return the command line of ``runtime`` with its state below ``state``."""
    command = [runtime, "--root", f"{state}/{runtime}", *map(str, arguments)]
    return ["unshare", "-m", "sh", "-c", _ONE_KIND, "sh", *command] if runtime == "crun" else command


def run(runtime: str, state: Path, bundle: Path, *, code: int = 0) -> str:
    """Run a bundle to its end and return what it printed."""
    done = subprocess.run(
        words(runtime, state, "run", "-b", bundle, name()), stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == code, f"{runtime}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def busybox_image(folder: Path, config: dict[str, Any], *members: Any, layers: int = 1) -> Path:
    """Make an OCI layout around a static busybox; ``members`` as :func:`image_kit.tar` takes them."""
    need_tool("busybox")
    program = next(p for p in (Path("/usr/bin/busybox"), Path("/bin/busybox")) if p.exists()).read_bytes()
    base: list[tuple[str, bytes]] = [
        ("etc/passwd", b"root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/home/app:/x\n"),
        ("etc/group", b"root:x:0:\nvideo:x:44:app\n"),
    ]
    own = {member[0] if isinstance(member, tuple) else member.name for member in members}
    tools = ("sh", "id", "cat", "ls", "stat", "pwd", "touch", "chown", "sleep")
    links = [image_kit.special(f"bin/{tool}", tarfile.SYMTYPE, "busybox") for tool in tools]
    out = io.BytesIO(image_kit.tar(*(each for each in base if each[0] not in own), *links, *members))
    with tarfile.open(fileobj=out, mode="a") as archive:
        info = image_kit.special("bin/busybox", tarfile.REGTYPE, mode=0o755, size=len(program))
        archive.addfile(info, io.BytesIO(program))
    more = [image_kit.tar((f"layer/{n}", b"%d" % n)) for n in range(layers - 1)]
    layout = image_kit.Layout()
    layout.list(layout.image(out.getvalue(), *more, config=config), "kit")
    return layout.folder(folder)
