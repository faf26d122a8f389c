"""``layerkit setup``: make a runtime of this host use layerkit, and take it back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli import setup_containerd

if TYPE_CHECKING:
    from pathlib import Path

group = typer.Typer(
    no_args_is_help=True,
    help="Make a container runtime use layerkit, and take it back with --undo.",
    rich_markup_mode="markdown",
)


@group.command()
def podman(
    undo: Annotated[bool, typer.Option("--undo", help="Take out the lines that this command put in.")] = False,
    show: Annotated[bool, typer.Option("--print", help="Print the file as it would be; change nothing.")] = False,
    quiet: o.Quiet = False,
    json: o.Json = False,
) -> None:
    """Write the lines of storage.conf that let podman start containers under any id map without a copy.

    For an ordinary user that is `~/.config/containers/storage.conf`, for root `/etc/containers/storage.conf`.
    Containers that run go on as they are; those started later use it.

    Example: `layerkit setup podman --print`
    """
    from layerkit.cli.render import emit_json, note
    from layerkit.hosts.podman import storage_conf
    from layerkit.linux import userns

    path = storage_conf.storage_conf(userns.is_privileged())
    change = storage_conf.remove(path) if undo else storage_conf.add(path, _program())
    if show:
        print(change.text, end="")
    changed = not show and change.apply()
    if json and not show:
        emit_json("setup-podman", {"file": str(path), "changed": changed, "notes": list(change.notes)})
        return
    for text in change.notes:
        note(text, quiet=quiet)
    if not show:
        said = f"{path}: {'taken back' if undo else 'written'}" if changed else f"{path}: nothing to do"
        note(said, quiet=quiet)


def _program() -> Path:
    """Return the installed ``layerkit-mount-program``."""
    import shutil
    import sys
    from pathlib import Path

    from layerkit.model.errors import NotFound

    name = "layerkit-mount-program"
    for folder in (Path(sys.argv[0]).parent, Path(sys.executable).parent):
        if (folder / name).is_file():
            return (folder / name).absolute()
    found = shutil.which(name)
    if found is None:
        raise NotFound(f"{name} is not installed beside layerkit; install layerkit again (pip install layerkit)")
    return Path(found)


def register(app: typer.Typer) -> None:
    """Add this file's commands to ``app``."""
    setup_containerd.register(group)
    app.add_typer(group, name="setup", rich_help_panel="Host")
