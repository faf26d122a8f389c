"""The ``layerkit`` command: groups the subcommands, turns errors into messages and exit codes.

Nothing heavy is imported here: a command must begin within a tenth of a second, so each imports what it needs
when it runs. (Help takes twice that, most of it for what draws its panels.)
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Collection
from importlib import import_module
from typing import Annotated

import typer

# numpy's OpenBLAS starts a thread per processor when it is loaded, which spin for a while: 60 ms of each command,
# and nothing here multiplies matrices.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from layerkit import __version__
from layerkit.cli import options as o
from layerkit.cli.interrupts import INTERRUPTS
from layerkit.linux.configuration import unknown_variables
from layerkit.model.errors import Cancelled, LayerkitError, show_lines

_EXAMPLES = """Examples:

`layerkit remap image.tar --uid-map 0:100000:65536`

`layerkit mount image.tar /mnt --uid-map 0:100000:65536`

`layerkit doctor`"""


def _version(wanted: bool) -> None:
    if wanted:
        print(f"layerkit {__version__}")
        raise typer.Exit


def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Change who owns files in container images by writing metadata only."""


IMAGES, HOST, REGISTRIES, SERVICES = "Images", "Host", "Registries", "Services"
_COMMANDS = (
    (IMAGES, "remap", "remap"), (HOST, "mount", "mount"), (HOST, "mount", "umount"), (HOST, "mount", "mounts"),
    (HOST, "mount", "mount-program"), (HOST, "bundle", "bundle"), (HOST, "finalize", "finalize"),
    (IMAGES, "folders", "unpack"), (IMAGES, "folders", "pack"), (IMAGES, "inspect", "inspect"),
    (IMAGES, "inspect", "analyze"), (IMAGES, "rewrite", "optimize"), (IMAGES, "rewrite", "flatten"),
    (IMAGES, "rewrite", "copy"), (IMAGES, "inspect", "verify"), (REGISTRIES, "registry", "pull"),
    (SERVICES, "hook", "batch"), (HOST, "diagnosis", "doctor"), (HOST, "containerd", "snapshotter"),
    (HOST, "mount", "adopt"), (HOST, "diagnosis", "which"), (HOST, "diagnosis", "cache"),
    (HOST, "diagnosis", "copyups"), (HOST, "config", "config"),
)  # fmt: skip
_GROUPS = (
    (REGISTRIES, "registry", "index"), (HOST, "store", "store"), (SERVICES, "hook", "hook"),
    (HOST, "setup", "setup"), (HOST, "containerd", "containerd"),
)  # fmt: skip
_NAMES = frozenset(name for _, _, name in _COMMANDS + _GROUPS)


def app(names: Collection[str] = _NAMES) -> typer.Typer:
    """Return the command line with the commands called ``names``: each takes a while to import and to build."""
    whole = typer.Typer(
        name="layerkit",
        help="Change who owns files in container images by writing metadata only.",
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog=_EXAMPLES,
    )
    whole.callback()(_main)
    for panel, module, name in _COMMANDS:
        if name in names:
            function = getattr(import_module(f"layerkit.cli.{module}"), name.replace("-", "_"))
            o.command(whole, panel=panel)(function)
    for panel, module, name in _GROUPS:
        if name in names:
            whole.add_typer(import_module(f"layerkit.cli.{module}").group, name=name, rich_help_panel=panel)
    return whole


def run() -> None:
    """Run the command line and exit with its code, which ``model.errors`` says."""
    _open_closed_streams()
    INTERRUPTS.install()
    try:
        _run_app()
    except Cancelled as stopped:
        INTERRUPTS.ignore()
        _say(str(stopped))
        sys.exit(stopped.exit_code)
    except LayerkitError as error:
        _say(str(error))
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output went away (`layerkit … | head`): not an error of ours.
        _drop_output()
        sys.exit(1)
    except OSError as error:
        _drop_output()
        where = f": {error.filename}" if error.filename is not None else ""
        _say(f"{error.strerror or error}{where}")
        sys.exit(1)


def _run_app() -> None:
    for mistake in unknown_variables():
        _say(f"warning: {mistake}")
    try:
        command = typer.main.get_command(app(_needed(sys.argv[1:])))
        command(default_map=o.configured_defaults(command))
    except SystemExit:
        # Python would write what is left at its exit, and could then only complain about a full disk.
        sys.stdout.flush()
        INTERRUPTS.ignore()  # all is done and said
        raise


def _needed(words: list[str]) -> Collection[str]:
    """Return the names of the commands that this run is about: all for completion, help and a word that is none."""
    if words == ["--version"]:
        return ()
    return words[:1] if _NAMES.intersection(words[:1]) and "_LAYERKIT_COMPLETE" not in os.environ else _NAMES


def _drop_output() -> None:
    """Let standard output lead nowhere, so that what could not be written there is not tried again at exit."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _open_closed_streams() -> None:
    """Give the descriptors 0 to 2 something to be, where the caller closed them (``layerkit ... >&-``).

    Else the next file that is opened becomes standard output, and ``print(file=None)`` writes errors there. Input
    and output stay of no use, as GNU programs have it: reading or writing them is an error, not silence.
    """
    for fd, flags in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)  # the lowest free number, which is fd
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115


def _say(message: str) -> None:
    # Errors quote what images call themselves.
    print(show_lines(f"layerkit: {message}"), file=sys.stderr)


if __name__ == "__main__":
    run()
