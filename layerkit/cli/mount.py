"""``layerkit mount``, ``adopt``, ``umount``, ``mounts``, and ``mount-program``, which podman runs."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import Output, fields, human, table
from layerkit.model.errors import UsageError

if TYPE_CHECKING:
    from layerkit.hosts.adopted.mount import AdoptReport
    from layerkit.idmap import Mapping

Stacking = Annotated[
    str,
    typer.Option(
        "--stacking", metavar="auto|data-only|classic",
        help="For unpacked layers: how metadata is put over them; auto takes what the kernel supports.",
    ),
]  # fmt: skip
Reread = Annotated[bool, typer.Option("--reread", help="For unpacked layers: accept folders that changed.")]


def mount(
    ref: o.Ref,
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="An existing folder to mount on.")],
    ids: o.Map = o.Map(),
    strict: o.Strict = False,
    upper: Annotated[
        Path | None,
        typer.Option("--upper", metavar="DIR", help="Make the mount writable; changes go to this folder."),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option("--work", metavar="DIR", help="overlayfs's work folder [default: DIR.work, beside DIR]."),
    ] = None,
    rendering: Annotated[
        str | None, typer.Option("--rendering", metavar="auto|erofs|directory|fuse", help="Form of the metadata.")
    ] = None,
    own_meta: o.OwnMeta = False,
    for_podman: Annotated[
        bool, typer.Option("--for-podman", help="Print the options for `podman run`: maps and --rootfs TARGET:O.")
    ] = False,
    data: o.Data = "auto",
    platform: o.Platform = None,
    stacking: Stacking = "auto",
    reread: Reread = False,
    store: o.StoreDir = None,
    jobs: o.Jobs = 1,
    out: Output = Output(),
) -> None:
    """Mount an image with mapped owners as a real overlay, read-only unless --upper is given.

    Examples:
    `layerkit mount image.tar /mnt --uid-map 0:100000:65536`

    `layerkit mount oci:images:app /srv/root --subuid-name alice --upper /srv/changes`

    `layerkit mount containers-storage:app /mnt --uid-map 0:100000:65536` uses layers that podman has unpacked.
    `containerd:NAME`, `docker-storage:NAME` and `folders:UPPER:...:LOWEST` work in the same way.

    `podman run --rm $(layerkit mount --for-podman image.tar /mnt --uid-map 0:100000:65536) sh`
    """
    from layerkit.api import open as api
    from layerkit.hosts.adopted.sources import SCHEMES

    if for_podman and upper is not None:
        raise UsageError("--for-podman: podman keeps the changes of each container itself; leave --upper out")
    mapping = ids.mapping()
    writable = "" if upper else " (read-only)"
    if ref.startswith(tuple(f"{scheme}:" for scheme in SCHEMES)):
        if strict or platform is not None:
            raise UsageError(f"{ref}: leave out --strict and --platform; these layers are unpacked already")
        if for_podman:
            raise UsageError("--for-podman: podman has these layers; give podman the map, or name an image file")
        with out.progress() as step:
            adopted = api.mount_unpacked(
                ref, target, mapping, stacking=stacking, rendering=rendering, own_meta=own_meta, upper=upper,
                work=work, reread=reread, store=o.store_dir(store), progress=step,
            )  # fmt: skip
        _tell_adopted("mount", adopted, out, ("mounted", f"{adopted.name} on {target}{writable}"))
        return
    if stacking != "auto" or reread:
        raise UsageError(
            "--stacking and --reread are only for layers that a runtime unpacked (containers-storage:NAME, ...)"
        )
    podman = podman_words(target, mapping) if for_podman else []
    settings = o.settings(store, data=data, jobs=jobs, strict=strict)
    with api.open_image(ref, platform=platform, settings=settings) as image, out.progress() as step:
        mounted = image.mount(
            target, mapping, upper=upper, work=work, rendering=rendering, own_meta=own_meta, progress=step
        )
    result = mounted.report
    extra = {"podman": podman} if for_podman else {}
    if out.told("mount", {"target": str(mounted.target), **result.to_dict(), **extra}, result.warnings):
        return
    if for_podman:
        print(" ".join(podman))
        out.note("podman reads nothing else from the image: give the command, --user, --env and --workdir yourself")
        return
    fields([
        ("mounted", f"{result.name} on {mounted.target}{writable}"),
        ("map", result.map_text or "none"),
        ("metadata", f"{human(result.meta_bytes)} for this map ({result.how})"),
    ])  # fmt: skip


def podman_words(target: Path, mapping: Mapping | None) -> list[str]:
    """Return the words of ``podman run`` that make a container of the read-only mount at ``target``.

    Raises:
        UsageError: a path or map that podman cannot be given.
    """
    place = os.path.realpath(target)
    if not place.isascii() or shlex.quote(place) != place or ":" in place:
        raise UsageError(f"--for-podman: podman's --rootfs does not accept {place}; use a path of plain characters")
    if mapping is not None and not mapping.fits_kernel:
        raise UsageError("--for-podman: a user namespace supports neither --squash nor --overflow-id; omit them")
    words = []
    for flag, one in (("--uidmap", mapping.uid), ("--gidmap", mapping.gid)) if mapping else ():
        words += [f"{flag}={c}:{h}:{n}" for c, h, n in one.extents]
    return [*words, "--rootfs", f"{place}:O"]


def umount(
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A folder that `layerkit mount` mounted on.")],
    store: o.StoreDir = None,
    out: Output = Output(),
) -> None:
    """Unmount what `layerkit mount` mounted; the last mount of an image releases its data as well.

    Example: `layerkit umount /mnt`
    """
    from layerkit.api import open as api

    api.umount(target, store=o.store_dir(store))
    out.note(f"unmounted {target}")
    out.told("umount", {"target": str(target)})


def mounts(store: o.StoreDir = None, json: o.Json = False) -> None:
    """List the mounts that layerkit made from this store.

    Example: `layerkit mounts --json`
    """
    from layerkit.api import open as api

    rows = api.mounts(store=o.store_dir(store))
    out = Output(json)
    if out.told("mounts", {"mounts": rows}):
        return
    table("", ["TARGET", "IMAGE", "MAP"], [(r["target"], r["image"], r["map"] or "none") for r in rows])
    for row in rows:
        if row["server"]:
            killed = "the processes that serve its metadata were killed; unmount it and mount it again"
            out.note(f"warning: {row['target']}: {killed}")
        if row["lost"]:
            lost = f"the runtime removed layers that it uses; unmount it: {row['lost'].split()}"
            out.note(f"warning: {row['target']}: {lost}")


def mount_program(
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The folder to mount on.")],
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
    """Mount a container's layers under its id map without a copy, as podman's `mount_program`.

    podman runs this command; `layerkit setup podman` sets it in storage.conf. The layers' metadata is read once
    for each image, and served or written once for all maps. File data stays where podman has it.

    Example: `layerkit mount-program -o lowerdir=TOP:BASE,upperdir=U,workdir=W,uidmapping=0:100000:65536 /mnt`
    """
    from layerkit.hosts.podman.mount_program import mount as mount_layers

    mounted = mount_layers(",".join(option), target, o.store_dir(store))
    out = Output(json)
    out.note(*(f"layerkit mount-program: {text}" for text in mounted.notes))
    out.told("mount-program", {"target": str(target), "way": mounted.way, "server": mounted.pid})


def adopt(
    ref: Annotated[
        str,
        typer.Argument(
            metavar="REF",
            help="Unpacked layers: `containers-storage:NAME`, `containerd:[ROOT@NAMESPACE]NAME`, "
            "`docker-storage:NAME`, `folders:UPPER:...:LOWEST`.",
        ),
    ],
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A new folder for `upper`, `work` and, if needed, `meta`.")
    ],
    ids: o.Map = o.Map(),
    stacking: Stacking = "auto",
    reread: Reread = False,
    store: o.StoreDir = None,
    out: Output = Output(),
) -> None:
    """Write an upper that shows a runtime's unpacked layers under an id map; mount it with any tool.

    Only what the map changes is written, as stubs without data. `layerkit mount` takes the same references and
    also mounts them.

    Example: `layerkit adopt containers-storage:app /srv/app-upper --uid-map 0:100000:65536 --stacking classic`
    """
    from layerkit.hosts.adopted import mount as adopting
    from layerkit.hosts.adopted.sources import find_unpacked
    from layerkit.hosts.mounts.spec import MountOptions

    settings, mapping, options = o.settings(store), ids.mapping(), MountOptions(stacking=stacking, reread=reread)
    if mapping is None:
        raise UsageError("adopt needs a map: add --uid-map C:H:N or --subuid-name NAME")
    with settings.open_store() as held, out.progress() as step:
        report = adopting.write_upper(find_unpacked(ref), folder, mapping, held, options, progress=step)
    _tell_adopted("adopt", report, out, ("written", str(folder)))


def _tell_adopted(schema: str, report: AdoptReport, out: Output, first: tuple[str, str]) -> None:
    """Print what was made of unpacked layers; ``first`` is the first line."""
    out.warn(report.warnings)
    if out.told(schema, report.to_dict()):
        return
    layers = f"{len(report.folders)} folders"
    if report.runtime != "folders":
        layers = f"{len(report.folders)} unpacked by {report.runtime}"
    read = f", {report.read_folders} read now" if report.read_folders else ", none read again"
    fields([
        first,
        ("map", report.map_text or "none"),
        ("layers", layers + read + f" ({report.stacking})"),
        ("metadata", f"{human(report.meta_bytes)} for this map ({report.how})"),
        *([("to mount", report.mount_line)] if report.mount_line else []),
    ])  # fmt: skip
