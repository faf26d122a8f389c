"""``layerkit-mount-program -o OPTIONS TARGET``: the program that storage.conf names, without what typer costs.

A container waits for this process, so what it imports is counted in milliseconds. Any other arguments than podman's
take the usual way, through ``layerkit mount-program``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from layerkit.hosts.podman.mount_program import mount
from layerkit.usecases.settings import default_store


def main() -> None:
    """Do it and exit, with the exit codes of ``layerkit``."""
    words = sys.argv[1:]
    if len(words) != 3 or words[0] != "-o" or words[2].startswith("-"):
        from layerkit.cli.main import run as whole

        sys.argv[1:1] = ["mount-program"]
        whole()
        return
    from layerkit.model.errors import LayerkitError

    try:
        # The store is ours, whatever umask podman was started with.
        os.umask(0o022)
        for note in mount(words[1], Path(words[2]), default_store()).notes:
            print(f"layerkit mount-program: {note}", file=sys.stderr)
    except LayerkitError as error:
        print(f"layerkit mount-program: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        where = f": {error.filename}" if error.filename is not None else ""
        print(f"layerkit mount-program: {error.strerror or error}{where}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
