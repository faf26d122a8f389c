"""``layerkit bundle``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import Output, fields, human
from layerkit.model.errors import UsageError


def bundle(
    ref: o.Ref,
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="The bundle: a new or empty folder.", show_default=False)
    ] = None,
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="[COMMAND]...", help="Replaces the image's command.", show_default=False),
    ] = None,
    ids: o.PlainMap = o.PlainMap(),
    rootless: Annotated[
        bool,
        typer.Option(
            "--rootless",
            help="For runc as an ordinary user. You are the container's root. Host ids in the maps are those of "
            "your user namespace: 0 is you, 1 and up are your subordinate ids.",
        ),
    ] = False,
    entrypoint: Annotated[
        str | None,
        typer.Option("--entrypoint", metavar="WORD", help="Replaces the image's; a JSON list for several words."),
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option("--env", "-e", metavar="NAME=VALUE", help="Set a variable; NAME unsets it.")
    ] = None,
    user: Annotated[
        str | None, typer.Option("--user", "-u", metavar="USER[:GROUP]", help="Names are looked up in the image.")
    ] = None,
    workdir: Annotated[str | None, typer.Option("--workdir", "-w", metavar="PATH", help="Made if missing.")] = None,
    hostname: Annotated[str, typer.Option("--hostname", metavar="NAME", help="[default: the folder's name]")] = "",
    terminal: Annotated[bool, typer.Option("--tty", "-t", help="Give the process a terminal.")] = False,
    read_only: Annotated[bool, typer.Option("--read-only", help="Make the root filesystem read-only.")] = False,
    network: Annotated[
        str,
        typer.Option(
            "--network", metavar="none|host", help="A network namespace with nothing in it, or the host's."
        ),
    ] = "none",
    volume: Annotated[
        list[str] | None, typer.Option("--volume", "-v", metavar="SRC:DST[:OPTS]", help="Bind a path of the host.")
    ] = None,
    image_volume: Annotated[
        str, typer.Option("--image-volume", metavar="bind|tmpfs|ignore", help="What the image's volumes become.")
    ] = "bind",
    cap_add: Annotated[list[str] | None, typer.Option("--cap-add", metavar="CAP", help="Add a capability.")] = None,
    cap_drop: Annotated[
        list[str] | None, typer.Option("--cap-drop", metavar="CAP", help="Drop one, or `all`.")
    ] = None,
    seccomp: Annotated[
        str,
        typer.Option(
            "--seccomp",
            metavar="auto|unconfined|FILE",
            help="Which system calls are allowed; auto takes the profile that podman uses on this host.",
        ),
    ] = "auto",
    annotation: Annotated[
        list[str] | None, typer.Option("--annotation", metavar="KEY=VALUE", help="Add an annotation.")
    ] = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Unmount and delete a bundle; give its folder instead of REF.")
    ] = False,
    own_meta: o.OwnMeta = False,
    strict: o.Strict = False,
    how: o.Bringing = o.Bringing(),
    out: Output = Output(),
) -> None:
    """Make an OCI runtime bundle: a mounted root filesystem and a config.json for runc and crun.

    Examples:
    `layerkit bundle image.tar /srv/web --uid-map 0:100000:65536`, then `runc run -b /srv/web web`

    `layerkit bundle store:app /srv/sh --uid-map 0:200000:65536 --tty -- /bin/sh -l`

    `layerkit bundle --rootless oci:images:app ~/web`, then `runc run -b ~/web web`

    `layerkit bundle --remove /srv/web`
    """
    from layerkit.linux import userns

    rootless = rootless or (remove and _is_rootless(Path(ref)))
    if rootless:
        from layerkit.linux.userns import enter

        # Before anything that starts threads.
        enter()
    from layerkit.api import bundle as bundling
    from layerkit.api.open import open_image

    if remove:
        if folder is not None:
            raise UsageError("--remove takes one folder and nothing else: layerkit bundle --remove DIR")
        bundling.remove(ref)
        out.note(f"removed {ref}")
        return
    if folder is None:
        raise UsageError("DIR is missing, the folder for the bundle: layerkit bundle REF DIR")
    mapping = ids.mapping()
    from layerkit.formats.runtime.config import Wishes

    wishes = Wishes(
        command=tuple(command or ()), entrypoint=_words(entrypoint), env=tuple(env or ()), user=user,
        workdir=workdir, hostname=hostname or _host_name(folder), terminal=terminal, read_only=read_only,
        network=network, cap_add=tuple(cap_add or ()), cap_drop=tuple(cap_drop or ()), binds=tuple(volume or ()),
        image_volumes=image_volume, annotations=_pairs(annotation or []), seccomp=seccomp,
    )  # fmt: skip
    settings = replace(how.settings, strict=strict)
    with open_image(ref, platform=how.platform, settings=settings) as image, out.progress() as step:
        result = bundling.bundle(
            image, folder, mapping, wishes, rootless=rootless, own_meta=own_meta, progress=step
        )
    out.warn(result.warnings)
    if mapping is None and not rootless and userns.in_initial_userns():
        out.note("warning: no id map, so root in the container is root of the host; add --uid-map C:H:N")
    if out.told("bundle", result.to_dict()):
        return
    kept = " (earlier changes are kept)" if result.reused else ""
    fields([
        ("bundle", f"{result.folder} of {result.name}{kept}"),
        ("map", result.map_text or "none"),
        ("metadata", f"{human(result.meta_bytes)} for this map ({result.how})"),
        ("process", f"{' '.join(result.args)} as {result.user}"),
        ("run it", f"runc run -b {result.folder} {_host_name(folder)}"),
        ("remove it", f"layerkit bundle --remove {result.folder}"),
    ])  # fmt: skip


def _is_rootless(folder: Path) -> bool:
    """Return whether a bundle holds files of subordinate ids; without what starts threads."""
    import json

    try:
        return bool(json.loads((folder / "layerkit.json").read_bytes())["rootless"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _words(entrypoint: str | None) -> tuple[str, ...] | None:
    if entrypoint is None or not entrypoint.startswith("["):
        return None if entrypoint is None else tuple(w for w in (entrypoint,) if w)
    import json

    try:
        words = json.loads(entrypoint)
    except ValueError:
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UsageError(f'--entrypoint {entrypoint!r}: want a word, or a JSON list such as ["sh", "-c"]')
    return tuple(words)


def _host_name(folder: Path) -> str:
    import os
    import re

    name = re.sub(r"[^A-Za-z0-9-]+", "-", os.path.basename(os.path.abspath(folder))).strip("-")[:63].strip("-")
    return name or "bundle"


def _pairs(texts: list[str]) -> dict[str, str]:
    for text in texts:
        if "=" not in text or text.startswith("="):
            raise UsageError(f"--annotation {text!r}: want KEY=VALUE")
    return {key: value for key, _, value in (text.partition("=") for text in texts)}
