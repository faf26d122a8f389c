"""The ``layerkit`` command: groups the subcommands, turns errors into messages and exit codes.

Nothing heavy is imported here: ``layerkit --help`` must answer in a tenth of a second, so each command
imports what it needs when it runs.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer

# numpy's OpenBLAS starts a thread per processor when it is loaded, which spin for a while: 60 ms of each command,
# and nothing here multiplies matrices.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from layerkit import __version__
from layerkit.cli import (
    adopt,
    analyze,
    batch,
    bundle,
    cache,
    containerd,
    copy,
    copyups,
    doctor,
    finalize,
    flatten,
    hook,
    index,
    inspect,
    mount,
    mount_program,
    optimize,
    pack,
    pull,
    registry_options,
    remap,
    setup,
    snapshotter,
    store,
    unpack,
    verify,
    which,
)
from layerkit.errors import Cancelled, LayerkitError

app = typer.Typer(
    name="layerkit",
    help="Change who owns files in container images by writing metadata only.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""Examples:

`layerkit remap image.tar --uid-map 0:100000:65536`

`layerkit mount image.tar /mnt --uid-map 0:100000:65536`

`layerkit doctor`""",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"layerkit {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Change who owns files in container images by writing metadata only."""


for module in (
    remap,
    mount,
    mount_program,
    bundle,
    finalize,
    unpack,
    pack,
    inspect,
    analyze,
    optimize,
    flatten,
    copy,
    verify,
    index,
    pull,
    store,
    hook,
    batch,
    doctor,
    setup,
    snapshotter,
    containerd,
    adopt,
    which,
    cache,
    copyups,
):
    module.register(app)
registry_options.add_to_commands(app)


def run() -> None:
    """Run the command line and exit with its code (0 done, 1 failed, 2 usage, 3 input, 4 registry, 5 batch)."""
    # Both have to leave by the same road as an error: through every `finally`.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _stop)
    _build_only(sys.argv[1:2])
    try:
        app(standalone_mode=True)
    except LayerkitError as error:
        sys.exit(_report(error))
    except BrokenPipeError:
        # The reader of our output went away (`layerkit … | head`): not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f": {error.filename}" if error.filename is not None else ""
        print(f"layerkit: {error.strerror or error}{where}", file=sys.stderr)
        sys.exit(1)


def _build_only(words: list[str]) -> None:
    """Leave out the commands that this run is not about: typer takes a millisecond and more to build each."""
    commands = [each for each in app.registered_commands if each.name in words]
    groups = [each for each in app.registered_groups if each.name in words]
    # Completion, help, and a word that is none need all of them.
    if (commands or groups) and "_LAYERKIT_COMPLETE" not in os.environ:
        app.registered_commands, app.registered_groups = commands, groups


def _report(error: LayerkitError) -> int:
    print(f"layerkit: {error}", file=sys.stderr)
    return error.exit_code


def _stop(signum: int, frame: object) -> None:
    raise Cancelled("interrupted; nothing half-made is left")


if __name__ == "__main__":
    run()
