"""Where the ``layerkit`` command starts: what has to hold before anything is imported."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line."""
    # Nothing is begun while modules are imported: an interrupt may end that at once, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from layerkit.cli.main import run

    run()


if __name__ == "__main__":
    main()
