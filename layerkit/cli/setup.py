"""``layerkit setup``: make a runtime of this host use layerkit, and take it back."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.containerd import DEFAULT_ADDRESS, DEFAULT_ROOT
from layerkit.cli.render import Output
from layerkit.model.errors import NotFound, UsageError

group = typer.Typer(
    no_args_is_help=True, help="Make a container runtime use layerkit; --undo reverts it.",
    rich_markup_mode="markdown",
)  # fmt: skip


@o.command(group)
def podman(undo: o.Undo = False, show: o.Print = False, quiet: o.Quiet = False, json: o.Json = False) -> None:
    """Set up storage.conf so that podman starts containers under any id map without a copy.

    The file is `~/.config/containers/storage.conf`, or `/etc/containers/storage.conf` for root. Running
    containers are not affected; those started later use layerkit.

    Example: `layerkit setup podman --print`
    """
    from layerkit.hosts.podman import storage_conf
    from layerkit.linux import userns

    out, path = Output(json, quiet), storage_conf.storage_conf(userns.is_privileged())
    change = storage_conf.remove(path) if undo else storage_conf.add(path, _mount_program())
    if show:
        print(change.text, end="")
        out.note(*change.notes)
        return
    changed = change.apply()
    if not out.told("setup-podman", {"file": str(path), "changed": changed, "notes": list(change.notes)}):
        said = ("undone" if undo else "written") if changed else "nothing to do"
        out.note(*change.notes, f"{path}: {said}")


def _mount_program() -> Path:
    """Return the installed ``layerkit-mount-program``."""
    name = "layerkit-mount-program"
    for folder in (Path(sys.argv[0]).parent, Path(sys.executable).parent):
        if (folder / name).is_file():
            return (folder / name).absolute()
    found = shutil.which(name)
    if found is None:
        raise NotFound(f"{name} is not installed beside layerkit; install layerkit again (pip install layerkit)")
    return Path(found)


@o.command(group)
def containerd(
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="containerd's configuration.")] = Path(
        "/etc/containerd/config.toml"
    ),
    unit: Annotated[Path, typer.Option("--unit", metavar="FILE", help="The systemd unit to write.")] = Path(
        "/etc/systemd/system/layerkit-snapshotter.service"
    ),
    name: Annotated[str, typer.Option("--name", help="Name of the snapshotter in containerd.")] = "layerkit",
    address: Annotated[
        Path, typer.Option("--address", metavar="SOCKET", help="The snapshotter's socket.")
    ] = DEFAULT_ADDRESS,
    root: Annotated[
        Path, typer.Option("--root", metavar="DIR", help="Where the snapshotter keeps its snapshots.")
    ] = DEFAULT_ROOT,
    store: o.StoreDir = None,
    undo: o.Undo = False,
    show: o.Print = False,
    quiet: o.Quiet = False,
    json: o.Json = False,
) -> None:
    """Add `layerkit snapshotter` to containerd's config.toml, and write a systemd unit for it.

    Then run `systemctl enable --now layerkit-snapshotter` and `systemctl restart containerd`.

    Examples:
    `layerkit setup containerd --print`

    `layerkit setup containerd`

    `layerkit setup containerd --undo`
    """
    from layerkit.hosts.containerd import config_toml as containerd_conf
    from layerkit.hosts.setup_file import Change

    for path in (address, root):
        if not path.is_absolute():
            raise UsageError(f"{path}: give an absolute path, because systemd and containerd run in other folders")
    if undo:
        changes = [containerd_conf.remove(config), Change(unit, "")]
        notes = [f"run: systemctl disable --now {unit.stem}; systemctl daemon-reload; systemctl restart containerd"]
    else:
        change = containerd_conf.add(config, name, address)
        words = [*_program(), "snapshotter", "--quiet", "--address", str(address), "--root", str(root)]
        words += ["--store", str(o.store_dir(store).absolute())]
        changes = [change, Change(unit, containerd_conf.unit(words))]
        notes = [f"run: systemctl daemon-reload; systemctl enable --now {unit.stem}", *change.notes]
    if show:
        for each in changes:
            print(f"# {each.path}" + ("" if each.text else ": removed"))
            print(each.text, end="\n" if each.text else "")
        return
    changed = [str(each.path) for each in changes if each.apply()]
    out = Output(json, quiet)
    if not out.told("setup-containerd", {"changed": changed, "notes": notes}):
        if changed:
            out.note(f"{'undone' if undo else 'written'}: {', '.join(changed)}", *notes)
        else:
            out.note("nothing to do")


def _program() -> list[str]:
    """Return how this layerkit is started from anywhere."""
    script = Path(sys.argv[0]).absolute()
    if script.name == "layerkit" and script.is_file():
        return [str(script)]
    found = shutil.which("layerkit")
    return [found] if found else [sys.executable, "-m", "layerkit.cli.main"]
