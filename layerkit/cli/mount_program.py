"""``layerkit mount-program``: what podman runs in place of fuse-overlayfs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import Output


def mount_program(
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The folder to mount at.")],
    option: Annotated[
        list[str],
        typer.Option(
            "-o",
            metavar="OPTIONS",
            help="`lowerdir=TOP:…:BOTTOM[,upperdir=…,workdir=…][,uidmapping=C:H:N:…,gidmapping=…]`; also "
            "`squash_to_root`, `squash_to_uid`, `squash_to_gid`, `overflow_id=N`, `rendering=auto|fuse|directory`, "
            "`ro`, `volatile`, `noexec`, `nodev`, `nosuid`, `noatime`, `context=…`.",
        ),
    ],
    store: o.StoreDir = None,
    json: o.Json = False,
) -> None:
    """Mount a container's layers under its id map, without a copy, as podman's `mount_program`.

    podman runs it; `layerkit setup podman` writes the line of storage.conf that says so. Metadata of the layers
    is read once for each image, and served or written once for all maps; file data stays where podman has it.

    Example: `layerkit mount-program -o lowerdir=TOP:BASE,upperdir=U,workdir=W,uidmapping=0:100000:65536 /mnt`
    """
    from layerkit.hosts.podman.mount_program import mount

    mounted = mount(",".join(option), target, o.store_dir(store))
    out = Output(json)
    out.note(*(f"layerkit mount-program: {text}" for text in mounted.notes))
    out.told("mount-program", {"target": str(target), "way": mounted.way, "server": mounted.pid})
