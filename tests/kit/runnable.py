"""Images that run, on a static busybox: one as a test wants it, and the tiny sample that tells what it sees."""

from __future__ import annotations

import io
import posixpath
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import made_images
from needs import need_tool

NAME = "layerkit.example/run:1"

# Folders that every engine leaves alone: of the root, and what is mounted there, each has its own idea. No link
# counts: those of an overlay depend on how its layers are cut; trees that umoci unpacks are compared in them.
_REPORT = b"""#!/bin/sh
cd /
for top in bin home opt root tmp usr var etc/keep etc/gone; do
    find $top -exec stat -c '%n|%F|%a|%u|%g|%Y|%N' {} +
    find $top -type f -exec md5sum {} +
done | sort
"""


def build(tiny: ModuleType, folder: Path, *, sparse: bool = True) -> Path:
    """Write the image to the layout ``folder`` under :data:`NAME`, which is its tag there.

    Without ``sparse`` no entry is stored so: docker runs an image with such layers, but ``docker save`` then finds
    that it cannot put the layer together again ("could not verify layer data").
    """
    layout = made_images.Layout()
    config: dict[str, Any] = {
        "config": {"Cmd": ["/bin/report"], "Env": ["PATH=/usr/bin:/bin"], "Labels": {"made-by": "a test"}},
        "history": [{"created_by": f"step {i}"} for i in range(5)],
    }
    entry = layout.image(*_with_folders([_busybox(), *tiny.layers()], sparse=sparse), **config)
    layout.list(entry, NAME)
    return layout.folder(folder)


def _program() -> bytes:
    need_tool("busybox")
    return Path(shutil.which("busybox") or "").resolve().read_bytes()


def _busybox() -> bytes:
    program = _program()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, mode in (("bin", 0o755), ("proc", 0o555), ("sys", 0o555), ("dev", 0o755)):
            archive.addfile(made_images.special(name, tarfile.DIRTYPE, mode=mode))
        for name, data in (("bin/busybox", program), ("bin/report", _REPORT)):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755
            archive.addfile(info, io.BytesIO(data))
        for name in ("sh", "find", "stat", "md5sum", "sort", "id", "cat"):
            archive.addfile(made_images.special(f"bin/{name}", tarfile.SYMTYPE, "busybox", mode=0o777))
    return out.getvalue()


def _members(layer: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Yield (name, type, the member's bytes with the PAX header before it)."""
    start = at = 0
    while layer[at]:
        kind, name = layer[at + 156 : at + 157], layer[at : at + 100].rstrip(b"\0")
        at += 512 + -(-int(layer[at + 124 : at + 135], 8) // 512) * 512
        if kind != b"x":
            yield posixpath.normpath(name), kind, layer[start:at]
            start = at


def _with_folders(layers: list[bytes], *, sparse: bool) -> list[bytes]:
    """Return the layers with the folders of all they hold listed, as every builder does.

    The tiny sample leaves some out; engines that unpack each layer apart then make up owner and mode.
    """
    folders: dict[bytes, bytes] = {}
    out = []
    for layer in layers:
        listed: set[bytes] = set()
        pieces = []
        members = list(_members(layer))
        folders |= {name: data for name, kind, data in members if kind == b"5"}
        for name, _kind, data in members:
            if not sparse and b"GNU.sparse." in data[:2048]:
                continue
            for end in (i for i, c in enumerate(name) if c == ord("/")):
                if name[:end] not in listed and name[:end] in folders:
                    pieces.append(folders[name[:end]])
                    listed.add(name[:end])
            if len(name) < 100:  # a longer one stands in the PAX header, and its folders are listed
                listed.add(name)
            pieces.append(data)
        out.append(b"".join(pieces) + bytes(1024))
    return out


def seen(report: str, shift: int = 0) -> list[str]:
    """Return the lines of a report, ids made smaller by ``shift``: what :func:`build` says they are."""
    lines = []
    for line in report.splitlines():
        parts = line.split("|")
        if len(parts) == 7:
            parts[3:5] = (str(int(part) - shift) for part in parts[3:5])
            parts[5] = str(max(0, int(parts[5])))  # no engine gives a file a time before 1970
        lines.append("|".join(parts))
    return sorted(lines)


def busybox_image(folder: Path, config: dict[str, Any], *members: Any, layers: int = 1) -> Path:
    """Make an OCI layout around a static busybox; ``members`` as :func:`made_images.tar` takes them."""
    program = _program()
    base: list[tuple[str, bytes]] = [
        ("etc/passwd", b"root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/home/app:/x\n"),
        ("etc/group", b"root:x:0:\nvideo:x:44:app\n"),
    ]
    own = {member[0] if isinstance(member, tuple) else member.name for member in members}
    tools = ("sh", "id", "cat", "ls", "stat", "pwd", "touch", "chown", "sleep")
    links = [made_images.special(f"bin/{tool}", tarfile.SYMTYPE, "busybox") for tool in tools]
    out = io.BytesIO(made_images.tar(*(each for each in base if each[0] not in own), *links, *members))
    with tarfile.open(fileobj=out, mode="a") as archive:
        info = made_images.special("bin/busybox", tarfile.REGTYPE, mode=0o755, size=len(program))
        archive.addfile(info, io.BytesIO(program))
    more = [made_images.tar((f"layer/{n}", b"%d" % n)) for n in range(layers - 1)]
    layout = made_images.Layout()
    layout.list(layout.image(out.getvalue(), *more, config=config), "kit")
    return layout.folder(folder)
