"""``layerkit snapshotter``, containerd's proxy snapshotter, and ``layerkit containerd`` for those who run it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import Output, fields
from layerkit.model.errors import UsageError

DEFAULT_ADDRESS = Path("/run/layerkit/snapshotter.sock")
DEFAULT_ROOT = Path("/var/lib/layerkit-snapshotter")
_GRACE_SECONDS = 10

group = typer.Typer(no_args_is_help=True, help="Make images of the store known to containerd.")


@o.command(group)
def add(
    ref: o.Ref,
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="Name of the image in containerd [default: its own name].")
    ] = "",
    address: Annotated[
        Path,
        typer.Option("--containerd", metavar="SOCKET", envvar="CONTAINERD_ADDRESS", help="containerd's socket."),
    ] = Path("/run/containerd/containerd.sock"),
    namespace: Annotated[
        str, typer.Option("--namespace", "-n", envvar="CONTAINERD_NAMESPACE", help="containerd's namespace.")
    ] = "default",
    snapshotter: Annotated[
        str, typer.Option("--snapshotter", help="The name that config.toml gives to `layerkit snapshotter`.")
    ] = "layerkit",
    platform: o.Platform = None,
    store: o.StoreDir = None,
    jobs: o.Jobs = 1,
    out: Output = Output(),
) -> None:
    """Make an image known to containerd without a download and without unpacking; `ctr run` can then start it.

    Its layers are read into layerkit's store if they are not there yet, and used from there. containerd gets only
    the manifest, the config and the names, a few kilobytes, so it cannot push or export such an image.

    Examples:
    `layerkit containerd add image.tar --name example.com/app:1`

    `ctr run --rm --snapshotter layerkit example.com/app:1 test`
    """
    from layerkit.api.open import open_image

    try:
        from layerkit.hosts.containerd.client import Containerd
    except ImportError as error:
        raise UsageError(f"this needs grpcio ({error}): pip install 'layerkit[containerd]'") from error

    start = time.monotonic()
    with Containerd(address, namespace) as containerd:
        with (
            open_image(ref, platform=platform, settings=o.settings(store, jobs=jobs)) as image,
            out.progress() as step,
        ):
            report = image.remap(None, progress=step)
            chosen = name or report.name
            chain = containerd.add(image.image, chosen, snapshotter)
    facts = {
        "name": chosen, "manifest": report.manifest, "chain_id": chain, "snapshotter": snapshotter,
        "namespace": namespace, "layers_read": report.layers_read, "seconds": time.monotonic() - start,
    }  # fmt: skip
    if out.told("containerd-add", facts):
        return
    fields([
        ("added", f"{chosen} to containerd's namespace {namespace}"),
        ("layers", f"{report.layers} ({report.layers_read} read just now)"),
        ("next", f"ctr -n {namespace} run --rm --snapshotter {snapshotter} {chosen} NAME"),
    ])  # fmt: skip


def snapshotter(
    address: Annotated[
        Path, typer.Option("--address", metavar="SOCKET", help="The unix socket that containerd connects to.")
    ] = DEFAULT_ADDRESS,
    root: Annotated[
        Path, typer.Option("--root", metavar="DIR", help="Folder of the snapshots; one process for each.")
    ] = DEFAULT_ROOT,
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="DIR", help="Folder of the mounts; a short path [default: in /run/layerkit]"),
    ] = None,
    store: o.StoreDir = None,
    out: Output = Output(),
) -> None:
    """Serve containerd as a snapshotter that maps owners by metadata and unpacks no image of the store.

    It runs until it gets SIGTERM or SIGINT; containers keep running without it. `layerkit setup containerd` sets
    it up in containerd's config.toml and writes a systemd unit.

    Examples:
    `layerkit snapshotter`

    `layerkit snapshotter --address /run/lk.sock --root /srv/snapshots --store /srv/layerkit`
    """
    import logging
    import signal
    import threading

    from layerkit.hosts.containerd.snapshots.snapshotter import Snapshotter
    from layerkit.linux import configuration

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
            facts = {"address": server.address, "root": opened.root, "run": opened.run}
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
