"""``layerkit containerd``: what there is to do with a containerd that runs `layerkit snapshotter`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import Output, fields
from layerkit.model.errors import UsageError

group = typer.Typer(no_args_is_help=True, help="Make images of the store known to containerd.")


@group.command("add")
def add(
    ref: o.Ref,
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="What containerd is to call it [default: its own name].")
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
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Make an image known to containerd without download and without unpacking; then `ctr run` starts it.

    Its layers are brought into layerkit's store if they are not there, and used where they lie. containerd gets
    the manifest, the config and the names, some kilobytes; it cannot push or export such an image.

    Examples:
    `layerkit containerd add image.tar --name example.com/app:1`

    `ctr run --rm --snapshotter layerkit example.com/app:1 test`
    """
    from layerkit.api.open import open_image

    try:
        from layerkit.hosts.containerd.client import Containerd
    except ImportError as error:
        raise UsageError(f"this needs grpcio ({error}): pip install 'layerkit[containerd]'") from error

    start, out = time.monotonic(), Output(json, quiet)
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
