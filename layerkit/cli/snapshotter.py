"""``layerkit snapshotter``: containerd's proxy snapshotter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import Output

DEFAULT_ADDRESS = Path("/run/layerkit/snapshotter.sock")
DEFAULT_ROOT = Path("/var/lib/layerkit-snapshotter")
_GRACE_SECONDS = 10


def snapshotter(
    address: Annotated[
        Path, typer.Option("--address", metavar="SOCKET", help="The unix socket that containerd is to talk to.")
    ] = DEFAULT_ADDRESS,
    root: Annotated[
        Path, typer.Option("--root", metavar="DIR", help="Where snapshots lie; one process for each root.")
    ] = DEFAULT_ROOT,
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="DIR", help="Where mounts lie, a short path [default: below /run/layerkit]."),
    ] = None,
    store: o.StoreDir = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Serve containerd as a snapshotter: owners mapped by metadata, images of the store without unpacking.

    It runs until it gets SIGTERM or SIGINT; containers go on without it. `layerkit setup containerd` prints what
    containerd's config.toml needs, and a unit for systemd.

    Examples:
    `layerkit snapshotter`

    `layerkit snapshotter --address /run/lk.sock --root /srv/snapshots --store /srv/layerkit`
    """
    import logging
    import signal
    import threading

    from layerkit.hosts.containerd.snapshots.snapshotter import Snapshotter
    from layerkit.linux import configuration
    from layerkit.model.errors import UsageError

    try:
        from layerkit.hosts.containerd.server import Server, tell_systemd
    except ImportError as error:
        raise UsageError(f"the snapshotter needs grpcio ({error}): pip install 'layerkit[containerd]'") from error

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    stopped = threading.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: stopped.set())
    opened = Snapshotter(root, o.store_dir(store), run=run, limits=configuration.limits())
    try:
        server = Server(opened, address)
        server.start()
        try:
            out, facts = Output(json, quiet), {"address": server.address, "root": opened.root, "run": opened.run}
            if out.told("snapshotter", {key: str(path) for key, path in facts.items()}):
                sys.stdout.flush()
            out.note(f"serving snapshots of {opened.root} on {server.address}")
            tell_systemd("READY=1")
            stopped.wait()
            tell_systemd("STOPPING=1")
        finally:
            server.stop(_GRACE_SECONDS)
    finally:
        opened.close()
