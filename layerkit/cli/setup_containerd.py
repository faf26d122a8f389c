"""``layerkit setup containerd``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import emit_json, note
from layerkit.cli.snapshotter import DEFAULT_ADDRESS, DEFAULT_ROOT


def containerd(
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="containerd's configuration.")] = Path(
        "/etc/containerd/config.toml"
    ),
    unit: Annotated[Path, typer.Option("--unit", metavar="FILE", help="The systemd unit to write.")] = Path(
        "/etc/systemd/system/layerkit-snapshotter.service"
    ),
    name: Annotated[str, typer.Option("--name", help="What containerd is to call the snapshotter.")] = "layerkit",
    address: Annotated[
        Path, typer.Option("--address", metavar="SOCKET", help="The snapshotter's socket.")
    ] = DEFAULT_ADDRESS,
    root: Annotated[
        Path, typer.Option("--root", metavar="DIR", help="Where the snapshotter keeps snapshots.")
    ] = DEFAULT_ROOT,
    store: o.StoreDir = None,
    undo: Annotated[bool, typer.Option("--undo", help="Take out what this command put in.")] = False,
    show: Annotated[bool, typer.Option("--print", help="Print both files' new text; change nothing.")] = False,
    quiet: o.Quiet = False,
    json: o.Json = False,
) -> None:
    """Write what containerd's config.toml needs to use `layerkit snapshotter`, and a unit for systemd.

    Then: `systemctl enable --now layerkit-snapshotter`, `systemctl restart containerd`.

    Examples:
    `layerkit setup containerd --print`

    `layerkit setup containerd`

    `layerkit setup containerd --undo`
    """
    from layerkit.hosts.containerd import config_toml as containerd_conf
    from layerkit.hosts.setup_file import Change
    from layerkit.model.errors import UsageError

    for path in (address, root):
        if not path.is_absolute():
            raise UsageError(
                f"{path}: want an absolute path, since systemd and containerd have working folders of their own"
            )
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
    if json:
        emit_json("setup-containerd", {"changed": changed, "notes": notes})
        return
    note(
        f"{'taken back' if undo else 'written'}: {', '.join(changed)}" if changed else "nothing to do", quiet=quiet
    )
    for text in notes if changed else []:
        note(text, quiet=quiet)


def _program() -> list[str]:
    """Return how this layerkit is started from anywhere."""
    import shutil
    import sys

    script = Path(sys.argv[0]).absolute()
    if script.name == "layerkit" and script.is_file():
        return [str(script)]
    found = shutil.which("layerkit")
    return [found] if found else [sys.executable, "-m", "layerkit.cli.main"]


def register(group: typer.Typer) -> None:
    """Add this file's command to the group ``setup``."""
    group.command()(containerd)
