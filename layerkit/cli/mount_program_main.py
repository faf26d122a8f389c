"""``layerkit-mount-program -o OPTIONS TARGET``: the program that storage.conf names, without what typer costs.

A container waits for this process, so what it imports is counted in milliseconds. Any other arguments than podman's
take the usual way, through ``layerkit mount-program``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def run(text: str, target: Path, store: Path) -> dict[str, object]:
    """Mount what the options ``text`` ask for; tell on standard error what the person should know."""
    from layerkit.hosts import mount_options, mount_program

    options = mount_options.parse(text)
    mounted = mount_program.mount(options, target, store)
    for note in (*options.notes, *([mounted.note] if mounted.note else [])):
        print(f"layerkit mount-program: {note}", file=sys.stderr)
    return {"way": mounted.way, "pid": mounted.pid}


def main() -> None:
    """Do it and exit, with the exit codes of ``layerkit``."""
    words = sys.argv[1:]
    if len(words) != 3 or words[0] != "-o" or words[2].startswith("-"):
        from layerkit.cli.main import run as whole

        sys.argv[1:1] = ["mount-program"]
        whole()
        return
    from layerkit.errors import LayerkitError

    try:
        # The store is ours, whatever umask podman was started with.
        os.umask(0o022)
        run(words[1], Path(words[2]), _store())
    except LayerkitError as error:
        print(f"layerkit mount-program: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        where = f": {error.filename}" if error.filename is not None else ""
        print(f"layerkit mount-program: {error.strerror or error}{where}", file=sys.stderr)
        sys.exit(1)


def _store() -> Path:
    named = os.environ.get("LAYERKIT_STORE")
    if named:
        return Path(named)
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    if any(path.exists() for path in (Path("/etc/layerkit/config.toml"), config / "layerkit/config.toml")):
        from layerkit.cli.options import store_dir

        return store_dir(None)
    from layerkit.settings import default_store

    return default_store()


if __name__ == "__main__":
    main()
